"""Monte Carlo dropout on the adapter (Gal & Ghahramani 2016, arXiv 1506.02142)."""

from __future__ import annotations

from ..guides import Dropout
from ..model import BayesianLoRA
from ..posterior import Posterior
from .svi import svi


def mc_dropout(model: BayesianLoRA, train, *, rate: float = 0.1, **options) -> Posterior:
    """Train with dropout of the adapter's inputs and keep it on when predicting.

    It is svi with guides.Dropout(rate): a draw drops the same inputs for every token and row, so it is one function.

    Args:
        model: prepared or not.
        train: as for svi.
        rate: probability that an input is dropped.
        options: of svi.
    """
    return svi(model, train, guide=Dropout(rate), **options)
