"""Multiple choice, language models and regression: against transformers' own scores, exact posteriors, and errors."""

import warnings

import datasets
import pyro
import pytest
import torch
import transformers
from conftest import LinearNetwork, tiny_bert, tiny_tokenizer
from pyro.infer import Trace_ELBO
from scipy import integrate, stats
from tokenizers.processors import TemplateProcessing

import pyro_lrblora as lb
from pyro_lrblora.likelihoods import label_site
from pyro_lrblora.likelihoods.multiple_choice import letter_tokens
from pyro_lrblora.networks import AnswerScorer, MeanPoolClassifier
from pyro_lrblora.probe import choose_scale, linear_probe

WORDS = ["good", "bad", "film", "the", "was", "plot", "very", "not", "great", "dull"]


def tiny_llama(seed: int = 1, vocab: int = 12):
    torch.manual_seed(seed)
    config = transformers.LlamaConfig(
        vocab_size=vocab, hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2,
        max_position_embeddings=32, initializer_range=0.3, pad_token_id=0, bos_token_id=None, eos_token_id=None,
        num_key_value_heads=1,
    )  # fmt: skip
    return transformers.LlamaForCausalLM(config).eval()


def tiny_t5(seed: int = 1):
    torch.manual_seed(seed)
    config = transformers.T5Config(
        vocab_size=12, d_model=16, d_kv=8, d_ff=24, num_layers=2, num_heads=2, decoder_start_token_id=0, pad_token_id=0,
        eos_token_id=None,
    )  # fmt: skip
    return transformers.T5ForConditionalGeneration(config).eval()


def tiny_texts(rows: int = 24, seed: int = 0):
    generator = torch.Generator().manual_seed(seed)
    pick = lambda high, size: torch.randint(high, (size,), generator=generator).tolist()
    text = lambda n: " ".join(WORDS[i] for i in pick(len(WORDS), n))
    lengths = pick(6, rows)
    return datasets.Dataset.from_dict(
        {"text": [text(2 + n) for n in lengths], "prompt": [text(2 + n) for n in reversed(lengths)]}
    )


def tiny_items(rows: int = 20, choices: int = 3, seed: int = 0):
    generator = torch.Generator().manual_seed(seed)
    pick = lambda high, size: torch.randint(high, (size,), generator=generator).tolist()
    text = lambda n: " ".join(WORDS[i] for i in pick(len(WORDS), n))
    return datasets.Dataset.from_dict(
        {
            "question": [text(2 + n) for n in pick(4, rows)],
            "choices": [[text(1 + n) for n in pick(3, choices)] for _ in range(rows)],
            "label": pick(choices, rows),
        }
    )


# --- next token


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("prompt", [None, "prompt"])
def test_next_token_is_the_loss_of_transformers(prompt, side):
    tokenizer = tiny_tokenizer()
    tokenizer.padding_side = side
    network = tiny_llama()
    batches = lb.data.Texts(tiny_texts(), tokenizer, prompt=prompt, batch_size=5)
    model = lb.BayesianLoRA(network, lb.LoRAXS(2), likelihood=lb.likelihoods.NextToken()).prepare(batches)
    posterior = lb.fit(model, batches, steps=1, rates=lb.Rates(0, 0, 0, 0), guide=lb.guides.Delta(), progress=False)
    found = lb.predict(posterior, batches, draws=1)
    losses, tokens = 0.0, 0
    tokenizer.padding_side = "right"  # where transformers' loss scores no token that stands behind padding
    for batch in batches:
        scored = int((batch["labels"][:, 1:] != -100).sum())
        with torch.no_grad():
            losses += float(network(**batch).loss) * scored
        tokens += scored
    assert found.nll == pytest.approx(losses / tokens, abs=1e-5)
    assert int(found.scored.sum()) == tokens
    assert found.log_likelihood.sum().item() == pytest.approx(-losses, rel=1e-5)


def test_a_rows_likelihood_does_not_depend_on_its_padding():
    model = lb.BayesianLoRA(tiny_llama(), lb.LoRAXS(2), likelihood=lb.likelihoods.NextToken(), size=1)
    found = []
    for pad in (0, 1, 3):
        ids = torch.tensor([[0] * pad + [3, 5, 6, 7]])
        batch = {"input_ids": ids, "attention_mask": (ids > 0).long(), "labels": ids.where(ids > 0, -100)}
        found.append(model.log_likelihood(model.outputs(batch, model.start(), {}), batch).item())
    assert found == pytest.approx(3 * found[:1], abs=1e-5)


def test_a_causal_roberta_counts_its_own_positions():
    torch.manual_seed(0)
    config = transformers.RobertaConfig(
        vocab_size=12, hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=24,
        max_position_embeddings=34, is_decoder=True, pad_token_id=1, initializer_range=0.3,
    )  # fmt: skip
    network = transformers.RobertaForCausalLM(config).eval()
    ids = torch.randint(2, 12, (2, 6))
    batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    model = lb.BayesianLoRA(network, lb.LoRAXS(2), likelihood=lb.likelihoods.NextToken())
    with torch.no_grad():
        expected = network(**batch).logits
        assert torch.equal(model.outputs(batch, model.start(), {}).logits, expected)
        tokens = expected[:, :-1].log_softmax(-1).gather(-1, ids[:, 1:, None]).squeeze(-1)
        one = {name: value[None] for name, value in batch.items()}
        scores = AnswerScorer(network)(**one, answer_mask=one["attention_mask"]).logits
    torch.testing.assert_close(scores[0], tokens.sum(-1))


def test_rows_for_a_language_model_that_are_no_texts_say_what_to_write():
    model = lb.BayesianLoRA(
        tiny_llama(), lb.LoRAXS(2), likelihood=lb.likelihoods.NextToken(), tokenizer=tiny_tokenizer()
    )
    with pytest.raises(ValueError, match=r"a column 'label'.*write lb.data.Texts\(dataset, tokenizer\)"):
        lb.fit(model, tiny_texts(4), epochs=1, progress=False)


def test_a_decoder_without_inputs_of_its_own_is_refused():
    torch.manual_seed(0)
    config = transformers.BartConfig(
        vocab_size=12, d_model=16, encoder_layers=1, decoder_layers=1, encoder_attention_heads=2,
        decoder_attention_heads=2, encoder_ffn_dim=24, decoder_ffn_dim=24, max_position_embeddings=32, pad_token_id=0,
        bos_token_id=2, eos_token_id=3, decoder_start_token_id=3, forced_eos_token_id=None,
    )  # fmt: skip
    network = transformers.BartForConditionalGeneration(config).eval()
    ids = torch.randint(4, 12, (4, 6))
    batches = [{"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": ids}]
    model = lb.BayesianLoRA(network, lb.LoRAXS(2), likelihood=lb.likelihoods.NextToken())
    with pytest.raises(ValueError, match="decoder_input_ids"):
        lb.fit(model, batches, steps=1, progress=False)


def test_prompts_are_read_and_not_scored():
    data, tokenizer = tiny_texts(), tiny_tokenizer()
    batches = lb.data.Texts(data, tokenizer, prompt="prompt")
    for row, labels in zip(data, batches.labels, strict=True):
        assert [WORDS[i - 2] for i in labels[labels != -100].tolist()] == row["text"].split()


@pytest.mark.parametrize("prompt", [None, "prompt"])
def test_an_end_of_text_is_added_and_can_be_left_out(prompt):
    tokenizer = tiny_tokenizer()
    tokenizer.eos_token = "[UNK]"
    ended, open_ended = (lb.data.Texts(tiny_texts(), tokenizer, prompt=prompt, end=end) for end in (True, False))
    for row, with_end, without in zip(tiny_texts(), ended.labels, open_ended.labels, strict=True):
        own = [WORDS.index(word) + 2 for word in row["text"].split()]
        assert with_end[with_end != -100].tolist() == [*own, tokenizer.eos_token_id]
        assert without[without != -100].tolist() == own


@pytest.mark.parametrize("longer", ["prompt", "text"])
def test_a_row_of_a_decoder_is_as_long_as_the_longer_of_its_two_texts(longer):
    short = "text" if longer == "prompt" else "prompt"
    data = datasets.Dataset.from_dict({longer: ["good film bad", "good"], short: ["bad plot", "bad"]})
    batches = lb.data.Texts(data, tiny_tokenizer(), prompt="prompt", decoder=tiny_t5())
    assert batches.longest == 3
    (batch,) = batches
    of = {"prompt": batch["attention_mask"], "text": (batch["labels"] != -100).long()}
    assert of[longer].tolist() == [[1, 1, 1], [1, 0, 0]]
    assert of[short].tolist() == [[1, 1], [1, 0]]


def test_sequence_to_sequence_is_the_loss_of_transformers():
    network, tokenizer = tiny_t5(), tiny_tokenizer()
    batches = lb.data.Texts(tiny_texts(), tokenizer, prompt="prompt", decoder=network, batch_size=5)
    model = lb.BayesianLoRA(network, lb.LoRAXS(2), likelihood=lb.likelihoods.NextToken())
    posterior = lb.fit(model, batches, steps=2, guide=lb.guides.LowRank(2), progress=False)
    assert len(posterior.history) == 1
    first = next(iter(batches))
    with torch.no_grad():
        outputs = network(**first)
        inputs = {name: value for name, value in first.items() if name != "labels"}
        assert torch.equal(network(**inputs).logits, outputs.logits)  # the decoder's inputs are those made from labels
    labels, observed = label_site(model.likelihood, outputs, first)
    total = -labels.log_prob(observed).sum() / (first["labels"] != -100).sum()
    torch.testing.assert_close(total, outputs.loss)


def test_a_decoders_target_may_be_one_token():
    """Its start token is read before it, so that no label is only read."""
    network, tokenizer = tiny_t5(), tiny_tokenizer()
    data = datasets.Dataset.from_dict({"prompt": ["good film", "bad"], "text": ["good", "bad"]})
    batches = lb.data.Texts(data, tokenizer, prompt="prompt", decoder=network)
    model = lb.BayesianLoRA(network, lb.LoRAXS(2), likelihood=lb.likelihoods.NextToken())
    for train in (batches, list(batches)):
        posterior = lb.fit(model, train, steps=1, guide=lb.guides.Delta(), progress=False)
        assert lb.predict(posterior, train, draws=1).observations == 2
    with pytest.raises(ValueError, match=r"none in rows \[1\]"):
        lb.fit(model, [dict(batch) | {"labels": torch.tensor([[2], [-100]])} for batch in batches], progress=False)


def test_packing_is_off_and_loses_nothing_when_on():
    data, tokenizer = tiny_texts(), tiny_tokenizer()
    plain, packed = (lb.data.Texts(data, tokenizer, packed=on, max_length=10) for on in (False, True))
    assert plain.rows == len(data)
    assert torch.equal(plain.labels[plain.labels != -100], packed.labels[packed.labels != -100])
    assert (packed.labels[:-1] != -100).all()


@pytest.mark.parametrize("guide", [lb.guides.LowRankPrecision(2), lb.guides.Delta()], ids=str)
def test_a_language_model_learns_its_texts(guide):
    """Texts of one word repeated: learnable, and the same functions for every row and batch size."""
    words = [w for w in WORDS for _ in range(4)]
    data = datasets.Dataset.from_dict({"text": [" ".join([w] * (3 + i % 3)) for i, w in enumerate(words)]})
    batches = lb.data.Texts(data, tiny_tokenizer(), batch_size=10, shuffle=0)
    model = lb.BayesianLoRA(
        tiny_llama(), lb.LoRAXS(8, targets="all-linear"), lb.priors.Normal(1.0), lb.likelihoods.NextToken()
    )
    posterior = lb.fit(model, batches, guide=guide, epochs=15, rates=lb.Rates(loc=3e-2), progress=False)
    start = lb.fit(model, batches, steps=1, rates=lb.Rates(0, 0, 0, 0), guide=lb.guides.Delta(), progress=False)
    one = lambda size: lb.predict(posterior, lb.data.Texts(data, tiny_tokenizer(), batch_size=size), draws=4)
    assert one(40).nll < lb.predict(start, batches, draws=1).nll - 0.5
    torch.testing.assert_close(one(40).token_log_probs, one(7).token_log_probs, atol=1e-4, rtol=1e-4)
    folded = lb.predict(posterior, lb.data.Texts(data, tiny_tokenizer()), draws=4, fold=4)
    torch.testing.assert_close(folded.token_log_probs, one(40).token_log_probs, atol=1e-4, rtol=1e-4)
    table = lb.compare({"a": posterior}, batches, train=batches)
    assert table.loc["a", "perplexity"] == pytest.approx(
        table.loc["a", "NLL"].__class__(torch.tensor(table.loc["a", "NLL"]).exp())
    )
    assert "ECE (15 bins)" not in table
    assert posterior.is_point or table["ELBO per row"].notna().any()


# --- multiple choice


def test_choices_are_scored_as_by_transformers():
    torch.manual_seed(0)
    config = tiny_bert().config
    network = transformers.BertForMultipleChoice(config).eval()
    batches = lb.data.Choices(tiny_items(), tiny_tokenizer(), batch_size=6, max_length=20)
    model = lb.BayesianLoRA(network, lb.LoRAXS(2), likelihood=lb.likelihoods.MultipleChoice()).prepare(
        batches, probe=False
    )
    posterior = lb.fit(model, batches, steps=1, rates=lb.Rates(0, 0, 0, 0), guide=lb.guides.Delta(), progress=False)
    found = lb.predict(posterior, batches, draws=1)
    with torch.no_grad():
        expected = torch.cat([network(**{k: v for k, v in b.items() if k != "labels"}).logits for b in batches])
    torch.testing.assert_close(found.logits[0], expected, atol=1e-5, rtol=1e-5)
    assert found.class_names is None
    trained = lb.fit(model, batches, steps=2, draws="row", progress=False)
    assert set(lb.compare({"a": trained}, batches, validation=batches).columns) >= {
        "accuracy",
        "ECE (15 bins)",
        "temperature",
    }


def test_the_probe_of_choices_is_a_conditional_logit():
    """The right choice has a marker in its features: the probe finds it, and is the maximum of its own posterior."""
    encoder = tiny_bert().bert
    items = tiny_items(60)
    marked = [[c + (" great" if i == row["label"] else " dull") for i, c in enumerate(row["choices"])] for row in items]
    items = items.remove_columns("choices").add_column("choices", marked)
    batches = lb.data.Choices(items, tiny_tokenizer(), max_length=20)
    model = lb.BayesianLoRA(MeanPoolClassifier(encoder, 1), likelihood=lb.likelihoods.MultipleChoice(), head_scale=1.0)
    head = model.prepare(batches).head_start

    def log_joint(weight):
        with torch.no_grad():
            outputs = [model.pretrained_outputs(b, {**head, "classifier.weight": weight}) for b in batches]
        fits = [
            o.logits.log_softmax(-1)[range(len(b["labels"])), b["labels"]]
            for o, b in zip(outputs, batches, strict=True)
        ]
        return float(torch.cat(fits).sum() - 0.5 * weight.square().sum())

    best = log_joint(head["classifier.weight"])
    assert best > log_joint(torch.zeros(1, 16)) + 5
    assert all(best > log_joint(head["classifier.weight"] + 0.1 * torch.randn(1, 16)) for _ in range(4))


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("per_token", [False, True])
def test_answers_are_scored_by_their_tokens(side, per_token):
    """Each row alone, without padding, through the bare language model."""
    tokenizer, network = tiny_tokenizer(), tiny_llama()
    tokenizer.padding_side = side
    items = tiny_items(6)
    batches = lb.data.Choices(items, tokenizer, pair=False, batch_size=4, max_length=20)
    scorer = AnswerScorer(network, per_token)
    with torch.no_grad():
        found = torch.cat([scorer(**{k: v for k, v in b.items() if k != "labels"}).logits for b in batches])
        for number, row in enumerate(items):
            for place, choice in enumerate(row["choices"]):
                before, after = (tokenizer(t, return_tensors="pt")["input_ids"] for t in (row["question"], choice))
                log_probs = network(torch.cat([before, after], 1)).logits.log_softmax(-1)[0]
                each = [log_probs[before.shape[1] - 1 + i, t] for i, t in enumerate(after[0])]
                expected = sum(each) / (len(each) if per_token else 1)
                assert found[number, place].item() == pytest.approx(expected.item(), abs=1e-4)
    model = lb.BayesianLoRA(scorer, lb.LoRAXS(2), likelihood=lb.likelihoods.MultipleChoice())
    fitted = lb.fit(model, batches, steps=2, draws="row", progress=False)
    assert lb.predict(fitted, batches, draws=3).logits.shape == (3, 6, 3)


@pytest.mark.parametrize("side", ["left", "right"])
def test_letters_are_read_after_the_last_token(side):
    tokenizer, network = letter_tokenizer(), tiny_llama(vocab=20)
    tokenizer.padding_side = side
    letters = letter_tokens(tokenizer, 3)
    items, likelihood = tiny_items(6), lb.likelihoods.MultipleChoice(letters)
    batches = lb.data.Letters(items, tokenizer, template="{question} {choices} :", batch_size=4, max_length=32)
    model = lb.BayesianLoRA(network, lb.LoRAXS(2), likelihood=likelihood)
    posterior = lb.fit(model, batches, steps=1, rates=lb.Rates(0, 0, 0, 0), guide=lb.guides.Delta(), progress=False)
    found = lb.predict(posterior, batches, draws=1).logits[0]
    for number, row in enumerate(items):
        listed = "\n".join(f"{letter}. {choice}" for letter, choice in zip("ABC", row["choices"], strict=True))
        ids = tokenizer(f"{row['question']} {listed} :", return_tensors="pt")["input_ids"]
        with torch.no_grad():
            expected = network(ids).logits[0, -1, list(letters)]
        if side == "right":  # on the left, absolute positions would differ, which Llama's rotary ones do not mind
            torch.testing.assert_close(found[number], expected, atol=1e-4, rtol=1e-4)
        else:
            torch.testing.assert_close(found[number], expected, atol=1e-3, rtol=1e-3)


def test_letters_leave_out_an_end_that_the_tokenizer_adds():
    plain, ending = letter_tokenizer(), letter_tokenizer()
    ending.eos_token = "[UNK]"
    end = ("[UNK]", ending.unk_token_id)
    ending.backend_tokenizer.post_processor = TemplateProcessing(single="$A [UNK]", special_tokens=[end])
    assert ending("good film")["input_ids"][-1] == ending.eos_token_id
    own = {"template": "{question} {choices} :", "max_length": 32}
    for found, expected in zip(*(lb.data.Letters(tiny_items(6), t, **own) for t in (ending, plain)), strict=True):
        assert all(torch.equal(found[name], expected[name]) for name in expected)


def test_more_choices_than_letters_are_refused():
    items = datasets.Dataset.from_dict({"question": ["film"], "choices": [["good"] * 27], "label": [26]})
    with pytest.raises(ValueError, match="at most 26 choices, a letter each, got 27"):
        lb.data.Letters(items, letter_tokenizer())


def letter_tokenizer():
    from tokenizers import Tokenizer, models, pre_tokenizers

    vocabulary = {word: i for i, word in enumerate(["[PAD]", "[UNK]", *WORDS, "A", "B", "C", ".", ":"])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="[PAD]", unk_token="[UNK]", model_max_length=32
    )


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda row: {"choices": row["choices"][:2] if row["label"] == 0 else row["choices"]},
            "same number of choices",
        ),
        (lambda row: {"choices": [" ", *row["choices"][1:]]}, "a text for every choice"),
        (lambda row: {"choices": [None, *row["choices"][1:]]}, "a text for every choice"),
        (lambda row: {"question": None}, "texts in column 'question', got None in row 0"),
        (lambda row: {"question": "good " * 40}, "at most 16 tokens"),
        (lambda row: {"label": 7}, "expected labels 0..2"),
        (lambda row: {"label": "A"}, "numbers in the label column 'label', got 'A' in row 0"),
        (lambda row: {"label": row["label"] or None}, "numbers in the label column 'label', got None in row"),
    ],
)
@pytest.mark.parametrize("form", [lb.data.Choices, lb.data.Letters])
def test_bad_items_are_refused(form, change, message):
    items = tiny_items(12)
    data = form(items, tiny_tokenizer(), max_length=30)
    assert data.rows == 12
    with pytest.raises(ValueError, match=message):
        form(items.map(change), tiny_tokenizer(), max_length=30 if "tokens" not in message else 16)


def test_items_that_are_no_choices_are_not_one_sure_choice():
    model = lb.BayesianLoRA(
        tiny_bert(1),
        lb.LoRAXS(2),
        likelihood=lb.likelihoods.MultipleChoice(),
        tokenizer=tiny_tokenizer(),
        head="frozen",
    )
    rows = tiny_items(6).map(lambda row: {"label": 0})
    with pytest.raises(ValueError, match=r"two choices or more.*write lb.data.Choices"):
        lb.fit(model, rows, epochs=1, progress=False)


@pytest.mark.parametrize("form", [lb.data.Choices, lb.data.Letters])
def test_items_whose_labels_are_all_none_have_no_labels(form):
    items = tiny_items(6).map(lambda row: {"label": None})
    assert form(items, tiny_tokenizer(), max_length=30).labels is None


def test_a_format_of_questions_alone_keeps_the_rest_of_the_items():
    items = tiny_items(6)
    expected, found = (
        next(iter(lb.data.Choices(rows, tiny_tokenizer(), max_length=20)))
        for rows in (items, items.with_format("numpy", columns=["question"]))
    )
    assert all(torch.equal(found[name], value) for name, value in expected.items())


def test_a_letter_that_is_not_in_the_vocabulary_is_refused():
    with pytest.raises(ValueError, match="letter 'A' to be one token"):
        letter_tokens(tiny_tokenizer(), 3)
    with pytest.raises(ValueError, match="at most 26 choices"):
        letter_tokens(tiny_tokenizer(), 27)


# --- numbers


def regression(scale: float = 0.3, rows: int = 40, seed: int = 0):
    """A linear network with one output: the posterior of R is known exactly."""
    torch.manual_seed(seed)
    network = LinearNetwork(outputs=1, inputs=7).requires_grad_(False)
    adapter = lb.LoRAXS(1, lb.projections.Random(), targets="all-linear")
    model = lb.BayesianLoRA(network, adapter, lb.priors.Normal(2.0), lb.likelihoods.Gaussian(scale), size=rows)
    basis = next(iter(model.adapted.bases.values()))
    x = torch.randn(rows, 7)
    direction = (x @ basis.A.T @ basis.B.T).squeeze(-1)
    y = network(x).squeeze(-1) + 1.5 * direction + scale * torch.randn(rows)
    precision = float(direction.square().sum() / scale**2 + 1 / 4)
    mean = float((direction * (y - network(x).squeeze(-1))).sum() / scale**2 / precision)
    return model, [{"x": x, "labels": y}], direction, mean, precision


def test_gaussian_regression_finds_the_exact_posterior_and_predictive():
    model, data, direction, mean, precision = regression()
    posterior = lb.fit(model, data, guide=lb.guides.FullRank(), steps=800, rates=lb.Rates(loc=2e-2), progress=False)
    assert posterior.mean()["R"].item() == pytest.approx(mean, abs=0.01)
    assert posterior.covariance().variance.item() == pytest.approx(1 / precision, rel=0.1)
    found = lb.predict(posterior, data, draws=2000)
    torch.testing.assert_close(found.epistemic_sd, direction.abs() / precision**0.5, rtol=0.1, atol=1e-4)
    torch.testing.assert_close(found.aleatoric_sd, torch.full_like(found.aleatoric_sd, 0.3))
    exact = stats.norm(
        model.network(data[0]["x"]).squeeze(-1) + mean * direction, (direction**2 / precision + 0.09).sqrt()
    )
    assert found.nll == pytest.approx(-exact.logpdf(data[0]["labels"]).mean(), abs=0.01)
    table = lb.compare({"a": posterior}, data, validation=data, train=data)
    assert {"RMSE", "NLL", "CRPS", "CRPS - best", "in 90% interval", "ELBO per row"} <= set(table.columns)
    assert "a, temperature" not in table.index
    groups = posterior.to_arviz(data)
    assert groups.log_likelihood["labels"].shape == (1, 100, 40)
    assert groups.posterior_predictive["labels"].shape == (1, 100, 40)
    assert lb.diagnose(posterior, data, train=data).tally["good"] > 0


def test_crps_is_its_integral():
    generator = torch.Generator().manual_seed(0)
    new = lambda *shape: torch.randn(*shape, generator=generator).double()
    loc, scale, labels = new(3, 5), new(3, 5).exp(), 2 * new(5)
    found = lb.metrics.crps_of_normals(loc, scale, labels)
    for row in range(5):
        cdf = lambda z, row=row: stats.norm(loc[:, row], scale[:, row]).cdf(z).mean()
        y = labels[row].item()
        low = integrate.quad(lambda z: cdf(z) ** 2, -40, y, limit=200)[0]  # noqa: B023
        high = integrate.quad(lambda z: (1 - cdf(z)) ** 2, y, 40, limit=200)[0]  # noqa: B023
        assert found[row] == pytest.approx(low + high, abs=1e-6)


def test_heteroscedastic_probe_finds_mean_and_noise():
    """A head on frozen features whose labels have a known noise."""
    encoder = tiny_bert().bert
    torch.manual_seed(0)
    inputs = torch.randint(1, 60, (400, 7))
    network = MeanPoolClassifier(encoder, 2)
    mask = torch.ones_like(inputs)
    with torch.no_grad():
        features = encoder(input_ids=inputs, attention_mask=mask).last_hidden_state.mean(1)
    labels = features @ torch.randn(16) + 0.5 * torch.randn(400)
    data = [{"input_ids": inputs, "attention_mask": mask, "labels": labels}]
    model = lb.BayesianLoRA(network, likelihood=lb.likelihoods.Gaussian(), head_scale=1.0).prepare(data)
    posterior = lb.fit(model, data, guide=lb.guides.Delta(), steps=1, rates=lb.Rates(0, 0, 0, 0), progress=False)
    found = lb.predict(posterior, data, draws=1)
    assert found.scale.mean().item() == pytest.approx(0.5, abs=0.1)
    assert (found.mean - labels).square().mean().sqrt().item() < 0.6


@pytest.mark.parametrize("rows", [6, 11])
def test_the_scale_of_a_probe_of_few_numbers_is_cross_validated(rows):
    """Fewer rows than features can be fitted without any noise, which held-out rows tell."""
    torch.manual_seed(rows)
    features, labels = torch.randn(rows, 32).double(), torch.randn(rows).double()
    likelihood = lb.likelihoods.Gaussian()
    scale = choose_scale(features, labels, 2, True, likelihood)
    weight, offset = linear_probe(features, labels, 2, scale, True, likelihood)
    noise = (features.float() @ weight.T + offset)[:, 1].exp()
    assert noise.min() > 0.05


def test_bad_numbers_are_refused():
    model, data, *_ = regression()
    with pytest.raises(ValueError, match="finite numbers"):
        lb.fit(model, [{**data[0], "labels": data[0]["labels"] * float("nan")}], progress=False)
    with pytest.raises(ValueError, match=r"scale > 0"):
        lb.likelihoods.Gaussian(-1.0)
    two = lb.BayesianLoRA(tiny_bert(2), likelihood=lb.likelihoods.Gaussian(1.0))
    with pytest.raises(ValueError, match="num_labels=1"):
        lb.fit(two, data, progress=False)


@pytest.mark.parametrize("size", [1e-3, 1.0, 100.0])
def test_numbers_of_another_scale_are_told(size):
    labels = size * torch.randn(50, generator=torch.Generator().manual_seed(0))
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        lb.likelihoods.Gaussian(1.0).check_labels(labels, 1)
        lb.likelihoods.Gaussian(1.0).check_labels(labels[:19], 1)
    assert len(told) == (size != 1)
    assert all(f"standard deviation of {float(labels.std()):.3g}" in str(each.message) for each in told)


def test_a_text_without_tokens_to_score_is_refused():
    batches = lb.data.Texts(datasets.Dataset.from_dict({"text": ["good"]}), tiny_tokenizer())
    model = lb.BayesianLoRA(tiny_llama(), likelihood=lb.likelihoods.NextToken())
    with pytest.raises(ValueError, match="at least one token to score"):
        lb.fit(model, batches, progress=False)
    with pytest.raises(ValueError, match="prompts shorter than"):
        lb.data.Texts(datasets.Dataset.from_dict({"text": ["good"], "p": ["bad " * 20]}), tiny_tokenizer(), prompt="p")
    with pytest.raises(ValueError, match="lb.data.Texts"):
        lb.fit(model, [{"input_ids": torch.ones(2, 3).long(), "labels": torch.ones(2).long()}], progress=False)


def test_the_standard_error_of_a_difference_per_token_is_its_spread():
    """Long texts have more nats whatever the model: the lengths are no noise of the difference of two NLLs."""
    generator, found = torch.Generator().manual_seed(0), []
    for _ in range(400):
        lengths = 1 + torch.empty(50).exponential_(0.05, generator=generator).long().clamp(max=99)
        scored = torch.arange(100) < lengths[:, None]
        shared, own = (torch.randn(50, 100, generator=generator) for _ in range(2))
        one, other = (
            lb.predictions.TokenPrediction((scored * nats)[None], 0.0 * scored[None], scored)
            for nats in (-2 + shared, -2.3 + shared + 0.3 * own)
        )
        losses = other.losses()["NLL"] - one.losses()["NLL"]
        assert losses.mean() == pytest.approx(other.nll - one.nll, abs=1e-5)
        found.append((losses.mean(), lb.metrics.standard_error(losses)))
    differences, errors = torch.tensor(found).T
    assert float(errors.mean() / differences.std()) == pytest.approx(1, rel=0.1)


def test_the_elbo_of_texts_is_pyros_own():
    """One row is one observation: the model's bound is what Trace_ELBO makes of it."""
    batches = lb.data.Texts(tiny_texts(12), tiny_tokenizer(), batch_size=12)
    model = lb.BayesianLoRA(tiny_llama(), lb.LoRAXS(2), likelihood=lb.likelihoods.NextToken()).prepare(batches)
    batch = next(iter(batches))
    guide = lb.guides.Delta()(model)
    loss = Trace_ELBO().loss(model, guide, batch)
    with torch.no_grad():
        outputs = model.network(**batch)
    scored = (batch["labels"][:, 1:] != -100).sum()
    prior = pyro.distributions.Normal(0.0, 0.1).log_prob(torch.zeros(model.sites.size)).sum()
    assert loss == pytest.approx(float(outputs.loss * scored - prior), rel=1e-5)


def test_scores_of_texts_by_hand():
    """Tokens are averaged over draws one by one, whole texts as wholes, and what is not scored counts nowhere."""
    generator, scored = torch.Generator().manual_seed(0), torch.tensor([[True, True, True], [True, False, False]])
    probs = torch.rand(4, 2, 3, generator=generator, dtype=torch.float64)
    entropy = torch.rand(4, 2, 3, generator=generator, dtype=torch.float64) * scored
    found = lb.predictions.TokenPrediction(probs.log() * scored, entropy, scored).scores()
    tokens = [probs[:, i, j].mean() for i, j in scored.nonzero().tolist()]
    assert found["NLL"] == pytest.approx(-float(sum(map(torch.log, tokens))) / 4)
    assert found["perplexity"] == pytest.approx(float(torch.stack(tokens).log().mean().neg().exp()))
    texts = [probs[:, 0].prod(-1).mean(), probs[:, 1, 0].mean()]
    assert found["NLL, whole texts"] == pytest.approx(-float(sum(map(torch.log, texts))) / 4)
    assert found["mean entropy"] == pytest.approx(float(entropy.sum()) / 4 / 4)


def test_entropies_of_tokens_that_are_not_scored_are_zero():
    texts = lb.data.Texts(tiny_texts(8), tiny_tokenizer(), prompt="prompt", batch_size=8)
    model = lb.BayesianLoRA(tiny_llama(), lb.LoRAXS(2), likelihood=lb.likelihoods.NextToken())
    posterior = lb.fit(model, texts, guide=lb.guides.Diagonal(), epochs=1, progress=False)
    prediction = lb.predict(posterior, texts, draws=2)
    assert not prediction.scored.all()
    assert (prediction.entropy[:, ~prediction.scored] == 0).all()
    assert (prediction.entropy[:, prediction.scored] > 0).all()
