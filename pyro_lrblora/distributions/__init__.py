"""Distributions over the latents that Pyro and torch lack, all stable in float32, and their covariances."""

from .blocks import Blocks
from .covariance import BlockCovariance, CovarianceFactors, FullCovariance, RotatedCovariance
from .low_rank import LowRankNormal, LowRankPrecisionNormal, kl_to_diagonal
from .mixture import EqualMixture
from .root_normal import FullRankNormal, MatrixNormal, RootNormal, RotatedNormal

__all__ = [
    "BlockCovariance",
    "Blocks",
    "CovarianceFactors",
    "EqualMixture",
    "FullCovariance",
    "FullRankNormal",
    "LowRankNormal",
    "LowRankPrecisionNormal",
    "MatrixNormal",
    "RootNormal",
    "RotatedCovariance",
    "RotatedNormal",
    "kl_to_diagonal",
]
