"""The Fisher matrix of the latents in one streaming pass: its diagonal and its leading eigenvectors."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from .data import Batch, batch_rows, naming_the_batch, some_rows
from .scores import row_gradients


@dataclass(frozen=True)
class Fisher:
    """Sum over N rows of E_y[g g'], g being a row's gradient of log p(y | latents), at one point.

    Args:
        diagonal: (D,).
        vectors: (D, K) orthonormal, leading eigenvectors.
        values: (K,) their eigenvalues, descending.
    """

    diagonal: Tensor  # (D,)
    vectors: Tensor  # (D, K)
    values: Tensor  # (K,)

    @property
    def residual(self) -> Tensor:
        """The part of the diagonal (D,) that the leading eigenvectors do not carry."""
        return (self.diagonal - (self.vectors.square() * self.values).sum(-1)).clamp(min=0)


def fisher(model, batches: Iterable[Batch], at: Tensor, rank: int, rows: int | None = None) -> Fisher:
    """The Fisher matrix at one point, with the network's own labels (the Gauss-Newton matrix, not the empirical one).

    Memory is O(D (rank + B C)): the leading eigenvectors come from a sketch that every batch's row gradients are merged
    into, exact where the rest of the spectrum is negligible.

    Args:
        model: a prepared BayesianLoRA.
        batches: training data.
        at: (D,) the latents; a Bayesian head stays at its start.
        rank: leading eigenvectors wanted.
        rows: stop after about this many rows and scale up to N; None uses all.
    """
    diagonal = torch.zeros_like(at)
    sketch = at.new_zeros(0, at.numel())
    for gradient in scaled_gradients(model, batches, at, rows):
        diagonal += gradient.square().sum(0)
        sketch = _merge(sketch, gradient, rank + 10)
    singular = sketch.norm(dim=-1)
    kept = singular[:rank] > 1e-6 * singular.max().clamp(min=1e-30)
    vectors = sketch[:rank][kept] / singular[:rank][kept].unsqueeze(-1)
    return Fisher(diagonal, vectors.T.contiguous(), singular[:rank][kept].square())


def scaled_gradients(model, batches: Iterable[Batch], at: Tensor, rows: int | None = None) -> Iterator[Tensor]:
    """Row gradients (B, D), batch after batch and class after class, whose outer products add up to the Fisher matrix.

    Args:
        model: a prepared BayesianLoRA.
        batches: training data.
        at: (D,) the latents; a Bayesian head stays at its start.
        rows: stop after about this many rows and scale up to N; None uses all.
    """
    values, head = model.start(), model.head_values()
    used = min(rows or model.size, model.size)
    seen = 0
    for position, batch in enumerate(batches):
        batch = some_rows(model.to_device(batch), slice(used - seen))
        size = batch_rows(batch)
        latents = at.detach().expand(size, -1).clone().requires_grad_()
        with torch.enable_grad(), model.attached(dropout=False), naming_the_batch(position):
            outputs = model.outputs(batch, values | model.sites.split(latents), head)
            labels = model.label_distribution(outputs, batch)
            for gradient in row_gradients(labels, None, latents):
                yield gradient * (model.size / used) ** 0.5
        seen += size
        if seen >= used:
            break


def _merge(sketch: Tensor, rows: Tensor, keep: int) -> Tensor:
    """The `keep` leading right singular vectors, times their singular values, of sketch and rows stacked."""
    stacked = torch.cat([sketch, rows])
    # Through the small Gram matrix: D may be a million, the stack is a hundred rows.
    # In float64: with more rows than directions most eigenvalues are zero, which float32 may fail to converge on.
    _, vectors = torch.linalg.eigh((stacked @ stacked.T).double())
    return vectors[:, -min(keep, stacked.shape[-1]) :].flip(-1).T.to(stacked) @ stacked
