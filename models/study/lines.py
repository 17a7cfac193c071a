"""The lines of the study's runs: which of them count, and which of a run's rows stands for it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

MAIN = ("draws", "linearised", "point")  # the row of a run that stands for its method


def latest(finished: Sequence[Mapping]) -> list[Mapping]:
    """The last run of every stage, task, method and seed, and of tuning of every value."""
    key = lambda at: (at["stage"], at["task"], at["method"], at["seed"], at["value"] if at["stage"] == "tune" else None)
    return list({key(run["settings"]): run for run in finished}.values())


def of_stage(finished: Sequence[Mapping], stage: str) -> list[Mapping]:
    """The runs of a stage."""
    return [run for run in finished if run["settings"]["stage"] == stage]


def main_row(run: Mapping) -> Mapping:
    """What a run says of its method: of draws, linearised, or of a point."""
    return next(run["rows"][name] for name in MAIN if name in run["rows"])
