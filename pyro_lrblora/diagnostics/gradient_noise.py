"""How much of a batch's gradient of the ELBO is signal."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import count, islice

import pandas as pd
import torch
from torch import Tensor

from ..data import as_batches, row_weight
from ..guides.draws import DrawsGuide
from ..guides.ensemble import EnsembleGuide
from ..infer.elbo import PartedELBO, has_closed_form
from ..infer.step import add_gradients, parameter_groups
from ..posterior import Posterior, local_parameters


@local_parameters
def gradient_noise(
    posterior: Posterior, train, batches: int = 16, seed: int = 0, *, batch_size: int | None = None, tokenizer=None
) -> GradientNoise:
    """Signal and noise of the gradient of -ELBO / N where the fit ended, with the fit's own estimator.

    The noise is over batches and draws. With n gradients g of mean m the squared signal is m'm - tr(S) / n, free of
    the noise's own share, S the covariance of one g; tr(S) / signal^2 is McCandlish et al.'s simple noise scale (2018,
    arXiv 1812.06162, eq. 2.9, appendix A.1), here in batches. Near an optimum the signal is zero, so a low ratio after
    a long fit is what convergence looks like; a low one while the ELBO still rises asks for larger batches or more
    particles. Posterior, network and param store stay as they are.

    Args:
        posterior: what svi returned; any guide with parameters of its own is measured.
        train: the rows that were fitted, with labels.
        batches: n >= 2 gradients, each of a batch from another pass: those of one pass are not independent.
        seed: of the order of rows and of the draws.
        batch_size: rows per batch, for a datasets.Dataset; None is the fit's own.
        tokenizer: for a datasets.Dataset, where the model has none.

    Raises:
        ValueError: batches < 2, no labels.
        FloatingPointError: NaN or infinite loss; names the batch.
    """
    if batches < 2:
        raise ValueError(f"expected batches >= 2, got batches={batches}")
    groups = _groups(posterior)
    if not groups or isinstance(posterior.guide, EnsembleGuide | DrawsGuide):
        return GradientNoise(
            pd.DataFrame(columns=["parameters", "signal", "noise", "snr", "noise_scale"]),
            0, f"{type(posterior.guide).__name__} has no parameters that maximise one ELBO",
        )  # fmt: skip
    model, settings = posterior.model, posterior.settings
    size = batch_size or settings.get("batch_size", 32)
    data = as_batches(train, tokenizer or model.tokenizer, batch_size=size, shuffle=seed)
    model.check_labels(data, "training data")
    everything = [parameter for group in groups.values() for parameter in group]
    before = [parameter.grad for parameter in everything]
    moments = {kind: _Moments() for kind in groups}
    try:
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            for gradient in islice(_gradients(posterior, data, groups), batches):
                for kind, vector in gradient.items():
                    moments[kind].add(vector)
    finally:
        for parameter, gradient in zip(everything, before, strict=True):
            parameter.grad = gradient
    table = pd.DataFrame({kind: moments[kind].row() for kind in groups}).T
    table["parameters"] = table["parameters"].astype(int)
    return GradientNoise(table, batches, "")


@dataclass(frozen=True)
class GradientNoise:
    """Signal and noise of the gradient of -ELBO / N, in nats per row and unit of the parameter.

    Args:
        table: a row per kind of parameter (loc, scale, factor, head), as the learning rates go: parameters, their
            number; signal, the norm of the mean gradient without the noise's share; noise, root of the summed variances
            of one batch's gradient; snr, their ratio; noise_scale, batches to average for a ratio of 1 (infinite at
            zero signal).
        batches: gradients it was measured on.
        note: why the table is empty.
    """

    table: pd.DataFrame
    batches: int
    note: str = ""


class _Moments:
    """Running mean of vectors and the sum of their variances (Welford 1962)."""

    def __init__(self):
        self.count, self.mean, self.squares = 0, 0.0, 0.0

    def add(self, vector: Tensor) -> None:
        self.count += 1
        off = vector - self.mean
        self.mean = self.mean + off / self.count
        self.squares += float(off @ (vector - self.mean))

    def row(self) -> dict[str, float]:
        variance = self.squares / (self.count - 1)
        square = max(0.0, float(self.mean @ self.mean) - variance / self.count)
        return {
            "parameters": len(self.mean),
            "signal": square**0.5,
            "noise": variance**0.5,
            "snr": (square / variance) ** 0.5 if variance else float("inf") if square else float("nan"),
            "noise_scale": variance / square if square else float("inf") if variance else float("nan"),
        }


def _groups(posterior: Posterior) -> dict[str, list[Tensor]]:
    """What a fit of the guide trains, by kind; nothing where only a head has parameters."""
    groups = {kind: [p for p in group if p.requires_grad] for kind, group in parameter_groups(posterior).items()}
    return groups if set(groups) - {"head"} else {}


def _gradients(posterior: Posterior, data, groups) -> Iterator[dict[str, Tensor]]:
    """Gradients of batches that are each of a pass of its own, a flat float64 vector per kind of parameter, no end."""
    model, guide, settings = posterior.model, posterior.guide, posterior.settings
    by_path = settings.get("path_derivative", False)
    closed = settings.get("kl") != "mc" and not by_path and has_closed_form(model, guide)
    elbo = PartedELBO(
        closed, model.sites.shapes, guide if by_path else None, settings.get("antithetic", False),
        num_particles=settings.get("particles", 1),
    )  # fmt: skip
    per_row = settings.get("draws", "row") == "row" and getattr(guide, "rowwise", None) is not None
    program, proposal = (model.rowwise, guide.rowwise) if per_row else (model, guide)
    for number in count(1):
        # Batches of one pass share no rows, so that their mean is nearer to the truth than independent ones' would be.
        position = int(torch.randint(len(data), ()))
        batch = next(islice(data, position, None))
        for parameter in (p for group in groups.values() for p in group):
            parameter.grad = None
        add_gradients(
            model, elbo, program, proposal, batch, (position, number), settings.get("precision", "fp32"),
            row_weight(batch, data),
        )  # fmt: skip
        yield {
            kind: torch.cat([
                (torch.zeros_like(p) if p.grad is None else p.grad).detach().flatten().double() for p in group
            ])
            for kind, group in groups.items()
        }  # fmt: skip
