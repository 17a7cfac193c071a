"""Joint normal over all modules, covariance diagonal plus rank K (the family of arXiv 2502.12122, equation 4)."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from pyro.nn import PyroParam
from torch import Tensor, nn
from torch.distributions import constraints

from ..distributions import LowRankNormal, LowRankPrecisionNormal
from .latent_guide import Curvature, LatentGuide


@dataclass(frozen=True)
class LowRank:
    """Covariance diag(s)(I + Z Z')diag(s) over all D latents together; D (K + 2) parameters.

    Args:
        rank: K, columns of Z.
        start_scale: start of each s as a share of the prior's, where no warm start sets it.
    """

    rank: int = 8
    start_scale: float = 0.1

    def __post_init__(self):
        check_columns(self.rank)

    @property
    def fisher_rank(self) -> int:
        return self.rank + 8

    def __call__(self, model) -> LowRankGuide:
        return LowRankGuide(model, self.rank, self.start_scale)


class LowRankGuide(LatentGuide):
    symmetric = True

    def __init__(self, model, rank: int, start_scale: float):
        super().__init__(model)
        self.loc, self.scale, self.factor = low_rank_parameters(self, model, rank, start_scale)

    def distribution(self) -> LowRankNormal:
        scale = self.scale
        return LowRankNormal(self.loc, scale.unsqueeze(-1) * self.factor, scale.square())

    def begin(self, curvature: Curvature) -> None:
        self.loc.data.copy_(curvature.loc)
        self.scale, self.factor.data = stationary_factor(curvature, self.factor.shape[-1])


def stationary_factor(curvature: Curvature, rank: int) -> tuple[Tensor, Tensor]:
    """Scales s (D,) and the stationary Z (D, K) for them: leading eigenvectors of the Laplace covariance in units of s.

    With s_i^2 = 1 / P_ii the reverse KL is stationary where (I + Z Z')^-1 Z = P~ Z, P~ = diag(s) P diag(s): an
    eigenvector of P~ with eigenvalue 1/lambda < 1 enters with length sqrt(lambda - 1).
    """
    fisher = curvature.fisher
    laplace = LowRankPrecisionNormal(
        curvature.loc, fisher.vectors * fisher.values.sqrt(), curvature.prior_precision + fisher.residual
    ).covariance()
    scale = curvature.diagonal.rsqrt()
    diagonal = laplace.diagonal / scale.square()
    factor = laplace.factor / scale.unsqueeze(-1)
    values, vectors = _leading_eigenvectors(diagonal, factor, rank)
    # Columns that are left over start small, not at zero, where their gradients would be equal.
    spare = torch.randn(len(scale), rank - len(values), generator=torch.Generator().manual_seed(0)).to(scale)
    return scale, torch.cat([vectors * (values - 1).clamp(min=1e-4).sqrt(), 1e-2 * spare], dim=-1)


def low_rank_parameters(guide: LatentGuide, model, rank: int, start_scale: float):
    """loc (D,), scale (D,) and factor (D, K), the factor in units of the scale: one rate suits any prior."""
    loc, prior_sd = guide.starting_point(model)
    # Small and random: at exactly zero every column would have the same gradient.
    factor = 1e-2 * torch.randn(loc.numel(), rank, generator=torch.Generator().manual_seed(0)).to(loc)
    return nn.Parameter(loc), PyroParam(start_scale * prior_sd, constraints.positive), nn.Parameter(factor)


def check_columns(rank: int) -> None:
    """Raise a ValueError unless a factor has at least one column."""
    if rank < 1:
        raise ValueError(f"expected rank >= 1, got rank={rank}; for no factor write Diagonal()")


def _leading_eigenvectors(diagonal: Tensor, factor: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """Eigenvalues (count,) and vectors (D, count) of diag(diagonal) - factor factor', by subspace iteration."""
    generator = torch.Generator().manual_seed(0)
    basis = torch.randn(len(diagonal), min(count + 8, len(diagonal)), generator=generator).to(diagonal)
    product = lambda v: diagonal.unsqueeze(-1) * v - factor @ (factor.T @ v)
    for _ in range(50):
        basis, _ = torch.linalg.qr(product(basis))
    values, rotation = torch.linalg.eigh(basis.T @ product(basis))
    return values[-count:].flip(0), (basis @ rotation)[:, -count:].flip(1)
