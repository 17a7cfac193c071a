"""Structures of the Gauss-Newton matrix of the latents: what each keeps, its log determinant, its Laplace guide."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

from ..data import Batch
from ..fisher import Fisher, fisher, scaled_gradients
from ..guides import Curvature, Diagonal, FullRank, LowRankPrecision, RotatedDiagonal
from ..guides.full_rank import precision_to_root
from ..guides.low_rank_precision import laplace_factor


@dataclass(frozen=True)
class DiagonalMatrix:
    """The diagonal alone, (D,)."""

    diagonal: Tensor  # (D,)

    @classmethod
    def of(cls, model, batches: Iterable[Batch], at: Tensor) -> DiagonalMatrix:
        return cls(fisher(model, batches, at, rank=1).diagonal)

    def log_det(self, prior_precision: Tensor) -> Tensor:
        """log det of the matrix plus the prior precision (D,), in nats."""
        return (self.diagonal + prior_precision).log().sum()

    def posterior(self, model, loc: Tensor, prior_precision: Tensor):
        """The guide and its spec."""
        guide = Diagonal()(model)
        guide.loc.data.copy_(loc)
        guide.scale = (self.diagonal + prior_precision).rsqrt()
        return guide, Diagonal()


@dataclass(frozen=True)
class LowRankMatrix:
    """The leading eigenvectors, and what they leave of the diagonal."""

    fisher: Fisher
    rank: int

    @classmethod
    def of(cls, model, batches: Iterable[Batch], at: Tensor, rank: int) -> LowRankMatrix:
        return cls(fisher(model, batches, at, rank), rank)

    def log_det(self, prior_precision: Tensor) -> Tensor:
        """log det of the matrix plus the prior precision (D,), in nats."""
        rest = prior_precision + self.fisher.residual
        whitened = self.fisher.vectors * self.fisher.values.sqrt() * rest.rsqrt().unsqueeze(-1)
        inner = torch.eye(whitened.shape[-1]).to(whitened) + whitened.T @ whitened
        return rest.log().sum() + torch.logdet(inner)

    def posterior(self, model, loc: Tensor, prior_precision: Tensor):
        """The guide and its spec."""
        spec = LowRankPrecision(self.rank)
        guide = spec(model)
        guide.loc.data.copy_(loc)
        guide.scale, guide.factor.data = laplace_factor(Curvature(loc, prior_precision, self.fisher), self.rank)
        guide.factor.data[:, len(self.fisher.values) :] = 0
        return guide, spec


@dataclass(frozen=True)
class KroneckerMatrix:
    """Per module the Kronecker product of the row and column sums of E[G G'] and E[G' G], over their trace.

    G is a row's gradient of a module's latents. (Martens & Grosse 2015 factor inputs and output gradients instead,
    which needs independence over tokens; a latent as small as R lets G itself be summed.)
    """

    left: list[Tensor]  # (r, r) per module, site by site
    right: list[Tensor]  # (c, c)

    @classmethod
    def of(cls, model, batches: Iterable[Batch], at: Tensor) -> KroneckerMatrix:
        sites = model.sites
        left = {name: at.new_zeros(s[0], s[1], s[1]) for name, s in sites.shapes.items()}
        right = {name: at.new_zeros(s[0], s[2], s[2]) for name, s in sites.shapes.items()}
        for gradient in scaled_gradients(model, batches, at):
            for name, g in sites.split(gradient).items():
                left[name] += torch.einsum("blij,blkj->lik", g, g)
                right[name] += torch.einsum("blij,blik->ljk", g, g)
        return cls([m for site in left.values() for m in site], [m for site in right.values() for m in site])

    def log_det(self, prior_precision: Tensor) -> Tensor:
        """log det of the matrix plus the prior precision (D,), in nats; exact where that is one number per module."""
        return torch.cat([precision.flatten() for *_, precision in self._rotated(prior_precision)]).log().sum()

    def posterior(self, model, loc: Tensor, prior_precision: Tensor):
        """The guide and its spec."""
        guide = RotatedDiagonal()(model)
        guide.set(loc, list(self._rotated(prior_precision)))
        return guide, RotatedDiagonal()

    def _rotated(self, prior_precision: Tensor):
        """By module: eigenbases and the precisions in them."""
        start = 0
        for left, right in zip(self.left, self.right, strict=True):
            (left_values, u), (right_values, v) = torch.linalg.eigh(left), torch.linalg.eigh(right)
            trace = left.trace().clamp(min=1e-30)
            stop = start + len(left) * len(right)
            prior = prior_precision[start:stop].reshape(len(left), len(right))
            values = torch.outer(left_values.clamp(min=0), right_values.clamp(min=0)) / trace
            yield u, v, values + u.square().T @ prior @ v.square()
            start = stop


@dataclass(frozen=True)
class FullMatrix:
    """All of it, (D, D), in float64."""

    matrix: Tensor  # (D, D)

    @classmethod
    def of(cls, model, batches: Iterable[Batch], at: Tensor) -> FullMatrix:
        FullRank().check_memory(model)
        matrix = torch.zeros(len(at), len(at), dtype=torch.float64, device=at.device)
        for gradient in scaled_gradients(model, batches, at):
            matrix += (gradient.T @ gradient).double()
        return cls(matrix)

    def log_det(self, prior_precision: Tensor) -> Tensor:
        """log det of the matrix plus the prior precision (D,), in nats."""
        return torch.logdet(self.matrix + torch.diag(prior_precision.double()))

    def posterior(self, model, loc: Tensor, prior_precision: Tensor):
        """The guide and its spec."""
        guide = FullRank()(model)
        guide.set(loc, [precision_to_root(self.matrix + torch.diag(prior_precision.double()))])
        return guide, FullRank()


def log_evidence(log_joint: float, log_det: Tensor, size: int) -> float:
    """Laplace's log p(y) in nats: log joint at the mode + D/2 log 2 pi - 1/2 log det H (MacKay 1992, equation 2.8)."""
    return log_joint + 0.5 * (size * math.log(2 * math.pi) - float(log_det))
