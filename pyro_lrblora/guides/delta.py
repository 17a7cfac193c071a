"""A point: maximum a posteriori, the deterministic fit every posterior is compared with."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import pyro.distributions as dist
from pyro.infer.autoguide import AutoDelta
from torch import nn

from .latent_guide import Curvature, LatentGuide


@dataclass(frozen=True)
class Delta:
    """All mass on one point. It has no density, so its "ELBO" is the log joint and bounds nothing."""

    fisher_rank: ClassVar[int] = 0

    def __call__(self, model) -> DeltaGuide:
        return DeltaGuide(model)


class DeltaGuide(LatentGuide):
    extra_family = AutoDelta
    has_density = False
    symmetric = True
    rowwise = None  # every row's draw would be the same

    def __init__(self, model):
        super().__init__(model)
        loc, _ = self.starting_point(model)
        self.loc = nn.Parameter(loc)

    def distribution(self) -> dist.Delta:
        return dist.Delta(self.loc, event_dim=1)

    def begin(self, curvature: Curvature) -> None:
        self.loc.data.copy_(curvature.loc)
