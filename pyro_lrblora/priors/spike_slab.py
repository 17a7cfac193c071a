"""A continuous spike and slab, its indicator summed out."""

from __future__ import annotations

from dataclasses import dataclass

import pyro.distributions as dist
import torch
from torch import Tensor
from torch.distributions import constraints

from .sites import Shapes, by_module, check_positive, sample_sites


@dataclass(frozen=True)
class SpikeSlab:
    """Each latent is Normal(0, scale) with probability `share`, else Normal(0, spike * scale), independently.

    The mixture's density is used, so that there is no discrete site (George & McCulloch 1993).

    Args:
        scale: standard deviation of the slab, positive.
        spike: the spike's standard deviation as a share of the slab's, in (0, 1).
        share: prior probability of the slab, in (0, 1).
    """

    scale: float = 0.1
    spike: float = 0.01
    share: float = 0.5

    def __post_init__(self):
        check_positive(scale=self.scale)
        for name, value in (("spike", self.spike), ("share", self.share)):
            if not 0 < value < 1:
                raise ValueError(f"expected 0 < {name} < 1, got {name}={value!r}")

    def __call__(self, shapes: Shapes) -> dict[str, Tensor]:
        weights = dist.Categorical(torch.tensor([1 - self.share, self.share]))
        relative = torch.tensor([self.spike, 1.0])

        def family(name: str) -> _RealMixture:
            scale = torch.as_tensor(by_module(self.scale, shapes[name], name))
            return _RealMixture(weights, dist.Normal(0.0, scale.unsqueeze(-1) * relative))

        return sample_sites(shapes, family)


class _RealMixture(dist.MixtureSameFamily):
    # torch has no transform to its own mixture's support, which guides and NUTS ask for.
    support = constraints.real
