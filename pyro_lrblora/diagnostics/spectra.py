"""Eigenvalues of covariances, however these are known, and what is said of them."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

_ROUNDING = 1e-12  # of the mean square of the draws, below which a variance is what rounding left


def eigenvalues(matrix: Tensor) -> Tensor:
    """Of a covariance, descending; rounding below zero is zero."""
    return torch.linalg.eigvalsh(matrix).flip(0).clamp(min=0)


def from_draws(centred: Tensor) -> Tensor:
    """The S - 1 eigenvalues that centred draws (S, D) show."""
    return eigenvalues(centred @ centred.T / (len(centred) - 1))[:-1]


def from_products(gram: Tensor) -> np.ndarray:
    """The eigenvalues, at most S - 1, that draws show whose inner products (S, S) are known; without those of zero."""
    centred = gram - gram.mean(0) - gram.mean(1, keepdim=True) + gram.mean()
    values = eigenvalues(centred / (len(gram) - 1))[:-1]
    return values[values > _ROUNDING * gram.diagonal().mean()].numpy()


def effective_rank(values: Tensor, draws: int | None) -> float:
    """tr(C)^2 / tr(C^2), of eigenvalues, or of a sample's with the bias of its S draws taken out."""
    trace, square = values.sum(), values.square().sum()
    if trace <= 0:
        return float("nan")
    if draws is not None:
        n = draws - 1
        square = n**2 / ((n - 1) * (n + 2)) * (square - trace**2 / n)
        trace = (trace**2 - 2 * square / n).clamp(min=0).sqrt()
    return float(trace**2 / square.clamp(min=1e-300))


def share(values: np.ndarray, top: int) -> float:
    """Of the variance, in the first eigenvalues; NaN without variance."""
    total = float(values.sum())
    return float(values[:top].sum()) / total if total > 0 else float("nan")
