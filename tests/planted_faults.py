"""Faults planted into posteriors that are known to be right, and which checks should see them.

Used by tests/test_planted_faults.py, which asserts, and by tests/benchmarks/planted_faults.py, which prints the tables.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import pandas as pd
import torch
from conftest import LinearGaussian
from torch import nn
from truth import exact, posterior_at

import pyro_lrblora as lb
from pyro_lrblora.data import as_batches
from pyro_lrblora.diagnostics import sbc, structure
from pyro_lrblora.guides.draws import Draws, DrawsGuide
from pyro_lrblora.predictive import predict_at

CAUGHT, QUIET, CANNOT = "caught", "quiet", "n/a"
APPROXIMATION = {
    "IWAE - ELBO": "IWAE - ELBO",
    "joint k-hat": "joint k-hat",
    "PSIS-LOO": "rows with a high k-hat",
}
REFERENCE = {
    "mean": "mean error",
    "sd": "log sd ratio",
    "correlation": "correlation error",
    "sliced W2": "sliced Wasserstein",
}
PREDICTION = {
    "training": "training",
    "LOO - test": "LOO per row - test",
    "NLL": "NLL (nats",
    "NLL - mean's": "NLL - NLL",
    "ECE": "ECE",
    "temperature": "temperature",
    "right or wrong": "confidence tells",
    "epistemic share": "epistemic share",
}


@dataclass(frozen=True)
class Fault:
    """One fault.

    Args:
        plant: what makes it; its arguments are those of the function that calls it.
        caught: columns whose check should see it.
        either: columns that may or may not, because the fault moves their number to about its threshold.
    """

    plant: Callable | None
    caught: frozenset[str] = frozenset()
    either: frozenset[str] = frozenset()

    def expected(self, column: str) -> str:
        return "either" if column in self.either else CAUGHT if column in self.caught else QUIET


def fault(plant, caught: str = "", either: str = "") -> Fault:
    split = lambda text: frozenset(filter(None, text.split(", ")))
    return Fault(plant, split(caught), split(either))


# --- the posterior of a linear-Gaussian problem, which is known exactly


def problem() -> LinearGaussian:
    """Three modules of rank 2: D = 12, with correlations of 0.28 (root mean square)."""
    return LinearGaussian(rank=2, modules=3, rows=60)


def _at_the_prior(mean, covariance, where: slice):
    """The latents in `where` as the prior has them."""
    mean, covariance = mean.clone(), covariance.clone()
    mean[where], covariance[where], covariance[:, where] = 0, 0, 0
    covariance[where, where] = 0.7**2 * torch.eye(len(mean[where])).double()
    return mean, covariance


POSTERIOR_FAULTS = {
    "none: the exact posterior": fault(lambda mean, c: (mean, c)),
    "sd x 0.5": fault(lambda mean, c: (mean, c / 4), "IWAE - ELBO, joint k-hat, PSIS-LOO, sd, sliced W2, SBC"),
    "sd x 2": fault(lambda mean, c: (mean, 4 * c), "IWAE - ELBO, sd, sliced W2, SBC", "joint k-hat, PSIS-LOO"),
    "mean shifted by one sd": fault(
        lambda mean, c: (mean + c.diagonal().sqrt(), c), "IWAE - ELBO, joint k-hat, PSIS-LOO, mean, sliced W2, SBC"
    ),
    "correlations removed": fault(
        lambda mean, c: (mean, c.diagonal().diag()),
        "IWAE - ELBO, joint k-hat, PSIS-LOO, correlation, effective rank, SBC",
    ),
    "one module of three left at the prior": fault(
        lambda mean, c: _at_the_prior(mean, c, slice(4, 8)),
        "IWAE - ELBO, joint k-hat, PSIS-LOO, mean, sd, correlation, sliced W2, effective rank, SBC",
    ),
    "two modules of three left at the prior": fault(
        lambda mean, c: _at_the_prior(mean, c, slice(4, 12)),
        "IWAE - ELBO, joint k-hat, PSIS-LOO, mean, sd, correlation, sliced W2, contraction, effective rank, SBC",
    ),
    "collapsed to a point (sd x 0.001)": fault(
        lambda mean, c: (mean, 1e-6 * c), "IWAE - ELBO, joint k-hat, PSIS-LOO, sd, sliced W2, SBC"
    ),
}


def _chain(target: LinearGaussian) -> lb.Posterior:
    """Draws of the exact posterior, stored as those of a converged Markov chain are."""
    torch.manual_seed(0)
    draws = torch.distributions.MultivariateNormal(target.mean, precision_matrix=target.precision).sample((1, 1000))
    return lb.Posterior(target.model, DrawsGuide(target.model.sites.split(draws.float())), Draws(1, 1000))


def posterior_cells(name: str, target: LinearGaussian, simulations: int | None = None) -> dict[str, str]:
    """What every check says of the exact posterior with a fault: column -> caught, quiet or n/a.

    Args:
        name: key of POSTERIOR_FAULTS.
        target: what `problem` returned.
        simulations: refits of simulation-based calibration; None leaves it out.
    """
    plant, covariance = POSTERIOR_FAULTS[name].plant, target.precision.inverse()
    faulty, truth = posterior_at(target, *plant(target.mean, covariance)), exact(target)
    found = lb.diagnose(faulty, [target.batch], train=[target.batch], reference=_chain(target), evidence_draws=200)
    cells = _cells(found, APPROXIMATION | REFERENCE | {"contraction": "modules that learned"})
    ranks = [structure(each, draws=8).effective_rank for each in (faulty, truth)]
    cells["effective rank"] = CAUGHT if abs(math.log(ranks[0] / ranks[1])) > 0.1 else QUIET
    if simulations:
        cells["SBC"] = QUIET if calibrated(target, plant, simulations).uniform else CAUGHT
    return cells


def calibrated(target: LinearGaussian, plant, simulations: int):
    """Simulation-based calibration of refits that are exact but for the fault."""
    batches, covariance = target.batches(target.rows), target.precision.inverse()
    clean = target.model.network(target.batch["x"]).double()
    noise = target.model.likelihood.sd.double()
    seen = target.model.network.inputs(target.batch["x"])
    jacobian = torch.cat(
        [
            torch.einsum("mr,sn,bn->bmrs", basis.B, basis.A, x).flatten(0, 1).flatten(1)
            for basis, x in zip(target.model.adapted.bases.values(), seen, strict=True)
        ],
        dim=1,
    ).double()

    def refit(model, train, seed):
        weighted = ((train[0]["labels"].double() - clean) / noise**2).flatten()
        return posterior_at(target, *plant(covariance @ jacobian.T @ weighted, covariance))

    return sbc(target.model, batches, refit, simulations=simulations, draws=19, progress=False)


# --- predictions of a classifier whose labels were drawn from the model itself


class Classifier(nn.Module):
    """Three classes, linear in two modules, so that with enough rows the posterior is nearly normal."""

    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Linear(5, 3, bias=False), nn.Linear(5, 3, bias=False)
        for layer in (self.first, self.second):
            layer.weight.data.mul_(0.1)
        self.sharpness = 1.0

    def forward(self, x):
        return self.sharpness * (self.first(x) + self.second(x.roll(1, -1).abs()))


class Classification:
    """A model, rows of each role drawn from it at one draw of the prior, and a normal fit of its posterior."""

    scale = 0.6  # of the prior

    def __init__(self, rows: int = 300, seed: int = 11):
        torch.manual_seed(seed)
        self.network = Classifier().requires_grad_(False)
        adapter = lb.LoRAXS(2, lb.projections.Random(), targets="all-linear")
        self.model = lb.BayesianLoRA(self.network, adapter, lb.priors.Normal(self.scale), head="frozen", size=rows)
        self.truth = {name: self.scale * torch.randn(1, *shape) for name, shape in self.model.sites.shapes.items()}
        self.train, self.validation, self.test = (self.drawn(n) for n in (rows, 400, 800))
        self.posterior = self.converged(self.train)

    def drawn(self, rows: int, sign: float = 1.0, shift: float = 0.0) -> list[dict]:
        """Inputs around `shift` and labels by the true rule, or by its opposite."""
        x = shift + torch.randn(rows, 5)
        truth = {name: sign * value for name, value in self.truth.items()}
        probs = predict_at(self.model, as_batches([{"x": x}]), truth, self.model.head_values()).probs
        return [{"x": x, "labels": torch.multinomial(probs, 1)[:, 0]}]

    def fitted(self, train, **options) -> lb.Posterior:
        settings = {"draws": "shared", "path_derivative": True, "rates": lb.Rates(loc=0.03, scale=0.03, factor=0.02)}
        return lb.fit(self.model, train, guide=lb.guides.FullRank(), progress=False, **(settings | options))

    def converged(self, train) -> lb.Posterior:
        """From a Laplace approximation, which is near already."""
        point = lb.fit(self.model, train, guide=lb.guides.Delta(), epochs=150, rates=lb.Rates(loc=0.05), progress=False)
        start = lb.infer.laplace(self.model, train, structure="full", init=point)
        return self.fitted(train, epochs=200, init=start, warm_start=False)

    def moved(self, factor: float = 1.0, shift: float = 0.0) -> lb.Posterior:
        """The posterior with its sds multiplied and its mean shifted, in sds."""
        good = self.posterior
        covariance, mean = good.covariance().dense(), good.model.sites.join(good.mean())
        guide = good.guide_spec(good.model)
        root = factor * torch.linalg.cholesky(covariance)
        guide.set(mean + shift * covariance.diagonal().sqrt(), [root])
        return lb.Posterior(good.model, guide, good.guide_spec, good.history, good.settings)


def _shuffled(task):
    train = [{**task.train[0], "labels": task.train[0]["labels"][torch.randperm(task.model.size)]}]
    return {"posterior": task.converged(train), "train": train}


def _early(task):
    (whole,) = task.train
    batches = [{name: value[i : i + 20] for name, value in whole.items()} for i in range(0, len(whole["x"]), 20)]
    return {"posterior": task.fitted(batches, epochs=4, schedule="constant", warm_start=False)}


WEIGHTS = "IWAE - ELBO, joint k-hat, PSIS-LOO"
PREDICTION_FAULTS = {
    "none: fitted to convergence": fault(lambda task: {}),
    "sd x 0.5": fault(lambda task: {"posterior": task.moved(factor=0.5)}, f"{WEIGHTS}, epistemic share"),
    "sd x 2": fault(
        lambda task: {"posterior": task.moved(factor=2.0)}, "IWAE - ELBO", "joint k-hat, PSIS-LOO, NLL - mean's, ECE"
    ),
    "mean shifted by one sd": fault(lambda task: {"posterior": task.moved(shift=1.0)}, WEIGHTS),
    "collapsed to a point (sd x 0.001)": fault(
        lambda task: {"posterior": task.moved(factor=1e-3)}, f"{WEIGHTS}, epistemic share"
    ),
    "training labels shuffled": fault(
        _shuffled, "NLL", "PSIS-LOO, LOO - test, NLL - mean's, ECE, temperature, right or wrong"
    ),
    "logits x 3": fault(lambda task: {"sharpness": 3.0}, f"{WEIGHTS}, ECE, temperature, NLL"),
    "training stopped early": fault(_early, f"training, {WEIGHTS}", "ECE, temperature, epistemic share"),
    "test labels of the opposite rule": fault(
        lambda task: {"test": task.drawn(800, sign=-1.0)}, "LOO - test, NLL, ECE, right or wrong"
    ),
    "test inputs shifted by 1.5 sds": fault(
        lambda task: {"test": task.drawn(800, shift=1.5)}, "LOO - test", "NLL - mean's, ECE, right or wrong"
    ),
}


def prediction_cells(name: str, task: Classification) -> dict[str, str]:
    """What every check says of the classifier with a fault: column -> caught, quiet or n/a.

    Args:
        name: key of PREDICTION_FAULTS.
        task: the same for all faults.
    """
    torch.manual_seed(1)
    changed = {"posterior": task.posterior, "train": task.train, "test": task.test, "sharpness": 1.0}
    changed |= PREDICTION_FAULTS[name].plant(task)
    task.network.sharpness = changed["sharpness"]
    try:
        found = lb.diagnose(
            changed["posterior"], changed["test"], train=changed["train"], validation=task.validation, draws=64,
            evidence_draws=200,
        )  # fmt: skip
    finally:
        task.network.sharpness = 1.0
    return _cells(found, APPROXIMATION | PREDICTION)


def _cells(diagnosis, columns: dict[str, str]) -> dict[str, str]:
    """Column -> caught, quiet or n/a, by the verdict of the row whose name begins so."""
    words = {"good": QUIET, "warning": CAUGHT, "bad": CAUGHT, "not checked": CANNOT}
    verdict = lambda start: next(check.verdict for check in diagnosis.checks if check.check.startswith(start))
    return {column: words[verdict(start)] for column, start in columns.items()}


def table(cells: dict[str, dict[str, str]], faults: dict[str, Fault]) -> pd.DataFrame:
    """Faults x checks; a cell that is not as expected says so."""
    rows = {}
    for name, row in cells.items():
        wrong = lambda column, cell, name=name: faults[name].expected(column) not in (cell, "either") and cell != CANNOT
        rows[name] = {
            column: f"**{cell}, expected {faults[name].expected(column)}**" if wrong(column, cell) else cell
            for column, cell in row.items()
        }
    return pd.DataFrame.from_dict(rows, orient="index").rename_axis("fault")
