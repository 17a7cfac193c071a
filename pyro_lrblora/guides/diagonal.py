"""Mean-field normal: an independent Normal per latent (Blundell et al. 2015, arXiv 1505.05424)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import pyro.distributions as dist
import torch
from pyro.nn import PyroParam
from torch import nn
from torch.distributions import constraints

from .latent_guide import Curvature, LatentGuide

_POINT_SD = 1e-4  # of the prior's: as good as a point, and still a density


@dataclass(frozen=True)
class Diagonal:
    """Independent Normals; 2 D parameters.

    Args:
        start_scale: start of each standard deviation as a share of the prior's, where no warm start sets it.
        point_sites: latent sites that stay points, by name or by its first part ("B" for B_384 and B_1536). LoRA with
            point_sites=("B",) is BLoB's family (Wang et al. 2024, arXiv 2406.11675).
    """

    start_scale: float = 0.1
    point_sites: Sequence[str] = ()
    fisher_rank: ClassVar[int] = 1

    def __post_init__(self):
        object.__setattr__(self, "point_sites", tuple(self.point_sites))  # a file gives it back as a list

    def __call__(self, model) -> DiagonalGuide:
        return DiagonalGuide(model, self.start_scale, self.point_sites)


class DiagonalGuide(LatentGuide):
    symmetric = True

    def __init__(self, model, start_scale: float, point_sites: Sequence[str] = ()):
        super().__init__(model)
        loc, prior_sd = self.starting_point(model)
        self.loc = nn.Parameter(loc)
        self.random = torch.cat(
            [
                torch.full((shape.numel(),), not {name, name.split("_")[0]} & set(point_sites), device=loc.device)
                for name, shape in self.sites.shapes.items()
            ]
        )
        unknown = [p for p in point_sites if not any(p in (n, n.split("_")[0]) for n in self.sites.shapes)]
        if unknown or not self.random.any():
            raise ValueError(
                f"expected point_sites among {list(self.sites.shapes)}, and not all of them, got {list(point_sites)}"
            )
        self._all_random = bool(self.random.all())  # once: on a GPU it waits for what is queued
        self._point_sd = _POINT_SD * prior_sd
        self.scale = PyroParam(start_scale * prior_sd[self.random], constraints.positive)

    def distribution(self) -> dist.Independent:
        scale = self.scale if self._all_random else self._point_sd.masked_scatter(self.random, self.scale)
        return dist.Normal(self.loc, scale).to_event(1)

    def begin(self, curvature: Curvature) -> None:
        self.loc.data.copy_(curvature.loc)
        self.scale = curvature.diagonal.rsqrt()[self.random]
