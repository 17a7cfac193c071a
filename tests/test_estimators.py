"""Gradient estimators of the bound against its exact gradient on a linear-Gaussian problem."""

import pyro
import pytest
import torch
from conftest import LinearGaussian, label, tiny_bert, token_batches
from pyro import poutine
from pyro.infer.autoguide import AutoNormal

import pyro_lrblora as lb
from pyro_lrblora.guides.mirrored import Mirrored
from pyro_lrblora.infer.elbo import PartedELBO
from pyro_lrblora.posterior import local_parameters

G = lb.guides
STANDING = lb.Rates(0, 0, 0, 0)


@pytest.fixture(scope="module")
def problem():
    return LinearGaussian(rank=2)


@local_parameters
def off_optimum(problem, spec):
    """A guide with all its parameters away from the start and from the optimum."""
    guide = spec(problem.model)
    g = torch.Generator().manual_seed(1)
    for parameter in guide.parameters():
        parameter.data += 0.3 * torch.randn(parameter.shape, generator=g)
    return guide


@local_parameters
def gradients(problem, guide, repeats, draws, closed=False, path=False, batch=None, **options):
    """Gradients of (repeats) losses in all of the guide's parameters, (repeats, P)."""
    elbo = PartedELBO(closed, problem.model.sites.shapes, guide if path else None, **options)
    program, proposal = (problem.model.rowwise, guide.rowwise) if draws == "row" else (problem.model, guide)
    parameters, found = list(guide.parameters()), []
    for _ in range(repeats):
        loss = elbo.differentiable_loss(program, proposal, batch or problem.batch)
        found.append(torch.cat([g.flatten() for g in torch.autograd.grad(loss, parameters)]))
    return torch.stack(found).double()


def exact_gradient(problem, guide):
    """Of minus the ELBO: the gradient of KL(q || posterior), dense, since the evidence does not depend on q."""
    q = guide.distribution()
    covariance, difference = q.covariance().dense().double(), q.mean.double() - problem.mean
    quadratic = (problem.precision * covariance).sum() + difference @ problem.precision @ difference
    kl = 0.5 * (quadratic - torch.logdet(covariance))
    return torch.cat([g.flatten() for g in torch.autograd.grad(kl, list(guide.parameters()))]).double()


ESTIMATORS = {
    "closed": {"draws": "shared", "closed": True},
    "closed, rows": {"draws": "row", "closed": True},
    "mc": {"draws": "shared"},
    "mc, rows": {"draws": "row"},
    "path": {"draws": "shared", "path": True},
    "path, rows": {"draws": "row", "path": True},
    "antithetic particles": {"draws": "shared", "antithetic": True, "num_particles": 2},
    "antithetic rows": {"draws": "row", "antithetic": True, "closed": True},
    "antithetic path": {"draws": "row", "antithetic": True, "path": True},
    "particles": {"draws": "row", "num_particles": 3},
}


def factored(shapes):
    """The latents are pulled together by a factor, as a prior of one's own may."""
    (name,) = shapes
    value = pyro.sample(name, pyro.distributions.Normal(0.0, 0.7).expand(shapes[name]).to_event())
    pyro.factor("together", -2.0 * value.square().sum((-3, -2, -1)))
    return {name: value}


def cold(shapes):
    with poutine.scale(scale=0.1):
        return lb.priors.Normal(0.7)(shapes)


def flat(shapes):
    with poutine.mask(mask=False):
        return lb.priors.Normal(0.7)(shapes)


@pytest.mark.parametrize("prior", [factored, cold, flat], ids=label)
def test_what_a_prior_adds_to_its_densities_counts_once(problem, prior):
    """The fit's own bound is the log joint minus log q, drawn by hand."""
    model = problem.model.with_prior(prior)
    fit = lb.fit(model, problem.batches(24), guide=G.Diagonal(), rates=lb.Rates(loc=0.03), steps=1000, progress=False)
    values = fit.sample(2000, seed=1)
    joint = []
    for draw in values["R"]:
        trace = poutine.trace(poutine.condition(model, {"R": draw})).get_trace(problem.batch)
        joint.append(float(trace.log_prob_sum()))
    expected = torch.tensor(joint).double() - fit.log_prob(values)
    found = 24 * torch.tensor([row["elbo"] for row in fit.history[-200:]]).double()
    error = (expected.var() / len(expected) + found.var() / len(found)).sqrt()
    assert error < 0.3
    assert abs(found.mean() - expected.mean()) < 4 * error
    if prior is factored:
        with pytest.raises(ValueError, match="together.*once per row"):
            lb.fit(model, problem.batches(24), guide=G.Diagonal(), draws="row", progress=False)


@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_the_mean_gradient_is_exact(problem, estimator):
    guide = off_optimum(problem, G.LowRankPrecision(2))
    found, exact = gradients(problem, guide, 150, **ESTIMATORS[estimator]), exact_gradient(problem, guide)
    error = found.std(0) / len(found) ** 0.5
    assert ((found.mean(0) - exact).abs() <= 4.5 * error + 1e-3 * exact.abs().max()).all()
    assert exact.abs().max() > 6 * error.max()  # a sign or a factor would be seen


@pytest.mark.parametrize("estimator", ["path, rows", "antithetic rows"])
def test_the_mean_gradient_over_batches_is_exact(problem, estimator):
    """Batches of 7, 7, 7 and 3 rows weighted by their sizes, as the plate's scale says."""
    guide = off_optimum(problem, G.LowRankPrecision(2))
    batches = problem.batches(7)
    per_batch = [gradients(problem, guide, 80, batch=batch, **ESTIMATORS[estimator]) for batch in batches]
    shares = [len(batch["x"]) / problem.rows for batch in batches]
    mean = sum(share * found.mean(0) for share, found in zip(shares, per_batch, strict=True))
    variance = sum(share**2 * found.var(0) / 80 for share, found in zip(shares, per_batch, strict=True))
    exact = exact_gradient(problem, guide)
    assert ((mean - exact).abs() <= 4.5 * variance.sqrt() + 1e-3 * exact.abs().max()).all()


@pytest.mark.parametrize("spec", [G.Flow(hidden=4), G.Mixture(2)], ids=label)
def test_the_path_derivative_of_other_families_agrees_with_mc(problem, spec):
    guide = off_optimum(problem, spec)
    path, plain = (gradients(problem, guide, 150, "row", path=path) for path in (True, False))
    error = ((path.var(0) + plain.var(0)) / 150).sqrt()
    assert ((path.mean(0) - plain.mean(0)).abs() <= 4.5 * error + 1e-4).all()
    assert not torch.allclose(path[0], plain[0])


@local_parameters
def exact_posterior_guide(problem):
    guide = G.FullRank()(problem.model)
    guide.set(problem.mean.float(), [torch.linalg.cholesky(torch.linalg.inv(problem.precision))])
    return guide


def test_the_path_derivative_vanishes_at_the_posterior(problem):
    """Every single gradient, not their mean: the landing sticks."""
    guide = exact_posterior_guide(problem)
    path, plain = (gradients(problem, guide, 20, "shared", path=path) for path in (True, False))
    assert path.abs().max() < 1e-4 * plain.abs().max()
    guide.loc.data += 0.1
    moved = gradients(problem, guide, 20, "shared", path=True)
    assert moved.abs().max() > 0.05 * plain.abs().max()


def test_mirrored_pairs_lower_the_variance(problem):
    guide = off_optimum(problem, G.LowRankPrecision(2))
    total = lambda **options: float(gradients(problem, guide, 100, **options).var(0).sum())
    # The log likelihood is quadratic: its linear part, most of it, cancels in a pair.
    two = {"draws": "shared", "num_particles": 2}
    assert total(**two, antithetic=True) < 0.7 * total(**two)
    assert total(**two) < 0.7 * total(draws="shared")


@pytest.mark.parametrize("rows", [1, 4, 5])
def test_rows_are_mirrored_at_the_mean(problem, rows):
    guide = off_optimum(problem, G.LowRankPrecision(2))
    batch = {name: value[:rows] for name, value in problem.batch.items()}
    with Mirrored():
        trace = poutine.trace(guide.rowwise).get_trace(batch)
    draws, half = trace.nodes["_latents"]["value"], (rows + 1) // 2
    assert draws.shape == (rows, 4)
    torch.testing.assert_close(draws[half:] + draws[: rows - half], (2 * guide.loc).expand(rows - half, 4))
    assert len(draws.unique(dim=0)) == rows
    assert torch.equal(trace.nodes["R"]["value"].reshape(rows, 4), draws)


def test_successive_shared_draws_are_mirrored_in_pairs(problem):
    guide = off_optimum(problem, G.LowRankPrecision(2))
    with Mirrored():
        first, second, third, fourth = (poutine.trace(guide).get_trace().nodes["_latents"]["value"] for _ in range(4))
    for a, b in ((first, second), (third, fourth)):
        torch.testing.assert_close(a + b, 2 * guide.loc)
    assert not torch.allclose(first, third)


def test_the_bound_is_averaged_over_particles(problem):
    """ELBO of the exact posterior is the evidence, whatever the draw; likelihood and KL alone are noisy."""
    guide = exact_posterior_guide(problem)
    elbo = PartedELBO(False, problem.model.sites.shapes, num_particles=5)
    with pyro.settings.context(module_local_params=True):
        loss = elbo.differentiable_loss(problem.model, guide, problem.batch)
    assert elbo.bound.elbo == pytest.approx(problem.log_evidence, abs=0.02)
    assert -float(loss.detach()) == pytest.approx(elbo.bound.elbo, abs=1e-3)


# --- what fit makes of its arguments


def spread_of_bound(problem, **options):
    """Standard deviation of the bound over 60 steps that move nothing."""
    posterior = lb.fit(
        problem.model, [problem.batch], guide=G.Diagonal(), epochs=60, rates=STANDING, progress=False, **options
    )
    return torch.tensor([row["elbo"] for row in posterior.history]).std()


def test_fit_passes_particles_and_pairs_on(problem):
    one = spread_of_bound(problem, draws="shared")
    two = spread_of_bound(problem, draws="shared", particles=2)
    eight = spread_of_bound(problem, draws="shared", particles=8)
    paired = spread_of_bound(problem, draws="shared", particles=2, antithetic=True)
    assert 0.25 < eight / one < 0.5
    assert paired < 0.7 * two


@pytest.mark.parametrize("path_derivative", [True, False])
def test_fit_passes_the_path_derivative_on(problem, path_derivative):
    """At the exact posterior, where a gradient without the score term is zero."""
    seen = []

    def at_the_posterior(model):
        guide = exact_posterior_guide(problem)
        guide.begin_at = lambda loc: None
        for parameter in guide.parameters():
            parameter.register_hook(lambda gradient: seen.append(float(gradient.abs().max())))
        return guide

    lb.fit(
        problem.model, [problem.batch], guide=at_the_posterior, steps=3, draws="shared", kl="mc", rates=STANDING,
        path_derivative=path_derivative, progress=False, warm_start=False,
    )  # fmt: skip
    assert len(seen) == 9
    assert (max(seen) < 1e-3) == path_derivative


MEANINGLESS = [
    ({"guide": G.Flow(), "antithetic": True}, TypeError, "symmetric about its mean .* got FlowGuide"),
    ({"guide": G.Mixture(2), "antithetic": True}, TypeError, "symmetric about its mean .* got MixtureGuide"),
    ({"guide": G.Delta(), "antithetic": True}, TypeError, "symmetric about its mean .* got DeltaGuide"),
    ({"guide": AutoNormal, "antithetic": True}, TypeError, "symmetric about its mean .* got AutoNormal"),
    ({"guide": AutoNormal, "path_derivative": True}, TypeError, "with a density .* got AutoNormal"),
    ({"guide": G.Delta(), "path_derivative": True}, TypeError, "with a density .* got DeltaGuide"),
    ({"guide": G.Dropout(), "path_derivative": True}, TypeError, "with a density .* got DropoutGuide"),
    ({"kl": "closed", "path_derivative": True}, ValueError, "expected kl='mc' or 'auto'"),
    ({"draws": "shared", "antithetic": True}, ValueError, "even number of particles .* got 1"),
    ({"draws": "shared", "antithetic": True, "particles": 3}, ValueError, "even number of particles .* got 3"),
    ({"particles": 0}, ValueError, "particles to be an integer >= 1, got particles=0"),
    ({"particles": 1.5}, ValueError, "particles to be an integer >= 1"),
    ({"guide": G.Delta(), "draws": "row"}, TypeError, "declares `rowwise`"),
    ({"guide": G.Flow(), "kl": "closed"}, ValueError, "closed-form KL"),
]


@pytest.mark.parametrize(("options", "error", "message"), MEANINGLESS, ids=lambda value: str(value)[:60])
def test_what_makes_no_sense_is_refused_before_the_network_runs(problem, options, error, message, monkeypatch):
    monkeypatch.setattr(problem.model.network, "forward", lambda **_: pytest.fail("the network ran"))
    with pytest.raises(error, match=message):
        lb.fit(problem.model, [problem.batch], steps=1, progress=False, **options)


@pytest.mark.parametrize("options", [{"antithetic": True}, {"path_derivative": True}, {"particles": 2}], ids=str)
def test_estimators_with_a_priors_own_sites(options):
    """A hierarchical prior's scales have a guide of their own, which keeps its plain gradient."""
    model = lb.BayesianLoRA(tiny_bert(), lb.LoRAXS(2), lb.priors.LayerScale(0.1), head="bayesian")
    posterior = lb.fit(model, token_batches(16), guide=G.LowRank(2), epochs=2, progress=False, **options)
    start = posterior.guide_spec(posterior.model).extra.locs.R_scale
    assert not torch.equal(posterior.guide.extra.locs.R_scale, start)
    assert all(torch.isfinite(parameter).all() for parameter in posterior.guide.parameters())
