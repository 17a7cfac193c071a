"""Eigenvalues of covariances, however these are known, and what is said of them."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

_PAIRS = 1000  # of latents, whose chance correlations say what draws are worth
_LATENTS = 256  # at most, that these are of
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


def effective_rank(values: Tensor, draws: float | None) -> float:
    """tr(C)^2 / tr(C^2), of eigenvalues, or of a sample's with the bias of its S draws taken out."""
    trace, square = values.sum(), values.square().sum()
    if trace <= 0 or (draws is not None and draws <= 2):  # no bias can be told from two draws
        return float("nan")
    if draws is not None:
        n = draws - 1
        square = n**2 / ((n - 1) * (n + 2)) * (square - trace**2 / n)
        trace = (trace**2 - 2 * square / n).clamp(min=0).sqrt()
    return float(trace**2 / square.clamp(min=1e-300))


def added_precision(values: Tensor, draws: float | None) -> tuple[Tensor, float]:
    """Eigenvalues of M = C^-1 - I, descending, none below zero, and its effective rank tr(M)^2 / tr(M^2).

    The inverse of a sample covariance is too large, and its eigenvalues are further apart than those of C^-1: the
    first two moments of an inverse Wishart matrix say by how much (von Rosen 1988), and the rank is without that bias.

    Args:
        values: eigenvalues of C, descending, or of a sample covariance.
        draws: that the sample is of, more than D + 4; None where C is known.
    """
    size, inverse = len(values), 1 / values.clamp(min=1e-12)
    left = None if draws is None else draws - 2 - size  # degrees of freedom beyond the least
    if left is not None:
        inverse = inverse * left / (draws - 1)
    added = (inverse - 1).clamp(min=0).flip(0)
    if left is None:
        return added, effective_rank(added, None)
    trace, squares = inverse.sum(), inverse.square().sum()
    # Of C^-1 without bias: tr(C^-1)^2 and tr(C^-2). Then those of M.
    trace_squared, square = trace**2 - 2 * squares / left, ((left - 1) * squares - trace**2) / left
    top, bottom = trace_squared - 2 * size * trace + size**2, square - 2 * trace + size
    return added, float((top / bottom).clamp(1, size)) if top > 0 and bottom > 0 else float("nan")


def share(values: np.ndarray, top: int) -> float:
    """Of the variance, in the first eigenvalues; NaN without variance."""
    total = float(values.sum())
    return float(values[:top].sum()) / total if total > 0 else float("nan")


def turned(draws: Tensor, chains: int, generator: torch.Generator) -> Tensor:
    """Draws (S, D), chain after chain, whose every latent is turned about by a step of its own in each chain.

    Its own autocorrelation stays, its correlations go.
    """
    by_chain = draws.unflatten(0, (chains, -1))
    length = by_chain.shape[1]
    steps = torch.randint(length, (chains, 1, draws.shape[1]), generator=generator)
    return by_chain.gather(1, (torch.arange(length)[:, None] + steps) % length).flatten(0, 1)


def independent_draws(draws: Tensor, chains: int) -> float:
    """How many independent draws show chance correlations as large as draws (S, D) do that are turned about.

    The mean square of a correlation of n independent draws is 1 / (n - 1).
    """
    draws, generator = draws[:, :: -(-draws.shape[1] // _LATENTS)], torch.Generator().manual_seed(0)
    pairs = draws.shape[1] * (draws.shape[1] - 1) // 2
    if not pairs:
        return float(len(draws))
    means = [
        torch.corrcoef(turned(draws, chains, generator).T).square().tril(-1).nansum() / pairs
        for _ in range(-(-_PAIRS // pairs))
    ]
    return min(float(len(draws)), 1 + 1 / max(float(sum(means)) / len(means), 1e-12))
