"""The frozen pair (A, B) of one adapted module."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor


@dataclass(frozen=True)
class Basis:
    """The frozen factors of W0 + B R A; R is (r, r).

    Args:
        A: (r, n), rows orthonormal unless the projection says otherwise.
        B: (m, r), columns orthonormal times one scalar.
    """

    A: Tensor  # (r, n)
    B: Tensor  # (m, r)


class Projection(Protocol):
    """How (A, B) is chosen; a frozen dataclass with these members, or anything that has them.

    `statistics` names what a pass over the training data must sum for each module: None (no data needed), "inputs" (the
    module's inputs, a forward pass alone), "labels" (gradients under the observed labels) or "model" (gradients under
    the network's own labels). Two members are optional: `smallest_rank`, and `summed_gradient(statistics)`, the (m, n)
    sum of loss gradients under the labels that LoRAXS(budget=...) reads.
    """

    statistics: str | None

    def collect(self, inputs: Tensor, gradients: Tensor | None, mask: Tensor) -> Mapping[str, Tensor]:
        """Tensors to sum over batches, from a module's inputs (B, T, n) and output gradients (B, T, m).

        The mask (B, T) is 0 where a token is padding, else 1; gradients are None where `statistics` is "inputs".
        """

    def __call__(
        self, weight: Tensor, rank: int, statistics: Mapping[str, Tensor], generator: torch.Generator
    ) -> Basis:
        """The basis of one module from its weight (m, n) and its summed statistics."""
