"""Every guide against the exact posterior of a linear-Gaussian problem, and against the best its family can do."""

import pytest
import torch
from conftest import LinearGaussian

import pyro_lrblora as lb
from pyro_lrblora.infer.elbo import PartedELBO

RANK = 3


def best_diagonal(problem) -> float:
    """KL of the best diagonal normal: precisions are the posterior precision's diagonal (Bishop 2006, 10.2)."""
    return problem.reverse_kl(problem.mean, torch.diag(1 / problem.precision.diagonal()))


def best_reverse_kl(problem, family: str, starts: int = 6) -> float:
    """The least KL of a diagonal-plus-rank-K covariance or precision, by L-BFGS from several starts in float64."""
    best, log_det = float("inf"), torch.logdet(problem.precision)
    for seed in range(starts):
        g = torch.Generator().manual_seed(seed)
        log_diagonal = torch.randn(problem.size, generator=g).double().requires_grad_()
        factor = torch.randn(problem.size, RANK, generator=g).double().requires_grad_()
        optimiser = torch.optim.LBFGS([log_diagonal, factor], max_iter=800, line_search_fn="strong_wolfe")

        def kl(log_diagonal=log_diagonal, factor=factor):
            matrix = torch.diag(log_diagonal.clamp(-20, 20).exp()) + factor @ factor.T
            sign = 1 if family == "covariance" else -1
            trace = (
                (problem.precision * matrix).sum()
                if family == "covariance"
                else torch.linalg.solve(matrix, problem.precision).diagonal().sum()
            )
            return 0.5 * (trace - problem.size - log_det - sign * torch.logdet(matrix))

        def closure(kl=kl, optimiser=optimiser):
            optimiser.zero_grad()
            value = kl()
            value.backward()
            return value

        optimiser.step(closure)
        best = min(best, float(kl().detach().nan_to_num(float("inf"))))
    return best


@pytest.fixture(scope="module")
def problem():
    return LinearGaussian(rank=4)


def fit(problem, guide, **options):
    """SVI until converged, on the full data."""
    settings = {
        "epochs": 1500,
        "rates": lb.Rates(loc=0.02, scale=0.02, factor=0.02),
        "progress": False,
        "clip": None,
    }
    return lb.fit(problem.model, [problem.batch], guide=guide, **(settings | options))


def fitted_kl(problem, posterior) -> float:
    mean = problem.model.sites.join(posterior.mean())
    return problem.reverse_kl(mean, posterior.covariance().dense())


@pytest.mark.parametrize("kl", ["closed", "mc"])
@pytest.mark.parametrize("draws", ["row", "shared"])
def test_diagonal_reaches_the_best_diagonal(problem, kl, draws):
    reached, best = (
        fitted_kl(problem, fit(problem, lb.guides.Diagonal(), kl=kl, draws=draws)),
        best_diagonal(problem),
    )
    assert best > 1.0  # a target a diagonal must fail on
    assert best - 1e-6 < reached < best + max(0.05 * best, 0.02)


@pytest.mark.parametrize(
    ("guide", "family"),
    [(lb.guides.LowRank(RANK), "covariance"), (lb.guides.LowRankPrecision(RANK), "precision")],
    ids=["LowRank", "LowRankPrecision"],
)
@pytest.mark.parametrize("warm_start", [True, False], ids=["warm", "cold"])
def test_low_rank_reaches_the_best_of_its_rank(problem, guide, family, warm_start):
    best = best_reverse_kl(problem, family)
    rates = lb.Rates(loc=0.02, scale=0.05, factor=0.2)
    reached = fitted_kl(problem, fit(problem, guide, draws="row", rates=rates, epochs=3000, warm_start=warm_start))
    assert best < 0.8 * best_diagonal(problem)
    assert best - 1e-4 < reached < best + max(0.05 * best, 0.02)


def test_delta_reaches_the_mode(problem):
    posterior = fit(problem, lb.guides.Delta())
    distance = problem.model.sites.join(posterior.mean()).double() - problem.mean
    sd = torch.linalg.inv(problem.precision).diagonal().sqrt()
    assert (distance.abs() / sd).max() < 0.05


def test_elbo_is_the_evidence_minus_the_kl(problem):
    """ELBO = log evidence - KL(q || posterior), both known exactly; the closed form of the KL included."""
    posterior = fit(problem, lb.guides.LowRankPrecision(RANK), epochs=20)
    expected = problem.log_evidence - fitted_kl(problem, posterior)
    from pyro_lrblora.posterior import local_parameters

    @local_parameters
    def estimate(closed):
        elbo = PartedELBO(closed, problem.model.sites.shapes)
        return torch.tensor([-elbo.loss(posterior.model, posterior.guide, problem.batch) for _ in range(3000)])

    @local_parameters
    def closed_estimate():
        elbo = PartedELBO(True, problem.model.sites.shapes)
        values = []
        with torch.no_grad():
            for _ in range(3000):
                elbo.differentiable_loss(posterior.model, posterior.guide, problem.batch)
                values.append(elbo.bound.elbo)
        return torch.tensor(values)

    for values in (estimate(False), closed_estimate()):
        assert abs(values.mean() - expected) < 4 * values.std() / len(values) ** 0.5


def test_fisher_of_a_linear_gaussian_model(problem):
    """Against J' J / noise^2; labels drawn from the model make it right in expectation."""
    from pyro_lrblora.fisher import fisher

    at = torch.zeros(problem.size)
    batches = problem.batches(12) * 400
    estimated = fisher(problem.model._copy(size=24 * 400), batches, at, rank=16)
    matrix = (estimated.vectors * estimated.values) @ estimated.vectors.T / 400
    assert (matrix.double() - problem.fisher).norm() / problem.fisher.norm() < 0.08
    torch.testing.assert_close(estimated.diagonal.double() / 400, problem.fisher.diagonal(), rtol=0.15, atol=0.05)


def test_fisher_of_a_classifier_is_exact():
    """Enumerated labels: sum_b sum_c p_bc g g' against autograd's Jacobian of the log probabilities."""
    from conftest import tiny_bert, token_batches

    from pyro_lrblora.fisher import fisher

    batches = token_batches(16)
    model = lb.BayesianLoRA(tiny_bert(), lb.LoRAXS(2), size=16)
    at = 0.1 * torch.randn(model.sites.size)

    def log_probs(flat, batch):
        return model.outputs(batch, model.sites.split(flat), model.head_start).logits.log_softmax(-1)

    exact = torch.zeros(model.sites.size, model.sites.size)
    for batch in batches:
        jacobian = torch.autograd.functional.jacobian(lambda flat, batch=batch: log_probs(flat, batch), at)
        exact += torch.einsum("bc,bcd,bce->de", log_probs(at, batch).exp(), jacobian, jacobian)
    estimated = fisher(model, batches, at, rank=32)
    torch.testing.assert_close(estimated.diagonal, exact.diagonal(), rtol=1e-3, atol=1e-5)
    torch.testing.assert_close(
        (estimated.vectors * estimated.values) @ estimated.vectors.T,
        exact,
        rtol=1e-2,
        atol=1e-3 * float(exact.max()),
    )
    values = torch.linalg.eigvalsh(exact).flip(0)[:5]
    torch.testing.assert_close(fisher(model, batches, at, rank=5).values, values, rtol=2e-2, atol=0)
