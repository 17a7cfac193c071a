"""A problem small enough to be refitted a hundred times."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ..adapters import LoRAXS
from ..counts import check_counts
from ..model import BayesianLoRA
from ..priors import Normal
from ..projections import Random


def tiny_problem(rows: int = 100, seed: int = 0) -> tuple[BayesianLoRA, list[dict[str, Tensor]]]:
    """A model with 18 latents and the data to go with it, for many refits in minutes.

    A frozen network of one hidden layer, three classes, fixed random inputs, LoRA-XS on both layers. The labels are
    placeholders, which every simulation replaces.

    Args:
        rows: N.
        seed: of network and inputs.
    """
    check_counts(rows=rows)
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        network, x = _TinyNetwork().requires_grad_(False), torch.randn(rows, 5)
    model = BayesianLoRA(network, LoRAXS(3, Random(), targets="all-linear"), Normal(0.5), head="frozen", size=rows)
    return model, [{"x": x, "labels": torch.zeros(rows, dtype=torch.long)}]


class _TinyNetwork(nn.Module):
    def __init__(self):
        super().__init__()
        self.hidden, self.output = nn.Linear(5, 8), nn.Linear(8, 3)

    def forward(self, x):
        return self.output(torch.tanh(self.hidden(x)))
