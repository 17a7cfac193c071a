"""A posterior says what it was fitted with and to which rows, when saved too, and a report puts that beside its own."""

import json

import pytest
import torch
from conftest import tiny_bert, tiny_reviews, tiny_tokenizer, token_batches
from torch.utils.data import DataLoader
from truth import two_layer_problem

import pyro_lrblora as lb
from pyro_lrblora.provenance import LABELS, ROWS, data_hash

pytestmark = pytest.mark.filterwarnings("ignore")
FEW = {"draws": 2, "evidence_draws": 2}


@pytest.fixture(scope="module")
def fitted():
    data = tiny_reviews(20)
    model = lb.BayesianLoRA(tiny_bert(), lb.LoRAXS(2), lb.priors.Normal(0.5), tokenizer=tiny_tokenizer())
    return data, lb.fit(model, data, epochs=1, progress=False)


def built(posterior, path, train):
    """The facts of the section on how it was built, and its table of versions."""
    document = lb.report({"one": posterior}, tiny_reviews(10, seed=1), path, train=train, **FEW).document
    blocks = next(section for section in document.sections if section.title == "How it was built").blocks
    return blocks[0].values, blocks[-1].blocks[0]


def test_a_fit_records_versions_and_rows_and_a_saved_posterior_keeps_them(fitted, tmp_path):
    data, posterior = fitted
    record = posterior.settings["fitted_with"]
    assert record["torch"] == torch.__version__
    assert record["device"].startswith("cpu")
    assert record[ROWS] == data_hash(data)
    assert record[LABELS] == data_hash([{"labels": torch.tensor(data["label"])}])
    posterior.save(tmp_path)
    loaded = lb.Posterior.load(tmp_path, tiny_bert(), tokenizer=tiny_tokenizer())
    assert loaded.settings["fitted_with"] == record
    # In the report the machine of the fit stays apart from that of the report.
    loaded.settings["fitted_with"] |= {"torch": "1.2.3", "device": "cuda another"}
    facts, table = built(loaded, tmp_path / "report.md", data)
    assert facts["rows fitted, sha256"] == record[ROWS]
    assert facts["training rows given"] == "yes, by their hashes"
    assert list(table.frame.loc["torch"]) == ["1.2.3", torch.__version__]
    assert table.frame.loc["device", "fitted with"] == "cuda another"
    assert "1.2.3" in (tmp_path / "report.md").read_text()


def test_other_rows_than_those_of_the_fit_are_named(fitted, tmp_path):
    data, posterior = fitted
    facts, _ = built(posterior, tmp_path / "report.md", data.select(range(19, -1, -1)))
    assert facts["training rows given"].startswith("yes, but others or in another order")
    facts, _ = built(posterior, tmp_path / "report.md", lb.Batches(data, tiny_tokenizer()))  # the labels tell
    assert facts["training rows given"] == "yes, by their hashes"


def test_rows_that_come_in_another_order_each_time_are_not_called_others(fitted, tmp_path):
    data, posterior = fitted
    torch.manual_seed(0)
    shuffled = DataLoader(list(lb.Batches(data, tiny_tokenizer(), batch_size=1)), batch_size=None, shuffle=True)
    facts, _ = built(posterior, tmp_path / "report.md", shuffled)
    assert "is not known" in facts["training rows given"]


def test_a_posterior_saved_before_fits_recorded_anything_still_loads(fitted, tmp_path):
    data, posterior = fitted
    posterior.save(tmp_path)
    card = json.loads((tmp_path / "posterior.json").read_text())
    del card["settings"]["fitted_with"]
    (tmp_path / "posterior.json").write_text(json.dumps(card))
    loaded = lb.Posterior.load(tmp_path, tiny_bert(), tokenizer=tiny_tokenizer())
    facts, table = built(loaded, tmp_path / "report.md", data)
    assert "no hash" in facts["training rows given"]
    assert table.frame["fitted with"].isna().all()
    assert "not recorded" in table.note
    loaded.save_pretrained(tmp_path / "card")
    assert "saved with" in (tmp_path / "card" / "README.md").read_text()


CHAIN = {"draws": 4, "chains": 1}
METHODS = {
    "swag": lambda model, train: lb.infer.swag(model, train, burn_in=1, snapshots=4, columns=2, progress=False),
    "laplace": lambda model, train: lb.infer.laplace(model, train, epochs=1, progress=False),
    "ensemble": lambda model, train: lb.infer.ensemble(model, train, members=2, epochs=1, progress=False),
    "nuts": lambda model, train: lb.infer.nuts(model, train, warmup=2, progress=False, **CHAIN),
    "sgld": lambda model, train: lb.infer.sgld(model, train, burn_in=2, progress=False, **CHAIN),
    "tfb": lambda model, train: lb.infer.tfb(
        lb.fit(model, train, guide=lb.guides.Delta(), epochs=1, progress=False), train, draws=2, steps=2
    ),
}


@pytest.mark.parametrize("method", METHODS)
def test_every_method_records_it(method):
    model, train, _ = two_layer_problem(lb.priors.Normal(1.0))
    record = METHODS[method](model.with_head("frozen"), train).settings["fitted_with"]
    assert record[LABELS] == data_hash([{"labels": train[0]["labels"]}])
    assert ROWS not in record  # batches are known by their labels


def test_the_hash_of_the_labels_does_not_depend_on_batches():
    model = lb.BayesianLoRA(tiny_bert(), lb.LoRAXS(2))
    fit = lambda size: lb.fit(model, token_batches(16, size), guide=lb.guides.Delta(), epochs=1, progress=False)
    labels = torch.cat([batch["labels"] for batch in token_batches(16, 8)])
    assert fit(8).settings["fitted_with"][LABELS] == data_hash([{"labels": labels}])
