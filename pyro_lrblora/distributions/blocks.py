"""Independent blocks laid end to end: what a family that is joint within a module and independent between is."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from pyro.distributions import TorchDistribution
from torch import Tensor
from torch.distributions import Independent, Normal, constraints, kl_divergence, register_kl

from .covariance import BlockCovariance


class Blocks(TorchDistribution):
    """A distribution over (D,) made of parts, each with batch shape (L,): L equal blocks, each flattened.

    Args:
        parts: distributions with `covariance`, such as LowRankNormal or MatrixNormal.
    """

    support = constraints.real_vector
    arg_constraints: dict = {}
    has_rsample = True

    def __init__(self, parts: Sequence[TorchDistribution], batch_shape: Sequence[int] = (), validate_args=None):
        self.parts = list(parts)
        sizes = [part.batch_shape.numel() * part.event_shape.numel() for part in self.parts]
        self._sizes = sizes
        super().__init__(torch.Size(batch_shape), torch.Size([sum(sizes)]), validate_args=validate_args)

    def expand(self, batch_shape, _instance=None):
        return Blocks(self.parts, batch_shape, validate_args=False)

    @property
    def mean(self) -> Tensor:
        return self._join(part.mean for part in self.parts).expand(self._extended_shape())

    mode = mean

    @property
    def variance(self) -> Tensor:
        return self._join(part.variance for part in self.parts).expand(self._extended_shape())

    def rsample(self, sample_shape=torch.Size()) -> Tensor:
        shape = torch.Size(sample_shape) + self.batch_shape
        return self._join(part.rsample(shape) for part in self.parts)

    def log_prob(self, value: Tensor) -> Tensor:
        """Log density in nats of value (..., D)."""
        total = 0.0
        for part, piece in zip(self.parts, value.split(self._sizes, dim=-1), strict=True):
            total = total + part.log_prob(piece.unflatten(-1, part.batch_shape + part.event_shape)).sum(-1)
        return total.expand(torch.broadcast_shapes(total.shape, self.batch_shape))

    def entropy(self) -> Tensor:
        """Differential entropy in nats, shape batch_shape."""
        return sum(part.entropy().sum() for part in self.parts).expand(self.batch_shape)

    def covariance(self) -> BlockCovariance:
        """The covariance as blocks."""
        return BlockCovariance([part.covariance() for part in self.parts])

    def _join(self, values) -> Tensor:
        return torch.cat(
            [v.flatten(-1 - len(part.event_shape)) for v, part in zip(values, self.parts, strict=True)], dim=-1
        )


@register_kl(Blocks, Independent)
def _kl_blocks(q, p):
    if not isinstance(p.base_dist, Normal) or p.event_shape != q.event_shape:
        raise NotImplementedError
    total = 0.0
    pieces = zip(q.parts, p.mean.split(q._sizes, dim=-1), p.variance.sqrt().split(q._sizes, dim=-1), strict=True)
    for part, loc, scale in pieces:
        shape = part.batch_shape + part.event_shape
        normal = Normal(loc.unflatten(-1, shape), scale.unflatten(-1, shape))
        total = total + kl_divergence(part, Independent(normal, len(part.event_shape))).sum(-1)
    return total
