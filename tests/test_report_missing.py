"""What a posterior or its data lack leaves rows out with a reason, in diagnose and on the page; nothing crashes."""

from html import unescape

import pytest
import torch
from conftest import tiny_bert, tiny_reviews, tiny_tokenizer
from truth import two_layer_problem

import pyro_lrblora as lb

pytestmark = pytest.mark.filterwarnings("ignore")
FEW = {"draws": 4, "evidence_draws": 4}


@pytest.fixture(scope="module")
def task():
    """A posterior, what it was fitted to, and 60 test rows."""
    model, train, _ = two_layer_problem(lb.priors.Normal(1.0))
    torch.manual_seed(1)
    test = [{"x": torch.randn(60, 5), "labels": torch.randint(2, (60,))}]
    return lb.fit(model, train, guide=lb.guides.Diagonal(), epochs=5, progress=False), train, test


def examined(posterior, test, folder=None, **options):
    """The checks by name, once they are on a page too where there is a folder for it."""
    if folder is None:
        return {check.check: check for check in lb.diagnose(posterior, test, **(FEW | options)).checks}
    written = lb.report({"one": posterior}, test, folder / "report.html", **(FEW | options))
    page = unescape(written.path.read_text())
    assert all(check.meaning in page for check in written.diagnosis.checks)
    return {check.check: check for check in written.diagnosis.checks}


def unchecked(checks) -> dict[str, str]:
    """Check -> reason, of those that could not be made."""
    found = {name: check.meaning for name, check in checks.items() if check.verdict == "not checked"}
    assert all(len(reason) > 10 for reason in found.values())
    return found


@pytest.mark.parametrize(
    ("fit", "options", "reason"),
    [
        (lb.fit, {"guide": lb.guides.Delta(), "epochs": 5}, "A point has no density"),
        (lb.infer.ensemble, {"members": 2, "epochs": 5}, "An ensemble's members are fits"),
        (lb.infer.nuts, {"draws": 30, "warmup": 20, "chains": 1}, "Stored draws have no density"),
        (lb.infer.mc_dropout, {"epochs": 5}, "one of finitely many points"),
    ],
    ids=["point", "ensemble", "chain", "dropout"],
)
def test_a_posterior_without_an_elbo(fit, options, reason, task, tmp_path):
    posterior, train, test = task
    without = fit(posterior.model.with_head("frozen"), train, progress=False, **options)
    paged = fit in (lb.fit, lb.infer.nuts)
    checks = examined(without, test, tmp_path if paged else None, train=train)
    assert reason in unchecked(checks)["ELBO and importance weights"]
    assert any(name.startswith("ECE") for name in checks)


def test_rows_without_labels(task, tmp_path):
    posterior, train, test = task
    bare = [{"x": test[0]["x"]}]
    missing = unchecked(examined(posterior, bare, tmp_path, train=train, validation=bare, outside=bare))
    assert missing["calibration"] == "The test rows have no labels."
    assert missing["temperature"] == "The validation rows have no labels: temperature scaling left out."
    assert "rows of another kind (AUROC of the entropy)" not in missing  # it needs none


def test_one_class_only(task):
    posterior, train, test = task
    rows = [{"x": test[0]["x"], "labels": torch.ones(60, dtype=torch.long)}]
    missing = unchecked(examined(posterior, rows, train=train, validation=rows))
    assert "one class only" in missing["NLL"]


def test_one_observation(task, tmp_path):
    posterior, train, test = task
    one = [{name: value[:1] for name, value in test[0].items()}]
    missing = unchecked(examined(posterior, one, tmp_path, train=train, validation=one, outside=one))
    assert "every row is" in missing["confidence tells right from wrong"].lower()
    single = lb.fit(posterior.model.with_size(1), one, guide=lb.guides.Diagonal(), epochs=5, progress=False)
    unchecked(examined(single, one, train=one))


def test_predictions_that_are_all_equal(task, tmp_path):
    posterior, train, test = task
    same = [{"x": torch.zeros(60, 5), "labels": test[0]["labels"]}]
    checks = examined(posterior, same, tmp_path, train=train, validation=same, outside=same)
    unchecked(checks)
    assert checks["confidence tells right from wrong (AUROC)"].value == 0.5
    assert checks["confidence tells right from wrong (AUROC)"].verdict != "good"


def test_a_saved_posterior_is_examined_as_it_was(tmp_path):
    """Its projection needs data, which a loaded one has no need to see again."""
    data, network = tiny_reviews(20), tiny_bert()
    adapter = lb.LoRAXS(2, projection=lb.projections.Gradient())
    model = lb.BayesianLoRA(network, adapter, lb.priors.Normal(0.5), tokenizer=tiny_tokenizer())
    posterior = lb.fit(model, data, epochs=2, progress=False)
    posterior.save(tmp_path / "saved")
    loaded = lb.Posterior.load(tmp_path / "saved", network, tokenizer=tiny_tokenizer())
    first, second = (lb.diagnose(each, data, train=data, **FEW) for each in (posterior, loaded))
    assert [check.verdict for check in first.checks] == [check.verdict for check in second.checks]
    torch.testing.assert_close(
        torch.tensor(first.findings.structure.modules.to_numpy(float)),
        torch.tensor(second.findings.structure.modules.to_numpy(float)),
    )
