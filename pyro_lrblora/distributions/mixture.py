"""A mixture of diagonal normals with equal weights, whose draws carry gradients."""

from __future__ import annotations

import math

import torch
from pyro.distributions import TorchDistribution
from torch import Tensor
from torch.distributions import Normal, constraints


class EqualMixture(TorchDistribution):
    """(1/M) sum_m Normal(loc_m, diag(scale_m^2)).

    The weights are not parameters, so a draw given its component is an ordinary reparameterised one.

    Args:
        loc: (M, D).
        scale: (M, D), positive.
    """

    support = constraints.real_vector
    arg_constraints = {
        "loc": constraints.independent(constraints.real, 2),
        "scale": constraints.independent(constraints.positive, 2),
    }
    has_rsample = True

    def __init__(self, loc: Tensor, scale: Tensor, batch_shape=(), validate_args=None):
        self.loc, self.scale = loc, scale
        super().__init__(torch.Size(batch_shape), loc.shape[-1:], validate_args=validate_args)

    def expand(self, batch_shape, _instance=None):
        return EqualMixture(self.loc, self.scale, batch_shape, validate_args=False)

    @property
    def mean(self) -> Tensor:
        return self.loc.mean(0).expand(self._extended_shape())

    @property
    def variance(self) -> Tensor:
        between = (self.loc - self.loc.mean(0)).square()
        return (self.scale.square() + between).mean(0).expand(self._extended_shape())

    def rsample(self, sample_shape=torch.Size()) -> Tensor:
        shape = self._extended_shape(sample_shape)
        count = shape[:-1].numel()
        # Stratified: every component has its share of the draws, in random order.
        start = torch.randint(len(self.loc), (), device=self.loc.device)
        component = (start + torch.randperm(count, device=self.loc.device)) % len(self.loc)
        component = component.reshape(shape[:-1])
        noise = torch.randn(shape, dtype=self.loc.dtype, device=self.loc.device)
        return self.loc[component] + self.scale[component] * noise

    def log_prob(self, value: Tensor) -> Tensor:
        """Log density in nats of value (..., D)."""
        each = Normal(self.loc, self.scale).log_prob(value.unsqueeze(-2)).sum(-1)
        log_prob = each.logsumexp(-1) - math.log(len(self.loc))
        return log_prob.expand(torch.broadcast_shapes(log_prob.shape, self.batch_shape))
