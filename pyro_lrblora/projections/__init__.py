"""How the frozen factors A and B of an adapted layer are chosen: one file per family."""

from .basis import Basis, Projection
from .gradient import Gradient
from .random import Random
from .svd import SVD

__all__ = ["SVD", "Basis", "Gradient", "Projection", "Random"]
