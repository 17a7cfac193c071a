"""Callbacks that send the rows of a fit's history to TensorBoard or Weights & Biases."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path

from .posterior import Posterior


class TensorBoard:
    """Write every number of every epoch to TensorBoard, over optimiser steps.

    Args:
        log_dir: folder of the event files; a fit that goes on adds to it.

    Raises:
        ModuleNotFoundError: the package tensorboard is not installed.
    """

    def __init__(self, log_dir: str | Path):
        _check_installed("tensorboard", type(self).__name__)
        self.log_dir, self._writer = Path(log_dir), None

    def __call__(self, row: dict, posterior: Posterior) -> None:
        # Only now: of several processes, one calls back.
        if self._writer is None:
            from torch.utils.tensorboard import SummaryWriter

            self._writer = SummaryWriter(str(self.log_dir))
        for name, value in _numbers(row).items():
            self._writer.add_scalar(name, value, row["step"])
        self._writer.flush()


class WandB:
    """Log every number of every epoch to a Weights & Biases run, the fit's arguments being its config.

    Args:
        init: arguments of wandb.init: project, name, mode="offline", ...

    Raises:
        ModuleNotFoundError: the package wandb is not installed.
    """

    def __init__(self, **init):
        _check_installed("wandb", type(self).__name__)
        self.run, self._init = None, init

    def __call__(self, row: dict, posterior: Posterior) -> None:
        if self.run is None:
            import wandb

            self.run = wandb.init(**{"config": posterior.settings} | self._init)
        self.run.log(_numbers(row), step=row["step"])


def _numbers(row: dict) -> dict[str, float]:
    return {name: value for name, value in row.items() if name != "step" and value is not None}


def _check_installed(package: str, callback: str) -> None:
    if find_spec(package) is None:
        raise ModuleNotFoundError(
            f"expected the package {package} for callbacks.{callback}; write pip install {package}", name=package
        )
