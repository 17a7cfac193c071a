"""Independent normals in each module's own Kronecker eigenbasis (after George et al. 2018, arXiv 1806.03884)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from pyro.nn import PyroParam
from torch import Tensor, nn
from torch.distributions import constraints

from ..distributions import Blocks, RotatedNormal
from .latent_guide import Curvature, LatentGuide


@dataclass(frozen=True)
class RotatedDiagonal:
    """R = M + U (S * E) V' per module, U and V fixed by the warm start; 2 D trained parameters, L (r^2 + c^2) fixed.

    The eigenbases are those of the Fisher's row and column sums; without a warm start they are the identity, and it is
    Diagonal. It is also what laplace(structure="kron") returns.

    Args:
        start_scale: start of each S as a share of the prior's, where no warm start sets it.
    """

    start_scale: float = 0.1
    fisher_rank: ClassVar[int] = 64

    def __call__(self, model) -> RotatedDiagonalGuide:
        return RotatedDiagonalGuide(model, self.start_scale)


class RotatedDiagonalGuide(LatentGuide):
    symmetric = True

    def __init__(self, model, start_scale: float):
        super().__init__(model)
        loc, prior_sd = self.starting_point(model)
        self.loc = nn.Parameter(loc)
        self.scale = PyroParam(start_scale * prior_sd, constraints.positive)
        for site, (count, rows, columns) in self.sites.shapes.items():
            for side, size in (("left", rows), ("right", columns)):
                self.register_buffer(f"{side}_{site}", torch.eye(size).to(loc).repeat(count, 1, 1))

    def distribution(self) -> Blocks:
        locs, scales = self.sites.split(self.loc), self.sites.split(self.scale)
        return Blocks(
            [
                RotatedNormal(locs[site], getattr(self, f"left_{site}"), getattr(self, f"right_{site}"), scales[site])
                for site in self.sites.shapes
            ]
        )

    def begin(self, curvature: Curvature) -> None:
        shapes = [shape[1:] for shape in self.sites.shapes.values() for _ in range(shape[0])]
        blocks = zip(curvature.blocks(self.sites), shapes, strict=True)
        self.set(curvature.loc, [_rotate(block, *shape) for (_, block), shape in blocks])

    def set(self, loc: Tensor, modules: Sequence[tuple[Tensor, Tensor, Tensor]]) -> None:
        """Take loc (D,) and every module's U (r, r), V (c, c) and precisions in that basis (r, c), site by site."""
        self.loc.data.copy_(loc)
        self.scale = torch.cat([precision.rsqrt().flatten() for *_, precision in modules])
        start = 0
        for site, shape in self.sites.shapes.items():
            members = modules[start : start + shape[0]]
            getattr(self, f"left_{site}").copy_(torch.stack([left for left, *_ in members]))
            getattr(self, f"right_{site}").copy_(torch.stack([right for _, right, _ in members]))
            start += shape[0]


def _rotate(curvature: Curvature, rows: int, columns: int) -> tuple[Tensor, Tensor, Tensor]:
    """Eigenbases of the Fisher's row and column sums, and the diagonal of the whole curvature in them."""
    fisher = curvature.fisher
    vectors = (fisher.vectors * fisher.values.sqrt()).T.reshape(-1, rows, columns)
    left = torch.linalg.eigh(torch.einsum("kij,klj->il", vectors, vectors)).eigenvectors
    right = torch.linalg.eigh(torch.einsum("kij,kil->jl", vectors, vectors)).eigenvectors
    rest = (curvature.prior_precision + fisher.residual).reshape(rows, columns)
    rotated = left.square().T @ rest @ right.square()
    return left, right, rotated + (left.T @ vectors @ right).square().sum(0)
