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
    columns = rank + 8  # fewer miss directions of trained weights, whose singular values lie close together
    if generator is None or 10 * columns > min(matrix.shape):
        u, s, vh = torch.linalg.svd(matrix, full_matrices=False)
        return u[:, :rank].contiguous(), s[:rank], vh[:rank].T.contiguous()
    start = torch.randn(matrix.shape[1], columns, generator=generator).to(matrix.device)
    # All blocks span more than the last one, and their products with the matrix are what makes the next.
    basis = matrix.new_empty(matrix.shape[0], 5 * columns)
    rows = matrix.new_empty(5 * columns, matrix.shape[1])
    for done in range(0, 5 * columns, columns):
        spanned, following = basis[:, :done], slice(done, done + columns)
        block = matrix @ (rows[done - columns : done].T if done else start)
        for _ in range(2):  # once leaves the rounding error of what was taken away
            block = torch.linalg.qr(block - spanned @ (spanned.T @ block)).Q
        basis[:, following], rows[following] = block, block.T @ matrix
    wide = rows.double()
    squares, rotation = torch.linalg.eigh(wide @ wide.T)  # in half the time of the SVD of the rows
    rotation, s = rotation[:, -rank:].flip(1).float(), squares[-rank:].flip(0).clamp_min(0).sqrt().float()
    u, v = basis @ rotation, rows.T @ (rotation / s)
    identity = torch.eye(rank, device=matrix.device)
    if not all((vectors.T @ vectors - identity).abs().max() < 1e-4 for vectors in (u, v)):
        return leading_singular_vectors(matrix, rank, None)  # of so low a rank that some block has nothing of its own
    return u, s, v
