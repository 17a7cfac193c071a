"""Several fitted guides with equal weights, each with the point head it was trained with."""

from __future__ import annotations

import uuid
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import pyro
import pyro.distributions as dist
import torch
from pyro.nn import PyroModule
from torch import Tensor, nn

from ..tracing import traced_values
from .stock import build_guide


@dataclass(frozen=True)
class Ensemble:
    """What infer.ensemble returns is rebuilt from this; `fit` has no use for it.

    Args:
        guide: the members' spec.
        members: M.
    """

    guide: object
    members: int

    def __call__(self, model) -> EnsembleGuide:
        """A guide of unfitted members, to be filled by load_state_dict."""
        heads = [{} if model.head == "bayesian" else model.head_values() for _ in range(self.members)]
        return EnsembleGuide([build_guide(self.guide, model) for _ in heads], heads)


class EnsembleGuide(PyroModule):
    """A guide that picks a member, draws from it, and samples that member's head as sites too.

    Args:
        guides: the members' fitted guides.
        heads: each member's point head, by dotted name; empty where the head is a site already.
    """

    def __init__(self, guides: Sequence[nn.Module], heads: Sequence[Mapping[str, Tensor]]):
        super().__init__(f"EnsembleGuide_{uuid.uuid4().hex[:8]}")
        self.members = nn.ModuleList(guides)
        self._leaves = {name: "head_" + name.replace(".", "__") for name in heads[0]}
        for name, leaf in self._leaves.items():
            self.register_buffer(leaf, torch.stack([head[name].detach() for head in heads]))

    def forward(self, *args, **kwargs) -> dict[str, Tensor]:
        chances = torch.full((len(self.members),), 1 / len(self.members))
        member = int(pyro.sample("_member", dist.Categorical(chances), infer={"is_auxiliary": True}))
        return self.draw(member)

    def draw(self, member: int) -> dict[str, Tensor]:
        """Sample every site from one member."""
        values = dict(self.members[member]())
        for name, leaf in self._leaves.items():
            value = getattr(self, leaf)[member]
            values[name] = pyro.sample(name, dist.Delta(value, event_dim=value.dim()))
        return values

    def spread(self, draws: int) -> dict[str, Tensor]:
        """Draws by site, (draws, site shape), the members taking turns."""
        drawn = [traced_values(self.draw, number % len(self.members)) for number in range(draws)]
        return {name: torch.stack([values[name] for values in drawn]) for name in drawn[0]}
