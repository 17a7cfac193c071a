"""SWAG: a normal fitted to the trajectory of stochastic gradient steps (Maddox et al. 2019, arXiv 1902.02476)."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from tqdm.auto import tqdm

from ..data import as_batches, endless, row_weight
from ..guides import Delta, LowRank
from ..model import PRECISIONS, BayesianLoRA
from ..posterior import Posterior, local_parameters
from ..provenance import fitted_with
from .checks import check_callbacks
from .elbo import PartedELBO
from .start import prior_sites, start_at
from .step import Rates, add_gradients, gradient_scaler, optimiser_of, step
from .svi import svi


@local_parameters
def swag(
    model: BayesianLoRA,
    train,
    *,
    columns: int = 10,
    snapshots: int = 20,
    every: int | None = None,
    burn_in: int = 5,
    rates: Rates = Rates(loc=1e-3),
    covariance_scale: float = 0.5,
    clip: float | None = 10.0,
    init: Posterior | None = None,
    batch_size: int = 32,
    seed: int = 0,
    precision: str = "fp32",
    callbacks: Sequence[Callable[[dict, Posterior], object]] = (),
    progress: bool = True,
    tokenizer=None,
    **options,
) -> Posterior:
    """Fit a point, go on at a constant learning rate, and take mean and covariance of the snapshots on the way.

    With LoRAXS it is LR-BLoRA as published (arXiv 2502.12122, equation 4), with LoRA SWAG-LoRA. The covariance is
    covariance_scale * (diag + D D' / (K - 1)), the published 1/2 by default; D holds the last K deviations from the
    running mean. It is a property of the optimiser, not of prior and likelihood: the prior only acts as weight
    decay. A point head is averaged over the snapshots too. One draw is one function.

    Args:
        model: latents only: a prior without sites of its own, and no Bayesian head.
        train: as for svi.
        columns: K, at least 2; at most `snapshots`.
        snapshots: how many are taken.
        every: optimiser steps between snapshots; None is once per epoch, as published.
        burn_in: epochs of the point fit before them; 0 starts at `init` or at the base.
        rates: constant while collecting.
        covariance_scale: 1/2 in both papers; the reference code of LR-BLoRA samples with 2.
        clip: greatest norm of the gradient of the log joint / N; None for no clipping.
        init: start of the point fit.
        batch_size: rows per batch, for a datasets.Dataset.
        seed: of the point fit and the order of batches.
        precision: of the network, as for svi, in the point fit and while collecting.
        callbacks: called at every snapshot with the history's row for it, {"snapshot", "step", "log_joint", "seconds"},
            and the point at that moment.
        progress: show a progress bar.
        tokenizer: for a datasets.Dataset, where the model has none.
        options: of svi, for the point fit.

    Raises:
        ValueError: fewer snapshots than columns, arguments out of range, options of a point fit without one
            (burn_in=0), a prior with sites of its own, a Bayesian head, an unknown precision.
        TypeError: callbacks that do not take a row and a posterior.
        FloatingPointError: NaN or infinite loss; names the batch.
    """
    if not 2 <= columns <= snapshots:
        raise ValueError(f"expected 2 <= columns <= snapshots, got columns={columns}, snapshots={snapshots}")
    if every is not None and every < 1 or burn_in < 0:
        raise ValueError(f"expected every >= 1 and burn_in >= 0, got every={every}, burn_in={burn_in}")
    if not covariance_scale > 0:
        raise ValueError(f"expected covariance_scale > 0, got {covariance_scale!r}")
    if precision not in PRECISIONS:
        raise ValueError(f"expected precision to be one of {list(PRECISIONS)}, got {precision!r}")
    if burn_in == 0 and options:
        raise ValueError(f"expected no options of svi with burn_in=0, which fits no point, got {sorted(options)}")
    check_callbacks(callbacks)
    _check_latents_only(model)
    tokenizer = tokenizer or model.tokenizer
    given, train = train, as_batches(train, tokenizer, batch_size=batch_size, shuffle=seed).restarted()
    model.check_labels(train, "training data")
    if burn_in == 0:
        point = start_at(model, init, train, tokenizer)
    else:
        point = svi(
            model, train, guide=Delta(), init=init, epochs=burn_in, rates=rates, clip=clip, seed=seed,
            precision=precision, progress=progress, tokenizer=tokenizer, **options,
        )  # fmt: skip
    every = every or len(train)
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        moments = _collect(point, train, snapshots, every, columns, rates, clip, precision, callbacks, progress)
        guide = LowRank(columns)(point.model)
    moments.into(guide, covariance_scale)
    if point.model.point_head is not None:
        point.model.point_head.load_state_dict(moments.head_mean)
    settings = {
        "method": "swag",
        "columns": columns,
        "snapshots": snapshots,
        "every": every,
        "burn_in": burn_in,
        "rates": vars(rates),
        "covariance_scale": covariance_scale,
        "seed": seed,
        "precision": precision,
        **fitted_with(point.model.device, given, train),
    }
    return Posterior(point.model, guide, LowRank(columns), point.history, settings)


class Moments:
    """Running mean, mean of squares and the last K deviations of a trajectory in (D,).

    Args:
        columns: K.
    """

    def __init__(self, columns: int):
        self.columns, self.count = columns, 0
        self.mean: Tensor | float = 0.0  # (D,)
        self.squares: Tensor | float = 0.0  # (D,)
        self.deviations: list[Tensor] = []  # of (D,)
        self.head_mean: dict[str, Tensor] = {}

    def add(self, point: Tensor, head: dict[str, Tensor]) -> None:
        """Take a snapshot; in float64, since variances are small differences."""
        point = point.detach().double()
        self.count += 1
        self.mean = self.mean + (point - self.mean) / self.count
        self.squares = self.squares + (point.square() - self.squares) / self.count
        self.deviations = [*self.deviations, point - self.mean][-self.columns :]
        for name, value in head.items():
            before = self.head_mean.get(name, torch.zeros_like(value))
            self.head_mean[name] = before + (value.detach() - before) / self.count

    def into(self, guide, covariance_scale: float) -> None:
        """Set a LowRank guide to the mean and covariance_scale * (diag + D D' / (K - 1))."""
        variance = (self.squares - self.mean.square()).clamp(min=0)
        # A latent that never moved has no variance; the guide needs a positive one.
        floor = 1e-8 * variance.mean().clamp(min=1e-12)
        scale = (covariance_scale * variance.maximum(floor)).sqrt()
        factor = torch.stack(self.deviations, dim=-1) * (covariance_scale / (self.columns - 1)) ** 0.5
        guide.loc.data.copy_(self.mean)
        guide.factor.data.copy_(factor / scale.unsqueeze(-1))
        guide.scale = scale.to(guide.loc.dtype)


def _collect(point, train, snapshots, every, columns, rates, clip, precision, callbacks, progress) -> Moments:
    model, guide, head = point.model, point.guide, point.model.point_head
    elbo = PartedELBO(False, model.sites.shapes)
    optimiser, scaler = optimiser_of(point, rates), gradient_scaler(model, precision)
    moments, batches = Moments(columns), endless(train)
    before = point.history[-1]["step"] if point.history else 0
    for number in tqdm(range(1, snapshots + 1), disable=not progress, desc="SWAG", unit="snapshot"):
        begun = time.perf_counter()
        for _ in range(every):
            position, batch = next(batches)
            where, weight = (position, None), row_weight(batch, train)
            add_gradients(model, elbo, model, guide, batch, where, precision, weight, scaler)
            step(optimiser, clip, scaler)
        moments.add(guide.loc, {} if head is None else head.state_dict())
        row = {"snapshot": number, "step": before + number * every, "log_joint": elbo.bound.elbo}
        point.history.append(row | {"seconds": time.perf_counter() - begun})
        for callback in callbacks:
            callback(point.history[-1], point)
    return moments


def _check_latents_only(model: BayesianLoRA) -> None:
    others = sorted(model.head_start) if model.head == "bayesian" else prior_sites(model)[1]
    if others:
        raise ValueError(
            f"expected a model whose only sites are the latents for SWAG, got {others} too; write a prior without "
            "scales of its own and head='point'"
        )
