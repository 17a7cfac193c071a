"""Gradients of the log likelihood that Fisher matrices and data-driven projections are made of."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from pyro.distributions import TorchDistribution
from torch import Tensor
from torch.distributions import Independent, Normal

_MOST_CLASSES = 10


def score_losses(labels: TorchDistribution, observed: Tensor | None) -> Iterator[Tensor]:
    """Scalars to differentiate, one after the other, for the scores of every row of a batch.

    Args:
        labels: the distribution the likelihood gives the batch's labels, batch shape (B,).
        observed: (B,) the labels seen: one scalar, their log likelihood. None: the network's own labels, one scalar per
            class, sum_b sqrt(p_b(c)) log p_b(c) with the root held fixed, so that the outer products of the row
            gradients add up to the exact Fisher matrix; for Normal labels likewise, one scalar per output and one more
            where the scale is predicted. Above 10 classes or outputs, or for any other distribution, one label is drawn
            per row, which is right in expectation.
    """
    base = labels.base_dist if isinstance(labels, Independent) else labels
    if observed is not None:
        yield labels.log_prob(observed).sum()
    elif labels.has_enumerate_support and len(labels.enumerate_support(expand=False)) <= _MOST_CLASSES:
        for value in labels.enumerate_support():
            log_prob = labels.log_prob(value)
            yield (log_prob.detach().exp().sqrt() * log_prob).sum()
    elif isinstance(base, Normal) and labels.event_shape.numel() <= _MOST_CLASSES:
        rows = lambda value: value.expand(labels.batch_shape + labels.event_shape).reshape(len(value), -1)
        loc, scale = rows(base.loc), rows(base.scale)
        # The Fisher matrix of a Normal in (loc, log scale) is diag(1 / scale^2, 2).
        yield from (loc / scale.detach()).sum(0)
        if scale.requires_grad:
            yield from 2**0.5 * scale.log().sum(0)
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
