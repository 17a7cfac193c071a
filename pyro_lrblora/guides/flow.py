"""Normalizing flow over the flat latent vector: affine couplings (Dinh et al. 2017, arXiv 1605.08803)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import pyro.distributions as dist
import torch
from pyro.distributions.transforms import AffineCoupling, Permute
from pyro.nn import DenseNN, PyroParam
from torch import nn
from torch.distributions import AffineTransform, constraints

from .latent_guide import Curvature, LatentGuide


@dataclass(frozen=True)
class Flow:
    """loc + scale * f(z), f being affine couplings of Pyro; about 1.5 D * hidden parameters per layer.

    It starts as Diagonal: the couplings are the identity then. It has a density and draws with gradients, no mean or
    variance in closed form.

    Args:
        layers: couplings, halves exchanged between them; at least 2 to reach every latent.
        hidden: units of each coupling's one hidden layer.
        start_scale: start of each scale as a share of the prior's, where no warm start sets it.
    """

    layers: int = 2
    hidden: int = 32
    start_scale: float = 0.1
    fisher_rank: ClassVar[int] = 1

    def __post_init__(self):
        if self.layers < 1 or self.hidden < 1:
            raise ValueError(f"expected layers >= 1 and hidden >= 1, got layers={self.layers}, hidden={self.hidden}")

    def __call__(self, model) -> FlowGuide:
        return FlowGuide(model, self.layers, self.hidden, self.start_scale)


class FlowGuide(LatentGuide):
    def __init__(self, model, layers: int, hidden: int, start_scale: float):
        super().__init__(model)
        loc, prior_sd = self.starting_point(model)
        size = len(loc)
        if size < 2:
            raise ValueError(f"expected at least 2 latents for couplings, got D={size}")
        self.loc = nn.Parameter(loc)
        self.scale = PyroParam(start_scale * prior_sd, constraints.positive)
        self.split = size // 2
        # A random order, so that both halves hold latents of every module.
        self.register_buffer("order", torch.randperm(size, generator=torch.Generator().manual_seed(0)).to(loc.device))
        self.factor = nn.ModuleList()  # by the factor's rate: many weights behind each latent
        for number in range(layers):
            conditioning = self.split if number % 2 == 0 else size - self.split
            network = DenseNN(conditioning, [hidden], [size - conditioning] * 2, nonlinearity=nn.Tanh())
            nn.init.zeros_(network.layers[-1].weight), nn.init.zeros_(network.layers[-1].bias)
            self.factor.append(network.to(loc.device))

    def distribution(self) -> dist.TransformedDistribution:
        size, transforms = len(self.loc), [Permute(self.order)]
        swap = lambda first: Permute(torch.cat([torch.arange(first, size), torch.arange(first)]).to(self.loc.device))
        for number, network in enumerate(self.factor):
            first = self.split if number % 2 == 0 else size - self.split
            # Made anew at each call: a cached inverse would hold the graph of another draw.
            transforms += [AffineCoupling(first, network), swap(first)]
        transforms.append(Permute(torch.argsort(self.order)))
        transforms.append(AffineTransform(self.loc, self.scale, event_dim=1))
        base = dist.Normal(torch.zeros_like(self.loc), 1.0).to_event(1)
        return dist.TransformedDistribution(base, transforms)

    def begin(self, curvature: Curvature) -> None:
        self.loc.data.copy_(curvature.loc)
        self.scale = curvature.diagonal.rsqrt()
