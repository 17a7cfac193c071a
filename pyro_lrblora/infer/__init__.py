"""Inference methods: one file each, each a function that returns a Posterior."""

from .progress import ScalesNotConverged
from .svi import Rates, svi

__all__ = ["Rates", "ScalesNotConverged", "svi"]
