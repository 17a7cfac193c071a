"""The papers' claims and this library's defaults on real data: every run a line, tables and figures from the lines.

python models/study/study.py --data FOLDER --out out/study              all stages; goes on where it was cut off
python models/study/study.py --data FOLDER --out out/study --small      one row of the table in minutes

Three stages. "tune": every method's one setting, among four values, by its NLL on further rows of the training split
(judged rows) of the development tasks, with seeds that no table has. "defaults": this library's configuration with one
thing changed, likewise. "scores": every method with its tuned value on every task and seed, the test rows looked at for
the first time.
docs/study.md says what the methods are and how the rows are split.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import numpy as np
import torch

sys.path.append(str(Path(__file__).resolve().parents[1]))
from methods import METHODS, VARIATIONS, Fits  # noqa: E402
from runs import Runs  # noqa: E402
from tables import write_tables  # noqa: E402
from tasks import TASKS, Problem, problem  # noqa: E402
from tuning import chosen  # noqa: E402

import pyro_lrblora as lb  # noqa: E402
from pyro_lrblora import metrics  # noqa: E402
from pyro_lrblora.adapters.lora import lora_parameters  # noqa: E402
from pyro_lrblora.adapters.targets import weight_shape  # noqa: E402
from pyro_lrblora.diagnostics import against_votes, out_of_distribution  # noqa: E402
from pyro_lrblora.guides.ensemble import EnsembleGuide  # noqa: E402

STAGES = ["tune", "defaults", "scores"]
LOGIT_DRAWS = 1000
SMALL = {
    "tasks": ["sst2"], "development": ["sst2"], "methods": ["LoRA", "LoRA-XS", "LowRankPrecision"], "seeds": [0],
    "stages": ["scores"], "rows": 200, "validation_rows": 100, "test_rows": 200, "outside_rows": 100, "epochs": 4,
}  # fmt: skip


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--small", action="store_true", help="one task, three methods; other flags still count")
    parser.add_argument("--data", required=True, help="folder with a folder of parquet files per task")
    parser.add_argument("--base", default="builtin", help="a BERT encoder, hub id or folder; 'builtin' is MiniLM")
    parser.add_argument("--frozen-layers", type=int, default=4, help="computed once per row; the others are adapted")
    parser.add_argument("--stages", nargs="+", default=STAGES, choices=STAGES)
    parser.add_argument("--tasks", nargs="+", default=["sst2", "snli", "ag_news"], choices=TASKS)
    parser.add_argument("--development", nargs="+", default=["sst2", "snli"], choices=TASKS, help="tasks tuned on")
    parser.add_argument("--methods", nargs="+", default=list(METHODS), choices=METHODS)
    parser.add_argument("--variations", nargs="+", default=list(VARIATIONS), choices=VARIATIONS)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--development-seeds", type=int, nargs="+", default=[100], help="of tuning and defaults")
    parser.add_argument("--rows", type=int, default=300)
    parser.add_argument("--validation-rows", type=int, default=150)
    parser.add_argument("--judged-rows", type=int, default=1000, help="that settings and defaults are chosen on")
    parser.add_argument("--test-rows", type=int, default=300)
    parser.add_argument("--outside-rows", type=int, default=100, help="of another kind, and voted on")
    parser.add_argument("--max-length", type=int, default=64, help="tokens per row, longer ones are cut")
    parser.add_argument("--batch-size", type=int, default=16)
    parser.add_argument("--epochs", type=int, default=5)
    parser.add_argument("--draws", type=int, default=10)
    parser.add_argument("--out", type=Path, default=Path("out/study"))
    args = parser.parse_args(argv)
    if args.small:
        parser.set_defaults(**SMALL)
        args = parser.parse_args(argv)

    failed, fits = 0, Latest(args)
    for stage in args.stages:
        runs = Runs(args.out / "runs.jsonl")  # read again: a stage plans from what the one before found
        failed += runs.complete(list(planned(stage, args, runs.finished)), fits.run)
    write_tables(Runs(args.out / "runs.jsonl").finished, args.out)
    print(f"Wrote {args.out}/tables.md")
    if failed:
        raise SystemExit(f"expected every run to succeed, {failed} failed; the same command makes those again")


def planned(stage: str, args: argparse.Namespace, finished: Sequence[Mapping]) -> Iterator[dict]:
    """The settings of every run of a stage, those of one problem one after another."""
    names = ["base", "frozen_layers", "rows", "validation_rows", "max_length", "batch_size", "epochs"]
    shared = {name: getattr(args, name) for name in names}
    if stage == "scores":
        shared |= {name: getattr(args, name) for name in ("test_rows", "outside_rows", "draws")}
        values = {name: chosen(finished, name, METHODS, args.rows, args.frozen_layers) for name in args.methods}
        for seed in args.seeds:
            for task in args.tasks:
                for name, value in values.items():
                    yield {"stage": stage, "task": task, "method": name, "value": value, "seed": seed} | shared
        return
    shared |= {"judged_rows": args.judged_rows, "draws": args.draws}
    if stage == "defaults":
        tried = [(name, None) for name in args.variations]
    else:
        tuned = [name for name in args.methods if not METHODS[name].tuned_as]
        tried = [(name, value) for name in tuned for value in METHODS[name].grid]
    for seed in args.development_seeds:
        for task in args.development:
            for name, value in tried:
                yield {"stage": stage, "task": task, "method": name, "value": value, "seed": seed} | shared


class Latest:
    """Makes runs, and keeps the fits of the latest problem: its methods share models and points."""

    def __init__(self, args: argparse.Namespace):
        self.args = args
        self._key: tuple | None = None
        self._fits: Fits | None = None

    def run(self, settings: Mapping) -> dict[str, dict[str, object]]:
        """Fit what the settings say, and score it."""
        with_test = settings["stage"] == "scores"
        key = settings["task"], settings["seed"], with_test
        if key != self._key:
            self._fits, self._key = None, None  # the memory of the one before is free first
            found = problem(settings["task"], settings["seed"], self.args, with_test)
            self._key, self._fits = key, Fits(found, self.args)
        fits, name = self._fits, settings["method"]
        fits.borrowed, begun = 0.0, time.process_time()
        if settings["stage"] == "defaults":
            posterior, how = fits.vary(VARIATIONS[name]), "monte_carlo"
        else:
            posterior, how = METHODS[name].fit(fits, settings["value"]), METHODS[name].predict
        seconds = time.process_time() - begun + fits.borrowed
        about = costs(posterior) | {"CPU seconds": seconds, "curve": curve(posterior)}
        rows = {}
        for label, options in ways(posterior, how, self.args.draws):
            held = lb.predict(posterior, fits.problem.validation, seed=0, **options)
            rows[label] = {"validation": held.scores()}
            if with_test:
                rows[label] |= scores(posterior, fits.problem, held, options)
            elif fits.problem.test is not None:
                found = lb.predict(posterior, fits.problem.test, seed=0, **options)
                rows[label] |= {"judged": found.scores(), "losses": losses(found)}
        return rows | {"fit": about}


def ways(posterior: lb.Posterior, method: str, draws: int) -> Iterator[tuple[str, dict]]:
    """How a posterior predicts, by name: linearised, or by its draws, and at the mean where it has one mode."""
    if posterior.is_point:
        yield "point", {"draws": 1}
        return
    if method == "linearised":  # draws of logits, which cost no forward
        yield method, {"draws": LOGIT_DRAWS, "method": method}
        return
    yield "draws", {"draws": draws}
    if not isinstance(posterior.guide, EnsembleGuide):
        yield "mean", {"at": "mean"}


def scores(posterior: lb.Posterior, rows: Problem, held: lb.Prediction, options: Mapping) -> dict[str, object]:
    """Every figure of a prediction on test rows, those at the temperature of the validation rows among them."""
    found = lb.predict(posterior, rows.test, seed=0, **options)
    temperature = metrics.fit_temperature(held.log_probs, held.labels)
    table = {"test": figures(found), "temperature": temperature, "test, tempered": figures(found.tempered(temperature))}
    if rows.outside is not None:
        other = lb.predict(posterior, rows.outside, seed=0, **options)
        table["OOD AUROC"] = float(out_of_distribution(found, other).loc["entropy", "AUROC"])
    if rows.votes is not None:
        batches, votes = rows.votes
        voted = lb.predict(posterior, batches, seed=0, **options)
        for name, each in {"votes": voted, "votes, tempered": voted.tempered(temperature)}.items():
            agreement = against_votes(each.probs, votes, simulations=1)
            table[name] = {"KL": float(agreement.kl.mean()), "JS": float(agreement.js.mean())}
    return table | {"losses": losses(found), "losses, tempered": losses(found.tempered(temperature))}


def losses(prediction: lb.Prediction) -> dict[str, list[float]]:
    """Every row's NLL (nats) and Brier score, as lines keep them."""
    return {name: [round(float(loss), 4) for loss in values] for name, values in prediction.losses().items()}


def figures(prediction: lb.Prediction) -> dict[str, float]:
    """Accuracy, NLL, Brier, both ECEs, AURC, and the ECE that the same probabilities have if they are exactly right."""
    probs, labels = prediction.probs, prediction.labels
    generator = torch.Generator().manual_seed(0)
    drawn = [torch.multinomial(probs, 1, generator=generator).squeeze(1) for _ in range(50)]
    return prediction.scores() | {
        "ECE (15 bins of equal mass)": metrics.ece(probs, labels, 15, "mass"),
        "ECE if calibrated": float(np.mean([metrics.ece(probs, each, 15) for each in drawn])),
        "AURC": metrics.aurc(probs, labels),
    }


def costs(posterior: lb.Posterior) -> dict[str, float]:
    """Numbers of parameters: of the posterior, of LoRA r = 8 on the same modules, of the head."""
    counts = posterior.parameter_counts()
    lora = lora_parameters(map(weight_shape, posterior.model.modules.values()))
    return {"parameters": counts["posterior"], "head": counts["head"], "LoRA r=8": lora}


def curve(posterior: lb.Posterior) -> list[list[float]]:
    """Steps and validation NLL after every epoch."""
    rows = [row for row in posterior.history if row.get("validation_nll") is not None]
    return [[row["step"], round(row["validation_nll"], 4)] for row in rows]


if __name__ == "__main__":
    main()
