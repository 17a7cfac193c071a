"""Inference methods: one file each, each a function that returns a Posterior."""

from .chains import ChainsNotConverged
from .ensemble import ensemble
from .laplace import laplace
from .mc_dropout import mc_dropout
from .nuts import nuts
from .parallel import parallel_fits
from .progress import ScalesNotConverged
from .sghmc import sghmc
from .sgld import sgld
from .step import Rates
from .svi import svi
from .swag import swag
from .tfb import tfb

__all__ = [
    "ChainsNotConverged",
    "Rates",
    "ScalesNotConverged",
    "ensemble",
    "laplace",
    "mc_dropout",
    "nuts",
    "parallel_fits",
    "sghmc",
    "sgld",
    "svi",
    "swag",
    "tfb",
]
