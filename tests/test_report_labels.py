"""Predictions of numbers and of texts are checked and compared as those of classes are, by checks of their own."""

from html import unescape

import numpy as np
import pytest
import torch
from conftest import tiny_tokenizer
from test_tasks import regression, tiny_llama, tiny_texts

import pyro_lrblora as lb
from pyro_lrblora.diagnostics import intervals, text_scores
from pyro_lrblora.formatting import shown

pytestmark = pytest.mark.filterwarnings("ignore")
FEW = {"draws": 6, "evidence_draws": 6}


def row(diagnosis, check):
    return next(each for each in diagnosis.checks if each.check.startswith(check))


def numbers(wider: float = 1.0, shift: float = 0.0, rows: int = 400) -> lb.NumberPrediction:
    """Predictions whose labels were drawn from them before they were made wider or moved."""
    torch.manual_seed(3)
    right = lb.NumberPrediction(torch.randn(8, rows), 0.3 + torch.rand(8, rows), None)
    labels = right.draw_labels()[torch.randint(8, (rows,)), torch.arange(rows)]
    centre = right.loc.mean(0)
    return lb.NumberPrediction(centre + wider * (right.loc - centre) + shift, wider * right.scale, labels)


@pytest.mark.parametrize(
    ("wider", "shift", "shape"),
    [(1.0, 0.0, ""), (0.5, 0.0, "too narrow"), (2.0, 0.0, "too wide"), (1.0, 1.0, "too high"), (1.0, -1.0, "too low")],
)
def test_intervals_say_what_is_wrong_with_predicted_numbers(wider, shift, shape):
    found = intervals(numbers(wider, shift))
    low, high = found.coverage_right
    assert 0.85 < low < 0.9 < high < 0.95
    assert (low <= found.coverage <= high) == (shape == "")
    assert (found.ks <= found.ks_right) == (shape == "")
    assert shape in found.shape
    assert (found.shape == "") == (shape == "")


def test_the_labels_as_their_own_forecast_are_half_their_mean_difference():
    prediction = numbers(rows=30)
    labels = prediction.labels.double().numpy()
    apart = np.abs(labels[:, None] - labels)
    np.testing.assert_allclose(intervals(prediction).crps_climatology, apart.mean(1) - apart.mean() / 2, atol=1e-6)
    with pytest.raises(ValueError, match="rows with labels"):
        intervals(lb.NumberPrediction(prediction.loc, prediction.scale, None))


@pytest.fixture(scope="module")
def fitted_numbers():
    model, data, *_ = regression()
    return data, lb.fit(model, data, guide=lb.guides.Diagonal(), epochs=60, progress=False)


def test_numbers_are_checked_compared_and_on_the_page(fitted_numbers, tmp_path):
    data, posterior = fitted_numbers
    written = lb.report({"a": posterior, "b": posterior}, data, tmp_path / "report.html", train=data, **FEW)
    page, scores = unescape(written.path.read_text()), lb.predict(posterior, data, draws=6).scores()
    found = written.diagnosis
    assert row(found, "NLL (nats per row)").value == pytest.approx(scores["NLL"])
    assert row(found, "share in the 90% interval").value == pytest.approx(scores["in 90% interval"])
    assert row(found, "CRPS").value == pytest.approx(scores["CRPS"])
    assert row(found, "LOO per row - test").verdict == "good"  # the test rows are the fitted ones
    assert {check.check for check in found.checks} >= {
        "NLL - NLL of the posterior mean",
        "epistemic share of the variance",
    }
    assert not [check for check in found.checks if check.check.startswith(("ECE", "calibration", "temperature"))]
    assert written.comparison.loc["a", "CRPS"] == pytest.approx(row(found, "CRPS").value)
    assert all(shown(float(value)) in page for value in written.comparison["NLL"])
    assert "No comparison" not in page
    assert written.document.sections[1].blocks[0].values["rows tested"] == 40  # and not the number of batches
    assert all(check.meaning in page for check in found.checks)


def test_a_laplace_approximation_of_numbers_has_no_linearised_row(fitted_numbers):
    data, posterior = fitted_numbers
    laplace = lb.infer.laplace(posterior.model, data, epochs=1, progress=False)
    assert list(lb.compare({"a": laplace}, data).index) == ["a", "a, mean"]


def test_numbers_of_another_rule_and_without_labels(fitted_numbers):
    data, posterior = fitted_numbers
    moved = [{**data[0], "labels": data[0]["labels"] + 3 * data[0]["labels"].std()}]
    found = lb.diagnose(posterior, moved, **FEW)
    caught = ("NLL (nats", "share in the 90%", "labels uniform", "CRPS")
    assert {row(found, check).verdict for check in caught} == {"bad"}
    assert "too low" in row(found, "labels uniform").meaning
    bare = lb.diagnose(posterior, [{name: v for name, v in data[0].items() if name != "labels"}], **FEW)
    assert row(bare, "share in the 90%").meaning == "The test rows have no labels."


def test_texts_are_checked_compared_and_on_the_page(tmp_path):
    batches = lb.data.Texts(tiny_texts(), tiny_tokenizer(), batch_size=5)
    model = lb.BayesianLoRA(tiny_llama(), lb.LoRAXS(2), lb.priors.Normal(1.0), lb.likelihoods.NextToken())
    posterior = lb.fit(model, batches, guide=lb.guides.Diagonal(), epochs=6, rates=lb.Rates(loc=0.05), progress=False)
    written = lb.report({"a": posterior}, batches, tmp_path / "report.html", train=batches, **FEW)
    page, prediction = unescape(written.path.read_text()), lb.predict(posterior, batches, draws=6)
    found = written.diagnosis
    assert row(found, "NLL (nats per token)").value == pytest.approx(prediction.nll)
    assert f"{np.exp(prediction.nll):.4g}" in row(found, "NLL (nats per token)").meaning
    untouched = lb.fit(model, batches, steps=1, rates=lb.Rates(0, 0, 0, 0), guide=lb.guides.Delta(), progress=False)
    before = lb.predict(untouched, batches, draws=1).nll
    assert found.findings.at_base.nll == pytest.approx(before, abs=1e-5)
    assert (row(found, "NLL (nats per token)").verdict == "bad") == (prediction.nll >= before)
    table = text_scores(prediction)
    assert table["NLL"].sum() == pytest.approx(prediction.nll * table["tokens"].sum())
    assert row(found, "NLL per text").value == pytest.approx(table["NLL"].mean())
    assert row(found, "LOO per row - test").verdict == "good"  # whole texts on both sides
    assert written.comparison.loc["a", "perplexity"] == pytest.approx(np.exp(prediction.nll))
    assert "No comparison" not in page
    assert shown(float(table["NLL per token"].max())) in page
