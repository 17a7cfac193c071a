"""A scale per module with a prior of its own."""

from __future__ import annotations

from dataclasses import dataclass

import pyro
import pyro.distributions as dist
import torch
from torch import Tensor

from .sites import Shapes, by_module, check_positive, sample_sites


@dataclass(frozen=True)
class LayerScale:
    """Normal with one scale per module, each a latent: log scale ~ Normal(log `scale`, `spread`).

    Adds for each latent site the site "<site>_scale" of shape (L,), one entry per module.

    Args:
        scale: median of each module's scale, positive.
        spread: standard deviation of its logarithm, positive; 1 lets modules differ by a factor of e and more.
    """

    scale: float = 0.1
    spread: float = 1.0

    def __post_init__(self):
        check_positive(scale=self.scale, spread=self.spread)

    def __call__(self, shapes: Shapes) -> dict[str, Tensor]:
        hyper = dist.LogNormal(torch.as_tensor(self.scale).log(), self.spread)
        scales = {
            name: pyro.sample(f"{name}_scale", hyper.expand(shape[:1]).to_event()) for name, shape in shapes.items()
        }
        return sample_sites(shapes, lambda name: dist.Normal(0.0, by_module(scales[name], shapes[name], name)))
