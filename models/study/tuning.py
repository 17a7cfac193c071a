"""Which value of its one setting every method takes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import pandas as pd
from lines import main_row, of_stage


def chosen(finished: Sequence[Mapping], name: str, methods: Mapping, rows: int, frozen_layers: int) -> float:
    """The value of a method's setting with the lowest NLL in `tuning`.

    Args:
        finished: runs.
        name: of the method.
        methods: by name.
        rows, frozen_layers: of the run to come. Runs of the method that were tuned with both count alone, if there are
            any; else those with as many rows; else all.

    Returns:
        The upper middle of the grid where nothing was tuned.
    """
    tuned, grid = methods[name].tuned_as or name, methods[name].grid
    as_many = [run for run in finished if run["settings"]["rows"] == rows]
    alike = [run for run in as_many if run["settings"]["frozen_layers"] == frozen_layers]
    for runs in (alike, as_many, finished):
        table = tuning(runs)
        if tuned in table.index:
            return float(table.loc[tuned].mean(axis=1).idxmin())
    return grid[len(grid) // 2]


def tuning(finished: Sequence[Mapping]) -> pd.DataFrame:
    """Mean NLL over seeds by (method, value), a column per development task; values that lack a task are left out.

    On judged rows, or on validation rows in a run whose training split had no more.
    """
    found: dict[tuple[str, float], dict[str, list[float]]] = {}
    for run in of_stage(finished, "tune"):
        at, row = run["settings"], main_row(run)
        held = row.get("judged", row["validation"])
        found.setdefault((at["method"], at["value"]), {}).setdefault(at["task"], []).append(held["NLL"])
    rows = {key: {task: np.mean(each) for task, each in tasks.items()} for key, tasks in found.items()}
    index = pd.MultiIndex.from_tuples(rows, names=["method", "value"])
    return pd.DataFrame(list(rows.values()), index=index).dropna()
