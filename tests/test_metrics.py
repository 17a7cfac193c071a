"""Metrics against scikit-learn and plain counting, and their properties."""

import numpy as np
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from scipy import stats
from sklearn.calibration import calibration_curve
from sklearn.metrics import accuracy_score, average_precision_score, log_loss, roc_auc_score

import pyro_lrblora as lb
from pyro_lrblora import metrics


def predictions(rows, classes, seed, sharpness=2.0):
    g = np.random.default_rng(seed)
    logits = sharpness * g.normal(size=(rows, classes))
    probs = np.exp(logits) / np.exp(logits).sum(-1, keepdims=True)
    return probs, g.integers(classes, size=rows)


cases = given(rows=st.integers(1, 60), classes=st.integers(2, 5), seed=st.integers(0, 200))


@settings(deadline=None)
@cases
def test_scores_equal_scikit_learns(rows, classes, seed):
    probs, labels = predictions(rows, classes, seed)
    names = list(range(classes))
    assert metrics.accuracy(probs, labels) == pytest.approx(accuracy_score(labels, probs.argmax(-1)))
    assert metrics.nll(probs, labels) == pytest.approx(log_loss(labels, probs, labels=names))
    squares = [(probs[row, c] - (c == labels[row])) ** 2 for row in range(rows) for c in names]
    assert metrics.brier(probs, labels) == pytest.approx(sum(squares) / rows)


@settings(deadline=None)
@given(rows=st.integers(2, 60), levels=st.integers(1, 12), seed=st.integers(0, 200))
def test_detection_scores_equal_scikit_learns_with_ties_too(rows, levels, seed):
    g = np.random.default_rng(seed)
    scores, positive = g.integers(levels, size=rows) / levels, g.permutation(np.arange(rows) % 3 == 0)
    assert metrics.auroc(scores, positive) == pytest.approx(roc_auc_score(positive, scores))
    assert metrics.average_precision(scores, positive) == pytest.approx(average_precision_score(positive, scores))
    thresholds = [t for t in scores if (scores[positive] >= t).mean() >= 0.95]
    counted = (scores[~positive] >= max(thresholds)).mean()
    assert metrics.false_positive_rate(scores, positive) == pytest.approx(counted)


@settings(deadline=None)
@given(rows=st.integers(2, 80), seed=st.integers(0, 200), bins=st.integers(1, 20))
def test_ece_equals_scikit_learns_calibration_curve(rows, seed, bins):
    probs, labels = predictions(rows, 3, seed)
    confidence, hits = probs.max(-1), probs.argmax(-1) == labels
    share, mean = calibration_curve(hits, confidence, n_bins=bins, strategy="uniform")
    edges = np.linspace(0, 1, bins + 1)
    weights = np.bincount(np.searchsorted(edges[1:-1], confidence), minlength=bins)
    expected = np.abs(share - mean) @ weights[weights > 0] / rows
    assert metrics.ece(probs, labels, bins) == pytest.approx(expected, abs=1e-9)


@settings(deadline=None)
@cases
def test_ece_in_all_its_forms_by_plain_counting(rows, classes, seed):
    probs, labels = predictions(rows, classes, seed)
    confidence, hits = probs.max(-1), (probs.argmax(-1) == labels).astype(float)
    bins = min(4, rows)
    groups = [confidence.argsort(kind="stable")[np.arange(rows) * bins // rows == b] for b in range(bins)]
    mass = sum(abs(confidence[g].mean() - hits[g].mean()) * len(g) for g in groups if len(g)) / rows
    assert metrics.ece(probs, labels, bins, kind="mass") == pytest.approx(mass)
    classwise = 0.0
    for c in range(classes):
        for b in range(10):
            inside = (probs[:, c] > b / 10) & (probs[:, c] <= (b + 1) / 10)
            if inside.any():
                classwise += abs((probs[inside, c] - (labels[inside] == c)).sum()) / rows / classes
    assert metrics.ece(probs, labels, 10, kind="class") == pytest.approx(classwise)


@settings(deadline=None)
@cases
def test_ranges_and_row_order(rows, classes, seed):
    probs, labels = predictions(rows, classes, seed)
    order = np.random.default_rng(seed).permutation(rows)
    for metric, top in ((metrics.accuracy, 1), (metrics.nll, np.inf), (metrics.brier, 2), (metrics.ece, 1)):
        value = metric(probs, labels)
        assert 0 <= value <= top + 1e-12
        assert metric(probs[order], labels[order]) == pytest.approx(value)
        assert metric(torch.tensor(probs), torch.tensor(labels)) == pytest.approx(value)


def test_confident_mistakes_cost_what_they_cost():
    logits = torch.tensor([[150.0, 0.0], [0.0, 90.0]]).expand(3, -1, -1)
    prediction = lb.Prediction(logits, torch.tensor([1, 1]))
    assert prediction.nll == prediction.scores()["NLL"] == pytest.approx(75.0)
    unlabelled = lb.Prediction(logits, None)
    for found in (unlabelled.losses, unlabelled.scores, lambda: unlabelled.nll, lambda: unlabelled.log_likelihood):
        with pytest.raises(ValueError, match="expected labels"):
            found()


def test_perfect_calibration_scores_near_zero():
    g = np.random.default_rng(0)
    p = g.uniform(size=200_000)
    probs, labels = np.stack([1 - p, p], -1), (g.uniform(size=len(p)) < p).astype(int)
    for kind in ("width", "mass", "class"):
        assert metrics.ece(probs, labels, 15, kind) < 0.006
    curve = metrics.reliability(probs, labels, 10)
    assert curve["rows"].sum() == len(p)
    assert np.abs(curve["confidence"] - curve["accuracy"]).max() < 0.02


@pytest.mark.parametrize("temperature", [0.5, 1.0, 3.0])
def test_temperature_is_found_again(temperature):
    g = np.random.default_rng(1)
    logits = g.normal(size=(50_000, 3))
    probs = metrics.apply_temperature(logits, 1.0)
    labels = (probs.cumsum(-1) < g.uniform(size=(len(probs), 1))).sum(-1)
    assert metrics.fit_temperature(logits * temperature, labels) == pytest.approx(temperature, rel=0.05)


@pytest.mark.parametrize("best", [0.02, 0.03, 0.1, 20.0])
def test_extreme_temperatures_are_found_too(best):
    labels = np.arange(400) % 2
    wrong = labels ^ (np.arange(400) < 40)  # a tenth: the best logit is log 9
    logits = best * np.log(9.0) * (np.eye(2)[wrong] - 0.5)
    assert metrics.fit_temperature(logits, labels) == pytest.approx(best, rel=1e-3)


def test_a_probability_of_zero_has_a_temperature():
    log_probs = torch.tensor([[0.0, 0.6, 0.4], [0.2, 0.8, 0.0], [0.9, 0.1, 0.0]]).log()
    assert 0 < metrics.fit_temperature(log_probs, [1, 1, 0]) < 1
    assert metrics.fit_temperature(log_probs, [0, 1, 0]) > 10  # that class was the label


def test_mass_bins_do_not_depend_on_the_order_of_rows_that_tie():
    probs, labels = np.full((300, 2), [0.7, 0.3]), (np.arange(300) >= 180).astype(int)  # 60% right
    for order in (np.arange(300), np.random.default_rng(0).permutation(300)):
        assert metrics.ece(probs, labels[order], 15, "mass") == pytest.approx(0.1)


def test_tensors_with_a_graph_are_scored():
    probs = torch.tensor([[0.8, 0.2], [0.4, 0.6]], requires_grad=True)
    assert metrics.nll(probs, torch.tensor([0, 1])) == pytest.approx(-np.log([0.8, 0.6]).mean())
    assert metrics.fit_temperature(probs.log(), torch.tensor([0, 1])) < 1


@settings(deadline=None, max_examples=30)
@given(rows=st.integers(1, 40), classes=st.integers(2, 4), seed=st.integers(0, 100))
def test_temperature_never_hurts_the_rows_it_was_fitted_on(rows, classes, seed):
    probs, labels = predictions(rows, classes, seed)
    scaled = metrics.apply_temperature(np.log(probs), metrics.fit_temperature(np.log(probs), labels))
    assert metrics.nll(scaled, labels) <= metrics.nll(probs, labels) + 1e-6
    assert metrics.accuracy(scaled, labels) == metrics.accuracy(probs, labels)


@settings(deadline=None, max_examples=30)
@given(rows=st.integers(1, 40), classes=st.integers(2, 4), seed=st.integers(0, 100))
@example(rows=4, classes=4, seed=69)  # two classes of a row are less than a thousandth apart
def test_rows_are_separable_where_a_lower_temperature_is_always_better(rows, classes, seed):
    probs, labels = predictions(rows, classes, seed)
    for known in (labels, probs.argmax(-1)):
        cold = metrics.nll(metrics.apply_temperature(np.log(probs), 1e-9), known)
        assert metrics.separable(np.log(probs), known) == (cold < 0.01)


def test_bootstrap_covers_the_truth():
    """The 90% interval of the accuracy of a coin with p = 0.8 covers 0.8 about nine times out of ten."""
    covered = 0
    for seed in range(100):
        hits = np.random.default_rng(seed).uniform(size=200) < 0.8
        probs = np.tile([0.9, 0.1], (200, 1))
        low, high = metrics.bootstrap(metrics.accuracy, probs, np.where(hits, 0, 1), draws=300, level=0.9, seed=seed)
        covered += low <= 0.8 <= high
    assert 82 <= covered <= 98


@pytest.mark.parametrize(
    ("probs", "labels", "message"),
    [
        (np.zeros((0, 2)), np.zeros(0), "N >= 1"),
        (np.ones(3) / 3, np.zeros(3), r"probs \(N, C\)"),
        (np.full((2, 2), 0.5), np.zeros(3), r"labels \(N,\)"),
        (np.array([[2.0, -1.0]]), np.array([0]), "probabilities"),
        (np.array([[3.0, 1.0]]), np.array([0]), "softmax"),
        (np.array([[0.5, 0.5]]), np.array([2]), "labels 0..1"),
        (np.array([[0.5, 0.5]]), np.array([0.9]), "labels 0..1, got 0.9"),
        (np.array([[0.5, 0.5]]), np.array([np.nan]), "labels 0..1, got nan"),
    ],
)
def test_bad_input(probs, labels, message):
    for metric in (metrics.accuracy, metrics.nll, metrics.brier, metrics.ece):
        with pytest.raises(ValueError, match=message):
            metric(probs, labels)


def test_bad_options():
    probs, labels = predictions(5, 2, 0)
    with pytest.raises(ValueError, match="bins >= 1"):
        metrics.ece(probs, labels, 0)
    with pytest.raises(ValueError, match="'width', 'mass' or 'class'"):
        metrics.ece(probs, labels, kind="adaptive")
    with pytest.raises(ValueError, match="level"):
        metrics.bootstrap(metrics.nll, probs, labels, level=95)


def test_the_standard_error_of_a_mean_is_that_of_scipy_and_one_value_has_none():
    values = np.random.default_rng(0).normal(size=30)
    assert metrics.standard_error(torch.from_numpy(values)) == pytest.approx(stats.sem(values))
    assert np.isnan(metrics.standard_error(values[:1]))


def test_a_bootstrap_interval_is_the_quantiles_of_the_resamples():
    generator = np.random.default_rng(3)
    probs = generator.dirichlet(np.ones(3), 60)
    labels = generator.integers(3, size=60)
    for level, seed in ((0.95, 0), (0.5, 0), (0.5, 4)):
        rows = np.random.default_rng(seed).integers(60, size=(200, 60))
        values = [metrics.nll(probs[each], labels[each]) for each in rows]
        expected = np.quantile(values, [0.5 - level / 2, 0.5 + level / 2])
        assert metrics.bootstrap(metrics.nll, probs, labels, draws=200, level=level, seed=seed) == pytest.approx(
            expected
        )
