"""Variational families: one file each. A guide is a spec here, or any callable from a model to a Pyro guide."""

from .block_low_rank import BlockLowRank
from .delta import Delta
from .diagonal import Diagonal
from .draws import Draws, DrawsGuide
from .dropout import Dropout
from .ensemble import Ensemble, EnsembleGuide
from .flow import Flow
from .full_rank import FullRank
from .latent_guide import Curvature, LatentGuide
from .low_rank import LowRank
from .low_rank_precision import LowRankPrecision
from .matrix_normal import MatrixNormal
from .mixture import Mixture
from .rotated_diagonal import RotatedDiagonal

__all__ = [
    "BlockLowRank",
    "Curvature",
    "Delta",
    "Diagonal",
    "Draws",
    "DrawsGuide",
    "Dropout",
    "Ensemble",
    "EnsembleGuide",
    "Flow",
    "FullRank",
    "LatentGuide",
    "LowRank",
    "LowRankPrecision",
    "MatrixNormal",
    "Mixture",
    "RotatedDiagonal",
]
