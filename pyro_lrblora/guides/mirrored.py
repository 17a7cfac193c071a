"""Antithetic draws: in pairs x, 2 mean - x, whose errors cancel in whatever is nearly linear in the latents."""

from __future__ import annotations

import torch
from pyro.poutine.messenger import Messenger
from torch import Tensor


class Mirrored(Messenger):
    """Makes draws of a symmetric guide in mirrored pairs: of the rows of a batch, else of successive calls.

    Of the latents, and of the normal distributions that stand for a Bayesian head and a prior's own sites in
    unconstrained space.
    """

    def __init__(self):
        super().__init__()
        self._waiting: dict[str, Tensor] = {}

    def _pyro_sample(self, msg):
        name, fn = msg["name"], msg["fn"]
        if msg["done"] or not (name == "_latents" or name.endswith("_unconstrained")):
            return
        if name == "_latents" and fn.batch_shape:
            msg["value"] = mirrored(fn)
        elif name in self._waiting:
            msg["value"] = 2 * fn.mean - self._waiting.pop(name)
        else:
            msg["value"] = self._waiting[name] = fn.rsample()
        msg["done"] = True


def mirrored(fn) -> Tensor:
    """Draws of a distribution with batch shape (B,), the second half mirrored at the mean: (B, D)."""
    rows = fn.batch_shape[0]
    first = fn.rsample()[: (rows + 1) // 2]
    return torch.cat([first, 2 * fn.mean[: len(first)] - first])[:rows]
