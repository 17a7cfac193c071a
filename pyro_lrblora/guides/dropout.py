"""Dropout of an adapter's inputs as a distribution over its latents (Gal & Ghahramani 2016, arXiv 1506.02142)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from pyro.distributions import TorchDistribution
from pyro.infer.autoguide import AutoDelta
from torch import Tensor, nn
from torch.distributions import constraints

from ..latents import LatentSites
from .latent_guide import Curvature, LatentGuide


@dataclass(frozen=True)
class Dropout:
    """Columns of R (LoRA-XS) or of A (LoRA) are zero with probability `rate`, else scaled by 1 / (1 - rate).

    Column j of the latent that meets the inputs is dropout of input j. One draw is one function: the same columns for
    every token and row. It has no density, so nothing here is an evidence bound.

    Args:
        rate: between 0 and 1.
    """

    rate: float = 0.1
    fisher_rank: ClassVar[int] = 0

    def __post_init__(self):
        if not 0 < self.rate < 1:
            raise ValueError(f"expected 0 < rate < 1, got rate={self.rate!r}")

    def __call__(self, model) -> DropoutGuide:
        return DropoutGuide(model, self.rate)


class DropoutGuide(LatentGuide):
    extra_family = AutoDelta
    has_density = False

    def __init__(self, model, rate: float):
        super().__init__(model)
        loc, _ = self.starting_point(model)
        self.loc, self.rate = nn.Parameter(loc), rate

    def distribution(self) -> _Dropped:
        return _Dropped(self.loc, self.rate, self.sites)

    def begin(self, curvature: Curvature) -> None:
        self.loc.data.copy_(curvature.loc)


class _Dropped(TorchDistribution):
    """loc times Bernoulli masks of columns: draws and moments, and 0 in place of a log density."""

    support = constraints.real_vector
    arg_constraints: dict = {}
    has_rsample = True

    def __init__(self, loc: Tensor, rate: float, sites: LatentSites, batch_shape=()):
        self.loc, self.rate, self.sites = loc, rate, sites
        super().__init__(torch.Size(batch_shape), loc.shape, validate_args=False)

    def expand(self, batch_shape, _instance=None):
        return _Dropped(self.loc, self.rate, self.sites, batch_shape)

    @property
    def mean(self) -> Tensor:
        return self.loc.expand(self._extended_shape())

    @property
    def variance(self) -> Tensor:
        reads = self.sites.join(
            {name: torch.full(shape, float(name[0] != "B")) for name, shape in self.sites.shapes.items()}
        )
        return (self.loc.square() * reads.to(self.loc) * self.rate / (1 - self.rate)).expand(self._extended_shape())

    def rsample(self, sample_shape=torch.Size()) -> Tensor:
        leading = self._extended_shape(sample_shape)[:-1]
        masks = {}
        for name, shape in self.sites.shapes.items():
            keep = torch.full((*leading, shape[0], 1, shape[2]), 1 - self.rate, device=self.loc.device)
            # LoRA's B meets the outputs: nothing of it is dropped.
            mask = torch.bernoulli(keep) / keep if name[0] != "B" else torch.ones_like(keep)
            masks[name] = mask.expand(*leading, *shape)
        return self.loc * self.sites.join(masks)

    def log_prob(self, value: Tensor) -> Tensor:
        return value.new_zeros(value.shape[:-1])
