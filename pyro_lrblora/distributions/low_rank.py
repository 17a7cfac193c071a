"""Normal distributions over the flat latent vector whose covariance, or precision, is diagonal plus low rank.

Both keep the triangular factor T of the whitened factor Z, T'T = I + Z'Z. The Gram matrix squares the condition number
of Z, so it and T are float64; what has length D is float32, and right to within a nat where the Woodbury identity loses
hundreds (pytorch#75173).
"""

from __future__ import annotations

import math
from functools import cached_property

import torch
from pyro.distributions import TorchDistribution
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.distributions import Independent, Normal, constraints, register_kl

from .covariance import CovarianceFactors

_LOG_2PI = math.log(2 * math.pi)
_BLOCK = 2**14  # rows of Z that are float64 at a time: a copy of all of it would not fit into the cache


class _Triangle(torch.autograd.Function):
    """The upper triangular T (..., K, K), float64, with positive diagonal and T'T = I + Z'Z, from Z (..., D, K).

    Its own backward: a gradient through T reaches Z through the K x K Gram matrix alone, so that it costs one product
    Z @ (K, K). (Murray 2016, arXiv 1602.07527, equation 10, for the Cholesky factor.)
    """

    @staticmethod
    def forward(ctx, z: Tensor) -> Tensor:
        gram = torch.eye(z.shape[-1], dtype=torch.float64, device=z.device)
        for block in z.split(_BLOCK, dim=-2):
            block = block.double()
            gram = gram + block.mT @ block
        t = torch.linalg.cholesky(gram).mT
        ctx.save_for_backward(z, t)
        return t

    @staticmethod
    @once_differentiable
    def backward(ctx, gradient: Tensor) -> Tensor:
        z, t = ctx.saved_tensors
        lower = (t @ gradient.mT).tril()
        lower.diagonal(dim1=-2, dim2=-1).mul_(0.5)
        half = torch.linalg.solve_triangular(t, lower, upper=True)
        half = torch.linalg.solve_triangular(t.mT, half, upper=False, left=False)
        return z @ (half + half.mT).to(z.dtype)


class _Product(torch.autograd.Function):
    """Z (..., D, K) times a float64 matrix (..., K, K), rounded once: columns that nearly cancel keep their digits."""

    @staticmethod
    def forward(ctx, z: Tensor, matrix: Tensor) -> Tensor:
        ctx.save_for_backward(z, matrix)
        return torch.cat([(block.double() @ matrix).to(z.dtype) for block in z.split(_BLOCK, dim=-2)], dim=-2)

    @staticmethod
    @once_differentiable
    def backward(ctx, gradient: Tensor) -> tuple[Tensor, Tensor]:
        z, matrix = ctx.saved_tensors
        return gradient @ matrix.mT.to(z.dtype), (z.mT @ gradient).to(matrix.dtype)


class _DiagonalPlusLowRank(TorchDistribution):
    """What the covariance and the precision form share: parameters, shapes and the whitened factor."""

    support = constraints.real_vector
    has_rsample = True

    def __init__(self, loc: Tensor, factor: Tensor, diagonal: Tensor, validate_args=None):
        if factor.dim() < 2 or factor.shape[-2] != loc.shape[-1]:
            raise ValueError(f"expected a factor of shape (..., D={loc.shape[-1]}, K), got {tuple(factor.shape)}")
        if diagonal.shape[-1] != loc.shape[-1]:
            raise ValueError(f"expected a diagonal of shape (..., D={loc.shape[-1]}), got {tuple(diagonal.shape)}")
        self.loc, self._factor, self._diagonal = loc, factor, diagonal
        batch_shape = torch.broadcast_shapes(loc.shape[:-1], factor.shape[:-2], diagonal.shape[:-1])
        super().__init__(batch_shape, loc.shape[-1:], validate_args=validate_args)

    def expand(self, batch_shape, _instance=None):
        # The parameters stay as they are and broadcast: a draw per row costs no copy of the factor.
        new = self._get_checked_instance(type(self), _instance)
        new.loc, new._factor, new._diagonal = self.loc, self._factor, self._diagonal
        for name in ("_whitened", "_triangle", "_basis"):
            if name in self.__dict__:
                setattr(new, name, getattr(self, name))
        TorchDistribution.__init__(new, torch.Size(batch_shape), self.event_shape, validate_args=False)
        new._validate_args = self._validate_args
        return new

    @cached_property
    def _whitened(self) -> Tensor:
        """Z (..., D, K): the factor in units of the diagonal."""
        return self._factor / self._diagonal.sqrt().unsqueeze(-1)

    @cached_property
    def _triangle(self) -> Tensor:
        """T (..., K, K), T'T = I + Z'Z."""
        return _Triangle.apply(self._whitened)

    @property
    def _log_det_triangle(self) -> Tensor:
        """log det(I + Z'Z) / 2, shape (...)."""
        return self._triangle.diagonal(dim1=-2, dim2=-1).log().sum(-1).to(self.loc.dtype)

    @cached_property
    def _basis(self) -> tuple[Tensor, Tensor]:
        """Q1 = Z T^-1 (..., D, K) and Q2 = T^-1 (..., K, K): [Q1; Q2] has orthonormal columns, those of [Z; I]."""
        eye = torch.eye(self._factor.shape[-1]).to(self._triangle)
        q2 = torch.linalg.solve_triangular(self._triangle, eye, upper=True)
        return _Product.apply(self._whitened, q2), q2.to(self.loc.dtype)

    @property
    def mean(self) -> Tensor:
        return self.loc.expand(self._extended_shape())

    mode = mean

    def entropy(self) -> Tensor:
        """Differential entropy in nats, shape batch_shape."""
        return (0.5 * self.event_shape[0] * (1 + _LOG_2PI) + self._half_log_det).expand(self.batch_shape)

    def log_prob(self, value: Tensor) -> Tensor:
        """Log density in nats of value (..., D)."""
        if self._validate_args:
            self._validate_sample(value)
        constant = 0.5 * self.event_shape[0] * _LOG_2PI
        log_prob = -constant - self._half_log_det - 0.5 * self._mahalanobis(value - self.loc)
        return log_prob.expand(torch.broadcast_shapes(log_prob.shape, self.batch_shape))

    @property
    def variance(self) -> Tensor:
        return self.covariance().variance.expand(self._extended_shape())

    @property
    def covariance_matrix(self) -> Tensor:
        """Dense (..., D, D); for small D only."""
        return self.covariance().dense()

    def _normals(self, sample_shape) -> tuple[Tensor, Tensor]:
        """Standard normal noise of shapes (..., D) and (..., K)."""
        shape = self._extended_shape(sample_shape)
        new = lambda size: torch.randn(size, dtype=self.loc.dtype, device=self.loc.device)
        return new(shape), new(shape[:-1] + self._factor.shape[-1:])


class LowRankNormal(_DiagonalPlusLowRank):
    """Normal with covariance diag(cov_diag) + cov_factor @ cov_factor.T, stable in float32.

    Takes the arguments of torch's LowRankMultivariateNormal. A draw costs O(D K), a density O(D K^2).

    Args:
        loc: (..., D).
        cov_factor: (..., D, K), any sign and rank, zero included.
        cov_diag: (..., D), positive.
    """

    arg_constraints = {
        "loc": constraints.real_vector,
        "cov_factor": constraints.independent(constraints.real, 2),
        "cov_diag": constraints.independent(constraints.positive, 1),
    }

    def __init__(self, loc: Tensor, cov_factor: Tensor, cov_diag: Tensor, validate_args=None):
        super().__init__(loc, cov_factor, cov_diag, validate_args)

    cov_factor = property(lambda self: self._factor)
    cov_diag = property(lambda self: self._diagonal)

    @property
    def _half_log_det(self) -> Tensor:
        return 0.5 * self._diagonal.log().sum(-1) + self._log_det_triangle

    def _mahalanobis(self, difference: Tensor) -> Tensor:
        # min_a |y - Z a|^2 + |a|^2 over the augmented columns: the residual is formed, not subtracted as a norm.
        q1, q2 = self._basis
        y = difference / self._diagonal.sqrt()
        along = torch.einsum("...dk,...d->...k", q1, y)
        residual = y - torch.einsum("...dk,...k->...d", q1, along)
        return residual.square().sum(-1) + torch.einsum("...jk,...k->...j", q2, along).square().sum(-1)

    def rsample(self, sample_shape=torch.Size()) -> Tensor:
        wide, low = self._normals(sample_shape)
        return self.loc + self._diagonal.sqrt() * wide + torch.einsum("...dk,...k->...d", self._factor, low)

    def covariance(self) -> CovarianceFactors:
        """The diagonal (D,) and factor (D, K) whose sum is the covariance."""
        return CovarianceFactors(self._diagonal, self._factor, +1)


class LowRankPrecisionNormal(_DiagonalPlusLowRank):
    """Normal with precision diag(precision_diag) + precision_factor @ precision_factor.T.

    Its covariance is the diagonal *minus* a low-rank part, which is what data do to a Normal prior: the posterior
    precision is the prior's plus a Fisher term of low rank. Draws need no inverse: project standard noise of length
    D + K away from the columns of [Z; I].

    Args:
        loc: (..., D).
        precision_factor: (..., D, K), zero included.
        precision_diag: (..., D), positive.
    """

    arg_constraints = {
        "loc": constraints.real_vector,
        "precision_factor": constraints.independent(constraints.real, 2),
        "precision_diag": constraints.independent(constraints.positive, 1),
    }

    def __init__(self, loc: Tensor, precision_factor: Tensor, precision_diag: Tensor, validate_args=None):
        super().__init__(loc, precision_factor, precision_diag, validate_args)

    precision_factor = property(lambda self: self._factor)
    precision_diag = property(lambda self: self._diagonal)

    @property
    def _half_log_det(self) -> Tensor:
        return -0.5 * self._diagonal.log().sum(-1) - self._log_det_triangle

    def _mahalanobis(self, difference: Tensor) -> Tensor:
        along = torch.einsum("...dk,...d->...k", self._factor, difference)
        return (self._diagonal * difference.square()).sum(-1) + along.square().sum(-1)

    def rsample(self, sample_shape=torch.Size()) -> Tensor:
        wide, low = self._normals(sample_shape)
        q1, q2 = self._basis
        along = torch.einsum("...dk,...d->...k", q1, wide) + torch.einsum("...jk,...j->...k", q2, low)
        return self.loc + (wide - torch.einsum("...dk,...k->...d", q1, along)) / self._diagonal.sqrt()

    def covariance(self) -> CovarianceFactors:
        """The diagonal (D,) and factor (D, K) whose difference is the covariance."""
        return CovarianceFactors(1 / self._diagonal, self._basis[0] / self._diagonal.sqrt().unsqueeze(-1), -1)


def kl_to_diagonal(q: _DiagonalPlusLowRank, loc: Tensor, variance: Tensor) -> Tensor:
    """KL(q || Normal(loc, diag(variance))) in nats, closed form, shape q.batch_shape.

    Args:
        q: a LowRankNormal or LowRankPrecisionNormal over D dimensions.
        loc: (..., D).
        variance: (..., D), positive.
    """
    spread = (q.covariance().variance + (q.loc - loc).square()) / variance
    return 0.5 * (spread - 1 + variance.log()).sum(-1) - q._half_log_det


@register_kl(_DiagonalPlusLowRank, Independent)
def _kl_low_rank_independent(q, p):
    if not isinstance(p.base_dist, Normal) or len(p.event_shape) != 1:
        raise NotImplementedError
    return kl_to_diagonal(q, p.mean, p.variance)


@register_kl(LowRankNormal, LowRankNormal)
def _kl_low_rank_low_rank(q, p):
    # tr(P^-1 Q) = sum_i Q_diag_i (P^-1)_ii + the quadratic form of each of Q's columns under P.
    leverage = p._basis[0].square().sum(-1)
    trace = (q.cov_diag / p.cov_diag * (1 - leverage)).sum(-1)
    trace = trace + p._mahalanobis(q.cov_factor.mT.movedim(-2, 0)).sum(0)
    quadratic = p._mahalanobis(q.loc - p.loc)
    return 0.5 * (trace + quadratic - q.event_shape[0]) + p._half_log_det - q._half_log_det


@register_kl(LowRankPrecisionNormal, LowRankPrecisionNormal)
def _kl_precision_precision(q, p):
    covariance = q.covariance()
    # V_p' Sigma_q V_p is K x K; written with q's own projection so that nothing of size D x D appears.
    z = p.precision_factor / q.precision_diag.sqrt().unsqueeze(-1)
    q1, q2 = q._basis
    along = torch.einsum("...dk,...dj->...kj", q1, z)
    residual = z - torch.einsum("...dk,...kj->...dj", q1, along)
    inner = residual.square().sum((-2, -1)) + torch.einsum("...ik,...kj->...ij", q2, along).square().sum((-2, -1))
    trace = (p.precision_diag * covariance.variance).sum(-1) + inner
    quadratic = p._mahalanobis(q.loc - p.loc)
    return 0.5 * (trace + quadratic - q.event_shape[0]) + p._half_log_det - q._half_log_det
