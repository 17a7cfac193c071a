"""Directions in which the loss wants to move the pretrained weight (after LoRA-GA, arXiv 2407.05000)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from .basis import Basis
from .svd import leading_singular_vectors


@dataclass(frozen=True)
class Gradient:
    """A and B are leading singular vectors of the loss gradient at W0, the head being a linear probe.

    The subspace has seen the training labels: it is an empirical-Bayes choice, and the posterior is conditional on it.

    Args:
        label_free: use the network's own label distribution instead: B and A are the leading eigenvectors of the sums
            over rows of E_y[G G'] and E_y[G' G], G being one row's gradient. (The *summed* gradient under the
            model's own labels has mean zero, so its singular vectors say nothing.)
    """

    label_free: bool = False

    @property
    def statistics(self) -> str:
        return "model" if self.label_free else "labels"

    def collect(self, inputs: Tensor, gradients: Tensor, mask: Tensor) -> dict[str, Tensor]:
        if not self.label_free:
            return {"gradient": torch.einsum("btm,btn->mn", gradients, inputs)}
        # With G = g' x of a row's T tokens, G G' = g' (x x') g: T x T numbers a row instead of the m x n of G.
        gram = lambda tokens: tokens @ tokens.mT
        # Summed in the product: a matrix for every row would be B times as large.
        summed = lambda one, other: one.flatten(0, 1).T @ other.flatten(0, 1)
        return {
            "left": summed(gradients, gram(inputs) @ gradients),
            "right": summed(inputs, gram(gradients) @ inputs),
        }

    def summed_gradient(self, statistics: Mapping[str, Tensor]) -> Tensor:
        """The sum over rows of the loss gradient, (m, n), up to sign."""
        return statistics["gradient"]

    def __call__(
        self, weight: Tensor, rank: int, statistics: Mapping[str, Tensor], generator: torch.Generator
    ) -> Basis:
        if not self.label_free:
            u, _, v = leading_singular_vectors(self.summed_gradient(statistics), rank, generator)
            return Basis(A=v.T.contiguous(), B=u)
        top = lambda matrix: torch.linalg.eigh(matrix).eigenvectors[:, -rank:].flip(-1)
        return Basis(A=top(statistics["right"]).T.contiguous(), B=top(statistics["left"]).contiguous())
