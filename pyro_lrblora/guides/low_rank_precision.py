"""Joint normal over all modules whose *precision* is diagonal plus rank K."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ..distributions import LowRankPrecisionNormal
from .latent_guide import Curvature, LatentGuide
from .low_rank import check_columns, low_rank_parameters


@dataclass(frozen=True)
class LowRankPrecision:
    """Precision diag(1/s)(I + Z Z')diag(1/s) over all D latents together; D (K + 2) parameters.

    Under a Normal prior the posterior's precision is the prior's plus a Fisher term that a few directions carry, so its
    covariance is the prior's *minus* a low-rank part: this family can say that, LowRank cannot.

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

    def __call__(self, model) -> LowRankPrecisionGuide:
        return LowRankPrecisionGuide(model, self.rank, self.start_scale)


class LowRankPrecisionGuide(LatentGuide):
    symmetric = True

    def __init__(self, model, rank: int, start_scale: float):
        super().__init__(model)
        self.loc, self.scale, self.factor = low_rank_parameters(self, model, rank, start_scale)

    def distribution(self) -> LowRankPrecisionNormal:
        scale = self.scale
        return LowRankPrecisionNormal(self.loc, self.factor / scale.unsqueeze(-1), scale.square().reciprocal())

    def begin(self, curvature: Curvature) -> None:
        self.loc.data.copy_(curvature.loc)
        self.scale, self.factor.data = laplace_factor(curvature, self.factor.shape[-1])


def laplace_factor(curvature: Curvature, rank: int) -> tuple[Tensor, Tensor]:
    """The Laplace approximation: the Fisher's leading eigenvectors in Z (D, K), the rest of its diagonal in s (D,)."""
    fisher = curvature.fisher
    vectors = fisher.vectors[:, :rank] * fisher.values[:rank].sqrt()
    rest = (curvature.diagonal - vectors.square().sum(-1)).maximum(curvature.prior_precision)
    factor = vectors * rest.rsqrt().unsqueeze(-1)
    # Columns that the curvature does not fill start small, not at zero, where their gradients would be equal.
    spare = torch.randn(len(rest), rank - factor.shape[-1], generator=torch.Generator().manual_seed(0)).to(rest)
    return rest.rsqrt(), torch.cat([factor, 1e-2 * spare], dim=-1)
