"""Top singular vectors of the pretrained weight (LoRA-XS; Balazy et al. 2024, arXiv 2405.17604)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from .basis import Basis


@dataclass(frozen=True)
class SVD:
    """A and B span the leading right and left singular vectors of W0.

    Args:
        exact: a full SVD instead of the randomised one (Halko et al. 2011, 4 power iterations).
        absorb_singular_values: the papers' factors, A = diag(s) V' instead of V' (arXiv 2502.12122, section 3). A prior
            on R is then anisotropic on one side and means something else in every module; for reproduction only.
    """

    exact: bool = False
    absorb_singular_values: bool = False
    statistics: ClassVar[None] = None

    def __call__(
        self, weight: Tensor, rank: int, statistics: Mapping[str, Tensor], generator: torch.Generator
    ) -> Basis:
        u, s, v = leading_singular_vectors(weight, rank, None if self.exact else generator)
        return Basis(A=s[:, None] * v.T if self.absorb_singular_values else v.T.contiguous(), B=u)


def leading_singular_vectors(
    matrix: Tensor,  # (m, n)
    rank: int,
    generator: torch.Generator | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """U (m, rank), s (rank,), V (n, rank) in float32, on the matrix's own device.

    Randomised where a generator is given and it saves work, exact otherwise.
    """
    matrix = matrix.detach().float()
    oversampled = rank + 10
    if generator is None or 4 * oversampled > min(matrix.shape):
        u, s, vh = torch.linalg.svd(matrix, full_matrices=False)
        v = vh.T
    else:
        seed = int(torch.randint(2**31, (), generator=generator))
        cuda = [matrix.device] if matrix.is_cuda else []
        with torch.random.fork_rng(devices=cuda):
            torch.manual_seed(seed)
            u, s, v = torch.svd_lowrank(matrix, q=oversampled, niter=4)
    return u[:, :rank].contiguous(), s[:rank], v[:, :rank].contiguous()
