"""From data sets and batches to what a model takes, and the built-in reviews."""

import datasets
import numpy as np
import pytest
import torch
from conftest import tiny_bert, tiny_reviews, tiny_tokenizer, token_batches

import pyro_lrblora as lb
from pyro_lrblora.data import as_batches, check_class_order
from pyro_lrblora.data.columns import text_columns
from pyro_lrblora.reviews import reviews


def test_batches_hold_every_row_once_padded_to_the_longest():
    data, tokenizer = tiny_reviews(23), tiny_tokenizer()
    for options in ({}, {"shuffle": 3}, {"by_length": True}):
        batches = lb.Batches(data, tokenizer, batch_size=5, **options)
        assert len(batches) == 5
        seen = list(batches)
        assert [len(batch["labels"]) for batch in seen] == [5, 5, 5, 5, 3]
        texts = [tokenizer.decode([i for i in row.tolist() if i]) for batch in seen for row in batch["input_ids"]]
        assert sorted(texts) == sorted(data["text"])
        for batch in seen:
            assert batch["input_ids"].shape[1] == int(batch["attention_mask"].sum(1).max())


def test_shuffling_is_seeded_and_new_every_epoch():
    order = lambda batches: [row for batch in batches for row in batch["labels"].tolist()]
    first, again = (lb.Batches(tiny_reviews(), tiny_tokenizer(), shuffle=1) for _ in range(2))
    epochs = [order(first), order(first)]
    assert epochs == [order(again), order(again)]
    assert epochs[0] != epochs[1]


def test_sorting_by_length_saves_padding_and_tells_the_order():
    batches = lb.Batches(tiny_reviews(), tiny_tokenizer(), batch_size=8, by_length=True)
    tokens = lambda b: sum(batch["input_ids"].numel() for batch in b)
    assert tokens(batches) < tokens(lb.Batches(tiny_reviews(), tiny_tokenizer(), batch_size=8))
    labels = torch.cat([batch["labels"] for batch in batches])
    assert torch.equal(labels, batches.labels[torch.as_tensor(batches.order)])


@pytest.mark.parametrize(
    "names", [("premise", "hypothesis"), ("sentence1", "sentence2"), ("text", "text_pair"), ("text",), ("review",)]
)
def test_text_columns_are_found(names):
    texts = tiny_reviews(6)["text"]
    data = datasets.Dataset.from_dict({"id": list(range(6))} | dict.fromkeys(names, texts) | {"label": [0, 1] * 3})
    (batch,) = lb.Batches(data, tiny_tokenizer())
    longest = max(len(text.split()) for text in texts)
    assert batch["input_ids"].shape == (6, min(16, longest * len(names)))


def test_columns_can_be_named():
    data = tiny_reviews(6).rename_columns({"text": "body", "label": "stars"}).add_column("other", ["bad"] * 6)
    batches = lb.Batches(data, tiny_tokenizer(), text="body", label="stars")
    assert batches.labels.tolist() == data["stars"]
    with pytest.raises(KeyError, match="expected one of the text columns.*columns.*body"):
        lb.Batches(data, tiny_tokenizer())
    with pytest.raises(KeyError, match="column.*'txt'"):
        lb.Batches(data, tiny_tokenizer(), text=["body", "txt"])
    with pytest.raises(KeyError, match="expected column.*'star'.*got columns.*stars"):
        lb.Batches(data, tiny_tokenizer(), text="body", label="star")


def test_tokenised_data_sets_need_no_text():
    data, tokenizer = tiny_reviews(9), tiny_tokenizer()
    tokenised = data.map(lambda row: tokenizer(row["text"]), remove_columns=["text"])
    for a, b in zip(
        lb.Batches(tokenised, tokenizer, batch_size=4), lb.Batches(data, tokenizer, batch_size=4), strict=True
    ):
        assert torch.equal(a["input_ids"], b["input_ids"])
        assert torch.equal(a["labels"], b["labels"])


def test_long_rows_are_cut():
    data = datasets.Dataset.from_dict({"text": ["good " * 50], "label": [0]})
    assert next(iter(lb.Batches(data, tiny_tokenizer())))["input_ids"].shape == (1, 16)
    assert next(iter(lb.Batches(data, tiny_tokenizer(), max_length=5)))["input_ids"].shape == (1, 5)


def test_class_names_come_from_the_data():
    data = reviews(30)
    batches = lb.Batches(data, tiny_tokenizer())
    assert batches.class_names == ["negative", "positive"]
    model = lb.BayesianLoRA(tiny_bert(2), tokenizer=tiny_tokenizer()).prepare(data)
    assert model.class_names == ["negative", "positive"]
    given = lb.BayesianLoRA(tiny_bert(2), likelihood=lb.likelihoods.Categorical(class_names=["no", "yes"]))
    assert given.class_names == ["no", "yes"]
    named = lb.BayesianLoRA(tiny_bert(3), likelihood=lb.likelihoods.Categorical(class_names=["no", "yes"]))
    with pytest.raises(ValueError, match="expected 3 class names, got \\['no', 'yes'\\]"):
        lb.fit(named, token_batches(), progress=False)


def with_column(name, values):
    return tiny_reviews().remove_columns(name).add_column(name, values)


BAD = {
    "empty data set": (lambda: tiny_reviews().select([]), ValueError, "at least one row"),
    "no batches": (list, ValueError, "at least one batch"),
    "an iterator": (lambda: iter(token_batches()), TypeError, "more than once"),
    "a dict": (lambda: datasets.DatasetDict(train=tiny_reviews()), TypeError, "one split"),
    "one batch": (lambda: token_batches()[0], TypeError, "re-iterable of batch dicts"),
    "tuples": (lambda: [(1, 2)], TypeError, "batches to be dicts"),
    "no labels": (lambda: tiny_reviews().remove_columns("label"), ValueError, "'label' or 'labels'"),
    "no text": (lambda: tiny_reviews().remove_columns("text"), KeyError, "text columns"),
    "label too large": (lambda: tiny_reviews(classes=5), ValueError, r"labels 0\.\.2 for .* 3 classes, got \[3, 4\]"),
    "label -1": (
        lambda: [b | {"labels": b["labels"] - 1} for b in token_batches()],
        ValueError, r"got \[-1\].*rows without a label",
    ),
    "label and not labels": (
        lambda: [{"label" if k == "labels" else k: v for k, v in b.items()} for b in token_batches()],
        KeyError, "under 'labels', got 'label'",
    ),
    "rows, not batches": (lambda: tiny_reviews().to_list(), TypeError, "from_list"),
    "numbers with a gap": (lambda: with_column("label", [0.5, None] * 20), ValueError, "dataset.filter"),
    "labels of words": (lambda: with_column("label", ["good"] * 40), ValueError, "class_encode_column"),
    "a label that is missing": (lambda: with_column("label", [None] + [1] * 39), ValueError, "None in row 0"),
    "a text that is missing": (lambda: with_column("text", ["good", None] * 20), ValueError, "None in row 1"),
    "float labels": (lambda: [b | {"labels": b["labels"] / 2} for b in token_batches()], ValueError, "integer label"),
}  # fmt: skip


@pytest.mark.parametrize("case", BAD)
def test_bad_data_is_one_clear_error_before_any_work(case):
    build, error, message = BAD[case]
    model = lb.BayesianLoRA(tiny_bert(), tokenizer=tiny_tokenizer())
    for call in (model.prepare, lambda data: lb.fit(model, data, progress=False)):
        with pytest.raises(error, match=message):
            call(build())
    if "label" not in case:
        with pytest.raises(error, match=message):
            as_batches(build(), tiny_tokenizer())


def test_tokenizer_is_needed_and_must_pad():
    model = lb.BayesianLoRA(tiny_bert())
    with pytest.raises(ValueError, match="expected a tokenizer for"):
        model.prepare(tiny_reviews())
    with pytest.raises(ValueError, match="tokenizer.pad_token = tokenizer.eos_token"):
        model.prepare(tiny_reviews(), tokenizer=tiny_tokenizer(pad=False))


def test_bad_validation_data_is_found_before_training():
    model = lb.BayesianLoRA(tiny_bert(), tokenizer=tiny_tokenizer())
    with pytest.raises(ValueError, match="labels 0..2"):
        lb.fit(model, tiny_reviews(), validation=tiny_reviews(classes=5), progress=False)
    with pytest.raises(ValueError, match="validation data"):
        lb.fit(model, tiny_reviews(), validation=tiny_reviews().remove_columns("label"), progress=False)


# --- the built-in text


def test_reviews_are_reproducible_and_differ_by_seed():
    assert reviews(50, seed=1).to_dict() == reviews(50, seed=1).to_dict()
    assert reviews(50, seed=1)["text"] != reviews(50, seed=2)["text"]
    assert reviews(10, seed=1)["text"] == reviews(10, seed=1, domain="films")["text"]


def test_reviews_labels_follow_p_true():
    data = reviews(20_000)
    p, y = np.array(data["p_true"]), np.array(data["label"])
    for low in np.arange(0, 1, 0.1):
        inside = (p >= low) & (p < low + 0.1)
        if inside.sum() > 100:
            assert abs(y[inside].mean() - p[inside].mean()) < 4 * 0.5 / inside.sum() ** 0.5
    assert 0.2 < ((p > 0.3) & (p < 0.7)).mean() < 0.4  # ambiguous ones
    assert 0.75 < np.maximum(p, 1 - p).mean() < 0.9  # the best accuracy anyone can have


def test_the_second_domain_shares_no_remark():
    films, hotels = (set(" ".join(reviews(300, domain=d)["text"]).split()) for d in ("films", "hotels"))
    assert not {"plot", "acting", "gripping", "masterpiece"} & hotels
    assert not {"breakfast", "spotless", "filthy"} & films


def test_reviews_bad_arguments():
    with pytest.raises(ValueError, match="rows >= 1"):
        reviews(0)
    with pytest.raises(ValueError, match="'films', 'hotels'"):
        reviews(5, domain="cars")


@pytest.mark.parametrize("form", ["numpy", "torch"])
def test_tokens_may_be_numbers_of_another_library(form):
    words = tiny_tokenizer()
    data = tiny_reviews(4).map(lambda row: words(row["text"]), remove_columns="text")
    expected, found = (next(iter(lb.Batches(rows, words))) for rows in (data, data.with_format(form)))
    assert all(torch.equal(found[name], value) for name, value in expected.items())


def test_a_format_of_tokens_alone_keeps_the_labels():
    words = tiny_tokenizer()
    data = tiny_reviews(4).map(lambda row: words(row["text"]))
    batches = lb.Batches(data.with_format("torch", columns=["input_ids", "attention_mask"]), words)
    assert batches.labels.tolist() == data["label"]


def test_a_test_set_whose_labels_are_all_none_is_predicted_as_one_without():
    model, data = lb.BayesianLoRA(tiny_bert(), lb.LoRAXS(2), tokenizer=tiny_tokenizer()), tiny_reviews(8)
    posterior = lb.fit(model, data, guide=lb.guides.Delta(), epochs=1, progress=False)
    hidden = data.remove_columns("label").add_column("label", [None] * 8)
    assert lb.predict(posterior, hidden, draws=1).labels is None
    with pytest.raises(ValueError, match="'label' or 'labels'"):
        lb.fit(model, hidden, progress=False)


def test_a_class_that_a_test_set_lacks_does_not_shift_those_after_it():
    def named(names):
        return tiny_reviews(12, classes=2).cast_column("label", datasets.ClassLabel(names=names))

    own, other = ["neg", "neu", "pos"], named(["neg", "pos"])
    with pytest.raises(ValueError, match=r"model's order, .*'neu', .* got \['neg', 'pos'\]; write .*, 'label'\)$"):
        check_class_order(own, other.features["label"].names, "data")
    aligned = other.align_labels_with_mapping({"neg": 0, "neu": 1, "pos": 2}, "label")
    check_class_order(own, aligned.features["label"].names, "data")
    assert aligned["label"] == [2 * label for label in other["label"]]
    with pytest.raises(ValueError, match=r"once the rows of \['mixed'\] are dropped"):
        check_class_order(own, ["mixed", "neu", "neg"], "data")
    check_class_order(own, ["neg", "not neg"], "data")


def test_labels_in_a_list_are_refused():
    batch = token_batches(4)[0] | {"labels": [0, 1, 2, 0]}
    with pytest.raises(TypeError, match="labels as a tensor, got a list"):
        as_batches([batch])


def test_labels_of_several_lengths_are_refused():
    rows = datasets.Dataset.from_dict({"input_ids": [[1, 2, 3], [1, 2]], "labels": [[1, 2, 3], [1, 2]]})
    with pytest.raises(ValueError, match=r"lists of several lengths; write lb.data.Texts"):
        lb.Batches(rows, tiny_tokenizer())


def test_batches_of_no_size_or_order_are_refused():
    rows, tokenizer = tiny_reviews(4), tiny_tokenizer()
    with pytest.raises(ValueError, match="batch_size to be an integer >= 1, got batch_size=0"):
        lb.Batches(rows, tokenizer, batch_size=0)
    with pytest.raises(TypeError, match="shuffle to be a seed, or None for no shuffling, got shuffle=False"):
        lb.Batches(rows, tokenizer, shuffle=False)
    with pytest.raises(TypeError, match=r"got a single row; write dataset.batch\(8\)"):
        as_batches([{"input_ids": torch.tensor([1, 2])}])


def test_what_would_be_lost_of_a_dataset_is_refused():
    rows, tokenizer = tiny_reviews(4), tiny_tokenizer()
    with pytest.raises(ValueError, match="a transform.*write dataset.map"):
        lb.Batches(rows.with_transform(lambda rows: rows), tokenizer)
    tokens = rows.map(lambda row: dict(tokenizer(row["text"]))).remove_columns("text")
    assert next(iter(lb.Batches(tokens, tokenizer)))["input_ids"].shape[0] == 4
    with pytest.raises(ValueError, match="max_length= where texts are tokenised here"):
        lb.Batches(tokens, tokenizer, max_length=3)
    positions = tokens.map(lambda row: {"position_ids": list(range(len(row["input_ids"])))})
    with pytest.raises(ValueError, match=r"which the tokenizer pads, got 'position_ids' too; .*remove_columns"):
        lb.Batches(positions, tokenizer)
    words = tokens.map(lambda row: {"words": ["a"] * len(row["input_ids"])})
    assert "words" not in next(iter(lb.Batches(words, tokenizer)))


def test_every_pair_of_text_columns_is_a_pair():
    """QNLI has a question and a sentence: the sentence alone would be another task."""
    rows = datasets.Dataset.from_dict({"question": ["a film", "dull"], "sentence": ["good", "bad"], "label": [0, 1]})
    assert list(text_columns(rows, None)) == ["question", "sentence"]


def test_a_loader_that_shuffles_is_scored_against_its_own_labels():
    """Labels that are the network's own predictions: any other order of either shows."""
    model = lb.BayesianLoRA(tiny_bert(), lb.LoRAXS(2), tokenizer=tiny_tokenizer())
    posterior = lb.fit(model, token_batches(), guide=lb.guides.Delta(), epochs=1, progress=False)
    rows = [{name: value[0] for name, value in batch.items()} for batch in token_batches(40, 1)]
    torch.manual_seed(0)
    own = lb.predict(posterior, torch.utils.data.DataLoader(rows, batch_size=7), draws=1).predicted
    assert len(own.unique()) > 1
    rows = [row | {"labels": label} for row, label in zip(rows, own, strict=True)]
    loader = torch.utils.data.DataLoader(rows, batch_size=7, shuffle=True)
    assert lb.predict(posterior, loader, draws=1).scores()["accuracy"] == 1
    assert lb.predict(posterior, loader, draws=1, method="probit").scores()["accuracy"] == 1
    fitted = lb.fit(model, rows_in(rows), validation=loader, guide=lb.guides.Delta(), epochs=3, progress=False,
                    rates=lb.Rates(0, 0, 0, 0))  # fmt: skip
    assert len({round(row["validation_nll"], 5) for row in fitted.history}) == 1


def rows_in(rows):
    return torch.utils.data.DataLoader(rows, batch_size=8)


def test_a_dropped_class_keeps_its_name_out_of_the_model():
    rows = tiny_reviews(20, classes=2).cast_column("label", datasets.ClassLabel(names=["no", "yes", "maybe"]))
    model = lb.BayesianLoRA(tiny_bert(2), tokenizer=tiny_tokenizer()).prepare(rows)
    assert model.class_names == ["LABEL_0", "LABEL_1"]


def test_classes_of_data_that_a_model_does_not_know_are_not_its_others():
    with pytest.raises(ValueError, match="expected the classes of the data in the model's order"):
        check_class_order(["neg", "pos"], ["pos", "mixed"], "data")
    names = datasets.ClassLabel(names=["negative", "positive"]), datasets.ClassLabel(names=["positive", "negative"])
    train, other = (tiny_reviews(20, 2).cast_column("label", each) for each in names)
    model = lb.BayesianLoRA(tiny_bert(2), lb.LoRAXS(2), tokenizer=tiny_tokenizer())
    with pytest.raises(ValueError, match="classes of the validation data in the model's order"):
        lb.fit(model, train, validation=other, progress=False)


@pytest.mark.parametrize("dtype", [torch.int32, torch.uint8, torch.bool])
def test_classes_of_any_whole_numbers_are_fitted(dtype):
    batches = [{**batch, "labels": batch["labels"].clamp(max=1).to(dtype)} for batch in token_batches()]
    assert as_batches(batches).labels.dtype == torch.int64
    long = [{**batch, "labels": batch["labels"].long()} for batch in batches]
    logits = []
    for data in (batches, long):
        posterior = lb.fit(lb.BayesianLoRA(tiny_bert(2), lb.LoRAXS(2)), data, epochs=1, progress=False)
        logits.append(lb.predict(posterior, data, draws=2).logits)
    assert torch.equal(*logits)


def test_rows_end_after_512_tokens_where_a_tokenizer_knows_no_end():
    tokenizer = tiny_tokenizer()
    tokenizer.model_max_length = int(1e30)  # as transformers says of a tokenizer without a limit
    rows = datasets.Dataset.from_dict({"text": ["good " * 700], "label": [0]})
    assert lb.Batches(rows, tokenizer).longest == 512
    assert lb.Batches(rows, tokenizer, max_length=600).longest == 600
