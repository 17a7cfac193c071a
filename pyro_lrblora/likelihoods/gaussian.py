"""Numbers with normal noise, its scale known or predicted."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from dataclasses import dataclass

import pyro
import pyro.distributions as dist
import torch
from torch import Tensor

from ..predictions import NumberPrediction
from .categorical import check_finite, logits_of


@dataclass(frozen=True)
class Gaussian:
    """Labels (N,), numbers, normal around the network's output.

    Args:
        scale: the noise's standard deviation, in units of the labels, for a network with one output. None: the network
            has two outputs, the mean and the log of the standard deviation (heteroscedastic; Nix & Weigend 1994).
    """

    scale: float | None = None

    def __post_init__(self):
        if self.scale is not None and not self.scale > 0:
            raise ValueError(f"expected a noise scale > 0, got scale={self.scale!r}")

    def __call__(self, outputs, batch: Mapping[str, Tensor]) -> Tensor:
        labels = batch.get("labels")
        noise = dist.Normal(*self._moments(outputs))
        return pyro.sample("labels", noise, obs=None if labels is None else labels.to(noise.loc.dtype))

    def check_labels(self, labels: Tensor, classes: int | None) -> None:
        """Raise a ValueError where labels (N,) are not finite numbers, or the outputs are not as many as needed.

        Warns:
            UserWarning: labels so large or small that a fit would not get to them.
        """
        needed = 2 if self.scale is None else 1
        if labels.dim() != 1 or not labels.double().isfinite().all():
            raise ValueError(
                f"expected finite numbers of shape (N,) as labels, got {labels.dtype} {tuple(labels.shape)}"
            )
        if classes is not None and classes != needed:
            raise ValueError(
                f"expected a network with {needed} output(s) for {self}, got {classes}; load it with "
                f"num_labels={needed}"
            )
        spread = float(labels.double().std()) if len(labels) >= 20 else 0.0  # a few rows say little about the others
        if spread > 0 and not 0.2 <= spread <= 5:
            warnings.warn(
                f"the labels have a standard deviation of {spread:.3g}, and rates and the head's prior are made for "
                "one near 1: write (labels - mean) / sd in the data, and undo it on what is predicted",
                stacklevel=2,
            )

    def summary(self, outputs, batch: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Mean and noise scale of each row, (B,)."""
        loc, scale = self._moments(outputs)
        return {"loc": loc, "scale": scale}

    @staticmethod
    def prediction(summaries: Mapping[str, Tensor], labels: Tensor | None, class_names) -> NumberPrediction:
        """The prediction for N rows from S draws."""
        return NumberPrediction(summaries["loc"], summaries["scale"], labels)

    def _moments(self, outputs) -> tuple[Tensor, Tensor]:
        values = check_finite(logits_of(outputs))
        if self.scale is None:
            return values[:, 0], values[:, 1].exp()
        return values[:, 0], torch.full_like(values[:, 0], self.scale)
