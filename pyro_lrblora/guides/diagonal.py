"""Mean-field normal: an independent Normal per latent (Blundell et al. 2015, arXiv 1505.05424)."""

from __future__ import annotations

from dataclasses import dataclass

import pyro.distributions as dist
from pyro.nn import PyroParam
from torch import nn
from torch.distributions import constraints

from .latent_guide import Curvature, LatentGuide


@dataclass(frozen=True)
class Diagonal:
    """Independent Normals; 2 D parameters.

    Args:
        start_scale: start of each standard deviation as a share of the prior's, where no warm start sets it.
    """

    start_scale: float = 0.1

    def __call__(self, model) -> DiagonalGuide:
        return DiagonalGuide(model, self.start_scale)


class DiagonalGuide(LatentGuide):
    def __init__(self, model, start_scale: float):
        super().__init__(model)
        loc, prior_sd = self.starting_point(model)
        self.loc = nn.Parameter(loc)
        self.scale = PyroParam(start_scale * prior_sd, constraints.positive)

    def distribution(self) -> dist.Independent:
        return dist.Normal(self.loc, self.scale).to_event(1)

    def begin(self, curvature: Curvature) -> None:
        self.loc.data.copy_(curvature.loc)
        self.scale = curvature.diagonal.rsqrt()
