"""Normal distributions over the flat latent vector whose covariance, or precision, is diagonal plus low rank.

Both keep one QR factorisation of the whitened factor stacked on the identity, M = [Z; I] = [Q1; Q2] T. It has
full column rank whatever the factor is, so it is smooth at Z = 0, and it never squares the condition number: the
determinant and the quadratic form stay right in float32 where the Woodbury identity loses hundreds of nats
(pytorch#75173).
"""

from __future__ import annotations

import math
from functools import cached_property

import torch
from pyro.distributions import TorchDistribution
from torch import Tensor
from torch.distributions import Independent, Normal, constraints, register_kl

from .covariance import CovarianceFactors

_LOG_2PI = math.log(2 * math.pi)


class _DiagonalPlusLowRank(TorchDistribution):
    """What the covariance and the precision form share: parameters, shapes and the QR of the whitened factor."""

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
        if "_qr" in self.__dict__:
            new._qr = self._qr
        TorchDistribution.__init__(new, torch.Size(batch_shape), self.event_shape, validate_args=False)
        new._validate_args = self._validate_args
        return new

    @cached_property
    def _qr(self) -> tuple[Tensor, Tensor, Tensor]:
        """Q1 (..., D, K), Q2 (..., K, K) and log det(I + Z'Z) / 2 of [Z; I] = [Q1; Q2] T."""
        whitened = self._factor / self._diagonal.sqrt().unsqueeze(-1)
        dim, rank = whitened.shape[-2:]
        eye = torch.eye(rank, dtype=whitened.dtype, device=whitened.device).expand(*whitened.shape[:-2], -1, -1)
        q, t = torch.linalg.qr(torch.cat([whitened, eye], dim=-2))
        return q[..., :dim, :], q[..., dim:, :], t.diagonal(dim1=-2, dim2=-1).abs().log().sum(-1)

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
        return 0.5 * self._diagonal.log().sum(-1) + self._qr[2]

    def _mahalanobis(self, difference: Tensor) -> Tensor:
        # min_a |y - Z a|^2 + |a|^2 over the augmented columns: the residual is formed, not subtracted as a norm.
        q1, q2, _ = self._qr
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
        return -0.5 * self._diagonal.log().sum(-1) - self._qr[2]

    def _mahalanobis(self, difference: Tensor) -> Tensor:
        along = torch.einsum("...dk,...d->...k", self._factor, difference)
        return (self._diagonal * difference.square()).sum(-1) + along.square().sum(-1)

    def rsample(self, sample_shape=torch.Size()) -> Tensor:
        q1, q2, _ = self._qr
        wide, low = self._normals(sample_shape)
        along = torch.einsum("...dk,...d->...k", q1, wide) + torch.einsum("...jk,...j->...k", q2, low)
        return self.loc + (wide - torch.einsum("...dk,...k->...d", q1, along)) / self._diagonal.sqrt()

    def covariance(self) -> CovarianceFactors:
        """The diagonal (D,) and factor (D, K) whose difference is the covariance."""
        return CovarianceFactors(1 / self._diagonal, self._qr[0] / self._diagonal.sqrt().unsqueeze(-1), -1)


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
    leverage = p._qr[0].square().sum(-1)
    trace = (q.cov_diag / p.cov_diag * (1 - leverage)).sum(-1)
    trace = trace + p._mahalanobis(q.cov_factor.mT.movedim(-2, 0)).sum(0)
    quadratic = p._mahalanobis(q.loc - p.loc)
    return 0.5 * (trace + quadratic - q.event_shape[0]) + p._half_log_det - q._half_log_det


@register_kl(LowRankPrecisionNormal, LowRankPrecisionNormal)
def _kl_precision_precision(q, p):
    covariance = q.covariance()
    # V_p' Sigma_q V_p is K x K; written with q's own projection so that nothing of size D x D appears.
    z = p.precision_factor / q.precision_diag.sqrt().unsqueeze(-1)
    q1, q2, _ = q._qr
    along = torch.einsum("...dk,...dj->...kj", q1, z)
    residual = z - torch.einsum("...dk,...kj->...dj", q1, along)
    inner = residual.square().sum((-2, -1)) + torch.einsum("...ik,...kj->...ij", q2, along).square().sum((-2, -1))
    trace = (p.precision_diag * covariance.variance).sum(-1) + inner
    quadratic = p._mahalanobis(q.loc - p.loc)
    return 0.5 * (trace + quadratic - q.event_shape[0]) + p._half_log_det - q._half_log_det
