"""Low-frequency cosines: a fixed basis that looks at nothing (DCT-II; Ahmed, Natarajan and Rao 1974)."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from .basis import Basis


@dataclass(frozen=True)
class DCT:
    """Rows of A and columns of B are the lowest-frequency vectors of the orthonormal DCT-II.

    The order of a weight's rows and columns means little in most networks, so this is a second null beside `Random()`,
    without a seed. Cosine bases for fine-tuning: LoCA, arXiv 2502.06820.
    """

    statistics: ClassVar[None] = None

    def __call__(
        self, weight: Tensor, rank: int, statistics: Mapping[str, Tensor], generator: torch.Generator
    ) -> Basis:
        m, n = weight.shape
        return Basis(A=_cosines(rank, n).to(weight.device), B=_cosines(rank, m).T.contiguous().to(weight.device))


def _cosines(rank: int, size: int) -> Tensor:
    """(rank, size), row k being cos(pi k (j + 1/2) / size) at unit length."""
    frequency = torch.arange(rank, dtype=torch.float64)
    place = torch.arange(size, dtype=torch.float64) + 0.5
    cosines = torch.cos(math.pi / size * torch.outer(frequency, place))
    return (cosines / cosines.norm(dim=1, keepdim=True)).float()
