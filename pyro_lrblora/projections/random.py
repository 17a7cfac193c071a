"""Haar-random orthonormal factors: the null against which any informed projection is measured."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from .basis import Basis


@dataclass(frozen=True)
class Random:
    """A and B uniform over all orthonormal frames (QR of a Gaussian with the signs of R's diagonal; Mezzadri 2007)."""

    statistics: ClassVar[None] = None

    def __call__(
        self, weight: Tensor, rank: int, statistics: Mapping[str, Tensor], generator: torch.Generator
    ) -> Basis:
        m, n = weight.shape
        frame = lambda size: _haar(size, rank, generator).to(weight.device)
        return Basis(A=frame(n).T.contiguous(), B=frame(m))


def _haar(size: int, rank: int, generator: torch.Generator) -> Tensor:
    q, r = torch.linalg.qr(torch.randn(size, rank, generator=generator))
    return q * r.diagonal().sign()
