"""A posterior beside a reference: every number against a closed form, a dense computation, or one by hand."""

import math

import pytest
import torch
from conftest import LinearGaussian, tiny_bert, token_batches
from hypothesis import given, settings
from hypothesis import strategies as st
from pyro.infer.autoguide import AutoNormal
from truth import exact, two_layer_problem

import pyro_lrblora as lb
from pyro_lrblora.diagnostics import reference as module
from pyro_lrblora.diagnostics.reference import against_reference
from pyro_lrblora.guides.draws import Draws, DrawsGuide

pytestmark = pytest.mark.filterwarnings("ignore::pyro_lrblora.ScalesNotConverged")
NOISE = 4 * (2 / 2000) ** 0.5  # four standard errors of a difference of means of S = 2000 draws, in sds


@pytest.fixture(scope="module")
def problem():
    return LinearGaussian(rank=3)


@pytest.fixture(scope="module")
def truth(problem):
    return stored(problem.model, normal(problem.mean, problem.precision.inverse(), seed=1))


def normal(mean, covariance, seed=2):
    torch.manual_seed(seed)
    return torch.distributions.MultivariateNormal(mean, covariance).sample((8000,))


def beside(problem, truth, mean, covariance, **options):
    return against_reference(stored(problem.model, normal(mean, covariance)), truth, **({"draws": 2000} | options))


def moments(problem):
    covariance = problem.precision.inverse()
    sd = covariance.diagonal().sqrt()
    return problem.mean, covariance, sd, covariance / torch.outer(sd, sd)


def stored(model, draws, chains=1):
    """A posterior of given latents, (S, D)."""
    values = {name: value.unflatten(0, (chains, -1)) for name, value in model.sites.split(draws.float()).items()}
    return lb.Posterior(model, DrawsGuide(values), Draws(chains, len(draws) // chains))


def test_a_shift_of_one_sd_is_one_and_no_other_number_moves(problem, truth):
    mean, covariance, sd, _ = moments(problem)
    up = torch.tensor([1.0, -1.0, 0.5, 0, 0, 0, 0, 0, 2.0]).double()
    found = beside(problem, truth, mean + up * sd, covariance)
    torch.testing.assert_close(found.mean_error, up, atol=NOISE, rtol=0)
    assert found.log_sd_ratio.abs().max() < NOISE
    assert found.correlation_error < 0.03
    assert found.sliced_wasserstein == pytest.approx(float(up.square().mean().sqrt()), rel=0.15)
    everywhere = beside(problem, truth, mean + sd, covariance, projections=1000)
    assert everywhere.sliced_wasserstein == pytest.approx(1, rel=0.1)
    assert found.floor.mean_error.abs().max() < 2**0.5 * NOISE


@pytest.mark.parametrize("factor", [0.5, 2.0])
def test_an_sd_times_a_factor_is_its_log(problem, truth, factor):
    mean, covariance, _, _ = moments(problem)
    found = beside(problem, truth, mean, factor**2 * covariance, projections=400)
    torch.testing.assert_close(found.log_sd_ratio, torch.full((9,), math.log(factor)).double(), atol=NOISE, rtol=0)
    assert found.mean_error.abs().max() < 4 * ((1 + factor**2) / 2000) ** 0.5
    assert found.correlation_error < 0.03
    # Over directions the mean of the variance is 1, whatever the correlations: (factor - 1)^2 is the mean square.
    assert found.sliced_wasserstein == pytest.approx(abs(factor - 1), rel=0.1)


def test_correlations_removed_are_their_root_mean_square(problem, truth):
    mean, covariance, sd, correlation = moments(problem)
    expected = float((correlation - torch.eye(9)).square().sum() / 72) ** 0.5
    assert expected > 0.15  # or it would not be tested
    found = beside(problem, truth, mean, torch.diag(sd**2), draws=4000)
    assert found.correlation_error == pytest.approx(expected, rel=0.05)
    assert found.floor.correlation_error < 0.05
    assert found.log_sd_ratio.abs().max() < NOISE


def test_a_shift_along_one_latent_is_seen_by_as_many_directions_as_asked_for(problem, truth):
    """Along a random direction u the shift is u_1: few directions see another share of it than its expectation."""
    mean, covariance, sd, _ = moments(problem)
    shift = torch.zeros_like(mean).index_fill(0, torch.tensor([0]), 3.0)
    of = lambda **options: beside(problem, truth, mean + shift * sd, covariance, **options).sliced_wasserstein
    expected = 3 / len(mean) ** 0.5
    assert of(projections=2000) == pytest.approx(expected, rel=0.05)
    spread = torch.tensor([of(projections=1, seed=seed) for seed in range(12)]).std()
    assert spread > 0.2


def test_sliced_wasserstein_is_that_of_two_gaussians(problem, truth):
    """Along a direction, W2^2 = (difference of means)^2 + (difference of sds)^2."""
    mean, covariance, sd, correlation = moments(problem)
    torch.manual_seed(1)
    scale, shift = torch.rand(9).double() + 0.5, 0.4 * torch.randn(9).double()
    found = beside(problem, truth, mean + shift * sd, torch.diag((scale * sd) ** 2), draws=4000, projections=500)
    directions = torch.nn.functional.normalize(torch.randn(20_000, 9).double(), dim=1)
    spread = lambda matrix: ((directions @ matrix) * directions).sum(1).sqrt()
    squared = (directions @ shift) ** 2 + (spread(torch.diag(scale**2)) - spread(correlation)) ** 2
    assert found.sliced_wasserstein == pytest.approx(float(squared.mean().sqrt()), rel=0.06)


def test_the_reference_beside_itself_is_at_the_floor(problem, truth):
    found = against_reference(exact(problem), exact(problem), draws=1000)
    table = found.table
    for name in (
        "mean error, absolute (reference sds)",
        "log sd ratio, absolute",
        "sliced Wasserstein-2 (reference sds)",
    ):
        # Halves have half the draws, and so sqrt(2) times the noise.
        assert 0.4 < table.loc[name, "value"] / table.loc[name, "floor"] < 1.3
        assert table.loc[name, "value"] > 0  # the two were drawn with other seeds
    assert found.correlation_error < 0.02
    assert "no data were given" in found.note
    assert table.loc[["predictive total variation", "agreement"]].isna().all(axis=None)
    assert list(table) == ["value", "floor"]
    assert table.loc["log sd ratio", "value"] == float(found.log_sd_ratio.mean())
    assert list(found.floor.table) == ["value"]


@settings(deadline=None, max_examples=25)
@given(st.integers(0, 999), st.integers(4, 11), st.integers(2, 7))
def test_the_correlation_error_is_the_dense_one(seed, half, size):
    generator = torch.Generator().manual_seed(seed)
    ours, theirs = (torch.randn(2 * half, size, generator=generator).double().cumsum(1) for _ in range(2))
    apart = [torch.corrcoef(ours[at].T) - torch.corrcoef(theirs[at].T) for at in (slice(half), slice(half, None))]
    expected = math.sqrt(max(0, float((apart[0] * apart[1]).sum()) / (size * (size - 1))))
    found = module._correlation_error(module._Draws(ours, None), module._Draws(theirs, None))
    assert found == pytest.approx(expected, abs=1e-7)


def test_predictions_are_compared_as_by_hand():
    model, _, test = two_layer_problem(lb.priors.Normal(1.0))
    torch.manual_seed(0)
    ours, theirs = 0.5 * torch.randn(10, 8), 1.5 * torch.randn(10, 8)
    (x,) = (batch["x"] for batch in test)
    (first, second), network = model.adapted.bases.values(), model.network

    def probs(draws):
        found = []
        for r1, r2 in draws.reshape(-1, 2, 2, 2):
            hidden = torch.tanh(network.first(x) + x @ (first.B @ r1 @ first.A).T)
            found.append((network.second(hidden) + hidden @ (second.B @ r2 @ second.A).T).softmax(-1))
        return torch.stack(found).mean(0)

    distance = lambda p, q: float((p - q).abs().sum(-1).mean() / 2)
    agreement = lambda p, q: float((p.argmax(-1) == q.argmax(-1)).float().mean())
    found = against_reference(stored(model, ours), stored(model, theirs), test, draws=50)
    assert found.draws == 10
    p, q, halves = probs(ours), probs(theirs), (probs(theirs[:5]), probs(theirs[5:]))
    assert found.total_variation == pytest.approx(distance(p, q), abs=1e-5)
    assert found.agreement == pytest.approx(agreement(p, q), abs=1e-6) != 1
    assert found.floor.total_variation == pytest.approx(distance(*halves), abs=1e-5)
    assert found.floor.agreement == pytest.approx(agreement(*halves), abs=1e-6) != 1
    assert found.note == ""
    torch.testing.assert_close(found.mean_error.float(), (ours.mean(0) - theirs.mean(0)) / theirs.std(0))


@pytest.mark.parametrize("chains", [1, 2])
def test_a_reference_that_is_not_settled_has_a_high_floor(problem, chains):
    """A lone chain that drifts, or two chains apart: neighbours in a chain are alike, its ends are not."""
    draws = torch.randn(400, 9)
    draws += (
        torch.linspace(-2, 2, 400)[:, None]
        if chains == 1
        else torch.tensor([-1.0, 1.0]).repeat_interleave(200)[:, None]
    )
    floor = against_reference(exact(problem), stored(problem.model, draws, chains)).floor
    assert floor.mean_error.abs().min() > 1
    assert floor.sliced_wasserstein > 1


def test_a_point_and_latents_that_stand_still(problem, truth):
    spec = lb.guides.Delta()
    point = lb.Posterior(problem.model, spec(problem.model), spec)
    found = against_reference(point, truth, draws=50)
    assert (found.log_sd_ratio == -math.inf).all()
    assert math.isnan(found.correlation_error)
    assert found.mean_error.isfinite().all()
    assert "9 of 9 latents do not vary in the posterior" in found.note
    with pytest.raises(ValueError, match="reference with spread, got a point"):
        against_reference(truth, point)
    still = torch.randn(40, 9)
    still[:, 3] = 0.1
    found = against_reference(truth, stored(problem.model, still))
    assert found.mean_error.isnan().tolist() == found.log_sd_ratio.isnan().tolist() == [i == 3 for i in range(9)]
    assert found.table["value"].iloc[:5].notna().all()
    assert "1 of 9 latents do not vary in the reference: left out" in found.note
    with pytest.raises(ValueError, match="latents vary"):
        against_reference(truth, stored(problem.model, torch.ones(40, 9)))


def test_one_latent_and_labels_that_are_no_classes():
    problem = LinearGaussian(rank=1)
    found = against_reference(exact(problem), exact(problem), [problem.batch], draws=50)
    assert math.isnan(found.correlation_error)
    assert math.isnan(found.total_variation)
    assert "fewer than two latents" in found.note
    assert "not known to be over classes" in found.note


def test_every_kind_of_posterior_is_compared():
    rows = token_batches()
    model = lb.BayesianLoRA(tiny_bert(), lb.LoRAXS(2), head="frozen").prepare(rows)
    fit = lambda spec: lb.fit(model, rows, guide=spec, epochs=1, progress=False)
    truth = fit(lb.guides.LowRankPrecision(2))
    several = [
        fit(spec) for spec in (lb.guides.Flow(hidden=4), lb.guides.Mixture(2), lb.guides.Dropout(0.2), AutoNormal)
    ]
    several.append(lb.infer.ensemble(model, rows, members=2, guide=lb.guides.Diagonal(), epochs=1, progress=False))
    for posterior in several:
        found = against_reference(posterior, truth, rows, draws=20, projections=5)
        assert found.mean_error.shape == (32,)
        assert found.table["floor"].notna().all()
        assert 0 < found.total_variation < 1
        assert 0 <= found.agreement <= 1


def test_same_subspace_same_head_and_enough_draws_are_asked_for(problem, truth, monkeypatch):
    def refuse(*args, **kwargs):
        raise AssertionError("drawn before everything was checked")

    rows = token_batches()
    model = lb.BayesianLoRA(tiny_bert(), lb.LoRAXS(2)).prepare(rows)
    fit = lambda model: lb.fit(model, rows, guide=lb.guides.Diagonal(), epochs=1, progress=False)
    longer = lb.fit(model, rows, guide=lb.guides.Diagonal(), epochs=2, progress=False)  # its head moved on
    point_head, bayesian = fit(model), fit(model.with_head("bayesian"))
    fixed = fit(model.with_head(lb.fixed_from(point_head)))
    members = lb.infer.ensemble(model, rows, members=2, epochs=1, progress=False)
    elsewhere = fit(lb.BayesianLoRA(tiny_bert(), lb.LoRAXS(2, lb.projections.Random())).prepare(rows))
    assert against_reference(fixed, point_head, draws=8).draws == 8
    assert against_reference(members, bayesian, draws=9).draws == 8
    few = stored(problem.model, torch.randn(7, 9))
    with pytest.raises(ValueError, match="draws >= 8 of both posteriors, got 6"):
        against_reference(few, truth)
    monkeypatch.setattr(module._Draws, "of", refuse)
    with pytest.raises(ValueError, match="same subspace"):
        against_reference(elsewhere, point_head)
    for posterior in (bayesian, members, longer):
        with pytest.raises(ValueError, match=r"same head.*fixed_from"):
            against_reference(posterior, point_head)
    with pytest.raises(ValueError, match="draws >= 8"):
        against_reference(truth, truth, draws=7)
    with pytest.raises(ValueError, match="projections >= 1"):
        against_reference(truth, truth, projections=0)
