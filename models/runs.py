"""The runs of a study, one JSON line each: made once, scored alike, and put into one table over seeds."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import pandas as pd

import pyro_lrblora as lb


class Runs:
    """Finished runs in a file of JSON lines; one with the same settings is not made again.

    Args:
        path: of the file; made with its folder at the first run. A line that was cut off counts as not there.
    """

    def __init__(self, path: Path):
        self.path = path
        self._finished: dict[str, dict] = {}
        for line in path.read_text().splitlines() if path.exists() else ():
            try:
                run = json.loads(line)
            except json.JSONDecodeError:
                continue
            self._finished[_key(run["settings"])] = run

    @property
    def finished(self) -> list[dict]:
        """Every finished run: "settings", "rows", "seconds"."""
        return list(self._finished.values())

    def complete(self, plan: Sequence[Mapping], make: Callable[[Mapping], Mapping[str, Mapping[str, float]]]) -> int:
        """Make the runs of a plan that are missing, and return how many failed; the others go on.

        Args:
            plan: settings of each run, of JSON's types.
            make: from settings to rows of scores by name, see `scores`.
        """
        failed = 0
        for number, settings in enumerate(plan, 1):
            about = f"{number}/{len(plan)} " + " ".join(str(settings[name]) for name in _naming(plan))
            if _key(settings) in self._finished:
                print(f"{about}: there", flush=True)
                continue
            begun = time.perf_counter()
            try:
                rows = make(settings)
            except (Exception, SystemExit) as error:  # whatever it is, the other runs are worth having
                failed += 1
                print(f"{about}: failed, {type(error).__name__}: {error}", flush=True)
                continue
            seconds = time.perf_counter() - begun
            self._add({"settings": dict(settings), "rows": rows, "seconds": seconds})
            print(f"{about}: ready after {seconds:.0f} s", flush=True)
        return failed

    def table(self, plan: Sequence[Mapping]) -> pd.DataFrame:
        """Median and standard deviation over seeds of every score of a plan's finished runs.

        Returns:
            A row per combination of the settings that come before the seed, and per row of scores; a column "seeds",
            and two for every score, the second with " s.d.", which one seed does not have.
        """
        by = [name for name in _naming(plan) if name != "seed"]
        finished = [run for run in (self._finished.get(_key(settings)) for settings in plan) if run is not None]
        flat = pd.DataFrame(
            {name: run["settings"][name] for name in by} | {"prediction": row} | scored
            for run in finished
            for row, scored in run["rows"].items()
        )
        if flat.empty:
            return flat
        groups = flat.groupby([*by, "prediction"], sort=False, dropna=False)
        median, deviation = groups.median(), groups.std().add_suffix(" s.d.")
        columns = [column for name in median for column in (name, f"{name} s.d.")]
        return pd.concat([groups.size().rename("seeds"), median.join(deviation)[columns]], axis=1)

    def _add(self, run: dict) -> None:
        self._finished[_key(run["settings"])] = run
        self.path.parent.mkdir(parents=True, exist_ok=True)
        # A line that was cut off has no end: the next one must not become a part of it.
        cut_off = self.path.exists() and self.path.read_bytes()[-1:] not in (b"", b"\n")
        with self.path.open("a") as file:
            file.write("\n" * cut_off + json.dumps(run) + "\n")


def printed(table: pd.DataFrame) -> str:
    """The table as text, a median with its standard deviation as one column."""
    cell = lambda value, spread: f"{value:.3f}" + ("" if pd.isna(spread) else f" ± {spread:.3f}")
    names = [name for name in table if f"{name} s.d." in table]
    cells = {name: [cell(*pair) for pair in zip(table[name], table[f"{name} s.d."], strict=True)] for name in names}
    return pd.DataFrame({"seeds": table["seeds"]} | cells, index=table.index).to_string()


def scores(
    posterior: lb.Posterior, test, validation, *, draws: int, bins: int, method: str = "monte_carlo", seed: int = 0
) -> dict[str, dict[str, float]]:
    """Scores of a posterior on test rows, and of its mean, each also at the temperature fitted on validation rows.

    Args:
        posterior: what a fit returned.
        test, validation: with labels.
        draws: S; a point has one.
        bins: of the ECE, of equal width.
        method: of lb.predict; "linearised" for a Laplace approximation, whose mean is the point it is around.
        seed: of the draws.

    Returns:
        By "draws" or the method, and "mean": accuracy, NLL (nats), ECE, Brier; "T", "NLL at T", "ECE at T"; numbers of
        parameters.
    """
    if posterior.is_point:
        ways = {"point": {"draws": 1}}
    elif method == "monte_carlo":
        ways = {"draws": {"draws": draws}, "mean": {"at": "mean"}}
    else:
        ways = {method: {"draws": draws, "method": method}}
    counts, rows = posterior.parameter_counts(), {}
    for name, how in ways.items():
        found, held = (lb.predict(posterior, data, seed=seed, **how) for data in (test, validation))
        temperature = lb.metrics.fit_temperature(held.log_probs, held.labels)
        tempered = found.tempered(temperature).scores(bins)
        at = {"T": temperature, "NLL at T": tempered["NLL"], "ECE at T": tempered[f"ECE ({bins} bins)"]}
        rows[name] = found.scores(bins) | at | {"parameters": counts["posterior"], "head": counts["head"]}
    return rows


def _key(settings: Mapping) -> str:
    return json.dumps(settings, sort_keys=True)


def _naming(plan: Sequence[Mapping]) -> list[str]:
    """The names of the settings that say which run it is: those that come first, up to the seed."""
    names = list(plan[0])
    return names[: names.index("seed") + 1]
