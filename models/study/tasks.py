"""The study's tasks: which rows are trained, validated and tested on, and what else a prediction is held against."""

from __future__ import annotations

import argparse
from dataclasses import dataclass
from pathlib import Path

import datasets
import numpy as np
from pairs import Pairs
from sequence_classification import load_base, read_splits
from upper_layers import LowerStates, UpperLayers

import pyro_lrblora as lb


@dataclass(frozen=True)
class Task:
    """One data set.

    Args:
        train, test: beginnings of the names of the splits that validation rows are carved from, and that are scored.
        classes: C.
        outside: the task whose test rows are data of another kind.
        choices: whether a row is a question with choices.
        pair: whether a row is two texts, which are encoded apart and compared.
        votes: whether ChaosNLI has people's votes for rows of this kind.
    """

    train: str
    test: str
    classes: int
    outside: str | None
    choices: bool = False
    pair: bool = False
    votes: bool = False


TASKS = {
    "sst2": Task("train", "validation", 2, "ag_news"),
    "ag_news": Task("train", "test", 4, "sst2"),
    # ChaosNLI's items lie in SNLI's validation split, so that one is not trained on.
    "snli": Task("test", "validation", 3, "mrpc", pair=True, votes=True),
    "cola": Task("train", "validation", 2, "ag_news"),
    "rte": Task("train", "validation", 2, "snli", pair=True),
    "mrpc": Task("train", "validation", 2, "snli", pair=True),
    "arc_easy": Task("train", "test", 4, None, choices=True),
}


@dataclass(frozen=True)
class Problem:
    """A network and the rows of one task and seed, as the states of its frozen lower layers.

    Args:
        network: the upper layers and a head that is zero.
        likelihood: of the labels.
        train, validation: with labels, from the training split.
        test: of the test split; where that is not looked at yet, as many as are judged, also from the training split,
            or None.
        outside: rows of another kind, or None.
        votes: rows that people voted on, and their counts (N, C), or None.
        seed: of the choice of rows, and of every fit.
    """

    network: UpperLayers
    likelihood: object
    train: LowerStates
    validation: LowerStates
    test: LowerStates | None
    outside: LowerStates | None
    votes: tuple[LowerStates, np.ndarray] | None
    seed: int


def labelled(folder: Path, split: str, task: Task) -> datasets.Dataset:
    """The rows of a split that have a label, and as many choices as the task has classes."""
    splits = read_splits(str(folder))
    rows = next(rows for name, rows in splits.items() if name.startswith(split))  # "train_10k"
    if task.choices:
        rows = rows.filter(lambda row: len(row["choices"]) == task.classes)
    return rows.filter(lambda row: row["label"] >= 0)  # SNLI has rows without a majority


def problem(name: str, seed: int, args: argparse.Namespace, test: bool = True) -> Problem:
    """The rows of a task: training and validation rows differ by seed, test rows do not.

    Args:
        name: of TASKS.
        seed: see Problem.
        args: the study's command line.
        test: False reads no row of the test split, nor any that only belong to it, but rows to judge by.
    """
    task, folder = TASKS[name], Path(args.data)
    classifier, tokenizer = load_base(args.base, task.classes, True, "float32")
    encoder = classifier.encoder.requires_grad_(False)

    def states(rows: datasets.Dataset, shuffle: int | None = None) -> LowerStates:
        if task.choices:
            batches = lb.data.Choices(rows, tokenizer, max_length=256)
        elif task.pair:
            batches = Pairs(rows, tokenizer, args.max_length)
        else:
            batches = lb.Batches(rows, tokenizer, max_length=args.max_length)
        return LowerStates(batches, encoder, args.frozen_layers, args.batch_size, shuffle)

    rows = labelled(folder / name, task.train, task).shuffle(seed=seed)
    train, validation = rows.select(range(args.rows)), rows.select(range(args.rows, args.rows + args.validation_rows))
    outside = votes = None
    if not test:
        begin = args.rows + args.validation_rows
        judged = range(begin, min(begin + args.judged_rows, len(rows)))
        held = states(rows.select(judged)) if judged else None
    else:
        take = lambda rows, count: rows.shuffle(seed=0).select(range(min(count, len(rows))))
        held = states(take(labelled(folder / name, task.test, task), args.test_rows))
        if task.outside:
            other = TASKS[task.outside]
            outside = states(take(labelled(folder / task.outside, other.test, other), args.outside_rows))
        if task.votes:
            voted = take(next(iter(read_splits(str(folder / "chaosnli")).values())), args.outside_rows)
            votes = states(voted), np.asarray(voted["label_count"])
    return Problem(
        UpperLayers(encoder, args.frozen_layers, 1 if task.choices else task.classes, compared=task.pair),
        lb.likelihoods.MultipleChoice() if task.choices else lb.likelihoods.Categorical(),
        states(train, shuffle=seed),
        states(validation),
        held,
        outside,
        votes,
        seed,
    )
