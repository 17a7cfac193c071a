"""Variational families: one file each. A guide is a spec here, or any callable from a model to a Pyro guide."""

from .delta import Delta
from .diagonal import Diagonal
from .latent_guide import Curvature, LatentGuide
from .low_rank import LowRank
from .low_rank_precision import LowRankPrecision

__all__ = ["Curvature", "Delta", "Diagonal", "LatentGuide", "LowRank", "LowRankPrecision"]
