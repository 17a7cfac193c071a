"""diagnose and report: the numbers are those of the functions, faults are caught, and what is missing is said."""

import json
import math
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from browser import browser
from conftest import LinearGaussian, tiny_bert, tiny_reviews, tiny_tokenizer
from test_evidence import exact, posterior_at

import pyro_lrblora as lb
from pyro_lrblora.diagnostics import against_votes, calibration, gradient_noise, structure
from pyro_lrblora.diagnostics.diagnose import _temperature
from pyro_lrblora.diagnostics.findings import against_simpler
from pyro_lrblora.diagnostics.label_rules import _inside
from pyro_lrblora.diagnostics.prediction_rules import _calibration, against_mean
from pyro_lrblora.diagnostics.verdicts import verdicts
from pyro_lrblora.evidence import importance
from pyro_lrblora.formatting import shown
from pyro_lrblora.guides.draws import Draws, DrawsGuide
from pyro_lrblora.report.sections import unsure

pytestmark = pytest.mark.filterwarnings("ignore")


@pytest.fixture(scope="module")
def fitted():
    """Data by role, a posterior and a point."""
    torch.manual_seed(0)
    roles = ("train", "test", "validation", "outside")
    data = {role: tiny_reviews(40 + 10 * number, seed=number) for number, role in enumerate(roles)}
    model = lb.BayesianLoRA(tiny_bert(), lb.LoRAXS(2), lb.priors.Normal(0.5), tokenizer=tiny_tokenizer())
    posterior = lb.fit(model, data["train"], epochs=5, progress=False)
    return data, posterior, lb.fit(model, data["train"], guide=lb.guides.Delta(), epochs=5, progress=False)


def row(diagnosis, check):
    return next(each for each in diagnosis.checks if each.check.startswith(check))


def test_the_rows_are_what_the_functions_return(fitted):
    data, posterior, _ = fitted
    found = lb.diagnose(posterior, **data)
    prediction = lb.predict(posterior, data["test"], draws=32)
    errors = calibration(prediction.probs, prediction.labels).errors
    assert row(found, "ECE").value == pytest.approx(errors.loc["width", "value"])
    pieces = importance(posterior, data["train"], 100)
    assert row(found, "ELBO per row").value == pytest.approx(pieces.elbo.value / 40)
    assert row(found, "joint k-hat").value == pytest.approx(pieces.k_hat)
    at_mean = lb.predict(posterior, data["test"], at="mean")
    nll = [lb.metrics.nll(each.probs, each.labels) for each in (prediction, at_mean)]
    assert row(found, "NLL - NLL").value == pytest.approx(nll[0] - nll[1], abs=1e-6)
    unchecked = [check.check for check in found.checks if check.verdict == "not checked"]
    assert "against a reference posterior" in unchecked
    assert len(json.loads(found.to_json())) == len(found.table) == len(found.checks)
    assert all(f"[{check.verdict}] {check.check}" in repr(found) for check in found.checks)


def test_draws_are_enough_where_fewer_would_do(fitted):
    data, posterior, _ = fitted
    findings = lb.diagnose(posterior, data["test"], draws=4).findings
    noisy = replace(findings.sweep, table=findings.sweep.table.assign(**{"NLL SE": 1.0}))
    for sweep, value, verdict in ((findings.sweep, 1, "good"), (noisy, "4 or more", "warning")):
        rows = verdicts(replace(findings, sweep=sweep))
        check = next(each for each in rows if each.check == "draws that are enough")
        assert (check.value, check.threshold, check.verdict) == (value, "< 4", verdict)


def test_widths_that_are_wrong_in_both_directions_do_not_cancel():
    problem = LinearGaussian(rank=2)
    covariance = problem.precision.inverse()
    scale = torch.tensor([0.6, 1.28]).repeat(len(covariance) // 2).double()  # log -.51 and .25
    other = posterior_at(problem, problem.mean, covariance * scale.outer(scale))
    found = lb.diagnose(other, [problem.batch], reference=exact(problem), draws=4)
    assert row(found, "log sd ratio to").verdict == "good"
    assert row(found, "log sd ratio, absolute").value == pytest.approx(0.38, abs=0.05)
    assert row(found, "log sd ratio, absolute").verdict == "warning"


@pytest.mark.parametrize("word", ["warning", "bad"], ids=["falls", "not finite"])
def test_a_bound_that_falls_or_is_not_finite_speaks_against_a_fit(fitted, word):
    data, posterior, _ = fitted
    history = [{"epoch": 1 + k, "step": 10 * (1 + k), "elbo": -0.2 * k, "kl": 1.0} for k in range(10)]
    if word == "bad":
        history[-1]["elbo"] = math.nan
    fallen = lb.Posterior(posterior.model, posterior.guide, posterior.guide_spec, history, posterior.settings)
    assert row(lb.diagnose(fallen, data["test"], draws=4), "training").verdict == word


@pytest.mark.parametrize(("factor", "word"), [(0.25, "bad"), (1.0, "good"), (4.0, "bad")])
def test_a_posterior_of_the_wrong_width_is_caught_by_the_reference_and_by_the_weights(factor, word):
    problem = LinearGaussian(rank=2)
    other = posterior_at(problem, problem.mean, factor * problem.precision.inverse())
    found = lb.diagnose(other, [problem.batch], train=[problem.batch], reference=exact(problem), evidence_draws=400)
    assert row(found, "log sd ratio").value == pytest.approx(math.log(factor) / 2, abs=0.06)
    assert row(found, "log sd ratio").verdict == word
    # Weights of a posterior that is too wide are bounded: there the bounds tell, not the tail.
    weights = [row(found, check).verdict for check in ("joint k-hat", "IWAE - ELBO")]
    assert (weights == ["good", "good"]) == (factor == 1.0)
    assert row(found, "calibration").verdict == "not checked"  # its labels are not classes
    rank = structure(exact(problem), draws=8).effective_rank
    table = found.findings.low_rank.table  # of the reference, whatever the posterior
    assert table.loc[("covariance", "reference"), "effective rank"] == pytest.approx(rank, rel=1e-4)


def test_votes_and_gradients_are_checked_where_they_are_asked_for(fitted, tmp_path):
    data, posterior, point = fitted
    prediction = lb.predict(posterior, data["test"], draws=32)
    votes = torch.randint(0, 9, (len(data["test"]), 3)) + 1
    asked = {"train": data["train"], "votes": votes, "gradient_batches": 6}
    found = lb.report({"one": posterior}, data["test"], tmp_path / "report.md", **asked)
    agreement = against_votes(prediction.probs, votes).table
    distance = agreement.loc["total_variation", "mean"]
    assert row(found.diagnosis, "distance to people's votes").value == pytest.approx(distance, abs=1e-6)
    noise = gradient_noise(posterior, data["train"], 6).table
    assert row(found.diagnosis, "signal in the gradient").value in list(noise["snr"])
    words = (tmp_path / "report.md").read_text()
    for value in (distance, noise.loc["loc", "noise"]):
        assert shown(float(value)) in words
    perfect = 1000 * prediction.probs.numpy()
    assert row(lb.diagnose(posterior, data["test"], votes=perfect.round()), "distance").verdict == "good"
    opposite = 1000 * (prediction.probs.numpy() == prediction.probs.numpy().min(1, keepdims=True))
    assert row(lb.diagnose(posterior, data["test"], votes=opposite), "distance").verdict == "warning"
    assert not [check for check in lb.diagnose(point, data["test"]).checks if "votes" in check.check]
    for options, words in (
        ({"votes": votes[:5]}, "a row of counts per test row"), ({"gradient_batches": 4}, "with train="),
        ({"train": data["train"], "gradient_batches": 1}, "gradient_batches >= 2"),
    ):  # fmt: skip
        with pytest.raises(ValueError, match=words):
            lb.diagnose(posterior, data["test"], **options)


def test_what_is_missing_is_said_and_nothing_crashes(fitted, tmp_path):
    data, posterior, point = fitted
    bare = data["test"].remove_columns("label")
    for one in (posterior, point):
        found = lb.diagnose(one, bare)
        assert row(found, "PSIS-LOO").meaning.startswith("No training rows")
        assert row(found, "calibration").meaning == "The test rows have no labels."
        assert row(found, "temperature").verdict == "not checked"
    assert row(lb.diagnose(point, **data), "ELBO").meaning == "A point has no density."
    one_class = data["test"].map(lambda _: {"label": 1})
    assert "one class only" in row(lb.diagnose(posterior, one_class), "NLL").meaning
    assert lb.diagnose(posterior, data["test"].select([0])).tally["not checked"] > 0
    bare = data["validation"].remove_columns("label")
    written = lb.report({"one": posterior}, data["test"], tmp_path / "report.md", validation=bare)
    assert not any(name.endswith("temperature") for name in written.comparison.index)


def test_chains_that_did_not_mix_speak_against_the_posterior(fitted):
    data, posterior, _ = fitted
    still = {name: value[:1].expand(12, *value.shape[1:]).unsqueeze(0) for name, value in posterior.sample(1).items()}
    chains = lb.Posterior(posterior.model, DrawsGuide(still), Draws(1, 12), [], {"r_hat": math.inf, "ess": 2.0})
    found = lb.diagnose(chains, data["test"])
    assert row(found, "training").verdict == "bad"
    notes = lb.compare({"chains": chains}, data["test"], draws=2).attrs["notes"]
    assert any(note.startswith("chains: chains that have not reached one distribution") for note in notes)


def test_rows_that_were_not_fitted_are_no_evidence(fitted):
    data, posterior, _ = fitted
    words = tiny_tokenizer()
    for rows, others in ((data["train"], False), (tiny_reviews(40, seed=9), True)):
        for given in (rows, lb.Batches(rows, words, shuffle=3)):
            found = lb.diagnose(posterior, data["test"], train=given, evidence_draws=2)
            assert found.findings.other_rows == others
            assert ("training rows" in list(found.table["check"])) == others
    assert row(found, "training rows").verdict == "bad"


def test_one_draw_has_no_gap_between_its_bounds(fitted):
    data, posterior, _ = fitted
    found = lb.diagnose(posterior, data["test"], train=data["train"], evidence_draws=1)
    assert row(found, "IWAE").verdict == "not checked"


def test_validation_rows_that_are_all_right_tell_no_temperature(fitted):
    data, posterior, _ = fitted
    predicted = lb.predict(posterior, data["validation"], draws=32).predicted.tolist()
    right = data["validation"].remove_columns("label").add_column("label", predicted)
    found = lb.diagnose(posterior, data["test"], validation=right)
    assert row(found, "temperature").meaning == "All 60 validation rows are right, by which none is best; give more."
    assert row(found, "temperature").verdict == "not checked"


def test_what_a_temperature_gains_counts_a_certain_mistake_in_full():
    logits = torch.tensor([[20.0, 0.0]] * 999 + [[300.0, 0.0]]).double()
    labels = torch.tensor([0] * 999 + [1])
    found = _temperature(logits.log_softmax(-1), labels)
    nll = lambda scale: float(torch.nn.functional.cross_entropy(logits / scale, labels, reduction="sum"))
    assert found["temperature_gain"] == pytest.approx(nll(1.0) - nll(found["temperature"]))
    assert found["temperature_gain"] > 200


def test_an_ensemble_is_predicted_by_all_its_members(fitted, tmp_path):
    data, posterior, point = fitted
    points = lb.infer.ensemble(
        posterior.model, data["train"], members=3, guide=lb.guides.Delta(), epochs=1, progress=False
    )
    found = lb.diagnose(points, data["test"], draws=32)
    assert len(found.findings.prediction.logits) == 3
    assert row(found, "draws that are enough").verdict == "not checked"
    lb.report({"points": points}, data["test"], tmp_path / "report.md")
    wide = lb.infer.ensemble(
        posterior.model, data["train"], members=3, guide=lb.guides.Diagonal(), epochs=1, progress=False
    )
    assert (points.balanced_draws(10), wide.balanced_draws(10), posterior.balanced_draws(10)) == (3, 12, 10)
    assert [len(lb.predict(each, data["test"]).logits) for each in (points, wide, posterior, point)] == [3, 33, 32, 1]


def test_a_name_is_no_mathematics(fitted, tmp_path):
    data, posterior, point = fitted
    found = lb.report({"a$_$b": posterior, "<b>": point}, data["test"], tmp_path / "report.html")
    assert "a$_$b" in found.path.read_text()


def test_bad_arguments_are_refused_before_any_prediction(fitted, monkeypatch, tmp_path):
    data, posterior, _ = fitted
    monkeypatch.setattr(posterior.model, "outputs", lambda *_: pytest.fail("the network ran"))
    with pytest.raises(ValueError, match="expected the N=40 rows"):
        lb.diagnose(posterior, data["test"], train=data["test"])
    with pytest.raises(ValueError, match="expected draws"):
        lb.diagnose(posterior, data["test"], draws=0)
    with pytest.raises(ValueError, match="ending in .html or .md"):
        lb.report({"a": posterior}, data["test"], tmp_path / "report.pdf")
    with pytest.raises(ValueError, match="at least one posterior"):
        lb.report({}, data["test"], tmp_path / "report.html")
    with pytest.raises(ValueError, match="names that do not end in"):
        lb.report({"a": posterior, "b, mean": posterior}, data["test"], tmp_path / "report.html")
    with pytest.raises(TypeError, match="expected a posterior"):
        lb.diagnose({"a": posterior}, data["test"])
    for role in ("test", "validation"):
        hidden = data[role].map(lambda _: {"label": -1})
        with pytest.raises(ValueError, match=r"expected labels 0..2 .* got \[-1\]"):
            lb.report({"a": posterior}, path=tmp_path / "report.html", **{"test": data["test"], role: hidden})


def test_the_report_holds_the_numbers_of_the_functions(fitted, tmp_path):
    data, posterior, point = fitted
    found = lb.report({"low rank": posterior, "point": point}, path=tmp_path / "report.html", **data)
    page = found.path.read_text()
    assert len(page) < 5_000_000
    for check in found.diagnosis.checks:
        assert check.value is None or shown(check.value) in page
    for value in found.comparison["NLL"]:
        assert shown(float(value)) in page
    for value in structure(posterior).modules["contraction"]:
        assert shown(float(value)) in page
    assert data["test"]["text"][int(found.document.sections[6].blocks[-2].frame.index[0])] in page
    lb.report({"point": point}, data["test"].remove_columns("label"), tmp_path / "point.md")
    words = (tmp_path / "point.md").read_text()
    assert "The test rows have no labels" in words
    assert "not checked" in words


def test_the_report_in_a_browser(fitted, tmp_path):
    data, posterior, point = fitted
    found = lb.report({"low rank": posterior, "point": point}, path=tmp_path / "report.html", **data)
    with browser() as driver:
        driver.get(found.path.as_uri())
        assert not [entry for entry in driver.get_log("browser") if entry["level"] == "SEVERE"]
        pictures = (
            "return [...document.querySelectorAll('svg[role=img], img')].map(x => x.getBoundingClientRect().width)"
        )
        widths = driver.execute_script(pictures)
        assert len(widths) >= 8
        assert min(widths) > 50
        targets = driver.execute_script(
            "return [...document.querySelectorAll('nav a')].map(a => !!document.querySelector(a.getAttribute('href')))"
        )
        assert len(targets) >= 8
        assert all(targets)


@pytest.mark.parametrize(("gap", "advice"), [(0.02, "than chance can give"), (-0.1, "no better than no model")])
def test_what_is_better_by_chance_is_not_called_worse(fitted, gap, advice):
    """Losses around those of the label shares: below them on average, but within two standard errors, or above them."""
    data, posterior, _ = fitted
    findings = lb.diagnose(posterior, data["test"], draws=4).findings
    labels = findings.prediction.labels
    shares = torch.bincount(labels, minlength=3) / len(labels)
    noise = torch.where(torch.arange(len(labels)) % 2 == 0, 0.5, -0.5)
    right = (shares[labels].log() + gap + noise).exp().clamp(max=0.98)
    logits = ((1 - right) / 2).log()[:, None].expand(-1, 3).clone()
    logits[torch.arange(len(labels)), labels] = right.log()
    planted = replace(findings, prediction=replace(findings.prediction, logits=logits[None]))
    check = next(each for each in verdicts(planted) if each.check == "NLL (nats per row)")
    assert check.verdict == ("warning" if gap > 0 else "bad")
    assert advice in check.advice


def test_the_evidence_says_what_it_is_conditional_on():
    from pyro_lrblora.report.sections import _given

    network = tiny_bert()
    data_made = lb.BayesianLoRA(network, lb.LoRAXS(2, lb.projections.Gradient()))
    assert _given(data_made) == "Conditional on a head that is a point and on a projection made from the data."
    assert _given(lb.BayesianLoRA(network, lb.LoRAXS(2), head="bayesian")) == ""


def test_what_is_asked_of_a_report_is_what_its_parts_do(fitted, tmp_path):
    data, posterior, _ = fitted
    data = {role: data[role] for role in ("train", "test", "validation")}
    options = {"draws": 6, "seed": 3, "progress": False}
    written = lb.report({"one": posterior}, path=tmp_path / "page.md", evidence_draws=20, **data, **options)
    bound = importance(posterior, data["train"], 20, seed=3, progress=False).elbo.value / 40
    assert row(written.diagnosis, "ELBO per row").value == pytest.approx(bound, rel=1e-5)
    prediction = lb.predict(posterior, data["test"], **options)
    for value in (row(written.diagnosis, "NLL (").value, written.comparison.loc["one", "NLL"]):
        assert value == pytest.approx(prediction.nll, rel=1e-5)


@pytest.mark.parametrize(
    ("confidence", "accuracy", "word"), [(0.99, 0.7, "overconfident"), (0.55, 0.9, "underconfident")]
)
def test_probabilities_that_are_off_are_called_what_they_are(confidence, accuracy, word):
    rows = 400
    probs = torch.tensor([confidence, 1 - confidence]).expand(rows, 2)
    labels = (torch.arange(rows) >= accuracy * rows).long()
    found = calibration(probs, labels)
    prediction = lb.predictions.Prediction(probs.log().unsqueeze(0), labels)
    (_, value, _, verdict, meaning, advice), *_ = _calibration(
        SimpleNamespace(calibration=found, prediction=prediction)
    )
    assert value == pytest.approx(abs(confidence - accuracy), abs=1e-3)
    assert verdict == "bad"
    assert f": {word}" in meaning
    assert ("widen the posterior" if word == "overconfident" else "the posterior is too wide") in advice


@pytest.mark.parametrize(("share", "word"), [(0.7, "narrow"), (0.99, "wide")])
def test_intervals_that_are_off_are_called_what_they_are(share, word):
    intervals = SimpleNamespace(coverage=share, coverage_right=(0.85, 0.95), pit=torch.zeros(50))
    (*_, advice), *_ = _inside(SimpleNamespace(intervals=intervals))
    assert f"too {word}:" in advice


def test_the_rows_shown_as_unsure_are_the_least_sure():
    """Numbers by their sd, texts by their NLL per token, the worst first."""
    generator = torch.Generator().manual_seed(0)
    numbers = lb.NumberPrediction(torch.zeros(2, 30), torch.rand(30, generator=generator).expand(2, 30), None)
    shown = next(unsure(SimpleNamespace(prediction=numbers), None)).frame
    assert shown.index[0] == int(numbers.sd.argmax())
    log_probs = -torch.rand(2, 30, 4, generator=generator)
    texts = lb.predictions.TokenPrediction(log_probs, torch.zeros(2, 30, 4), torch.ones(30, 4, dtype=torch.bool))
    shown = next(unsure(SimpleNamespace(prediction=texts), None)).frame
    assert shown["NLL per token"].is_monotonic_decreasing
    assert shown["NLL per token"].iloc[0] == pytest.approx(float(-texts.log_probs.mean(-1).min()), rel=1e-5)


def test_a_posterior_that_is_its_prior_has_learned_nothing(fitted):
    data, posterior, _ = fitted
    guide, still = lb.guides.Diagonal(start_scale=1.0), lb.Rates(0, 0, 0, 0)
    prior = lb.fit(posterior.model, data["train"], guide=guide, steps=1, rates=still, warm_start=False, progress=False)
    found = row(lb.diagnose(prior, data["test"], draws=4), "modules that learned nothing")
    assert (found.value, found.verdict) == (1.0, "bad")


@pytest.mark.parametrize(("shift", "verdict"), [(-3.0, "warning"), (0.0, "good"), (3.0, "warning")])
def test_a_gap_between_left_out_and_test_rows_is_told_in_either_direction(fitted, shift, verdict):
    data, posterior, _ = fitted
    findings = lb.diagnose(posterior, data["test"], train=data["train"], draws=4).findings
    planted = replace(findings, loo=replace(findings.loo, elpd=findings.loo.elpd + shift))
    check = next(each for each in verdicts(planted) if each.check.startswith("LOO per row - test"))
    assert check.verdict == verdict


def against_the_mean(gain, noise):
    """The check of draws that are worse than the mean by `gain` nats on average, give or take `noise`, on 400 rows."""
    right = torch.full((400,), 0.5).log()
    other = torch.where(torch.arange(400) % 2 == 0, noise, -noise)
    both = [torch.stack([each, torch.log1p(-each.exp())], 1) for each in (right - gain - other, right)]
    draws, mean = (lb.predictions.Prediction(each.unsqueeze(0), torch.zeros(400).long()) for each in both)
    return next(against_mean(SimpleNamespace(prediction=draws, at_mean=mean)))


@pytest.mark.parametrize(
    ("gain", "noise", "verdict"),
    [(0.004, 0.0, "good"), (0.006, 0.0, "warning"), (0.02, 0.3, "good"), (0.04, 0.3, "warning"), (-0.1, 0.0, "good")],
)
def test_draws_hurt_where_their_loss_is_neither_chance_nor_nothing(gain, noise, verdict):
    """Two standard errors of the paired differences are 0.03 where the noise is 0.3 nats."""
    _, value, _, found, *_ = against_the_mean(gain, noise)
    assert value == pytest.approx(gain, abs=1e-5)
    assert found == verdict


def test_losses_are_compared_in_pairs():
    """Losses that vary by 1 nat from row to row and are always 0.01 below those of a simpler model."""
    losses = torch.linspace(0, 3, 100).double().numpy()
    value, base, limit, verdict = against_simpler(losses, losses + 0.01)
    assert verdict == "good"
    assert limit == pytest.approx(base)
    assert base - value == pytest.approx(0.01)
