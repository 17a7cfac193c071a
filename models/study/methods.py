"""The study's methods: how each is fitted, and the one setting of each that is tuned, among four values."""

from __future__ import annotations

import argparse
import math
import time
from collections.abc import Callable
from dataclasses import dataclass, replace

from tasks import Problem

import pyro_lrblora as lb

FLAT = lb.priors.Normal(1e3)  # no weight decay, as the published points have none
G = lb.guides


@dataclass(frozen=True)
class Variation:
    """What the default configuration of this library is made of, and what the study changes in it.

    Args:
        guide, projection, rank, prior: see lb.fit and lb.LoRAXS; the prior takes a scale.
        scale: of the prior.
        head: see lb.BayesianLoRA.
        options: of lb.fit beside them.
    """

    guide: object = G.LowRankPrecision(10)
    projection: object = lb.projections.Gradient()
    rank: int = 8
    prior: Callable = lb.priors.Normal
    scale: float = 0.1
    head: str = "point"
    options: tuple[tuple[str, object], ...] = ()


class Fits:
    """The fits of one problem, which share prepared models and points.

    Args:
        problem: the rows.
        args: the study's command line.
    """

    def __init__(self, problem: Problem, args: argparse.Namespace):
        self.problem, self.args = problem, args
        self.borrowed = 0.0  # CPU seconds of fits made before and used again, less those that prepared a network
        self._models: dict[str, lb.BayesianLoRA] = {}
        self._points: dict[str, tuple[lb.Posterior, float]] = {}

    def model(self, adapter, prior=FLAT) -> lb.BayesianLoRA:
        """The network with an adapter, prepared once, under a prior."""
        if repr(adapter) not in self._models:
            begun = time.process_time()
            model = lb.BayesianLoRA(self.problem.network, adapter, likelihood=self.problem.likelihood)
            self._models[repr(adapter)] = model.prepare(self.problem.train, seed=self.problem.seed)
            self.borrowed -= time.process_time() - begun
        return self._models[repr(adapter)].with_prior(prior)

    def options(self) -> dict:
        """What every fit by lb.fit gets: the same epochs, and the epoch with the best validation NLL of them."""
        return {
            "epochs": self.args.epochs, "validation": self.problem.validation, "keep_best": True,
            "validation_draws": 4, "seed": self.problem.seed, "progress": False,
        }  # fmt: skip

    def fit(self, model: lb.BayesianLoRA, guide, **options) -> lb.Posterior:
        """lb.fit with these options."""
        return lb.fit(model, self.problem.train, guide=guide, **self.options() | options)

    def point(self, adapter, rate: float) -> lb.Posterior:
        """A point fit, made once."""
        key = f"{adapter!r} {rate}"
        if key in self._points:
            self.borrowed += self._points[key][1]
        else:
            model, begun = self.model(adapter), time.process_time()
            point = self.fit(model, G.Delta(), rates=lb.Rates(loc=rate))
            self._points[key] = point, time.process_time() - begun
        return self._points[key][0]

    def vary(self, variation: Variation) -> lb.Posterior:
        """This library's own fit."""
        adapter = lb.LoRAXS(variation.rank, variation.projection, "all-linear")
        model = self.model(adapter, variation.prior(variation.scale)).with_head(variation.head)
        return self.fit(model, variation.guide, **dict(variation.options))


LORA = lb.LoRA(8, "all-linear", alpha=16)
LORA_XS = lb.LoRAXS(8, lb.projections.SVD(absorb_singular_values=True), "all-linear")
# Three values each, and then one beyond the end that was best of them (where none was, beyond the upper one).
LORA_RATES, XS_RATES = (1e-4, 3e-4, 1e-3, 3e-3), (3e-4, 1e-3, 3e-3, 1e-2)
PRIOR_SCALES = (0.05, 0.1, 0.2, 0.4)


@dataclass(frozen=True)
class Method:
    """One row of the table.

    Args:
        fit: from the fits of a problem and the tuned value.
        tunes: what the value is.
        grid: the four values that are tried on the development tasks.
        predict: the method of lb.predict.
        tuned_as: the method whose value is taken, for a method that only adds to that one's fit.
    """

    fit: Callable[[Fits, float], lb.Posterior]
    tunes: str
    grid: tuple[float, ...]
    predict: str = "monte_carlo"
    tuned_as: str | None = None


def ensemble(fits: Fits, rate: float) -> lb.Posterior:
    """Five LoRA points, whose starts differ by 0.02 in every entry of A and B."""
    options = {name: value for name, value in fits.options().items() if name != "validation_draws"}
    return lb.infer.ensemble(
        fits.model(LORA), fits.problem.train, members=5, spread=0.02 / FLAT.scale, rates=lb.Rates(loc=rate), **options
    )


def swag(adapter, point_rate: float) -> Callable[[Fits, float], lb.Posterior]:
    """SWAG with K = 10 from the point at its own rate, with 20 snapshots in as many epochs as the point had."""

    def fit(fits: Fits, rate: float) -> lb.Posterior:
        train, point = fits.problem.train, fits.point(adapter, point_rate)
        return lb.infer.swag(
            fits.model(adapter), train, init=point, burn_in=0, columns=10, snapshots=20,
            every=max(1, math.ceil(len(train) * fits.args.epochs / 20)), rates=lb.Rates(loc=rate),
            seed=fits.problem.seed, progress=False,
        )  # fmt: skip

    return fit


def laplace(adapter, rate: float) -> Callable[[Fits, float], lb.Posterior]:
    """Kronecker Laplace around a point under a prior, whose precision is then chosen by marginal likelihood."""

    def fit(fits: Fits, scale: float) -> lb.Posterior:
        point = fits.fit(fits.model(adapter, lb.priors.Normal(scale)), G.Delta(), rates=lb.Rates(loc=rate))
        return lb.infer.laplace(
            point.model, fits.problem.train, structure="kron", prior_precision="marginal_likelihood", init=point,
            seed=fits.problem.seed,
        )  # fmt: skip

    return fit


def blob(fits: Fits, scale: float) -> lb.Posterior:
    """A normal on A, a point on B, from a scale of 0.05 (BLoB's start)."""
    guide = G.Diagonal(point_sites=("B",), start_scale=0.05 / scale)
    model = fits.model(LORA, lb.priors.Normal(scale))
    return fits.fit(model, guide, rates=lb.Rates(loc=1e-3), warm_start=False)


def ours(guide, prior: Callable = lb.priors.Normal, rank: int = 8, tuned_as: str | None = None) -> Method:
    """Variational inference in the projected subspace with a guide."""
    fit = lambda fits, scale: fits.vary(Variation(guide=guide, prior=prior, rank=rank, scale=scale))
    return Method(fit, "prior scale", PRIOR_SCALES, tuned_as=tuned_as)


METHODS = {
    "LoRA": Method(lambda fits, rate: fits.point(LORA, rate), "rate", LORA_RATES),
    "LoRA ensemble": Method(ensemble, "rate", LORA_RATES, tuned_as="LoRA"),
    "MC dropout": Method(
        lambda fits, rate: lb.infer.mc_dropout(
            fits.model(LORA), fits.problem.train, rate=rate, rates=lb.Rates(loc=1e-3), **fits.options()
        ),
        "share dropped",
        (0.05, 0.1, 0.2, 0.4),
    ),
    "BLoB-like": Method(blob, "prior scale", (0.2, 0.5, 1.0, 2.0)),
    "SWAG-LoRA": Method(swag(LORA, 1e-3), "rate", (3e-4, 1e-3, 3e-3, 1e-2)),
    "Laplace-LoRA": Method(laplace(LORA, 1e-3), "prior scale", PRIOR_SCALES, predict="linearised"),
    "LoRA-XS": Method(lambda fits, rate: fits.point(LORA_XS, rate), "rate", XS_RATES),
    "LR-BLoRA": Method(swag(LORA_XS, 3e-3), "rate", XS_RATES),
    "L-LoRA-XS": Method(laplace(LORA_XS, 3e-3), "prior scale", (0.025, 0.05, 0.1, 0.2), predict="linearised"),
    "Diagonal": ours(G.Diagonal()),
    "LowRank": ours(G.LowRank(10)),
    "LowRankPrecision": ours(G.LowRankPrecision(10)),
    "MatrixNormal": ours(G.MatrixNormal()),
    # A scale per module instead of one, which the variations below found; not tuned further.
    "LowRankPrecision, LayerScale": ours(G.LowRankPrecision(10), lb.priors.LayerScale, tuned_as="LowRankPrecision"),
    # What the variations below found with 1,000 rows, with as many factors as stay under 5% of LoRA at width 1024.
    "LowRankPrecision, r = 16, K = 2": ours(G.LowRankPrecision(2), rank=16),
}

DEFAULT = Variation()
# One change each to the default, judged on further training rows of the development tasks.
VARIATIONS = (
    {"default": DEFAULT}
    | {f"K = {k}": replace(DEFAULT, guide=G.LowRankPrecision(k)) for k in (2, 5, 20)}
    | {"Diagonal": replace(DEFAULT, guide=G.Diagonal())}
    | {f"LowRank, K = {k}": replace(DEFAULT, guide=G.LowRank(k)) for k in (2, 5, 10)}
    | {
        "projection SVD": replace(DEFAULT, projection=lb.projections.SVD()),
        "projection WhitenedSVD": replace(DEFAULT, projection=lb.projections.WhitenedSVD()),
        "projection Random": replace(DEFAULT, projection=lb.projections.Random()),
        # Moving R in the singular vectors of W0 moves the logits far less than moving it in those of the gradient.
        "projection SVD, prior scale 1, loc rate x 10": replace(
            DEFAULT, projection=lb.projections.SVD(), scale=1.0, options=(("rates", lb.Rates(loc=5e-2)),)
        ),
        "projection Gradient, label-free": replace(DEFAULT, projection=lb.projections.Gradient(label_free=True)),
    }
    | {f"r = {rank}": replace(DEFAULT, rank=rank) for rank in (2, 4, 16)}
    | {f"r = {rank}, K = 2": replace(DEFAULT, rank=rank, guide=G.LowRankPrecision(2)) for rank in (16, 32)}
    | {
        "r = 16, Diagonal": replace(DEFAULT, rank=16, guide=G.Diagonal()),
        "r = 16, K = 2, prior scale 0.2": replace(DEFAULT, rank=16, guide=G.LowRankPrecision(2), scale=0.2),
    }
    | {f"prior scale {scale}": replace(DEFAULT, scale=scale) for scale in (0.03, 0.05, 0.2, 0.3)}
    | {
        "prior LayerScale": replace(DEFAULT, prior=lb.priors.LayerScale),
        "prior Learned": replace(DEFAULT, prior=lambda scale: lb.priors.Learned(lb.priors.Normal(scale))),
        "head Bayesian": replace(DEFAULT, head="bayesian"),
        "no warm start": replace(DEFAULT, options=(("warm_start", False),)),
        "two point epochs first": replace(DEFAULT, options=(("map_epochs", 2),)),
        "the last epoch": replace(DEFAULT, options=(("keep_best", False),)),
        "twice the epochs": replace(DEFAULT, options=(("epochs", 10),)),
        "KL by Monte Carlo": replace(DEFAULT, options=(("kl", "mc"),)),
        "shared draws": replace(DEFAULT, options=(("draws", "shared"),)),
        "rates x 2": replace(DEFAULT, options=(("rates", lb.Rates(1e-2, 2e-2, 2e-3, 2e-3)),)),
        "rates x 1/2": replace(DEFAULT, options=(("rates", lb.Rates(2.5e-3, 5e-3, 5e-4, 5e-4)),)),
    }
)
