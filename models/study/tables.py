"""The study's tables and figures, from its lines alone.

python models/study/tables.py docs/results/study.jsonl --out docs/results/study
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import numpy as np
import pandas as pd
from differences import OURS, paired, variations
from figures import curves, dots
from lines import MAIN, latest, of_stage
from tuning import tuning

REFERENCE = "LoRA"
PAIRED = (OURS, "LowRank", "Diagonal", REFERENCE, "LoRA-XS")  # that have a table of differences from all others
CURVES = (REFERENCE, "LoRA-XS", "Diagonal", "LowRank", OURS)  # whose history is one fit, of what the row shows
_COUNTS = ("parameters", "head", "CPU seconds", "steps", "fits", "seeds")
_SHARED = ("rows", "base", "frozen_layers", "validation_rows", "max_length", "batch_size", "epochs")


def scores(finished: Sequence[Mapping]) -> pd.DataFrame:
    """A row per task, method, prediction and seed, a column per figure; "at T": after temperature scaling."""
    rows = []
    for run in of_stage(finished, "scores"):
        at, fit = run["settings"], run["rows"]["fit"]
        for name, row in run["rows"].items():
            if name == "fit":
                continue
            flat = {key: at[key] for key in ("task", "method", "seed")} | {"prediction": name} | row["test"]
            flat |= {f"{key} at T": value for key, value in row["test, tempered"].items()}
            flat |= {"T": row["temperature"], "OOD AUROC": row.get("OOD AUROC")}
            for votes in ("votes", "votes, tempered"):
                flat |= {f"{votes}: {key}": value for key, value in row.get(votes, {}).items()}
            flat |= {"parameters": fit["parameters"], "of LoRA r=8": fit["parameters"] / fit["LoRA r=8"]}
            rows.append(flat | {"head": fit["head"], "CPU seconds": fit["CPU seconds"]})
    return pd.DataFrame(rows)


def write_tables(finished: Sequence[Mapping], folder: Path) -> None:
    """Write tables.md and the figures below a folder, those of runs that differ in more than their stage apart.

    Of several runs of one method, task and seed the last stands: it has the value that was tuned last.
    """
    folder.mkdir(parents=True, exist_ok=True)
    parts = ["# The study's tables", "Written by `models/study/tables.py` from the lines of the runs."]
    shared = lambda run: tuple(run["settings"].get(name) for name in _SHARED)
    groups = sorted({shared(run) for run in finished}, key=lambda group: (-group[0], *map(str, group)))
    varying = [place for place in range(1, len(_SHARED)) if len({group[place] for group in groups}) > 1]
    for group in groups:
        others = [f"{_SHARED[place]} {group[place]}" for place in varying]
        name = "_".join(str(group[place]).rpartition("/")[2] for place in (0, *varying))
        parts.append("## " + ", ".join([f"{group[0]:,} training rows", *others]))
        parts += _tables(latest([run for run in finished if shared(run) == group]), folder, name)
    (folder / "tables.md").write_text("\n\n".join(parts) + "\n", encoding="utf-8")


def _tables(finished: Sequence[Mapping], folder: Path, name: str) -> Iterator[str]:
    """The blocks of tables.md and the figures, of runs that share their settings."""
    tuned, varied, scored = tuning(finished), variations(finished), scores(finished)
    if len(scored):
        dots(_main_rows(scored), folder / f"nll_{name}.svg")
        curves(histories(finished), folder / f"curves_{name}.svg")
        yield from ["### Averages over tasks", "Over seeds, then tasks, of the methods that have every run."]
        yield from [_markdown(averages(scored)), f"![Test NLL by method and task](nll_{name}.svg)"]
        yield "A dot per seed, hollow after temperature scaling on validation rows, a bar at the mean."
        yield from ["### Paired differences", "The first minus the second, ± the standard error over rows and seeds."]
        for ours in [method for method in PAIRED if method in set(scored["method"])]:
            yield _markdown(differences(finished, scored, ours))
        for task in scored["task"].unique():
            yield from [f"### {task}", "Means over seeds; the NLL ± its standard deviation over them."]
            yield _markdown(by_method(scored[scored["task"] == task]))
        yield from ["### Speed of convergence", "Median steps until the validation NLL is LoRA's best."]
        yield from [_markdown(convergence(finished)), f"![Validation NLL by steps](curves_{name}.svg)"]
    if len(tuned):
        yield from ["### Tuned values", "Mean NLL over the development tasks at each value; the value taken in bold."]
        yield _wide(tuned)
    if len(varied):
        yield from ["### The default with one thing changed", "Its NLL on judged rows minus the default's."]
        yield _markdown(varied)


def averages(scored: pd.DataFrame) -> pd.DataFrame:
    """Main rows averaged over seeds, then tasks: those that REFERENCE and OURS have, of methods that have them all."""
    main = _complete(_main_rows(scored))
    columns = ["accuracy", "NLL", "Brier", "ECE (15 bins)", "ECE if calibrated", "ECE (15 bins of equal mass)", "AURC"]
    columns += ["OOD AUROC", "NLL at T", "Brier at T", "ECE (15 bins) at T", "of LoRA r=8", "CPU seconds"]
    by_task = main.groupby(["method", "task"], sort=False)
    table = by_task[columns].mean().groupby("method", sort=False).mean()
    if REFERENCE in table.index:
        table.insert(5, "ECE / LoRA's", table["ECE (15 bins)"] / table.loc[REFERENCE, "ECE (15 bins)"])
        table.insert(6, "ECE - LoRA's", _against_reference(main, "ECE (15 bins)"))
    # Over seeds within a task, averaged over tasks: what "more stable" is about.
    table["NLL s.d. over seeds"] = by_task["NLL"].std().groupby("method", sort=False).mean()
    return table


def _against_reference(main: pd.DataFrame, figure: str) -> pd.Series:
    """A figure minus REFERENCE's by method, the mean over tasks ± its standard error, from the spread over seeds.

    No error where a task has one seed.
    """
    wide = main.pivot(index=["task", "seed"], columns="method", values=figure)
    by_task = wide.sub(wide[REFERENCE], axis=0).groupby("task")
    mean, variance = by_task.mean().mean(), np.square(by_task.sem()).sum(skipna=False) / by_task.ngroups**2
    text = {name: f"{mean[name]:+.3f} ± {variance[name] ** 0.5:.3f}" for name in wide if name != REFERENCE}
    text = {name: value.removesuffix(" ± nan") for name, value in text.items()}
    return pd.Series(text, dtype=str)


def by_method(scored: pd.DataFrame) -> pd.DataFrame:
    """One task: mean over seeds, ± their standard deviation for NLL, by method and prediction."""
    columns = ["accuracy", "NLL", "Brier", "ECE (15 bins)", "ECE if calibrated", "AURC", "OOD AUROC", "votes: KL"]
    columns += ["votes: JS", "T", "NLL at T", "ECE (15 bins) at T", "votes, tempered: KL", "parameters", "head"]
    columns = [name for name in [*columns, "CPU seconds"] if name in scored and scored[name].notna().any()]
    groups = scored.groupby(["method", "prediction"], sort=False)
    table, spread = groups[columns].mean(), groups["NLL"].std()
    table["NLL"] = [
        f"{mean:.3f}" + ("" if np.isnan(sd) else f" ± {sd:.3f}") for mean, sd in zip(table["NLL"], spread, strict=True)
    ]
    table.insert(0, "seeds", groups.size())
    table.index = [f"{method}, {row}" for method, row in table.index]
    return table


def differences(finished: Sequence[Mapping], scored: pd.DataFrame, ours: str = OURS) -> pd.DataFrame:
    """One method minus every other, in NLL and Brier, by task and over all, and LoRA at its temperature.

    "seeds": the fewest that a task has of both.
    """
    others = [name for name in scored["method"].unique() if name != ours]
    against, rows = [(name, False) for name in others], {}
    if ours != REFERENCE:
        against.append((REFERENCE, True))
    for other, temper in against:
        cells = {"seeds": np.inf}
        for loss in ("NLL", "Brier"):
            for task, row in paired(finished, loss, other, temper, ours).iterrows():
                cells[f"{task}, {loss}"] = f"{row['difference']:+.3f} ± {row['SE']:.3f}"
                cells["seeds"] = min(row["seeds"], cells["seeds"])
        rows[f"{ours} - {other}" + (" at T" if temper else "")] = cells
    return pd.DataFrame.from_dict(rows, orient="index")


def convergence(finished: Sequence[Mapping]) -> pd.DataFrame:
    """Median steps until the validation NLL is at LoRA's best of that task and seed, and the share that got there.

    A fit that did not get there counts as later than any. "best at first": the share of fits whose own best is after
    the first epoch, before which no other can be seen to arrive.
    """
    curves_of = {}
    for run in of_stage(finished, "scores"):
        at, curve = run["settings"], run["rows"]["fit"]["curve"]
        if curve and at["method"] in CURVES:
            curves_of[at["task"], at["seed"], at["method"]] = np.asarray(curve)
    rows = []
    for (task, seed, method), curve in curves_of.items():
        reference = curves_of.get((task, seed, REFERENCE))
        if reference is None:
            continue
        reached = curve[curve[:, 1] <= reference[:, 1].min() + 1e-9, 0]
        rows.append({
            "method": method, "steps": reached[0] if len(reached) else np.inf, "reached": len(reached) > 0,
            "best at first": curve[:, 1].argmin() == 0,
        })  # fmt: skip
    columns = ["method", "steps", "reached", "best at first"]
    groups = pd.DataFrame(rows, columns=columns).groupby("method", sort=False)
    shares = groups[["reached", "best at first"]].mean()
    return groups["steps"].median().to_frame().join(shares).join(groups.size().rename("fits"))


def histories(finished: Sequence[Mapping]) -> dict[str, dict[str, list[np.ndarray]]]:
    """By task and method of CURVES, a seed's steps and validation NLL each, (E, 2)."""
    found: dict[str, dict[str, list[np.ndarray]]] = {}
    for run in of_stage(finished, "scores"):
        at, curve = run["settings"], run["rows"]["fit"]["curve"]
        if curve and at["method"] in CURVES:
            found.setdefault(at["task"], {}).setdefault(at["method"], []).append(np.asarray(curve))
    return found


def _main_rows(scored: pd.DataFrame) -> pd.DataFrame:
    return scored[scored["prediction"].isin(MAIN)]


def _complete(main: pd.DataFrame) -> pd.DataFrame:
    """The tasks and seeds that REFERENCE and OURS both have, and of the methods those that have all of them."""
    at = pd.Series(list(zip(main["task"], main["seed"], strict=True)), index=main.index)
    made = {name: set(runs) for name, runs in at.groupby(main["method"], sort=False)}
    wanted = made.get(REFERENCE, set()) & made.get(OURS, set())
    if not wanted:
        return main
    return main[main["method"].isin([name for name, runs in made.items() if wanted <= runs]) & at.isin(wanted)]


def _wide(table: pd.DataFrame) -> str:
    """A row per method: the mean over tasks at each of its values, the best in bold."""
    rows = {}
    for method, values in table.mean(axis=1).groupby(level=0, sort=False):
        best = values.idxmin()
        rows[method] = ", ".join(
            (f"**{value:g}: {nll:.3f}**" if (method, value) == best else f"{value:g}: {nll:.3f}")
            for (_, value), nll in values.sort_index().items()
        )
    return pd.Series(rows, name="value: NLL").to_markdown(colalign=("left", "right"))


def _markdown(table: pd.DataFrame) -> str:
    """Numbers of things without decimals, other numbers with three, nothing where there is none."""
    decimals = {name: 0 if name in _COUNTS else 3 for name in table}

    def cell(value, places):
        if isinstance(value, str):
            return value
        return "" if pd.isna(value) else "never" if np.isinf(value) else f"{value:,.{places}f}"

    cells = table.apply(lambda column: [cell(value, decimals[column.name]) for value in column])
    return cells.to_markdown(disable_numparse=True, colalign=("left", *["right"] * len(table.columns)))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("lines", type=Path)
    parser.add_argument("--out", type=Path, default=Path("out/study"))
    args = parser.parse_args()
    write_tables([json.loads(line) for line in args.lines.read_text().splitlines()], args.out)
    print((args.out / "tables.md").read_text())


if __name__ == "__main__":
    main()
