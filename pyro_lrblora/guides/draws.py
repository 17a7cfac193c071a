"""Stored draws in the place of a variational family: what a Markov chain leaves behind."""

from __future__ import annotations

import uuid
from collections.abc import Mapping
from dataclasses import dataclass

import pyro
import pyro.distributions as dist
import torch
from pyro import poutine
from pyro.nn import PyroModule
from torch import Tensor


@dataclass(frozen=True)
class Draws:
    """How many draws are stored; a saved posterior is rebuilt from it, `fit` has no use for it.

    Args:
        chains: number of Markov chains.
        draws: per chain.
    """

    chains: int
    draws: int

    def __post_init__(self):
        for name in ("chains", "draws"):
            if getattr(self, name) < 1:
                raise ValueError(f"expected {name} >= 1, got {name}={getattr(self, name)!r}")

    def __call__(self, model) -> DrawsGuide:
        """A guide of zeros, to be filled by load_state_dict."""
        trace = poutine.trace(model.sample_prior).get_trace()
        values = {name: trace.nodes[name]["value"] for name in trace.stochastic_nodes}
        return DrawsGuide({name: v.new_zeros(self.chains, self.draws, *v.shape) for name, v in values.items()})


class DrawsGuide(PyroModule):
    """A guide that picks one of its stored draws, the same one for every site.

    Args:
        draws: by site, (chains, S, site shape).
    """

    def __init__(self, draws: Mapping[str, Tensor]):
        super().__init__(f"DrawsGuide_{uuid.uuid4().hex[:8]}")
        # A Bayesian head's sites have dots in their names, which buffers cannot.
        self._leaves = {name: "draws_" + name.replace(".", "__") for name in draws}
        for name, leaf in self._leaves.items():
            self.register_buffer(leaf, draws[name].detach().clone())

    def by_chain(self) -> dict[str, Tensor]:
        """All draws by site, (chains, S, site shape)."""
        return {name: getattr(self, leaf) for name, leaf in self._leaves.items()}

    @property
    def chains(self) -> int:
        """Number of chains."""
        return len(next(iter(self.by_chain().values())))

    @property
    def total(self) -> int:
        """Number of draws of all chains together."""
        return len(next(iter(self._stacked().values())))

    def spread(self, draws: int) -> dict[str, Tensor]:
        """Draws evenly spaced over all stored ones, chain after chain, none twice while there are enough.

        A multiple of the number of chains takes equally many of each.

        Args:
            draws: how many.
        """
        places = ((torch.arange(draws, dtype=torch.float64) + 0.5) * self.total / draws).long()
        return {name: value[places.to(value.device)] for name, value in self._stacked().items()}

    def mean(self) -> dict[str, Tensor]:
        """The mean of all draws, by site."""
        return {name: value.mean(0) for name, value in self._stacked().items()}

    def forward(self, *args, **kwargs) -> dict[str, Tensor]:
        chances = torch.full((self.total,), 1 / self.total)
        place = pyro.sample("_draw", dist.Categorical(chances), infer={"is_auxiliary": True})
        return {
            name: pyro.sample(name, dist.Delta(value[place], event_dim=value.dim() - 1))
            for name, value in self._stacked().items()
        }

    def _stacked(self) -> dict[str, Tensor]:
        return {name: value.flatten(0, 1) for name, value in self.by_chain().items()}
