"""Mixture of diagonal normals, or of points, with equal weights."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from pyro.nn import PyroParam
from torch import Tensor, nn
from torch.distributions import constraints

from ..distributions import EqualMixture
from .latent_guide import Curvature, LatentGuide


@dataclass(frozen=True)
class Mixture:
    """M diagonal normals with equal weights; 2 M D parameters (M D for points).

    Points have no density: what is trained is the mean log joint of M points on their own, an ensemble in one fit.

    Args:
        components: M.
        component: "diagonal" or "delta".
        spread: standard deviation of the components' starts around the common start, as a share of the prior's.
        start_scale: start of each standard deviation as a share of the prior's, where no warm start sets it.
    """

    components: int = 4
    component: str = "diagonal"
    spread: float = 0.3
    start_scale: float = 0.1
    fisher_rank: ClassVar[int] = 1

    def __post_init__(self):
        if self.components < 2:
            raise ValueError(f"expected components >= 2, got components={self.components}; for one write Diagonal()")
        if self.component not in ("diagonal", "delta"):
            raise ValueError(f"expected component='diagonal' or 'delta', got component={self.component!r}")

    def __call__(self, model) -> MixtureGuide:
        return MixtureGuide(model, self)


class MixtureGuide(LatentGuide):
    def __init__(self, model, spec: Mixture):
        super().__init__(model)
        loc, prior_sd = self.starting_point(model)
        noise = torch.randn(spec.components, len(loc), generator=torch.Generator().manual_seed(0)).to(loc)
        self._offsets = spec.spread * prior_sd * (noise - noise.mean(0))
        self.loc = nn.Parameter(loc + self._offsets)
        self.has_density = spec.component == "diagonal"
        if self.has_density:
            self.scale = PyroParam((spec.start_scale * prior_sd).repeat(spec.components, 1), constraints.positive)

    def distribution(self) -> EqualMixture:
        return EqualMixture(self.loc, self.scale) if self.has_density else _Points(self.loc)

    def begin(self, curvature: Curvature) -> None:
        scale = curvature.diagonal.rsqrt()
        # Apart by the posterior's own width, not the prior's: components far out cost epochs to come back.
        self.begin_at(curvature.loc, scale)
        if self.has_density:
            self.scale = scale.repeat(len(self.loc), 1)

    def begin_at(self, loc: Tensor, width: Tensor | None = None) -> None:
        offsets = self._offsets if width is None else self._offsets.sign() * width.minimum(self._offsets.abs())
        self.loc.data.copy_(loc + offsets)


class _Points(EqualMixture):
    """Points with equal weights: draws and moments, and 0 in place of a log density."""

    def __init__(self, loc: Tensor, batch_shape=()):
        super().__init__(loc, torch.zeros_like(loc), batch_shape, validate_args=False)

    def expand(self, batch_shape, _instance=None):
        return _Points(self.loc, batch_shape)

    def log_prob(self, value: Tensor) -> Tensor:
        return value.new_zeros(value.shape[:-1])
