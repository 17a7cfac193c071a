"""Latents correlated along rows and along columns."""

from __future__ import annotations

from dataclasses import dataclass

import pyro
import torch
from torch import Tensor

from ..distributions import MatrixNormal as MatrixNormalDistribution
from .sites import Shapes, by_module, check_positive


@dataclass(frozen=True)
class MatrixNormal:
    """Each module's matrix is matrix normal, with equicorrelated rows and columns, independently of other modules.

    The covariance is scale^2 times the Kronecker product of two correlation matrices, each with one number off its
    diagonal (Dawid 1981).

    Args:
        scale: standard deviation of every entry, positive.
        row_correlation: between any two rows, above -1 / (number of rows - 1) and below 1.
        column_correlation: between any two columns, likewise.
    """

    scale: float = 0.1
    row_correlation: float = 0.0
    column_correlation: float = 0.0

    def __post_init__(self):
        check_positive(scale=self.scale)
        for name in ("row_correlation", "column_correlation"):
            if not -1 < getattr(self, name) < 1:
                raise ValueError(f"expected -1 < {name} < 1, got {name}={getattr(self, name)!r}")

    def __call__(self, shapes: Shapes) -> dict[str, Tensor]:
        # Every site's correlations are checked before the first is sampled.
        families = {name: self._family(name, shape) for name, shape in shapes.items()}
        return {name: pyro.sample(name, family.to_event(1)) for name, family in families.items()}

    def _family(self, name: str, shape: torch.Size) -> MatrixNormalDistribution:
        if len(shape) != 3:
            raise ValueError(f"expected sites of shape (modules, rows, columns) for MatrixNormal, got {name}: {shape}")
        modules, rows, columns = shape
        row_tril = _equicorrelated_tril(rows, self.row_correlation, "row_correlation", name)
        column_tril = _equicorrelated_tril(columns, self.column_correlation, "column_correlation", name)
        return MatrixNormalDistribution(
            torch.zeros(shape),
            (by_module(self.scale, shape, name) * row_tril).expand(modules, rows, rows),
            column_tril.expand(modules, columns, columns),
        )


def _equicorrelated_tril(size: int, correlation: float, argument: str, name: str) -> Tensor:
    """The Cholesky factor (size, size) of ones on the diagonal and one correlation everywhere else."""
    if size > 1 and correlation <= -1 / (size - 1):
        raise ValueError(
            f"expected {argument} > {-1 / (size - 1):.4g}, that is -1 / ({size} - 1) for the size of site {name!r}, "
            f"got {correlation!r}"
        )
    identity = torch.eye(size)
    if correlation == 0:
        return identity
    return torch.linalg.cholesky((1 - correlation) * identity + correlation)
