"""Differences of two methods on the same rows and seeds, with their standard errors."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import pandas as pd
from lines import main_row, of_stage

OURS = "LowRankPrecision"


def paired(
    finished: Sequence[Mapping], loss: str, other: str, temper_other: bool = False, ours: str = OURS
) -> pd.DataFrame:
    """Mean difference ours - other in a loss, by task, with its standard error over test rows and seeds.

    Args:
        finished: runs, with the losses of their rows.
        loss: "NLL" or "Brier".
        other: a method.
        temper_other: compare with the other's losses after temperature scaling.
        ours: the method it is compared with.

    Returns:
        Columns difference, SE, seeds, see `difference_of`; a row per task and, where both have all that ours has,
        "all tasks", their mean.
    """
    found: dict[str, dict[str, dict[int, np.ndarray]]] = {}
    for run in of_stage(finished, "scores"):
        at, row = run["settings"], main_row(run)
        key = "losses, tempered" if temper_other and at["method"] == other else "losses"
        if at["method"] in (ours, other) and key in row:
            found.setdefault(at["task"], {}).setdefault(at["method"], {})[at["seed"]] = np.asarray(row[key][loss])
    rows = {task: difference_of(each[ours], each.get(other, {})) for task, each in found.items() if ours in each}
    if len(rows) > 1 and all(rows.values()):
        rows["all tasks"] = _mean(list(rows.values()))
    return pd.DataFrame.from_dict({task: row for task, row in rows.items() if row}, orient="index")


def variations(finished: Sequence[Mapping]) -> pd.DataFrame:
    """How far the default with one thing changed is above the default, in NLL on judged rows.

    Args:
        finished: runs, with the losses of their rows.

    Returns:
        A column per task and "all tasks" with its "SE", over the seeds both have; "seeds", the fewest of a task.
    """
    found: dict[str, dict[str, dict[int, np.ndarray]]] = {}
    for run in of_stage(finished, "defaults"):
        at, row = run["settings"], main_row(run)
        if "losses" in row:  # the training split had rows to judge by
            losses = np.asarray(row["losses"]["NLL"])
            found.setdefault(at["method"], {}).setdefault(at["task"], {})[at["seed"]] = losses
    default, rows = found.pop("default", {}), {}
    for name, tasks in found.items():
        against = {task: difference_of(seeds, default.get(task, {}), False) for task, seeds in tasks.items()}
        if all(against.values()):
            mean = _mean(list(against.values()))
            rows[name] = {task: each["difference"] for task, each in against.items()}
            rows[name] |= {"all tasks": mean["difference"], "SE": mean["SE"], "seeds": mean["seeds"]}
    return pd.DataFrame.from_dict(rows, orient="index")


def difference_of(ours: Mapping[int, np.ndarray], other: Mapping[int, np.ndarray], same_rows: bool = True) -> dict:
    """Mean difference of losses by seed (N,), over the seeds that both have; nothing where they have none.

    A difference is taken to be a mean, an effect of the row, one of the seed and a residual. The variance of the mean
    over rows holds the residual's, and so does that over seeds, so it is subtracted once (crossed random effects).
    Where every seed has rows of its own, the spread of the seeds is all there is, but not below that of the rows.

    Args:
        same_rows: whether a row is the same for every seed.
    """
    seeds = sorted(set(ours) & set(other))
    if not seeds:
        return {}
    differences = np.stack([ours[seed] - other[seed] for seed in seeds])  # (seeds, N)
    mean, count = differences.mean(), len(seeds)
    over_seeds = differences.mean(1).var(ddof=1) / count if count > 1 else 0.0
    if same_rows:
        over_rows = differences.mean(0).var(ddof=1) / differences.shape[1]
        residual = differences - differences.mean(0) - differences.mean(1, keepdims=True) + mean
        freedom = max(1, (count - 1) * (differences.shape[1] - 1))
        twice = np.square(residual).sum() / freedom / differences.size
        variance = max(over_rows + over_seeds - twice, over_rows, over_seeds)
    else:
        variance = max(over_seeds, differences.var(1, ddof=1).mean() / differences.size)
    return {"difference": mean, "SE": variance**0.5, "seeds": count}


def _mean(rows: Sequence[Mapping[str, float]]) -> dict[str, float]:
    """The mean of independent differences, its standard error, and the fewest seeds that one of them has."""
    return {
        "difference": np.mean([row["difference"] for row in rows]),
        "SE": np.sum([row["SE"] ** 2 for row in rows]) ** 0.5 / len(rows),
        "seeds": min(row["seeds"] for row in rows),
    }
