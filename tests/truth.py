"""Targets with known posteriors, the best each family can do on them, and what the fits reach.

Used by tests/test_truth.py, which asserts, and by tests/benchmarks/truth.py, which prints the whole table.
"""

from __future__ import annotations

import math
import warnings
from dataclasses import dataclass

import torch
from conftest import LinearGaussian
from torch import nn

import pyro_lrblora as lb
from pyro_lrblora.posterior import local_parameters

G = lb.guides
RANK = 3


def posterior_at(problem, mean, covariance):
    """A normal posterior of given moments."""
    spec = lb.guides.FullRank()
    guide = spec(problem.model)
    guide.set(mean.float(), [torch.linalg.cholesky(covariance).float()])
    return lb.Posterior(problem.model, guide, spec)


def exact(problem):
    """The posterior itself."""
    return posterior_at(problem, problem.mean, problem.precision.inverse())


def best_diagonal(problem) -> float:
    """KL of the best diagonal normal: precisions are the posterior precision's diagonal (Bishop 2006, 10.2)."""
    return problem.reverse_kl(problem.mean, torch.diag(1 / problem.precision.diagonal()))


def best_blocks(problem) -> float:
    """KL of the best normal that is independent between modules: blocks of the precision, inverted."""
    blocks = [torch.linalg.inv(problem.precision[w, w]) for w in problem.model.sites.modules()]
    return problem.reverse_kl(problem.mean, torch.block_diag(*blocks))


def best_low_rank(problem, form: str, rank: int, per_module: bool = False) -> float:
    """Least KL of a diagonal-plus-rank-K covariance or precision."""
    places = list(problem.model.sites.modules()) if per_module else [slice(0, problem.size)]

    def covariance(log_diagonal, factor):
        blocks = []
        for where in places:
            matrix = torch.diag(log_diagonal[where].clamp(-20, 20).exp()) + factor[where] @ factor[where].T
            blocks.append(matrix if form == "covariance" else torch.linalg.inv(matrix))
        return torch.block_diag(*blocks)

    return _least_kl(problem, covariance, [(problem.size,), (problem.size, rank)])


def best_kronecker(problem) -> float:
    """Least KL of a Kronecker product per module."""
    shape = next(iter(problem.model.sites.shapes.values()))

    def covariance(rows, columns):
        return torch.block_diag(*(torch.kron(a @ a.T, b @ b.T) for a, b in zip(rows, columns, strict=True)))

    return _least_kl(problem, covariance, [(shape[0], shape[1], shape[1]), (shape[0], shape[2], shape[2])])


def best_rotated(problem, posterior) -> float:
    """Least KL in a fitted RotatedDiagonal's own basis: the precision's diagonal there."""
    sites = problem.model.sites
    (name,) = sites.shapes
    rotations = [
        torch.kron(u, v).double()
        for u, v in zip(
            getattr(posterior.guide, f"left_{name}"), getattr(posterior.guide, f"right_{name}"), strict=True
        )
    ]
    rotation = torch.block_diag(*rotations)
    diagonal = (rotation.T @ problem.precision @ rotation).diagonal()
    return problem.reverse_kl(problem.mean, rotation @ torch.diag(1 / diagonal) @ rotation.T)


def _least_kl(problem, covariance, shapes, starts: int = 6) -> float:
    best, log_det = float("inf"), torch.logdet(problem.precision)
    for seed in range(starts):
        g = torch.Generator().manual_seed(seed)
        parameters = [torch.randn(shape, generator=g).double().requires_grad_() for shape in shapes]
        optimiser = torch.optim.LBFGS(parameters, max_iter=800, line_search_fn="strong_wolfe")

        def kl(parameters=parameters):
            matrix = covariance(*parameters)
            return 0.5 * ((problem.precision * matrix).sum() - problem.size - log_det - torch.logdet(matrix))

        def closure(kl=kl, optimiser=optimiser):
            optimiser.zero_grad()
            value = kl()
            value.backward()
            return value

        optimiser.step(closure)
        best = min(best, float(kl().detach().nan_to_num(float("inf"))))
    return best


def fit(problem, guide, **options):
    """SVI on the full data until it has converged."""
    settings = {
        "epochs": 2000,
        "rates": lb.Rates(loc=0.02, scale=0.05, factor=0.1),
        "progress": False,
        "clip": None,
    }
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", lb.ScalesNotConverged)
        return lb.fit(problem.model, [problem.batch], guide=guide, **(settings | options))


def fitted_kl(problem, posterior, draws: int = 20_000) -> float:
    """KL(q || exact posterior) in nats; by Monte Carlo where q has no covariance in closed form."""
    try:
        covariance = posterior.covariance().dense()
    except TypeError:
        return _sampled_kl(problem, posterior, draws)
    return problem.reverse_kl(problem.model.sites.join(posterior.mean()), covariance)


@local_parameters
@torch.no_grad()
def _sampled_kl(problem, posterior, draws: int) -> float:
    torch.manual_seed(0)
    q = posterior.guide.distribution()
    exact = torch.distributions.MultivariateNormal(problem.mean, precision_matrix=problem.precision)
    x = q.rsample((draws,))
    return float((q.log_prob(x).double() - exact.log_prob(x.double())).mean())


ANTITHETIC = {"particles": 4, "antithetic": True}
# Shared draws and the path derivative: the gradient's noise vanishes at the posterior itself.
PATH = {"draws": "shared", "path_derivative": True, "rates": lb.Rates(loc=0.02, scale=0.02, factor=0.02)}
FAST = lb.Rates(loc=0.1, scale=0.05, factor=0.1)


@dataclass(frozen=True)
class Case:
    """One family on the shared target.

    Args:
        guide: its spec.
        best: (problem, posterior) -> the least KL its family can reach, in nats; None where that is not known.
        options: of the fit.
        quick: what the test changes in them: it comes less close than the table of `make truth`, in less time.
        tolerance: nats allowed above the best, where 5% of it is less.
    """

    guide: object
    best: object
    options: dict
    quick: dict
    tolerance: float = 0.02

    def __repr__(self) -> str:
        return repr(self.guide)


def fast(steps: int, particles: int = 2) -> dict:
    """Fewer steps at higher rates, of fewer draws."""
    return {"epochs": steps, "rates": FAST, "particles": particles}


CASES = [
    Case(G.Diagonal(), lambda p, _: best_diagonal(p), ANTITHETIC, fast(500)),
    Case(G.LowRank(RANK), lambda p, _: best_low_rank(p, "covariance", RANK), ANTITHETIC, fast(1200)),
    Case(G.LowRankPrecision(RANK), lambda p, _: best_low_rank(p, "precision", RANK), ANTITHETIC, fast(1200)),
    # Its warm start leads to a stationary point that is not the best one.
    Case(G.BlockLowRank(2), lambda p, _: best_low_rank(p, "precision", 2, True), ANTITHETIC, fast(800), 0.5),
    Case(G.BlockLowRank(2, form="covariance"), lambda p, _: best_low_rank(p, "covariance", 2, True), ANTITHETIC,
         fast(800)),
    Case(G.MatrixNormal(), lambda p, _: best_kronecker(p), ANTITHETIC, fast(600)),
    Case(G.RotatedDiagonal(), best_rotated, ANTITHETIC, fast(500)),
    Case(G.FullRank(per_module=True), lambda p, _: best_blocks(p), ANTITHETIC, fast(1000), 0.1),
    Case(G.FullRank(), lambda p, _: 0.0, PATH, {}, 0.01),
    Case(G.Flow(2, 16), None, {"particles": 4, "rates": lb.Rates(loc=0.02, scale=0.02, factor=5e-3)},
         {"epochs": 1000, "particles": 2, "rates": lb.Rates(loc=0.05, scale=0.05, factor=1e-2)}),
    # Three components take at most log 3 off the KL of the best one: a lower bound.
    Case(G.Mixture(3), lambda p, _: best_diagonal(p) - math.log(3), {"particles": 4}, fast(800), 0.3),
]  # fmt: skip


def shared_target() -> LinearGaussian:
    """Two modules of rank 3: D = 18, correlated within and between them."""
    return LinearGaussian(rank=3, modules=2)


class TwoLayers(nn.Module):
    """A classifier with one hidden layer of tanh units: its posterior is not normal."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(3)
        self.first, self.second = nn.Linear(5, 8), nn.Linear(8, 2)

    def forward(self, x):
        return self.second(torch.tanh(self.first(x)))


def two_layer_problem(prior, rank: int = 2) -> tuple[lb.BayesianLoRA, list[dict], list[dict]]:
    """Model (D = 2 rank^2), training batch and 200 further inputs."""
    network = TwoLayers().requires_grad_(False)
    torch.manual_seed(4)
    x = torch.randn(260, 5)
    labels = (x[:, 0] * x[:, 1] + x[:, 2] > 0).long()
    model = lb.BayesianLoRA(network, lb.LoRAXS(rank, targets="all-linear"), prior, size=60)
    return model, [{"x": x[:60], "labels": labels[:60]}], [{"x": x[60:]}]
