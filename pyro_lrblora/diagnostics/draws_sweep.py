"""How many posterior draws does a prediction need?"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import pandas as pd
import torch

from .. import metrics
from ..predictions import Prediction


def draws_sweep(
    prediction: Prediction, sizes: Sequence[int] | None = None, repeats: int = 20, seed: int = 0, bins: int = 15
) -> DrawsSweep:
    """Score predictions made of fewer of the same draws, with the Monte Carlo error that so few draws leave.

    Args:
        prediction: logits (S, N, C) with labels.
        sizes: how many draws to average, each at most S; None is 1, 2, 4, 8, ... and S.
        repeats: random subsets of each size, without replacement; of an even size, of pairs of neighbours, which are
            what `predict` mirrors.
        seed: of the subsets.
        bins: of the ECE, equal width.

    Raises:
        ValueError: no labels, a size outside 1..S, fewer than 2 repeats.
    """
    draws = len(prediction.logits)
    if sizes is None:
        sizes = [2**k for k in range(draws.bit_length()) if 2**k < draws] + [draws]
    if not sizes or min(sizes) < 1 or max(sizes) > draws or repeats < 2:
        raise ValueError(f"expected sizes within 1..{draws} and repeats >= 2, got {list(sizes)} and repeats={repeats}")
    whole = prediction.scores(bins)
    generator = np.random.default_rng(seed)
    log_probs, table = prediction.logits.log_softmax(-1), {}
    for size in sorted(set(sizes)):
        if size == draws:
            table[size] = whole | {f"{name} SE": np.nan for name in whole}
            continue
        subsets = [_subset(generator, draws, size) for _ in range(repeats)]
        scores = pd.DataFrame(
            [Prediction(log_probs[torch.as_tensor(rows)], prediction.labels).scores(bins) for rows in subsets]
        )
        # Subsets of one finite set of draws vary less than fresh draws would, by this share of the variance.
        error = scores.std(ddof=1) / np.sqrt(1 - size / draws)
        table[size] = scores.mean().to_dict() | error.add_suffix(" SE").to_dict()
    frame = pd.DataFrame.from_dict(table, orient="index")
    frame.index.name = "draws"
    frame = frame[[column for name in whole for column in (name, f"{name} SE")]]
    # Of one row there is no standard error, and only the share counts.
    tolerance = float(np.fmin(0.01 * whole["NLL"], metrics.standard_error(prediction.losses()["NLL"])))
    return DrawsSweep(frame, draws, whole["NLL"], tolerance, "one draw: nothing to average" if draws == 1 else "")


@dataclass(frozen=True)
class DrawsSweep:
    """Scores by number of draws.

    Args:
        table: indexed by the number of draws: accuracy, NLL (nats), ECE, Brier, each the mean over subsets, and beside
            it its Monte Carlo standard error, that of one prediction with so many fresh draws; NaN at all S.
        draws: S.
        full: NLL with all S, nats.
        tolerance: the smaller of 1% of `full` and its standard error over test rows, nats.
        note: what the numbers cannot say, and why.
    """

    table: pd.DataFrame
    draws: int
    full: float
    tolerance: float
    note: str = ""

    @property
    def enough(self) -> int | None:
        """The first size below S whose NLL, one Monte Carlo standard error included, is within the tolerance of all S.

        None where no size is: then S itself may be too few. A point needs its one draw.
        """
        if self.draws == 1:
            return 1
        distance = (self.table["NLL"] - self.full).abs() + self.table["NLL SE"]
        fine = self.table.index[distance <= self.tolerance]
        return int(fine[0]) if len(fine) else None


def _subset(generator: np.random.Generator, draws: int, size: int) -> np.ndarray:
    if size % 2 or draws % 2:
        return generator.permutation(draws)[:size]
    pairs = generator.permutation(draws // 2)[: size // 2]
    return (2 * pairs[:, None] + np.arange(2)).ravel()
