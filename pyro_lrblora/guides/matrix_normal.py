"""Matrix normal per module: covariance between the rows of R times covariance between its columns."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from pyro.nn import PyroParam
from torch import Tensor, nn
from torch.distributions import constraints

from ..distributions import Blocks
from ..distributions import MatrixNormal as MatrixNormalDistribution
from .full_rank import precision_to_root, unit_triangular
from .latent_guide import Curvature, LatentGuide


@dataclass(frozen=True)
class MatrixNormal:
    """Kronecker covariance per module (Louizos & Welling 2016, arXiv 1603.04733); D + L (r^2 + r + c^2 + c) parameters.

    Args:
        start_scale: start of the standard deviations as a share of the prior's, where no warm start sets them.
    """

    start_scale: float = 0.1
    fisher_rank: ClassVar[int] = 64

    def __call__(self, model) -> MatrixNormalGuide:
        return MatrixNormalGuide(model, self.start_scale)


class MatrixNormalGuide(LatentGuide):
    symmetric = True

    def __init__(self, model, start_scale: float):
        super().__init__(model)
        loc, prior_sd = self.starting_point(model)
        self.loc = nn.Parameter(loc)
        spread = self.sites.split(start_scale * prior_sd)
        for site, (count, rows, columns) in self.sites.shapes.items():
            # All of the scale in the rows: only the product matters.
            row_scale = spread[site].log().mean(-1).exp()
            setattr(self, f"row_scale_{site}", PyroParam(row_scale, constraints.positive))
            setattr(self, f"column_scale_{site}", PyroParam(loc.new_ones(count, columns), constraints.positive))
            setattr(self, f"row_factor_{site}", nn.Parameter(loc.new_zeros(count, rows, rows)))
            setattr(self, f"column_factor_{site}", nn.Parameter(loc.new_zeros(count, columns, columns)))

    def distribution(self) -> Blocks:
        root = lambda side, site: unit_triangular(
            getattr(self, f"{side}_factor_{site}"), getattr(self, f"{side}_scale_{site}")
        )
        return Blocks(
            [
                MatrixNormalDistribution(loc, root("row", site), root("column", site))
                for site, loc in self.sites.split(self.loc).items()
            ]
        )

    def begin(self, curvature: Curvature) -> None:
        self.loc.data.copy_(curvature.loc)
        blocks = curvature.blocks(self.sites)
        for site, (count, rows, columns) in self.sites.shapes.items():
            fitted = [kronecker_roots(next(blocks)[1], rows, columns) for _ in range(count)]
            for side, roots in zip(("row", "column"), zip(*fitted, strict=True), strict=True):
                root = torch.stack(roots).to(self.loc)
                scale = root.diagonal(dim1=-2, dim2=-1)
                setattr(self, f"{side}_scale_{site}", scale.contiguous())
                getattr(self, f"{side}_factor_{site}").data.copy_((root / scale.unsqueeze(-1)).tril(-1))


def kronecker_roots(curvature: Curvature, rows: int, columns: int, sweeps: int = 10) -> tuple[Tensor, Tensor]:
    """Cholesky factors of the row and column covariances with the least KL to a block's Laplace approximation.

    Each given the other is a closed form: the row precision is the average of the precision's blocks weighted with the
    column covariance, and the other way round; ten sweeps of it.

    Args:
        curvature: of one module, D = rows * columns.
        rows, columns: shape of its latents.
    """
    fisher = curvature.fisher
    rest = (curvature.prior_precision + fisher.residual).reshape(rows, columns).double()
    vectors = (fisher.vectors * fisher.values.sqrt()).T.reshape(-1, rows, columns).double()
    column_root = torch.eye(columns, dtype=torch.float64, device=rest.device)
    for _ in range(sweeps):
        along = vectors @ column_root
        weights = column_root.square().sum(-1)
        row_precision = (torch.diag(rest @ weights) + torch.einsum("kij,klj->il", along, along)) / columns
        row_root = precision_to_root(row_precision)
        along = row_root.T @ vectors
        weights = row_root.square().sum(-1)
        column_precision = (torch.diag(rest.T @ weights) + torch.einsum("kij,kil->jl", along, along)) / rows
        column_root = precision_to_root(column_precision)
    return row_root, column_root
