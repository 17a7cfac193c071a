"""ArviZ's plots of posteriors, on whichever line of ArviZ is installed."""

import math

import matplotlib
import numpy as np
import pytest
import torch
from conftest import LinearGaussian, tiny_bert, token_batches
from matplotlib import pyplot
from matplotlib.collections import LineCollection, PathCollection
from scipy.stats import kstest

import pyro_lrblora as lb
from pyro_lrblora import arviz_plots
from pyro_lrblora.arviz_io import arviz_1
from pyro_lrblora.evidence import LOO, psis_loo

ROWS = token_batches(batch_size=40)  # in one batch: a small one takes as long
pytestmark = pytest.mark.filterwarnings("ignore::pyro_lrblora.ScalesNotConverged")


@pytest.fixture(autouse=True)
def _pyplot_keeps_nothing():
    matplotlib.use("Agg")
    yield
    assert pyplot.get_fignums() == []


def prepared(adapter=None, rows=40, head="bayesian"):
    adapter = adapter or lb.LoRAXS(2)
    return lb.BayesianLoRA(tiny_bert(), adapter, lb.priors.Normal(0.1), head=head).prepare(
        token_batches(rows, batch_size=rows)
    )


def gaussian(model=None, sd=0.1, loc=0.0):
    """A Diagonal posterior of known mean and width, fitted to nothing."""
    model = model or prepared(head="frozen")
    guide = lb.guides.Diagonal()(model)
    with torch.no_grad():
        guide.loc.fill_(loc)
        guide.scale = torch.full_like(guide.loc, sd)
    return lb.Posterior(model, guide, lb.guides.Diagonal())


def chains(model=None, count=2, draws=60, sd=0.1):
    model = model or prepared(head="frozen")
    values = {name: sd * torch.randn(count, draws, *shape) for name, shape in model.sites.shapes.items()}
    return lb.Posterior(model, lb.guides.draws.DrawsGuide(values), lb.guides.draws.Draws(count, draws))


def words(figure):
    return [text.get_text() for text in figure.findobj(matplotlib.text.Text)]


def points(figure):
    """The (x, y) of everything marked in a figure: scattered, or a line of markers alone."""
    scattered = [each.get_offsets() for each in figure.findobj(PathCollection)]
    lines = [line for axes in figure.axes for line in axes.lines]
    marked = [each.get_xydata() for each in lines if each.get_linestyle() == "None"]
    return np.concatenate([np.asarray(each, dtype=float).reshape(-1, 2) for each in (*scattered, *marked)])


# --- forest


@pytest.mark.parametrize("adapter", [lb.LoRAXS(2), lb.LoRA(2, "all-linear")], ids=repr)
def test_norms_are_those_of_the_dense_update(adapter):
    model = prepared(adapter, head="frozen")
    samples = gaussian(model, sd=0.5).sample(40, seed=0)
    found = arviz_plots.weight_norms(model, samples)
    latents = model.adapted.per_module({name: value[37] for name, value in samples.items()})
    assert list(found) == list(model.modules)
    for name, latent in latents.items():
        left, right = model.adapted.low_rank_factors(name, latent)
        assert found[name].shape == (40,)
        assert float(found[name][37]) == pytest.approx(float((left @ right).norm()), rel=1e-5)


@pytest.mark.parametrize("make", [gaussian, chains], ids=lambda make: make.__name__)
def test_a_forest_has_one_row_per_module_at_its_median(make):
    posterior = make()
    figure = arviz_plots.forest(posterior)
    assert set(posterior.model.modules) <= set(words(figure))
    samples, _ = arviz_plots.posterior_draws(posterior)
    medians = [float(np.median(v)) for v in arviz_plots.weight_norms(posterior.model, samples).values()]
    drawn = points(figure)
    assert len(drawn) == len(medians) == 8
    np.testing.assert_allclose(drawn[np.argsort(-drawn[:, 1]), 0], medians, rtol=0.02)
    assert "|W - W0|" in figure.axes[-1].get_xlabel()


# --- pair


def test_a_pair_shows_the_draws_of_the_chosen_latents():
    posterior = gaussian()
    figure = arviz_plots.pair(posterior, [1, 6], draws=50)
    flat = posterior.model.sites.join(posterior.sample(50, seed=0)).numpy()[:, [1, 6]]
    drawn = points(figure)
    assert len(drawn) == 50
    np.testing.assert_allclose(drawn[np.argsort(drawn[:, 0])], flat[np.argsort(flat[:, 0])], rtol=1e-5)
    names = arviz_plots.latent_names(posterior.model)
    assert {names[1], names[6]} <= set(words(figure))


def test_a_pair_takes_the_three_widest_latents_by_itself():
    posterior = gaussian()
    with torch.no_grad():
        posterior.guide.scale = torch.full((32,), 0.1).index_fill(0, torch.tensor([3, 9, 20]), 1.0)
    names = arviz_plots.latent_names(posterior.model)
    shown = {name for name in words(arviz_plots.pair(posterior)) if name.startswith("R[")}
    assert shown == {names[3], names[9], names[20]}


def test_latents_are_named_in_the_order_of_the_flat_vector():
    names = arviz_plots.latent_names(prepared(head="frozen"))
    assert len(names) == 32
    assert names[5].replace("\n", "") == "R[0, 1]bert.encoder.layer.0.attention.self.key"


@pytest.mark.parametrize("latents", [[3], [3, 3], [0, 32], [-1, 2], []], ids=repr)
def test_a_pair_refuses_latents_that_are_not_there(latents):
    with pytest.raises(ValueError, match="from 0 to 31"):
        arviz_plots.pair(gaussian(), latents)


def test_a_point_has_no_pairs():
    model = prepared(head="frozen")
    with pytest.raises(TypeError, match="with spread"):
        arviz_plots.pair(lb.Posterior(model, lb.guides.Delta()(model), lb.guides.Delta()))


# --- k-hat


@pytest.mark.parametrize(("draws", "limit"), [(5000, 0.7), (200, 1 - 1 / math.log10(200))])
def test_k_hat_has_a_point_per_row_and_the_limit_of_its_draws(draws, limit):
    k_hat = torch.linspace(-0.2, 1.1, 30)
    figure = arviz_plots.k_hat(LOO(torch.zeros(30), k_hat, draws))
    drawn = points(figure)
    np.testing.assert_allclose(drawn[np.argsort(drawn[:, 0]), 1], k_hat, rtol=1e-6)
    levels = [line.get_ydata()[0] for line in figure.axes[0].lines]
    levels += [path[0, 1] for lines in figure.findobj(LineCollection) for path in lines.get_segments()]
    assert any(level == pytest.approx(limit) for level in levels)


def test_unknown_k_hat_has_no_point_and_none_at_all_no_picture():
    k_hat = torch.full((10,), float("nan"))
    with pytest.raises(ValueError, match="too few draws"):
        arviz_plots.k_hat(LOO(torch.zeros(10), k_hat, 20, "too few draws"))
    k_hat[4] = 0.5
    drawn = points(arviz_plots.k_hat(LOO(torch.zeros(10), k_hat, 20)))
    assert np.isfinite(drawn[:, 1]).sum() == 1


# --- LOO-PIT


def labelled_by(posterior, rows, sharper=1.0, seed=0):
    """A batch whose labels are drawn from the posterior's mean prediction, its logits multiplied."""
    batches = token_batches(rows, batch_size=rows, seed=seed)
    generator = torch.Generator().manual_seed(seed)
    for batch in batches:
        unlabelled = {name: value for name, value in batch.items() if name != "labels"}
        logits = lb.predict(posterior, [unlabelled], at="mean").logits[0]
        batch["labels"] = torch.multinomial((sharper * logits).softmax(-1), 1, generator=generator)[:, 0]
    return batches


def test_the_pit_of_certain_draws_is_the_randomised_pit_of_its_probabilities():
    # Draws that are all alike have equal weights: leaving a row out changes nothing.
    posterior = gaussian(prepared(head="frozen"), sd=1e-7, loc=0.5)
    found = arviz_plots.loo_pit_values(posterior, ROWS, draws=30, seed=3)
    prediction = lb.predict(posterior, ROWS, at="mean")
    probs, labels = prediction.probs.double().numpy(), prediction.labels.numpy()
    below = np.array([row[:label].sum() for row, label in zip(probs, labels, strict=True)])
    step = probs[np.arange(40), labels]
    assert ((found > below - 1e-5) & (found < below + step + 1e-5)).all()
    assert kstest((found - below) / step, "uniform").pvalue > 0.01


def test_the_pit_is_uniform_where_labels_are_as_random_as_predicted_and_not_where_they_are_not():
    posterior = gaussian(prepared(head="frozen", rows=400), sd=1e-3, loc=1.0)
    fair = arviz_plots.loo_pit_values(posterior, labelled_by(posterior, 400), draws=50)
    contrary = arviz_plots.loo_pit_values(posterior, labelled_by(posterior, 400, sharper=-1.0), draws=50)
    assert kstest(fair, "uniform").pvalue > 0.01
    assert kstest(contrary, "uniform").pvalue < 1e-4


def test_the_pit_leaves_its_row_out():
    # Weights 1 / p(y | draw) against two draws, one sure of the label and one not: in closed form.
    posterior = chains(count=1, draws=2, sd=2.0)
    log_probs = lb.predict(posterior, ROWS, draws=2).logits.double().log_softmax(-1)
    labels = torch.cat([batch["labels"] for batch in ROWS])
    likelihood = log_probs.exp()[:, torch.arange(40), labels]
    weights = likelihood.reciprocal() / likelihood.reciprocal().sum(0)
    left_out = torch.einsum("sn,snc->nc", weights, log_probs.exp()).numpy()
    found = arviz_plots.loo_pit_values(posterior, ROWS)
    below = np.array([row[:label].sum() for row, label in zip(left_out, labels, strict=True)])
    step = left_out[np.arange(40), labels]
    # The place within the step is the same random number for every posterior.
    other = arviz_plots.loo_pit_values(gaussian(sd=1e-7), ROWS, draws=30)
    base = lb.predict(gaussian(sd=1e-7), ROWS, at="mean").probs.double().numpy()
    base_below = np.array([row[:label].sum() for row, label in zip(base, labels, strict=True)])
    place = (other - base_below) / base[np.arange(40), labels]
    np.testing.assert_allclose(found, below + place * step, atol=1e-4)


def test_the_pit_picture_holds_the_empirical_distribution():
    posterior = gaussian()
    figure = arviz_plots.loo_pit(posterior, ROWS)
    values = arviz_plots.loo_pit_values(posterior, ROWS)
    (axes,) = figure.axes
    x, y = max((line.get_xydata().T for line in axes.lines), key=lambda line: len(line[0]))
    at = np.linspace(0.05, 0.95, 10)
    drawn = y[np.searchsorted(x, at, side="right") - 1] + x[np.searchsorted(x, at, side="right") - 1]
    np.testing.assert_allclose(drawn, [(values <= each).mean() for each in at], atol=1.5 / 40)
    assert axes.get_xlabel() == "LOO-PIT"


def test_no_pit_without_classes_a_density_or_all_rows():
    problem = LinearGaussian(rank=2)
    with pytest.raises(ValueError, match="class labels"):
        arviz_plots.loo_pit_values(gaussian(problem.model), problem.batches(24))
    model = prepared()
    with pytest.raises(TypeError, match="density"):
        arviz_plots.loo_pit(lb.Posterior(model, lb.guides.Delta()(model), lb.guides.Delta()), ROWS)
    with pytest.raises(ValueError, match="40 rows"):
        arviz_plots.loo_pit(gaussian(), token_batches(24))


# --- compare


def test_compare_ranks_by_leave_one_out_density():
    model = prepared(head="frozen")
    posteriors = {"far": gaussian(model, sd=0.05, loc=3.0), "near": gaussian(model, sd=0.05), "chains": chains(model)}
    figure = arviz_plots.compare(posteriors, ROWS)
    (axes,) = figure.axes
    named = {label.get_text(): place for place, label in zip(axes.get_yticks(), axes.get_yticklabels(), strict=True)}
    loo = {name: float(psis_loo(posteriors[name], ROWS).total.value) for name in ("far", "near")}
    assert set(posteriors) <= set(named)
    drawn = points(figure)
    for name, value in loo.items():
        row = drawn[np.abs(drawn[:, 1] - named[name]) < 0.1]
        assert np.abs(row[:, 0] - value).min() < 0.01
    assert named["far"] < named["near"]
    assert loo["far"] < loo["near"]


def test_chains_have_arviz_own_leave_one_out_density():
    import arviz as az

    posterior = chains(count=4, draws=100)
    found = psis_loo(posterior, ROWS, 400, 0)
    own = az.loo(posterior.to_arviz(ROWS), pointwise=True)
    assert float(found.elpd.sum()) == pytest.approx(float(own.elpd if arviz_1() else own.elpd_loo), abs=0.01)


def test_compare_wants_two_posteriors_of_the_same_rows():
    with pytest.raises(ValueError, match="two or more"):
        arviz_plots.compare({"one": gaussian()}, ROWS)
    other = gaussian(prepared(head="frozen", rows=24))
    with pytest.raises(ValueError, match="N=24 rows"):
        arviz_plots.compare({"one": gaussian(), "other": other}, ROWS)


# --- calibration and summary


def test_pava_has_a_panel_per_class_or_says_what_it_needs():
    if not arviz_1():
        with pytest.raises(NotImplementedError, match="ArviZ 1.x"):
            arviz_plots.pava(gaussian(), ROWS)
        return
    figure = arviz_plots.pava(gaussian(loc=1.0), ROWS, draws=50)
    assert len(figure.axes) == 3
    unlabelled = [{k: v for k, v in batch.items() if k != "labels"} for batch in ROWS]
    with pytest.raises(ValueError, match="label"):
        arviz_plots.pava(gaussian(), unlabelled)


def test_only_stored_chains_have_r_hat_and_ess():
    independent, stored = arviz_plots.summary(gaussian(sd=0.3)), arviz_plots.summary(chains(count=4))
    assert len(independent) == len(stored) == 32
    assert {"r_hat", "ess_bulk", "ess_tail"} <= set(stored.columns)
    assert stored["r_hat"].between(0.98, 1.1).all()
    assert not [name for name in independent.columns if name.startswith(("r_hat", "ess", "mcse"))]
    assert independent["sd"].between(0.25, 0.35).all()
