"""Singular vectors of the weight as its inputs see it (SVD-LLM, arXiv 2403.07378, section 3.1; arXiv 2605.07706)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from .basis import Basis
from .svd import leading_singular_vectors


@dataclass(frozen=True)
class WhitenedSVD:
    """B spans the leading left singular vectors U of W0 C^(1/2), A the rows of V' C^(-1/2).

    C is the second moment of the module's inputs over the tokens of the training texts, so B B' W0 is the rank-r matrix
    closest to W0 in mean squared output. Labels are not looked at. Padding is left out where the module's inputs have
    the shape of the attention mask, (B, T). The pass keeps n^2 numbers in float64 for every module.

    Args:
        ridge: added to C's diagonal, as a share of its mean, for inputs that do not fill the space.
    """

    ridge: float = 1e-6
    statistics: ClassVar[str] = "inputs"

    def collect(self, inputs: Tensor, gradients: Tensor | None, mask: Tensor) -> dict[str, Tensor]:
        # A few huge activations are common: in float32 their rounding would drown the small directions.
        tokens = (inputs * mask.unsqueeze(-1)).flatten(0, 1).double()
        return {"inputs": tokens.T @ tokens}

    def __call__(
        self, weight: Tensor, rank: int, statistics: Mapping[str, Tensor], generator: torch.Generator
    ) -> Basis:
        weight = weight.detach().double()
        moment = statistics["inputs"]
        # Inputs that were never seen, or are all zero, leave C = I: the plain SVD.
        ridge = self.ridge * moment.diagonal().mean() if moment.any() else 1.0
        root = torch.linalg.cholesky(moment + ridge * torch.eye(len(moment), dtype=moment.dtype, device=moment.device))
        # Any root of C has the same U, and V' C^(-1/2) = S^(-1) U' W0: no inverse is needed.
        u, _, _ = leading_singular_vectors(weight @ root, rank, generator)
        a, _ = torch.linalg.qr(weight.T @ u.double())
        return Basis(A=a.T.float().contiguous(), B=u)
