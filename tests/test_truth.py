"""Every family and method against targets whose posterior is known: one row of `truth.CASES` per family."""

import warnings

import pytest
import torch
from conftest import label
from truth import (
    ANTITHETIC,
    CASES,
    best_diagonal,
    best_low_rank,
    fast,
    fit,
    fitted_kl,
    shared_target,
    two_layer_problem,
)

import pyro_lrblora as lb
from pyro_lrblora.diagnostics.reference import against_reference
from pyro_lrblora.infer.elbo import PartedELBO
from pyro_lrblora.posterior import local_parameters


@pytest.fixture(scope="module")
def problem():
    return shared_target()


@pytest.fixture(scope="module")
def mode(problem):
    # With two modules the normal equations are badly conditioned: the point needs many steps to be the mode.
    return fit(problem, lb.guides.Delta(), **fast(1000, particles=1))


@pytest.mark.parametrize("case", CASES, ids=label)
def test_a_family_reaches_the_best_it_can_do(problem, case):
    posterior = fit(problem, case.guide, **case.options | case.quick)
    reached = fitted_kl(problem, posterior)
    if case.best is None:
        assert reached < 0.4 * best_diagonal(problem)
        return
    best = case.best(problem, posterior)
    assert best - 1e-3 < reached < best + max(0.05 * best, case.tolerance)


@pytest.mark.parametrize(
    ("guide", "share"), [(lb.guides.LowRank(3), 0.5), (lb.guides.LowRankPrecision(3), 0.1)], ids=label
)
def test_a_cold_start_arrives_near(problem, guide, share):
    """From random columns LowRank stops at a stationary point that is not the best one; the warm start finds that."""
    form = "precision" if "Precision" in repr(guide) else "covariance"
    reached = fitted_kl(problem, fit(problem, guide, warm_start=False, **ANTITHETIC | fast(600)))
    best = best_low_rank(problem, form, 3)
    assert reached < (1 + share) * best


def test_where_a_diagonal_must_fail_a_low_rank_does_not(problem):
    """A diagonal fails by the sum of logs that its conditional variances leave out; enough columns are exact."""
    posterior = torch.linalg.inv(problem.precision)
    known = 0.5 * (torch.logdet(posterior) + problem.precision.diagonal().log().sum())
    assert known > 2
    assert abs(best_diagonal(problem) - float(known)) < 1e-6
    for guide in (lb.guides.LowRank(17), lb.guides.LowRankPrecision(17)):
        assert fitted_kl(problem, fit(problem, guide, **ANTITHETIC | fast(500))) < 0.1 * float(known)


@pytest.mark.parametrize("kl", ["closed", "mc"])
@pytest.mark.parametrize("draws", ["row", "shared"])
def test_diagonal_reaches_the_best_diagonal_however_it_is_estimated(problem, kl, draws):
    posterior = fit(problem, lb.guides.Diagonal(), kl=kl, draws=draws, **fast(500, particles=1))
    reached, best = fitted_kl(problem, posterior), best_diagonal(problem)
    assert best - 1e-3 < reached < best + max(0.05 * best, 0.02)


def test_delta_reaches_the_mode(problem, mode):
    distance = problem.model.sites.join(mode.mean()).double() - problem.mean
    sd = torch.linalg.inv(problem.precision).diagonal().sqrt()
    assert (distance.abs() / sd).max() < 0.05


@pytest.mark.parametrize("structure", ["low_rank", "full"])
def test_laplace_is_exact_where_the_posterior_is_normal(problem, mode, structure):
    posterior = laplace(problem, mode, structure)
    assert fitted_kl(problem, posterior) < 1e-3
    assert abs(posterior.settings["log_evidence"] - problem.log_evidence) < 1e-3


def test_diagonal_laplace_is_the_best_diagonal(problem, mode):
    posterior = laplace(problem, mode, "diagonal")
    assert abs(fitted_kl(problem, posterior) - best_diagonal(problem)) < 1e-3


def laplace(problem, mode, structure):
    return lb.infer.laplace(problem.model, [problem.batch], structure=structure, rank=18, init=mode)


def test_elbo_is_the_evidence_minus_the_kl(problem):
    """ELBO = log evidence - KL(q || posterior), both known exactly; the closed form of the KL included."""
    posterior = fit(problem, lb.guides.LowRankPrecision(3), epochs=20)
    expected = problem.log_evidence - fitted_kl(problem, posterior)

    @local_parameters
    def estimate(closed):
        elbo = PartedELBO(closed, problem.model.sites.shapes)
        return torch.tensor([-elbo.loss(posterior.model, posterior.guide, problem.batch) for _ in range(1500)])

    @local_parameters
    def closed_estimate():
        elbo = PartedELBO(True, problem.model.sites.shapes)
        values = []
        with torch.no_grad():
            for _ in range(1500):
                elbo.differentiable_loss(posterior.model, posterior.guide, problem.batch)
                values.append(elbo.bound.elbo)
        return torch.tensor(values)

    for values in (estimate(False), closed_estimate()):
        assert abs(values.mean() - expected) < 4 * values.std() / len(values) ** 0.5


@pytest.fixture(scope="module")
def reference():
    """Priors by name, each with its NUTS posterior on the two-layer network (D = 8)."""
    found = {}

    def of(prior):
        if repr(prior) not in found:
            model, train, test = two_layer_problem(prior)
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                nuts = lb.infer.nuts(model, train, draws=200, warmup=150, chains=2, progress=False)
            found[repr(prior)] = model, train, test, nuts
        return found[repr(prior)]

    return of


@pytest.mark.parametrize("prior", [lb.priors.Normal(1.0), lb.priors.Laplace(0.4)], ids=label)
def test_families_against_nuts_on_a_network_that_is_not_linear(reference, prior):
    model, train, test, nuts = reference(prior)
    assert nuts.settings["r_hat"] < 1.05
    distance = {}
    guides = [lb.guides.Diagonal(), lb.guides.FullRank()]
    if isinstance(prior, lb.priors.Normal):
        guides += [lb.guides.LowRank(4), lb.guides.LowRankPrecision(4)]
    for guide in guides:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", lb.ScalesNotConverged)
            rates = lb.Rates(loc=0.03, scale=0.03, factor=0.03)
            posterior = lb.fit(model, train, guide=guide, epochs=250, rates=rates, progress=False)
        found = against_reference(posterior, nuts, test)
        distance[type(guide).__name__] = found.correlation_error
        assert found.mean_error.abs().mean() < 0.4, (guide, found.table)
        assert 0.6 < found.log_sd_ratio.mean().exp() < 1.1, (guide, found.table)
        assert found.total_variation < 0.03, (guide, found.table)
    if isinstance(prior, lb.priors.Normal):
        point = lb.fit(model, train, guide=lb.guides.Delta(), epochs=800, rates=lb.Rates(loc=0.02), progress=False)
        laplace = lb.infer.laplace(model, train, structure="full", init=point)
        assert against_reference(laplace, nuts, test).total_variation < 0.05
    assert distance["FullRank"] < 0.75 * distance["Diagonal"]
