"""The study's figures, as SVG that is the same file at every run."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import numpy as np
import pandas as pd
from matplotlib import rc_context
from matplotlib.figure import Figure


def dots(main: pd.DataFrame, path: Path) -> None:
    """Test NLL by method, a panel per task: a dot per seed, hollow after temperature scaling, a bar at the mean."""
    tasks, methods = main["task"].unique(), main["method"].unique()[::-1]
    figure = Figure(figsize=(3 * len(tasks) + 1.5, 0.28 * len(methods) + 1))
    axes = figure.subplots(1, len(tasks), sharey=True)
    for axis, task in zip(np.atleast_1d(axes), tasks, strict=True):
        for place, method in enumerate(methods):
            rows = main[(main["task"] == task) & (main["method"] == method)]
            axis.plot(rows["NLL"], [place] * len(rows), "o", color="#0072B2", markersize=4)
            axis.plot(rows["NLL at T"], [place] * len(rows), "o", color="#D55E00", markersize=4, markerfacecolor="none")
            axis.plot([rows["NLL"].mean()], [place], "|", color="#0072B2", markersize=12)
        axis.set_title(task, fontsize=9)
        axis.set_xlabel("test NLL, nats", fontsize=8)
        axis.set_yticks(range(len(methods)), methods, fontsize=8)
        axis.tick_params(axis="x", labelsize=8)
        axis.spines[["top", "right"]].set_visible(False)
    _saved(figure, path)


def curves(lines: Mapping[str, Mapping[str, list[np.ndarray]]], path: Path) -> None:
    """Validation NLL against steps, a panel per task, a line per method (the mean over seeds)."""
    if not lines:
        return
    figure = Figure(figsize=(3.2 * len(lines), 2.8))
    axes = figure.subplots(1, len(lines))
    for axis, (task, methods) in zip(np.atleast_1d(axes), lines.items(), strict=True):
        for name, found in methods.items():
            axis.plot(found[0][:, 0], np.mean([curve[:, 1] for curve in found], 0), label=name, linewidth=1.2)
        axis.set_title(task, fontsize=9)
        axis.set_xlabel("steps", fontsize=8)
        axis.tick_params(labelsize=8)
        axis.spines[["top", "right"]].set_visible(False)
    np.atleast_1d(axes)[0].set_ylabel("validation NLL, nats", fontsize=8)
    np.atleast_1d(axes)[-1].legend(frameon=False, fontsize=7)
    _saved(figure, path)


def _saved(figure, path: Path) -> None:
    figure.tight_layout()
    with rc_context({"svg.hashsalt": "study"}):  # the same names at every run, so that only what changed differs
        figure.savefig(path, metadata={"Date": None})
