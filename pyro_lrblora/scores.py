"""Gradients of the log likelihood that Fisher matrices and data-driven projections are made of."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from pyro.distributions import TorchDistribution
from torch import Tensor

_MOST_CLASSES = 10


def score_losses(labels: TorchDistribution, observed: Tensor | None) -> Iterator[Tensor]:
    """Scalars to differentiate, one after the other, for the scores of every row of a batch.

    Args:
        labels: the distribution the likelihood gives the batch's labels, batch shape (B,).
        observed: (B,) the labels seen: one scalar, their log likelihood. None: the network's own labels, one scalar per
            class, sum_b sqrt(p_b(c)) log p_b(c) with the root held fixed, so that the outer products of the row
            gradients add up to the exact Fisher matrix; above 10 classes, or without finitely many,
            one label is drawn per row, which is right in expectation.
    """
    if observed is not None:
        yield labels.log_prob(observed).sum()
    elif labels.has_enumerate_support and len(labels.enumerate_support(expand=False)) <= _MOST_CLASSES:
        for value in labels.enumerate_support():
            log_prob = labels.log_prob(value)
            yield (log_prob.detach().exp().sqrt() * log_prob).sum()
    else:
        yield labels.log_prob(labels.sample()).sum()


def row_gradients(
    labels: TorchDistribution,
    observed: Tensor | None,
    latents: Tensor,  # (B, D), a draw per row, requires grad
) -> Iterator[Tensor]:
    """The rows' gradients (B, D) for each scalar of score_losses."""
    losses = list(score_losses(labels, observed))
    for position, loss in enumerate(losses):
        (gradient,) = torch.autograd.grad(loss, latents, retain_graph=position < len(losses) - 1)
        yield gradient
