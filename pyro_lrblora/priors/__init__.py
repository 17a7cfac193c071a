"""Priors over the latents: Pyro programs, one per class.

A prior is any function of the sites' shapes that samples each of them by name and returns the values:

    def mine(shapes):
        cauchy = dist.Cauchy(0.0, 0.1)
        return {name: pyro.sample(name, cauchy.expand(shape).to_event()) for name, shape in shapes.items()}

The first axis of a shape runs over adapted modules. Sites a prior adds of its own (scales) are drawn once, whatever the
number of rows.
"""

from .horseshoe import Horseshoe, RegularisedHorseshoe
from .independent import Laplace, Normal, StudentT
from .layer_scale import LayerScale
from .learned import Learned
from .matrix_normal import MatrixNormal
from .singular_values import SingularValues
from .spike_slab import SpikeSlab
from .variance import prior_variance as prior_variance

__all__ = [
    "Horseshoe",
    "Laplace",
    "LayerScale",
    "Learned",
    "MatrixNormal",
    "Normal",
    "RegularisedHorseshoe",
    "SingularValues",
    "SpikeSlab",
    "StudentT",
]
