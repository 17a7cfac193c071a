"""Normals that are a location plus an invertible linear map of standard noise: full covariance, Kronecker, rotated."""

from __future__ import annotations

import math

import torch
from pyro.distributions import TorchDistribution
from torch import Tensor
from torch.distributions import Independent, Normal, constraints, register_kl

from .covariance import FullCovariance, RotatedCovariance

_LOG_2PI = math.log(2 * math.pi)


class RootNormal(TorchDistribution):
    """Normal(loc, root root'); a subclass says what the root does, its inverse and its log determinant.

    Args:
        loc: (..., event shape).
        event_dim: axes of one draw.
    """

    has_rsample = True

    def __init__(self, loc: Tensor, event_dim: int, batch_shape: torch.Size, validate_args=None):
        self.loc = loc
        super().__init__(batch_shape, loc.shape[loc.dim() - event_dim :], validate_args=validate_args)

    def expand(self, batch_shape, _instance=None):
        # The parameters stay as they are and broadcast: a draw per row costs no copy of the root.
        new = object.__new__(type(self))
        new.__dict__.update(self.__dict__)
        new._batch_shape = torch.Size(batch_shape)
        return new

    @property
    def mean(self) -> Tensor:
        return self.loc.expand(self._extended_shape())

    mode = mean

    @property
    def variance(self) -> Tensor:
        return self.covariance().variance.unflatten(-1, self.event_shape).expand(self._extended_shape())

    def rsample(self, sample_shape=torch.Size()) -> Tensor:
        shape = self._extended_shape(sample_shape)
        return self.loc + self._root(torch.randn(shape, dtype=self.loc.dtype, device=self.loc.device))

    def log_prob(self, value: Tensor) -> Tensor:
        """Log density in nats of value (..., event shape)."""
        if self._validate_args:
            self._validate_sample(value)
        noise = self._inverse_root(value - self.loc).flatten(-len(self.event_shape))
        log_prob = -0.5 * (noise.square().sum(-1) + noise.shape[-1] * _LOG_2PI) - self._half_log_det
        return log_prob.expand(torch.broadcast_shapes(log_prob.shape, self.batch_shape))

    def entropy(self) -> Tensor:
        """Differential entropy in nats, shape batch_shape."""
        size = self.event_shape.numel()
        return (0.5 * size * (1 + _LOG_2PI) + self._half_log_det).expand(self.batch_shape)


class FullRankNormal(RootNormal):
    """Any covariance, by its Cholesky factor; D^2 memory, a density costs O(D^2).

    Args:
        loc: (..., D).
        scale_tril: (..., D, D) lower triangular with a positive diagonal.
    """

    support = constraints.real_vector
    arg_constraints = {"loc": constraints.real_vector, "scale_tril": constraints.lower_cholesky}

    def __init__(self, loc: Tensor, scale_tril: Tensor, validate_args=None):
        self.scale_tril = scale_tril
        super().__init__(
            loc, 1, torch.broadcast_shapes(loc.shape[:-1], scale_tril.shape[:-2]), validate_args=validate_args
        )

    def covariance(self) -> FullCovariance:
        """The covariance (..., D, D) by its root."""
        return FullCovariance(self.scale_tril)

    def _root(self, noise: Tensor) -> Tensor:
        return torch.einsum("...ij,...j->...i", self.scale_tril, noise)

    def _inverse_root(self, difference: Tensor) -> Tensor:
        return _solved(self.scale_tril, difference.unsqueeze(-1)).squeeze(-1)

    @property
    def _half_log_det(self) -> Tensor:
        return self.scale_tril.diagonal(dim1=-2, dim2=-1).log().sum(-1)


class MatrixNormal(RootNormal):
    """loc + row_tril E column_tril': covariance a Kronecker product of rows and columns (Dawid 1981).

    Args:
        loc: (..., r, c).
        row_tril: (..., r, r) lower triangular, the root of the covariance between rows.
        column_tril: (..., c, c) likewise between columns.
    """

    support = constraints.independent(constraints.real, 2)
    arg_constraints = {
        "loc": constraints.independent(constraints.real, 2),
        "row_tril": constraints.lower_cholesky,
        "column_tril": constraints.lower_cholesky,
    }

    def __init__(self, loc: Tensor, row_tril: Tensor, column_tril: Tensor, validate_args=None):
        self.row_tril, self.column_tril = row_tril, column_tril
        batch_shape = torch.broadcast_shapes(loc.shape[:-2], row_tril.shape[:-2], column_tril.shape[:-2])
        super().__init__(loc, 2, batch_shape, validate_args=validate_args)

    def covariance(self) -> RotatedCovariance:
        """The covariance of the flattened matrix (rows one after the other)."""
        ones = torch.ones_like(self.loc)
        return RotatedCovariance(self.row_tril, self.column_tril, ones)

    def _root(self, noise: Tensor) -> Tensor:
        return _both_sides(self.row_tril, noise, self.column_tril)

    def _inverse_root(self, difference: Tensor) -> Tensor:
        rows = _solved(self.row_tril, difference)
        return _solved(self.column_tril, rows.mT).mT

    @property
    def _half_log_det(self) -> Tensor:
        log_det = lambda tril: tril.diagonal(dim1=-2, dim2=-1).log().sum(-1)
        r, c = self.event_shape
        return c * log_det(self.row_tril) + r * log_det(self.column_tril)


class RotatedNormal(RootNormal):
    """loc + U (S * E) V' with orthogonal U and V: independent in a Kronecker eigenbasis (George et al. 2018, EKFAC).

    Args:
        loc: (..., r, c).
        left: U, (..., r, r) orthogonal.
        right: V, (..., c, c) orthogonal.
        scale: S, (..., r, c) positive.
    """

    support = constraints.independent(constraints.real, 2)
    arg_constraints = {
        "loc": constraints.independent(constraints.real, 2),
        "left": constraints.independent(constraints.real, 2),
        "right": constraints.independent(constraints.real, 2),
        "scale": constraints.independent(constraints.positive, 2),
    }

    def __init__(self, loc: Tensor, left: Tensor, right: Tensor, scale: Tensor, validate_args=None):
        self.left, self.right, self.scale = left, right, scale
        batch_shape = torch.broadcast_shapes(loc.shape[:-2], left.shape[:-2], right.shape[:-2], scale.shape[:-2])
        super().__init__(loc, 2, batch_shape, validate_args=validate_args)

    def covariance(self) -> RotatedCovariance:
        """The covariance of the flattened matrix (rows one after the other)."""
        return RotatedCovariance(self.left, self.right, self.scale)

    def _root(self, noise: Tensor) -> Tensor:
        return _both_sides(self.left, self.scale * noise, self.right)

    def _inverse_root(self, difference: Tensor) -> Tensor:
        return _both_sides(self.left.mT, difference, self.right.mT) / self.scale

    @property
    def _half_log_det(self) -> Tensor:
        return self.scale.log().sum((-2, -1))


def _both_sides(left: Tensor, matrices: Tensor, right: Tensor) -> Tensor:
    """left @ matrices (..., r, c) @ right.T, without a copy of left and right for every matrix."""
    return torch.einsum("...ij,...jc,...kc->...ik", left, matrices, right)


def _solved(root: Tensor, matrices: Tensor) -> Tensor:
    """root^-1 @ matrices (..., r, c), draws as columns of one solve: broadcasting would copy the root for each."""
    batch = root.shape[:-2]
    matrices = matrices.expand(torch.broadcast_shapes(matrices.shape, (*batch, 1, 1)))
    columns = matrices.reshape(-1, *batch, *matrices.shape[-2:]).movedim(0, -2)  # (batch, r, draws, c)
    solved = torch.linalg.solve_triangular(root, columns.flatten(-2), upper=False)
    return solved.unflatten(-1, columns.shape[-2:]).movedim(-2, 0).reshape(matrices.shape)


@register_kl(RootNormal, Independent)
def _kl_root_normal(q, p):
    if not isinstance(p.base_dist, Normal) or p.event_shape != q.event_shape:
        raise NotImplementedError
    # log N(x; m, v) is quadratic: its expectation needs q's marginal moments alone.
    spread = (q.variance + (q.mean - p.mean).square()) / p.variance
    size = q.event_shape.numel()
    cross = 0.5 * (spread + p.variance.log()).flatten(-len(q.event_shape)).sum(-1) + 0.5 * size * _LOG_2PI
    return cross - q.entropy()
