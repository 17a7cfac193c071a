"""Joint normal over all modules whose *precision* is diagonal plus rank K."""

from __future__ import annotations

from dataclasses import dataclass

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

    def __call__(self, model) -> LowRankPrecisionGuide:
        return LowRankPrecisionGuide(model, self.rank, self.start_scale)


class LowRankPrecisionGuide(LatentGuide):
    def __init__(self, model, rank: int, start_scale: float):
        super().__init__(model)
        self.loc, self.scale, self.factor = low_rank_parameters(self, model, rank, start_scale)

    def distribution(self) -> LowRankPrecisionNormal:
        scale = self.scale
        return LowRankPrecisionNormal(self.loc, self.factor / scale.unsqueeze(-1), scale.square().reciprocal())

    def begin(self, curvature: Curvature) -> None:
        """The Laplace approximation itself: the Fisher's leading eigenvectors, the rest of its diagonal in s."""
        fisher, rank = curvature.fisher, self.factor.shape[-1]
        vectors = fisher.vectors[:, :rank] * fisher.values[:rank].sqrt()
        rest = (curvature.diagonal - vectors.square().sum(-1)).maximum(curvature.prior_precision)
        self.loc.data.copy_(curvature.loc)
        self.scale = rest.rsqrt()
        self.factor.data[:, : vectors.shape[-1]] = vectors * rest.rsqrt().unsqueeze(-1)
