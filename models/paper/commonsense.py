"""L-LoRA-XS on a language model asked for a letter: MAP against Laplace approximations, by projection, and an ELBO fit.

python models/paper/commonsense.py --out out/llama                             Llama-2-7B-chat, the hub's data
python models/paper/commonsense.py --data FOLDER --small --base FOLDER --tasks arc_easy --out out/small

The paper: Dubovik et al. 2026, arXiv 2605.07706. From it: Llama-2-7B-chat, all seven kinds of linear modules, ranks 32
and 64, projections SVD, whitened SVD, DCT and random, diagonal and Kronecker Laplace approximations with the linearised
predictive and the prior precision by marginal likelihood. The tasks are those its peers share (BLoB, TFB, C-LoRA); ECE
has their 15 bins.

Deliberately otherwise: validation rows are carved from the training split (WinoGrande's twins never parted) and serve
the temperature alone; no epoch is chosen; every posterior has a row after temperature scaling. Prompts, epochs, rates
and the point's prior are this script's own, see docs/paper.md.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import product
from pathlib import Path

import datasets
import torch

import pyro_lrblora as lb

sys.path.append(str(Path(__file__).resolve().parents[1]))
from loading import tokenizer_of
from multiple_choice import letters_of, load, science
from runs import Runs, printed, scores
from sequence_classification import read_splits

LAPLACE = {"Laplace-diagonal": "diagonal", "Laplace-kron": "kron"}
METHODS = ["MAP", *LAPLACE, "LowRankPrecision"]
PROJECTIONS = {
    "SVD": lb.projections.SVD(absorb_singular_values=True),
    "WhitenedSVD": lb.projections.WhitenedSVD(),
    "DCT": lb.projections.DCT(),
    "Random": lb.projections.Random(),
    "Gradient": lb.projections.Gradient(),
}
SMALL = {
    "ranks": [4], "seeds": [0], "layers": [4], "projections": ["SVD"], "rows": 32, "validation_rows": 16,
    "test_rows": 48, "epochs": 1, "columns": 2, "draws": 4, "dtype": "float32",
}  # fmt: skip


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--small", action="store_true", help="for a small Llama as --base; other flags still count")
    parser.add_argument("--base", default="meta-llama/Llama-2-7b-chat-hf", help="hub id or folder")
    parser.add_argument("--data", help="folder with a folder of parquet files per task; left out: the hub's data sets")
    parser.add_argument("--tasks", nargs="+", default=list(TASKS), choices=TASKS)
    parser.add_argument("--methods", nargs="+", default=METHODS, choices=METHODS)
    published = ["SVD", "WhitenedSVD", "DCT", "Random"]
    parser.add_argument("--projections", nargs="+", default=published, choices=PROJECTIONS)
    parser.add_argument("--ranks", type=int, nargs="+", default=[32, 64])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2, 3, 4])
    parser.add_argument("--form", default="letter", choices=["letter", "answer"], help="what is scored of a choice")
    parser.add_argument("--targets", default="all-linear")
    parser.add_argument("--layers", type=int, nargs="*")
    parser.add_argument("--rows", type=int, default=10**9, help="at most so many training items")
    parser.add_argument("--validation-rows", type=int, default=200, help="taken from the training split first")
    parser.add_argument("--test-rows", type=int, default=10**9)
    parser.add_argument("--max-length", type=int, default=512, help="tokens of a prompt; longer items are left out")
    parser.add_argument("--epochs", type=int, default=3)
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--rate", type=float, default=1e-3, help="of the point")
    parser.add_argument("--point-scale", type=float, default=1.0, help="of the prior that the point is fitted under")
    parser.add_argument("--prior-scale", type=float, default=0.1, help="of LowRankPrecision, which is on Gradient")
    parser.add_argument("--columns", type=int, default=8, help="K of LowRankPrecision")
    parser.add_argument("--draws", type=int, default=10)
    parser.add_argument("--dtype", default="bfloat16", help="of the base; latents and guide are float32")
    parser.add_argument("--gradient-checkpointing", action="store_true")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--out", type=Path, default=Path("out/commonsense"))
    args = parser.parse_args(argv)
    if args.small:
        parser.set_defaults(**SMALL)
        args = parser.parse_args(argv)

    plan, runs = planned(args), Runs(args.out / "results.jsonl")
    failed = runs.complete(plan, partial(run, args=args))
    table = runs.table(plan)
    if len(table):
        table.to_csv(args.out / "table.csv")
        print(printed(table))
    if failed:
        raise SystemExit(f"expected every run to succeed, {failed} failed; the same command makes those again")


@dataclass(frozen=True)
class Task:
    """Where a task's items are and how they are asked for.

    Args:
        folder: below --data.
        hub: name, or name:config.
        train, test: beginnings of the splits' names; where the test labels are not public, the validation split.
        choices: of an item; items with another number are left out.
        item: from a row to question, choices and label.
        template: of the prompt.
    """

    folder: str
    hub: str
    train: str
    test: str
    choices: int
    item: Callable[[Mapping], dict]
    template: str


def winogrande(row: Mapping) -> dict:
    """A sentence with a gap; on the hub the answer is "1" or "2"."""
    label = row["label"] if "label" in row else int(row["answer"]) - 1
    return {"question": row["sentence"], "choices": [row["option1"], row["option2"]], "label": label}


def boolq(row: Mapping) -> dict:
    """A question about a passage, where there is one; no is 0 and yes 1."""
    passage = f"{row['passage']}\n" if "passage" in row else ""
    label = int(row["label"] if "label" in row else row["answer"])
    return {"question": f"{passage}{row['question']}?", "choices": ["no", "yes"], "label": label}


_QUESTION = "Choose the right answer.\nQuestion: {question}\n{choices}\nAnswer:"
_GAP = "Choose what fills the gap _ in the sentence.\nSentence: {question}\n{choices}\nAnswer:"
_PASSAGE = "Answer the question.\n{question}\n{choices}\nAnswer:"
TASKS = {
    "arc_easy": Task("arc_easy", "allenai/ai2_arc:ARC-Easy", "train", "test", 4, science, _QUESTION),
    "arc_challenge": Task("arc_challenge", "allenai/ai2_arc:ARC-Challenge", "train", "test", 4, science, _QUESTION),
    "openbookqa": Task("openbookqa", "allenai/openbookqa:main", "train", "test", 4, science, _QUESTION),
    "winogrande_s": Task(
        "winogrande", "allenai/winogrande:winogrande_s", "train_s", "validation", 2, winogrande, _GAP
    ),
    "winogrande_m": Task(
        "winogrande", "allenai/winogrande:winogrande_m", "train_m", "validation", 2, winogrande, _GAP
    ),
    "boolq": Task("boolq", "google/boolq", "train", "validation", 2, boolq, _PASSAGE),
}  # fmt: skip


def planned(args: argparse.Namespace) -> list[dict]:
    """The settings of every run: what tells it from the others first, then what they share."""
    names = ["tasks", "methods", "projections", "ranks", "seeds", "out", "device"]
    shared = {name: value for name, value in vars(args).items() if name not in names}
    plan = []
    for task, rank, projection, method, seed in product(
        args.tasks, args.ranks, args.projections, args.methods, args.seeds
    ):
        projection = "Gradient" if method == "LowRankPrecision" else projection
        settings = {"task": task, "rank": rank, "projection": projection, "method": method, "seed": seed} | shared
        if settings not in plan:
            plan.append(settings)
    return plan


def run(settings: Mapping, args: argparse.Namespace) -> dict[str, dict[str, float]]:
    """Fit one method to one task with one seed, and score it."""
    task, seed, method = TASKS[settings["task"]], settings["seed"], settings["method"]
    form = form_of(args, task.choices)
    network, tokenizer, likelihood, batches = load(args.base, form, False, args.dtype, task.choices)
    network.to(args.device)
    if args.gradient_checkpointing:
        network.base_model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    how = {"max_length": args.max_length, "batch_size": args.batch_size}
    how |= {"template": task.template} if form == "letter" else {}
    train, validation, test = (
        datasets.Dataset.from_list(fitting(items, task, tokenizer, args.max_length))
        for items in items_of(task, settings["seed"], args)
    )
    print(f"{len(train)}, {len(validation)}, {len(test)} items of {task.folder}, scored by {form}", flush=True)
    train = batches(train, tokenizer, shuffle=seed, **how)
    validation, test = (batches(rows, tokenizer, by_length=True, **how) for rows in (validation, test))
    adapter = lb.LoRAXS(settings["rank"], PROJECTIONS[settings["projection"]], args.targets, args.layers)
    scale = args.prior_scale if method == "LowRankPrecision" else args.point_scale
    model = lb.BayesianLoRA(network, adapter, lb.priors.Normal(scale), likelihood, tokenizer=tokenizer)
    model = model.prepare(train, seed=seed)
    scored = {"draws": args.draws, "bins": 15, "seed": seed}
    options = {"epochs": args.epochs, "seed": seed, "progress": False}
    if method == "LowRankPrecision":
        posterior = lb.fit(model, train, guide=lb.guides.LowRankPrecision(args.columns), **options)
        return scores(posterior, test, validation, **scored)
    # One point for MAP and both approximations, kept below --out.
    named = {name: value for name, value in settings.items() if name not in ("method", "draws")}
    name = f"{settings['task']}-{hashlib.sha256(json.dumps(named).encode()).hexdigest()[:12]}"
    fit = partial(lb.fit, model, train, guide=lb.guides.Delta(), rates=lb.Rates(loc=args.rate), **options)
    kept = {"folder": args.out / "points", "n_jobs": 1, "progress": False}
    point = lb.parallel_fits({name: fit}, network, tokenizer=tokenizer, **kept)[name]
    if method == "MAP":
        return scores(point, test, validation, **scored)
    posterior = lb.infer.laplace(
        model, train, structure=LAPLACE[method], prior_precision="marginal_likelihood", init=point, seed=seed
    )
    return scores(posterior, test, validation, method="linearised", **scored)


def form_of(args: argparse.Namespace, choices: int) -> str:
    """Letters, or the answers' own tokens where asked for or where letters are not tokens of the vocabulary."""
    if args.form == "letter":
        try:
            letters_of(tokenizer_of(args.base), choices)
        except ValueError as error:
            print(f"the answers' own tokens are scored, for letters cannot be: {error}", flush=True)
            return "answer"
    return args.form


def items_of(task: Task, seed: int, args: argparse.Namespace) -> tuple[list[dict], list[dict], list[dict]]:
    """Training, validation and test items of a task."""
    splits = read_splits(task.hub if args.data is None else str(Path(args.data) / task.folder))
    # The hub has one training split in every size's configuration.
    first = lambda *words: next(splits[name] for word in words for name in splits if name.startswith(word))
    everything, test = first(task.train, "train"), first(task.test)
    # A column that one split lacks (BoolQ's passages, in some copies) would make two tasks of them.
    shared = [name for name in everything.column_names if name in test.column_names]
    everything, test = list(everything.shuffle(seed=seed).select_columns(shared)), list(test.select_columns(shared))
    validation = everything[: args.validation_rows]
    stem = lambda row: row["qID"].rpartition("-")[0]
    held = {stem(row) for row in validation if "qID" in row}
    train = [row for row in everything[args.validation_rows :] if "qID" not in row or stem(row) not in held]
    parts = train[: args.rows], validation, test[: args.test_rows]
    return tuple([task.item(row) for row in part] for part in parts)


def fitting(items: Sequence[dict], task: Task, tokenizer, limit: int) -> list[dict]:
    """The items with the task's number of choices whose prompt is no longer than the limit; the others are counted."""
    listed = lambda item: "\n".join(f"A. {choice}" for choice in item["choices"])
    prompt = lambda item: task.template.format(question=item["question"], choices=listed(item))
    right = [item for item in items if len(item["choices"]) == task.choices]
    short = [item for item in right if len(tokenizer(prompt(item))["input_ids"]) <= limit]
    if len(short) < len(items):
        print(
            f"left out of {len(items)} items: {len(items) - len(right)} without {task.choices} choices, "
            f"{len(right) - len(short)} of more than {limit} tokens"
        )
    return short


if __name__ == "__main__":
    main()
