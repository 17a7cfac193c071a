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
        exact: a full SVD instead of block Krylov iteration (Musco and Musco 2015, algorithm 2, with q = 4).
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

    By block Krylov iteration from random columns where a generator is given and it saves work, exact otherwise.
    """
    matrix = matrix.detach().float()
    columns = max(rank, 8)
    if generator is None or 10 * columns > min(matrix.shape):
        u, s, vh = torch.linalg.svd(matrix, full_matrices=False)
        return u[:, :rank].contiguous(), s[:rank], vh[:rank].T.contiguous()
    start = torch.randn(matrix.shape[1], columns, generator=generator).to(matrix.device)
    basis = torch.linalg.qr(matrix @ start).Q
    rows = basis.T @ matrix
    for _ in range(4):
        block = matrix @ rows[-columns:].T
        for _ in range(2):  # what is left of columns that are spanned already is rounding error, orthogonal to nothing
            block = block - basis @ (basis.T @ block)
            block = torch.linalg.qr(block - basis @ (basis.T @ block)).Q
        # All blocks span more than the last one, and their products with the matrix are what makes the next.
        basis, rows = torch.cat([basis, block], 1), torch.cat([rows, block.T @ matrix])
    if (basis.T @ basis - torch.eye(basis.shape[1], device=basis.device)).abs().max() > 1e-4:
        return leading_singular_vectors(matrix, rank, None)  # of a matrix of zeros no block differs from the last
    v, s, uh = torch.linalg.svd(rows.T, full_matrices=False)  # a tall matrix: in half the time of a wide one
    return basis @ uh[:rank].T, s[:rank], v[:, :rank].contiguous()
