"""Learning-rate schedules, early stopping, and whether the scales have converged."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping

import torch
from pyro.infer.autoguide import AutoNormal
from torch import Tensor, nn

from ..guides import LatentGuide

SCHEDULES = ("cosine", "linear", "constant")
DRIFT = 0.05  # change of the mean log sd per epoch at the full rate that counts as still moving


class ScalesNotConverged(UserWarning):
    """The posterior's standard deviations were still moving when the fit ended."""


def multiplier(schedule: str, warmup: float, total: int) -> Callable[[int], float]:
    """The factor on the learning rate at each step: linear warm-up over a share of all steps, then the schedule."""
    rising = max(1, round(warmup * total))

    def factor(step: int) -> float:
        if step < rising:
            return (step + 1) / rising
        left = max(0.0, (total - step) / max(1, total - rising))
        return {"cosine": 0.5 * (1 - math.cos(math.pi * left)), "linear": left, "constant": 1.0}[schedule]

    return factor


class ScaleWatch:
    """Follows the mean log standard deviation of all that a guide draws against the learning rate spent.

    A decaying schedule makes everything look converged at the end. So the drift is measured over the last quarter of
    the learning rate spent and given per epoch at the full rate.
    """

    def __init__(self):
        self.points: list[tuple[float, float]] = []  # (epochs at the full rate so far, mean log sd)

    def record(self, guide, spent: float) -> float | None:
        """Note the guide's scales after `spent` more epochs' worth of full-rate steps; returns the mean log sd."""
        if not (isinstance(guide, LatentGuide) and guide.has_density):
            return None
        try:
            scales = [guide.distribution().variance.detach()[guide.random].sqrt()]
        except NotImplementedError:  # a flow
            return None
        if isinstance(guide.extra, AutoNormal):
            names = guide.extra.prototype_trace.stochastic_nodes
            scales += [guide.extra._get_loc_and_scale(name)[1].detach().flatten() for name in names]
        level = float(torch.cat(scales).log().mean())
        before = self.points[-1][0] if self.points else 0.0
        self.points.append((before + spent, level))
        return level

    @property
    def drift(self) -> float:
        """Change of the mean log sd per epoch at the full rate, at the end; 0 where there is nothing to watch."""
        if len(self.points) < 2:
            return 0.0
        spent, level = self.points[-1]
        earlier = [point for point in self.points if point[0] <= 0.75 * spent][-1]
        return abs(level - earlier[1]) / max(spent - earlier[0], 1e-12)


class BestState:
    """The parameters at the best validation NLL so far.

    Args:
        modules: what is trained, by name.
        patience: epochs without a better NLL after which to stop; None for no end.
    """

    def __init__(self, modules: Mapping[str, nn.Module], patience: int | None):
        self._modules, self._patience = modules, patience
        self.nll, self.waited = math.inf, 0
        self.state: dict[str, Tensor] = {}

    @property
    def exhausted(self) -> bool:
        """Whether patience is at its end."""
        return self._patience is not None and self.waited >= self._patience

    def update(self, nll: float) -> None:
        """Note an epoch's NLL, and the parameters where it is the best one."""
        if nll < self.nll:
            self.nll, self.waited = nll, 0
            self.state = {name: value.clone() for name, value in states(self._modules).items()}
        else:
            self.waited += 1

    def restore(self) -> None:
        """Put the best parameters back, where there are any."""
        if self.state:
            load_states(self._modules, self.state)


def states(modules: Mapping[str, nn.Module]) -> dict[str, Tensor]:
    """The parameters and buffers of several modules in one flat dict."""
    return {f"{name}.{k}": v.detach() for name, module in modules.items() for k, v in module.state_dict().items()}


def load_states(modules: Mapping[str, nn.Module], tensors: Mapping[str, Tensor]) -> None:
    """Put back what `states` returned."""
    for name, module in modules.items():
        module.load_state_dict(under(f"{name}.", tensors))


def under(prefix: str, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tensors whose names begin with a prefix, by what follows it."""
    return {name.removeprefix(prefix): value for name, value in tensors.items() if name.startswith(prefix)}
