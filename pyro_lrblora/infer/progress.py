"""Learning-rate schedules, early stopping, and whether the scales have converged."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable

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
    """Follows the mean log standard deviation of a guide against the learning rate spent.

    A decaying schedule makes everything look converged at the end. So the drift is measured over the last quarter of
    the learning rate spent and given per epoch at the full rate.
    """

    def __init__(self):
        self._points: list[tuple[float, float]] = []

    def record(self, guide, spent: float) -> float | None:
        """Note the guide's scales after `spent` more epochs' worth of full-rate steps; returns the mean log sd."""
        if not (isinstance(guide, LatentGuide) and guide.has_density):
            return None
        try:
            variance = guide.distribution().variance.detach()
        except NotImplementedError:  # a flow
            return None
        level = float(variance.log().mean() / 2)
        before = self._points[-1][0] if self._points else 0.0
        self._points.append((before + spent, level))
        return level

    @property
    def drift(self) -> float:
        """Change of the mean log sd per epoch at the full rate, at the end; 0 where there is nothing to watch."""
        if len(self._points) < 2:
            return 0.0
        spent, level = self._points[-1]
        earlier = [point for point in self._points if point[0] <= 0.75 * spent][-1]
        return abs(level - earlier[1]) / max(spent - earlier[0], 1e-12)


class BestState:
    """The parameters at the best validation NLL so far."""

    def __init__(self, posterior):
        trained = (posterior.guide, posterior.model.point_head, posterior.model.learned_scale)
        self._modules = [module for module in trained if module is not None]
        self._best, self._waited, self._state = math.inf, 0, None

    def update(self, nll: float, patience: int | None) -> bool:
        """Note an epoch's NLL; true when `patience` epochs have passed without a better one."""
        if patience is None:
            return False
        if nll < self._best:
            self._best, self._waited = nll, 0
            self._state = [copy.deepcopy(module.state_dict()) for module in self._modules]
        else:
            self._waited += 1
        return self._waited >= patience

    def restore(self) -> None:
        """Put the best parameters back."""
        for module, state in zip(self._modules, self._state or (), strict=False):
            module.load_state_dict(state)
