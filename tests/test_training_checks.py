"""Whether a fit should have gone on, and how much of its gradient is signal."""

import warnings

import numpy as np
import pyro
import pytest
import torch
from conftest import LinearGaussian, tiny_bert, tiny_reviews, tiny_tokenizer, token_batches
from hypothesis import given
from hypothesis import strategies as st
from truth import two_layer_problem

import pyro_lrblora as lb
from pyro_lrblora.diagnostics.gradient_noise import gradient_noise
from pyro_lrblora.diagnostics.training import APART, BROKEN, CANNOT_TELL, CONVERGED, FALLS, TRAIN_LONGER, training
from pyro_lrblora.infer.progress import DRIFT
from pyro_lrblora.plots.training import training_curves

NOISE = np.random.default_rng(0).normal(size=200)
CONSTANT = {"method": "svi", "schedule": "constant", "warmup": 0.0, "epochs": 20}


def planted(elbo, log_sd=None, nll=None, settings=CONSTANT):
    """A posterior that remembers a given course."""
    model = LinearGaussian(rank=2).model
    history = []
    for number, value in enumerate(elbo):
        row = {"epoch": number + 1, "step": 10 * (number + 1), "elbo": float(value), "kl": 3.0}
        row |= {"log_likelihood": float(value) + 0.1, "mean_log_sd": -3.0 if log_sd is None else float(log_sd[number])}
        history.append(row | ({} if nll is None else {"validation_nll": float(nll[number])}))
    settings = {**settings, "epochs": len(history)} if "epochs" in settings else settings
    return lb.Posterior(model, lb.guides.Diagonal()(model), lb.guides.Diagonal(), history, settings)


epochs = np.arange(20)
rising = -1.0 + 0.03 * epochs + 0.003 * NOISE[20:40]
flat = -0.5 - 0.5 * np.exp(-epochs) + 0.003 * NOISE[20:40]
overfitting = 0.5 + 0.002 * (epochs - 6) ** 2


# --- verdicts on planted histories


def test_a_rising_elbo_asks_for_more_epochs():
    found = training(planted(rising))
    assert found.verdict == TRAIN_LONGER
    assert found.gain == pytest.approx(0.03, rel=0.1)
    assert found.gain_error < 0.01


def test_a_flat_elbo_has_converged():
    found = training(planted(flat))
    assert found.verdict == CONVERGED
    assert abs(found.gain) < 0.01
    assert found.drift == 0.0


def test_the_slope_and_its_error_are_those_of_scipy():
    from scipy.stats import linregress, t

    found = training(planted(rising))
    window = slice(14, 20)  # the last quarter of 20 epochs, from epoch 15 on
    line = linregress(epochs[window], rising[window])
    assert found.gain == pytest.approx(line.slope)
    assert found.gain_error == pytest.approx(line.stderr * t.ppf(0.95, 4))


def test_noise_is_called_a_rise_no_more_often_than_its_interval_says():
    generator = np.random.default_rng(1)
    verdicts = [training(planted(-0.5 + 0.3 * generator.normal(size=20))).verdict for _ in range(200)]
    assert verdicts.count(TRAIN_LONGER) < 20  # 5% of 200, and three standard errors
    assert verdicts.count(CANNOT_TELL) > 100
    hidden = training(planted(-0.5 + 0.3 * NOISE[40:60]))
    assert hidden.verdict == CANNOT_TELL
    assert "noise" in hidden.reason


def test_a_falling_elbo_is_not_convergence():
    found = training(planted(rising[::-1]))
    assert found.verdict == FALLS
    assert "gains -" in found.reason
    assert "lower" in found.advice


def test_moving_scales_ask_for_more_epochs_though_the_elbo_is_flat():
    found = training(planted(flat, log_sd=-3 - 0.1 * epochs))
    assert found.verdict == TRAIN_LONGER
    assert found.drift == pytest.approx(0.1)
    assert "scale" in found.advice
    assert training(planted(flat, log_sd=-3 - 0.9 * DRIFT * epochs)).verdict == CONVERGED


def test_overfitting_names_its_epoch():
    found = training(planted(rising, nll=overfitting))
    assert found.verdict == "overfitted since epoch 7"
    assert found.best_epoch == 7
    assert "patience" in found.advice


def test_noise_in_the_validation_nll_is_not_overfitting():
    found = training(planted(flat, nll=0.5 + 0.02 * NOISE[100:120]))
    assert found.verdict == CONVERGED
    assert found.best_epoch == 1 + int(NOISE[100:120].argmin())


@pytest.mark.parametrize("option", [{"patience": 3}, {"keep_best": True}], ids=["patience", "keep_best"])
def test_a_fit_that_went_back_is_not_overfitting(option):
    found = training(planted(rising, nll=overfitting, settings={**CONSTANT, **option}))
    assert found.verdict == CONVERGED
    assert "epoch 7" in found.reason


@pytest.mark.filterwarnings("ignore:no head was found")
@pytest.mark.parametrize("method", ["laplace", "tfb"])
def test_what_is_built_on_a_fit_that_went_back_is_not_overfitted_either(method):
    model, train, _ = two_layer_problem(lb.priors.Normal(1.0))
    point = lb.fit(model.with_head("frozen"), train, guide=lb.guides.Delta(), steps=1, progress=False)
    course = planted(rising, nll=overfitting, settings={**CONSTANT, "keep_best": True})
    point.history, point.settings = course.history, course.settings
    if method == "laplace":
        built = lb.infer.laplace(point.model, train, init=point)
    else:
        built = lb.infer.tfb(point, train, draws=2, steps=2)
    found = training(built)
    assert found.verdict == CONVERGED
    assert "epoch 7" in found.reason
    assert "schedule" not in found.note


def test_too_few_epochs_cannot_tell():
    found = training(planted(flat[:3]))
    assert found.verdict == CANNOT_TELL
    assert "3 epochs" in found.reason
    assert "at least 4" in found.advice
    assert np.isnan(found.gain)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_an_elbo_that_is_not_finite_names_its_epoch(value):
    broken = flat.copy()
    broken[11] = value
    found = training(planted(broken))
    assert found.verdict == BROKEN
    assert "epoch 12" in found.reason


def test_a_decaying_schedule_is_not_mistaken_for_convergence():
    # The same course in steps; under the cosine the last epochs hardly moved because their rate was hardly any.
    settings = {**CONSTANT, "schedule": "cosine"}
    course = lambda spent: -1 + 0.05 * spent
    cosine = planted(rising, settings=settings)
    spent = training(cosine).curve["spent"].to_numpy()
    assert spent[-1] == pytest.approx(10, rel=0.02)  # half of 20 epochs at the full rate
    slowing = planted(course(spent) + 1e-4 * NOISE[:20], settings=settings)
    assert np.diff(course(spent))[-1] < 0.001
    assert training(slowing).gain == pytest.approx(0.05, rel=0.01)
    assert training(slowing).verdict == TRAIN_LONGER


def test_the_worst_member_of_an_ensemble_counts():
    good, bad = planted(flat), planted(rising)
    history = [{"member": m, **row} for m, fit in enumerate((good, bad)) for row in fit.history]
    settings = {"method": "ensemble", "member": good.settings}
    found = training(lb.Posterior(good.model, good.guide, good.guide_spec, history, settings))
    assert found.verdict == TRAIN_LONGER
    assert found.reason.startswith("member 1: ")
    assert len(found.curve) == 40
    assert found.gain == training(bad).gain


ASCENDING = [
    lambda: planted(flat),
    lambda: planted(flat[:3]),
    lambda: planted(flat, nll=overfitting),
    lambda: planted(rising),
    lambda: planted(rising[::-1]),
    lambda: planted([*flat[:19], float("nan")]),
]


@pytest.mark.parametrize("better", range(len(ASCENDING) - 1))
def test_verdicts_are_ordered_from_what_is_fine_to_what_is_broken(better):
    pair = [ASCENDING[better](), ASCENDING[better + 1]()]
    alone = [training(fit).verdict for fit in pair]
    for order in (pair, pair[::-1]):
        history = [{"member": m, **row} for m, fit in enumerate(order) for row in fit.history]
        settings = {"method": "ensemble", "member": pair[0].settings}
        found = training(lb.Posterior(pair[0].model, pair[0].guide, pair[0].guide_spec, history, settings))
        assert found.verdict == alone[1] != alone[0]


def test_a_fit_counted_in_steps_has_spent_what_those_steps_say():
    # 20 epochs of 10 steps of a cosine over 400: the integral of its first half, over the 10 steps of an epoch.
    settings = {**CONSTANT, "schedule": "cosine", "steps": 400}
    spent = training(planted(flat, settings=settings)).curve["spent"].iloc[-1]
    assert spent == pytest.approx(40 * (0.25 + 0.5 / np.pi), rel=0.01)


def test_a_history_without_elbo_degrades_with_its_reason():
    posterior = planted([])
    assert "no ELBO" in training(posterior).reason
    posterior.history.append({"chain": 0, "step": 100, "seconds": 1.0})
    posterior.settings = {"method": "nuts", "r_hat": 1.003, "ess": 812.0}
    found = training(posterior)
    assert found.verdict == CONVERGED
    assert "1.003" in found.reason
    assert "812" in found.reason
    assert found.curve.empty
    for r_hat in (1.4, float("inf"), float("nan")):
        posterior.settings["r_hat"] = r_hat
        assert training(posterior).verdict == APART


def test_what_is_missing_is_noted():
    found = training(planted(flat, settings={}))
    assert "schedule" in found.note
    assert "validation" in found.note
    assert "validation" not in training(planted(flat, nll=flat)).note


def test_a_tolerance_of_nothing_is_refused():
    with pytest.raises(ValueError, match="tolerance > 0"):
        training(planted(flat), tolerance=0)


@given(
    elbo=st.lists(st.floats(-1e6, 1e6), min_size=1, max_size=12),
    schedule=st.sampled_from(["cosine", "linear", "constant"]),
)
def test_any_history_gets_a_verdict_a_reason_and_advice(elbo, schedule):
    found = training(planted(elbo, nll=elbo, settings={**CONSTANT, "schedule": schedule}))
    assert found.verdict.split(" since")[0] in (FALLS, TRAIN_LONGER, CANNOT_TELL, CONVERGED, "overfitted")
    assert found.reason
    assert found.advice
    assert found.best_epoch == 1 + int(np.argmin(elbo))


# --- real fits


def short_and_long(epochs, scale=0.03, **options):
    problem = LinearGaussian(rank=2, modules=2)
    return lb.fit(
        problem.model, problem.batches(6), guide=lb.guides.Diagonal(), epochs=epochs, warm_start=False, particles=8,
        rates=lb.Rates(loc=0.03, scale=scale), progress=False, **options,
    )  # fmt: skip


def test_a_short_fit_is_told_to_train_longer_and_a_long_one_has_converged():
    short, long = training(short_and_long(6)), training(short_and_long(60))
    assert short.verdict == TRAIN_LONGER
    assert short.gain > 0.5
    assert long.verdict == CONVERGED
    assert abs(long.gain) < 0.01


def test_the_drift_is_the_one_that_the_fit_warned_of():
    with pytest.warns(lb.ScalesNotConverged) as warned:
        found = training(short_and_long(6, scale=0.3, schedule="linear"))
    assert found.drift > DRIFT
    assert found.verdict == TRAIN_LONGER
    assert f"moved by {found.drift:.2f} per epoch" in str(warned[0].message)


def test_latents_that_are_points_do_not_hide_that_the_others_move():
    model = lb.BayesianLoRA(tiny_bert(), lb.LoRA(2))
    options = {"warm_start": False, "epochs": 1, "progress": False}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", lb.ScalesNotConverged)
        fitted = lb.fit(
            model, token_batches(), guide=lb.guides.Diagonal(point_sites=("B",), start_scale=0.5), **options
        )
    scales = fitted.guide.scale
    assert 0 < len(scales) < fitted.model.sites.size
    assert fitted.history[-1]["mean_log_sd"] == pytest.approx(float(scales.detach().log().mean()), rel=1e-5)


def test_a_posterior_built_on_a_point_fit_says_whose_curve_it_is():
    posterior = lb.infer.swag(
        LinearGaussian(rank=2).model, LinearGaussian(rank=2).batches(6), burn_in=5, snapshots=4, columns=2,
        progress=False,
    )  # fmt: skip
    found = training(posterior)
    assert found.log_joint
    assert "swag" in found.note
    assert len(found.curve) == 5


# --- gradient noise


def at_the_optimum(**settings):
    problem = LinearGaussian(rank=2)
    spec = lb.guides.FullRank()
    guide = spec(problem.model)
    guide.set(problem.mean.float(), [torch.linalg.cholesky(problem.precision.inverse()).float()])
    return problem, lb.Posterior(problem.model, guide, spec, [], {"draws": "shared", **settings})


def test_noise_at_the_optimum_is_what_theory_says_and_the_signal_is_nothing():
    # With R = m + C^(1/2) e the gradient in the mean is F (R - m) / N, whose covariance is F C F / N^2.
    problem, posterior = at_the_optimum(kl="closed")
    found = gradient_noise(posterior, problem.batches(24), batches=600).table
    covariance = problem.fisher @ problem.precision.inverse() @ problem.fisher / 24**2
    assert found.loc["loc", "noise"] == pytest.approx(float(covariance.trace()) ** 0.5, rel=0.06)
    assert found.loc["loc", "snr"] < 0.1  # three standard errors of the mean, 1 / sqrt(600)


def test_batches_of_unequal_size_are_no_signal():
    problem, posterior = at_the_optimum(path_derivative=True)  # without noise of draws
    table = gradient_noise(posterior, problem.batches(22), batches=40).table
    assert len(problem.batches(22)) == 2
    equal = gradient_noise(posterior, problem.batches(12), batches=40).table
    for found in (table, equal):
        assert (found["signal"] < 3 * found["noise"] / 40**0.5).all()


def test_signal_far_from_the_optimum_is_the_exact_gradient():
    problem, posterior = at_the_optimum(kl="closed")
    posterior.guide.loc.data += 5.0
    found = gradient_noise(posterior, problem.batches(24), batches=200).table
    exact = float((problem.precision @ torch.full((problem.size,), 5.0).double()).norm()) / 24
    assert found.loc["loc", "signal"] == pytest.approx(exact, rel=0.02)
    assert found.loc["loc", "snr"] > 5
    assert found.loc["loc", "noise_scale"] == pytest.approx(found.loc["loc", "snr"] ** -2)


def test_the_path_derivative_has_neither_signal_nor_noise_at_the_optimum():
    problem, posterior = at_the_optimum(path_derivative=True)
    found = gradient_noise(posterior, problem.batches(24)).table
    with_score = gradient_noise(at_the_optimum(kl="mc")[1], problem.batches(24)).table
    assert (found["noise"] < 1e-4 * with_score["noise"]).all()


def test_small_batches_are_noisier():
    problem, posterior = at_the_optimum(kl="closed")
    full = gradient_noise(posterior, problem.batches(24), batches=200).table
    small = gradient_noise(posterior, problem.batches(3), batches=200).table
    assert small.loc["loc", "noise"] > 2 * full.loc["loc", "noise"]


def test_the_noise_is_of_batches_as_large_as_asked_for():
    model = lb.BayesianLoRA(tiny_bert(), lb.LoRAXS(2), lb.priors.Normal(0.5), tokenizer=tiny_tokenizer())
    posterior = lb.fit(model, tiny_reviews(), guide=lb.guides.Delta(), epochs=1, batch_size=20, progress=False)
    noise = lambda size: gradient_noise(posterior, tiny_reviews(), 24, batch_size=size).table.loc["loc", "noise"]
    assert noise(20) == noise(None)
    assert noise(2) > 1.5 * noise(20)


@pytest.mark.filterwarnings("ignore::pyro_lrblora.ScalesNotConverged")
def test_every_kind_of_parameter_has_a_row_and_nothing_is_left_behind():
    model = lb.BayesianLoRA(tiny_bert(), lb.LoRAXS(2), lb.priors.Learned(lb.priors.Normal(0.1)))
    posterior = lb.fit(model, token_batches(), guide=lb.guides.LowRank(2), epochs=1, warm_start=False, progress=False)
    pyro.param("mine", torch.ones(2))
    posterior.guide.loc.grad = torch.ones_like(posterior.guide.loc)
    state = {name: value.clone() for name, value in posterior.guide.state_dict().items()}
    network = {name: value.clone() for name, value in posterior.model.network.state_dict().items()}
    generator = torch.get_rng_state()
    found = gradient_noise(posterior, token_batches())
    again = gradient_noise(posterior, token_batches())
    assert list(found.table.index) == ["loc", "scale", "factor", "head"]
    assert found.table["parameters"].tolist() == [32, 33, 64, 51]
    assert found.table.equals(again.table)
    assert torch.equal(torch.get_rng_state(), generator)
    assert all(torch.equal(value, state[name]) for name, value in posterior.guide.state_dict().items())
    assert all(torch.equal(v, network[name]) for name, v in posterior.model.network.state_dict().items())
    assert torch.equal(posterior.guide.loc.grad, torch.ones_like(posterior.guide.loc))
    assert all(p.grad is None for p in posterior.model.point_head.parameters())
    assert list(pyro.get_param_store().keys()) == ["mine"]


def test_stored_draws_have_no_gradient_and_one_batch_no_noise():
    problem, posterior = at_the_optimum()
    stored = lb.guides.draws.DrawsGuide({"R": torch.randn(1, 10, 1, 2, 2)})
    chains = lb.Posterior(problem.model, stored, lb.guides.draws.Draws(1, 10))
    found = gradient_noise(chains, problem.batches(24))
    assert found.table.empty
    assert "DrawsGuide" in found.note
    with pytest.raises(ValueError, match="batches >= 2"):
        gradient_noise(posterior, problem.batches(24), batches=1)


# --- pictures


def test_the_picture_holds_the_history_and_drops_what_is_missing():
    found = training(planted(rising, log_sd=-3 - 0.1 * epochs, nll=overfitting))
    axes = training_curves(found).axes
    assert [axis.get_title().split(" (")[0] for axis in axes] == [
        "ELBO and log likelihood", "KL", "mean log sd", "validation NLL"
    ]  # fmt: skip
    np.testing.assert_array_equal(axes[0].lines[1].get_ydata(), rising)
    np.testing.assert_array_equal(axes[3].lines[0].get_ydata(), overfitting)
    assert axes[3].lines[1].get_xdata()[0] == 70  # the step of the best epoch
    without = training(planted(rising))
    without.curve["mean_log_sd"] = np.nan
    assert len(training_curves(without).axes) == 2
    with pytest.raises(ValueError, match="ELBO in its history"):
        training_curves(training(planted([])))


def test_the_noise_is_of_the_fits_own_estimator():
    """Four draws a step halve it, and draws in mirrored pairs have none where the gradient is linear in them."""
    noise = {}
    for name, settings in {"one": {}, "four": {"particles": 4}, "pair": {"particles": 2, "antithetic": True}}.items():
        problem, posterior = at_the_optimum(kl="closed", **settings)
        noise[name] = gradient_noise(posterior, problem.batches(24), batches=400).table.loc["loc", "noise"]
    assert noise["four"] / noise["one"] == pytest.approx(0.5, rel=0.1)
    assert noise["pair"] < 1e-3 * noise["one"]


def test_the_signal_is_free_of_the_noise_of_few_batches():
    """Over many measurements the squared signal is that of the whole data's gradient, however few batches each has."""
    problem, posterior = at_the_optimum()
    with torch.no_grad():
        posterior.guide.loc += 0.2 * torch.randn(len(posterior.guide.loc), generator=torch.Generator().manual_seed(1))
    whole = gradient_noise(posterior, problem.batches(24), batches=400).table.loc["loc", "signal"] ** 2
    rows = torch.utils.data.StackDataset(**problem.batch)
    loader = torch.utils.data.DataLoader(rows, batch_size=6, shuffle=True)
    torch.manual_seed(0)
    found = [gradient_noise(posterior, loader, batches=4, seed=seed).table.loc["loc"] for seed in range(200)]
    squares = np.array([row["signal"] ** 2 for row in found])
    assert (squares > 0).mean() > 0.9  # else the clip at zero would hide a bias
    assert squares.mean() == pytest.approx(whole, abs=3 * squares.std() / 200**0.5)
