"""Calibration, uncertainty, selection, other data and votes: against values by hand, brute force and simulation."""

import math

import datasets
import numpy as np
import pytest
import torch
from sklearn.isotonic import IsotonicRegression

from pyro_lrblora import metrics
from pyro_lrblora.diagnostics import (
    against_votes,
    calibration,
    decompose,
    draws_sweep,
    most_uncertain,
    out_of_distribution,
    risk_coverage,
)
from pyro_lrblora.predictive import Prediction


def drawn(rows=400, draws=16, classes=3, spread=1.0, seed=0):
    """Logits that differ between draws, and labels drawn from their mean."""
    torch.manual_seed(seed)
    logits = 1.5 * torch.randn(rows, classes) + spread * torch.randn(draws, rows, classes)
    probs = Prediction(logits, None).probs
    return Prediction(logits, torch.multinomial(probs, 1)[:, 0])


# --- calibration


def test_labels_drawn_from_the_probabilities_are_calibrated_and_sharper_ones_are_not():
    prediction = drawn()
    good = calibration(prediction.probs, prediction.labels, simulations=100)
    assert (good.errors["p"] > 0.05).all()
    assert good.outside < 0.2
    sharper = torch.as_tensor(metrics.apply_temperature(prediction.log_probs, 1 / 3))
    bad = calibration(sharper, prediction.labels, simulations=100)
    assert (bad.errors["p"] < 0.02).all()
    assert (bad.errors["value"] > bad.errors["perfect 95%"]).all()
    assert bad.errors.loc["width", "value"] == metrics.ece(sharper, prediction.labels, 15)
    assert bad.outside > 0.5


def test_the_error_is_of_as_many_bins_as_asked_for():
    prediction = drawn()
    for bins in (5, 40):
        found = calibration(prediction.probs, prediction.labels, bins=bins, simulations=20)
        assert found.bins == bins
        for kind in ("width", "mass", "class"):
            wanted = metrics.ece(prediction.probs, prediction.labels, bins, kind)
            assert found.errors.loc[kind, "value"] == pytest.approx(wanted)


def test_the_interval_of_an_error_holds_the_true_one():
    """Two classes right less often than they say, by .05: the true error, which resampling alone overstates."""
    generator, inside, above = np.random.default_rng(0), [], []
    for _ in range(40):
        confidence = generator.uniform(0.6, 1.0, 200)
        labels = (generator.uniform(size=200) > confidence - 0.05).astype(int)
        found = calibration(np.stack([confidence, 1 - confidence], 1), labels, simulations=40).errors.loc["width"]
        inside.append([found["low"] <= 0.05, found["high"] >= 0.05])
        above.append(found["high"] - found["value"])
    assert (np.mean(inside, 0) > 0.75).all()
    assert np.mean(above) > 0.01


@pytest.mark.parametrize("hits", range(25, 40))
def test_a_value_at_the_threshold_is_one_that_chance_gives(hits):
    """Of few rows whose probabilities are all the same the error takes few values."""
    probs = np.tile([0.42, 0.58], (60, 1))
    labels = np.array([1] * hits + [0] * (60 - hits))
    row = calibration(probs, labels, simulations=200).errors.loc["width"]
    assert (row["value"] <= row["perfect 95%"] + 1e-12) == (row["p"] > 0.05)


def test_the_p_values_of_calibrated_predictions_are_uniform():
    found = [calibration(*(lambda p: (p.probs, p.labels))(drawn(100, 4, seed=k)), simulations=40) for k in range(24)]
    values = np.array([each.errors.loc["width", "p"] for each in found])
    assert 0.3 < values.mean() < 0.7
    assert (values < 0.1).sum() <= 7


def test_the_corp_parts_are_those_of_scikit_learns_isotonic_regression():
    prediction = drawn()
    confidence = prediction.probs.double().max(-1).values.numpy()
    hits = (prediction.predicted == prediction.labels).numpy()
    found = calibration(prediction.probs, prediction.labels, simulations=20)
    isotonic = IsotonicRegression().fit(confidence, hits)
    recalibrated = isotonic.predict(confidence)
    np.testing.assert_allclose(found.recalibrated, isotonic.predict(found.confidence), atol=1e-6)
    brier, best = np.square(confidence - hits).mean(), np.square(recalibrated - hits).mean()
    assert found.brier == pytest.approx(brier)
    assert found.uncertainty == pytest.approx(hits.mean() * (1 - hits.mean()))
    assert found.miscalibration == pytest.approx(brier - best)
    assert found.discrimination == pytest.approx(found.uncertainty - best)
    assert found.rows.sum() == 400


# --- where the uncertainty is


def test_the_entropy_is_split_by_hand():
    sure = torch.tensor([[50.0, 0.0], [0.0, 50.0]])  # two draws that contradict each other
    alike = torch.zeros(2, 2)  # two that both say a half
    found = decompose(Prediction(torch.stack([sure, alike], dim=1), torch.tensor([0, 1])))
    np.testing.assert_allclose(found.entropy, [math.log(2), math.log(2)], rtol=1e-6)
    np.testing.assert_allclose(found.expected_entropy, [0, math.log(2)], atol=1e-6)
    np.testing.assert_allclose(found.mutual_information, [math.log(2), 0], atol=1e-6)
    np.testing.assert_allclose(found.disagreement, [0.5, 0])
    assert found.epistemic_share == pytest.approx(0.5, abs=1e-6)


def test_the_least_sure_rows_come_first_with_their_texts():
    prediction = drawn(rows=30)
    data = datasets.Dataset.from_dict({"text": [f"row {k}" for k in range(30)]})
    for by, sign in (("entropy", -1), ("mutual_information", -1), ("max_probability", 1)):
        table = most_uncertain(prediction, data, by=by, top=5)
        assert list(table["text"]) == [f"row {k}" for k in table.index]
        score = decompose(prediction).table[by]
        assert list(table.index) == list((sign * score).sort_values(kind="stable").index[:5])
    assert "row numbers" in most_uncertain(prediction).attrs["notes"][0]


def test_rows_of_another_kind_by_brute_force():
    inside, outside = drawn(rows=40, spread=0.5), drawn(rows=25, spread=2.0, seed=1)
    found = out_of_distribution(inside, outside)
    a, b = decompose(inside).mutual_information, decompose(outside).mutual_information
    pairs = (b[:, None] > a).mean() + 0.5 * (b[:, None] == a).mean()
    assert found.loc["mutual information", "AUROC"] == pytest.approx(pairs)
    assert pairs > 0.9
    threshold = np.sort(b)[::-1][math.ceil(0.95 * 25) - 1]
    assert found.loc["mutual information", "FPR95"] == pytest.approx((a >= threshold).mean())
    assert found.loc["entropy", "AUPR of chance"] == pytest.approx(25 / 65)
    generator = np.random.default_rng(0)
    resampled = [
        (lambda x, y: (y[:, None] > x).mean())(generator.choice(a, 40), generator.choice(b, 25)) for _ in range(400)
    ]
    assert found.loc["mutual information", "AUROC SE"] == pytest.approx(np.std(resampled), rel=0.3)
    same = out_of_distribution(inside, inside)
    assert same.loc["entropy", "AUROC"] == pytest.approx(0.5)


# --- selection and draws


@pytest.mark.parametrize("other", [{"draws": 8}, {"classes": 4}])
def test_rows_of_another_kind_have_the_same_draws_and_classes(other):
    with pytest.raises(ValueError, match="same draws and classes"):
        out_of_distribution(drawn(), drawn(**other))
    assert len(out_of_distribution(drawn(), drawn(rows=7))) == 4


def test_the_risk_coverage_curve_by_brute_force():
    prediction = drawn(rows=50)
    found = risk_coverage(prediction.probs, prediction.labels)
    order = prediction.probs.max(-1).values.argsort(descending=True)
    wrong = (prediction.predicted != prediction.labels)[order].double().numpy()
    np.testing.assert_allclose(found.risk, wrong.cumsum() / np.arange(1, 51))
    assert found.aurc == pytest.approx(metrics.aurc(prediction.probs, prediction.labels))
    assert found.risk_at(0.5) == pytest.approx(wrong[:25].mean())
    best = risk_coverage(prediction.probs, prediction.labels, confidence=-(wrong[order.argsort()]))
    assert best.excess == pytest.approx(0, abs=0.02)
    assert found.excess > best.excess


def test_fewer_draws_cost_what_fresh_ones_cost():
    """The Monte Carlo error of so many of 64 draws is the spread over independent sets of as many."""
    sweep = draws_sweep(drawn(rows=100, draws=64), sizes=[4, 64], repeats=60)
    torch.manual_seed(3)
    base = drawn(rows=100, draws=64)
    torch.manual_seed(0)
    centre = 1.5 * torch.randn(100, 3)
    fresh = []
    for seed in range(60):
        torch.manual_seed(100 + seed)
        fresh.append(metrics.nll(Prediction(centre + torch.randn(4, 100, 3), None).probs, base.labels))
    assert sweep.table.loc[4, "NLL SE"] == pytest.approx(np.std(fresh), rel=0.4)
    assert sweep.table.loc[4, "NLL"] == pytest.approx(np.mean(fresh), abs=3 * np.std(fresh) / 60**0.5)
    assert sweep.table.loc[64, "NLL"] == pytest.approx(metrics.nll(base.probs, base.labels))


def test_mirrored_draws_are_judged_in_pairs():
    """Logits that are linear in the draws: a pair leaves no error in the mean logit, two free draws do."""
    torch.manual_seed(0)
    centre, noise = torch.randn(100, 3), torch.randn(32, 1, 3)
    labels = torch.distributions.Categorical(logits=centre).sample()
    mirrored = torch.stack([noise, -noise], 1).flatten(0, 1)
    pairs = draws_sweep(Prediction(centre + mirrored, labels), sizes=[8, 64], repeats=60)
    free = draws_sweep(Prediction(centre + mirrored[torch.randperm(64)], labels), sizes=[8, 64], repeats=60)
    assert pairs.table.loc[8, "NLL SE"] < 0.6 * free.table.loc[8, "NLL SE"]


@pytest.mark.parametrize("rows", [20, 20000])
def test_the_tolerance_is_the_smaller_of_a_share_and_the_rows_own_error(rows):
    prediction = drawn(rows=rows, draws=2)
    nll = prediction.losses()["NLL"]
    limits = {"share": 0.01 * nll.mean(), "rows": nll.std(ddof=1) / rows**0.5}
    assert min(limits, key=limits.get) == ("share" if rows == 20 else "rows")
    assert draws_sweep(prediction, repeats=2).tolerance == pytest.approx(min(limits.values()))


def test_draws_that_are_all_the_same_are_enough_at_one():
    prediction = drawn(draws=1)
    repeated = Prediction(prediction.logits.expand(16, -1, -1), prediction.labels)
    assert draws_sweep(repeated).enough == 1


# --- people


def test_distances_from_votes_by_hand():
    found = against_votes([[0.5, 0.5], [0.9, 0.1]], [[5, 5], [1, 3]])
    np.testing.assert_allclose(found.kl[0], 0, atol=1e-12)
    assert found.kl[1] == pytest.approx(0.25 * math.log(0.25 / 0.9) + 0.75 * math.log(0.75 / 0.1))
    np.testing.assert_allclose(found.total_variation, [0, 0.65])
    assert list(found.majority) == [True, False]
    np.testing.assert_allclose(found.vote_share, [0.5, 0.25])
    assert found.ceiling == pytest.approx((0.5 + 0.75) / 2)
    far = against_votes([[1.0, 0.0]], [[0, 4]])
    assert far.js[0] == pytest.approx(math.sqrt(math.log(2)))


def test_votes_drawn_from_the_model_are_as_far_as_it_says():
    generator = np.random.default_rng(0)
    probs = generator.dirichlet([1, 1, 1], size=300)
    found = against_votes(probs, generator.multinomial(10, probs))
    for name, row in found.table.iterrows():
        assert row["mean"] == pytest.approx(row["perfect"], abs=4 * row["SE"]), name


def test_the_votes_of_a_hundred_people(shared):
    """A model that gives everyone's share is at zero; one that is sure of the majority is far, and not less right."""
    rows = datasets.Dataset.from_parquet(str(shared / "data/chaosnli/snli.parquet"))
    votes = np.array(rows["label_count"])
    assert (votes.sum(1) == 100).all()
    shares = votes / votes.sum(1, keepdims=True)
    right = against_votes(shares, votes, simulations=5)
    sure = against_votes(np.eye(3)[votes.argmax(1)], votes, simulations=5)
    assert right.kl.max() < 1e-9
    assert sure.total_variation.mean() > 0.2
    assert right.vote_share.mean() == pytest.approx(right.ceiling) == pytest.approx(sure.vote_share.mean())
