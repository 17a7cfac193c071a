"""How the frozen factors A and B of an adapted layer are chosen: one file per family."""

from .adaptive_rank import allocate_ranks
from .basis import Basis, Projection
from .dct import DCT
from .gradient import Gradient
from .hybrid import Hybrid
from .random import Random
from .svd import SVD
from .whitened_svd import WhitenedSVD

__all__ = ["DCT", "SVD", "Basis", "Gradient", "Hybrid", "Projection", "Random", "WhitenedSVD", "allocate_ranks"]
