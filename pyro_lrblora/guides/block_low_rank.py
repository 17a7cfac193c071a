"""Low-rank normal within every module, independent between modules."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch

from ..distributions import Blocks, LowRankNormal, LowRankPrecisionNormal
from .latent_guide import Curvature, LatentGuide
from .low_rank import check_columns, low_rank_parameters, stationary_factor
from .low_rank_precision import laplace_factor


@dataclass(frozen=True)
class BlockLowRank:
    """diag(s)(I + Z Z')diag(s) per module (and site), as covariance or inverted; D (K + 2) parameters.

    The same number of parameters as a joint factor of rank K, but L times its directions and none between modules.

    Args:
        rank: K, columns of Z in every module.
        form: "precision" or "covariance": which of the two is diagonal plus low rank.
        start_scale: start of each s as a share of the prior's, where no warm start sets it.
    """

    rank: int = 4
    form: str = "precision"
    start_scale: float = 0.1
    fisher_rank: ClassVar[int] = 64

    def __post_init__(self):
        check_columns(self.rank)
        if self.form not in ("precision", "covariance"):
            raise ValueError(f"expected form='precision' or 'covariance', got form={self.form!r}")

    def __call__(self, model) -> BlockLowRankGuide:
        return BlockLowRankGuide(model, self.rank, self.form, self.start_scale)


class BlockLowRankGuide(LatentGuide):
    symmetric = True

    def __init__(self, model, rank: int, form: str, start_scale: float):
        super().__init__(model)
        self.form = form
        self.loc, self.scale, self.factor = low_rank_parameters(self, model, rank, start_scale)

    def distribution(self) -> Blocks:
        # Split here, so that each site's modules become one batch of equal blocks.
        shapes = [(shape[0], shape[1:].numel()) for shape in self.sites.shapes.values()]
        sizes = [count * size for count, size in shapes]
        pieces = zip(self.loc.split(sizes), self.scale.split(sizes), self.factor.split(sizes), shapes, strict=True)
        parts = []
        for loc, scale, factor, shape in pieces:
            loc, scale, factor = loc.reshape(shape), scale.reshape(shape), factor.reshape(*shape, -1)
            if self.form == "covariance":
                parts.append(LowRankNormal(loc, scale.unsqueeze(-1) * factor, scale.square()))
            else:
                parts.append(LowRankPrecisionNormal(loc, factor / scale.unsqueeze(-1), scale.square().reciprocal()))
        return Blocks(parts)

    def begin(self, curvature: Curvature) -> None:
        start = stationary_factor if self.form == "covariance" else laplace_factor
        scale = torch.empty_like(self.loc)
        for where, block in curvature.blocks(self.sites):
            scale[where], self.factor.data[where] = start(block, self.factor.shape[-1])
        self.loc.data.copy_(curvature.loc)
        self.scale = scale
