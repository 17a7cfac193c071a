"""Covariances of the flat latent vector, never formed as D x D: all have `variance`, `times` and `dense`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class CovarianceFactors:
    """A covariance written as diag(diagonal) + sign * factor @ factor.T.

    Args:
        diagonal: (..., D).
        factor: (..., D, K).
        sign: +1 where the factor adds variance, -1 where it removes it (a low-rank precision).
    """

    diagonal: Tensor  # (..., D)
    factor: Tensor  # (..., D, K)
    sign: int = 1

    @property
    def variance(self) -> Tensor:
        """Marginal variances, (..., D)."""
        variance = self.diagonal + self.sign * self.factor.square().sum(-1)
        # Where a factor removes nearly all of it, the rest is below rounding: not zero, and not negative.
        return variance.maximum(torch.finfo(variance.dtype).eps * self.diagonal)

    def times(self, vectors: Tensor) -> Tensor:
        """The covariance times vectors (..., D)."""
        along = torch.einsum("...dk,...d->...k", self.factor, vectors)
        return self.diagonal * vectors + self.sign * torch.einsum("...dk,...k->...d", self.factor, along)

    def dense(self) -> Tensor:
        """The (..., D, D) matrix; for small D only."""
        return torch.diag_embed(self.diagonal) + self.sign * self.factor @ self.factor.mT


@dataclass(frozen=True)
class FullCovariance:
    """root @ root.T with a square root (..., D, D)."""

    root: Tensor  # (..., D, D)

    @property
    def variance(self) -> Tensor:
        """Marginal variances, (..., D)."""
        return self.root.square().sum(-1)

    def times(self, vectors: Tensor) -> Tensor:
        """The covariance times vectors (..., D)."""
        return torch.einsum("...ij,...j->...i", self.root, torch.einsum("...ji,...j->...i", self.root, vectors))

    def dense(self) -> Tensor:
        """The (..., D, D) matrix."""
        return self.root @ self.root.mT


@dataclass(frozen=True)
class RotatedCovariance:
    """Covariance of U (S * E) V' with standard normal E: independent in the Kronecker basis of U and V.

    Args:
        left: U, (..., r, r), any matrix; orthogonal for an eigenbasis.
        right: V, (..., c, c).
        scale: S, (..., r, c), all ones for a Kronecker product U U' x V V'.
    """

    left: Tensor  # (..., r, r)
    right: Tensor  # (..., c, c)
    scale: Tensor  # (..., r, c)

    @property
    def variance(self) -> Tensor:
        """Marginal variances, flat, (..., r c)."""
        return (self.left.square() @ self.scale.square() @ self.right.square().mT).flatten(-2)

    def times(self, vectors: Tensor) -> Tensor:
        """The covariance times flat vectors (..., r c)."""
        matrix = vectors.unflatten(-1, self.scale.shape[-2:])
        inner = self.scale.square() * _times(_times(matrix, self.right).mT, self.left).mT
        return _times(_times(inner, self.right.mT).mT, self.left.mT).mT.flatten(-2)

    def dense(self) -> Tensor:
        """The (..., r c, r c) matrix."""
        root = torch.einsum("...ij,...kl->...ikjl", self.left, self.right).flatten(-4, -3).flatten(-2)
        root = root * self.scale.flatten(-2).unsqueeze(-2)
        return root @ root.mT


def _times(matrices: Tensor, factor: Tensor) -> Tensor:
    """Matrices (S..., ..., r, c) times factors (..., c, c), which a broadcast product would copy S... times."""
    draws = matrices.shape[: matrices.dim() - factor.dim()]
    if not draws:
        return matrices @ factor
    together = matrices.flatten(0, len(draws) - 1).movedim(0, -3)
    product = together.flatten(-3, -2) @ factor
    return product.unflatten(-2, together.shape[-3:-1]).movedim(-3, 0).unflatten(0, draws)


@dataclass(frozen=True)
class BlockCovariance:
    """Independent blocks along the flat vector; each part holds L equal ones in its first axis."""

    parts: Sequence[CovarianceFactors | FullCovariance | RotatedCovariance]

    @property
    def variance(self) -> Tensor:
        """Marginal variances, (D,)."""
        return torch.cat([part.variance.flatten() for part in self.parts])

    def times(self, vectors: Tensor) -> Tensor:
        """The covariance times vectors (..., D)."""
        shapes = [part.variance.shape for part in self.parts]
        pieces = vectors.split([shape.numel() for shape in shapes], dim=-1)
        return torch.cat(
            [
                part.times(piece.unflatten(-1, shape)).flatten(-2)
                for part, piece, shape in zip(self.parts, pieces, shapes, strict=True)
            ],
            dim=-1,
        )

    def dense(self) -> Tensor:
        """The (D, D) matrix; for small D only."""
        return torch.block_diag(*(block for part in self.parts for block in part.dense()))
