"""Are numbers where their predictive intervals say: coverage, probability integral transform, CRPS."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from ..predictions import NumberPrediction
from .uniformity import bias_and_width

LEVEL = 0.9
_RANKS = 99  # into which the transform is cut, to name its shape
_ERRORS = 3.0  # standard errors from which on a shape is named


def intervals(prediction: NumberPrediction) -> Intervals:
    """Hold the labels of N rows against their predictive distributions.

    The probability integral transform of a row is the predictive probability below its label: uniform where the
    predictions are right (Dawid 1984, doi 10.2307/2981683; Gneiting et al. 2007, doi 10.1111/j.1467-9868.2007.00587.x).

    Args:
        prediction: with labels.

    Raises:
        ValueError: no labels.
    """
    from scipy.stats import binom, kstest, kstwo

    if prediction.labels is None:
        raise ValueError("expected a prediction of rows with labels, got none; predict rows that have a label column")
    pit, labels = prediction.cdf(prediction.labels).double().numpy(), prediction.labels.double().numpy()
    rows, tail = len(pit), (1 - LEVEL) / 2
    # All labels as one forecast: a label's mean distance to them, less half the mean distance between two.
    rank, total = labels.argsort().argsort(), np.sort(labels).cumsum()
    distance = ((2 * rank + 2 - rows) * labels + total[-1] - 2 * total[rank]) / rows
    return Intervals(
        pit=pit,
        coverage=float(((pit > tail) & (pit < 1 - tail)).mean()),
        coverage_right=tuple(float(count) / rows for count in binom.interval(0.95, rows, LEVEL)),
        ks=float(kstest(pit, "uniform").statistic),
        ks_right=float(kstwo.isf(0.05, rows)),
        shape=_shape(pit),
        crps=prediction.losses()["CRPS"],
        crps_climatology=distance - distance.mean() / 2,
    )


@dataclass(frozen=True)
class Intervals:
    """Predictive distributions of N numbers against the labels.

    Args:
        pit: (N,) probability integral transform.
        coverage: share of labels in the central 90% interval.
        coverage_right: where that share is in 95 of 100 test sets if the predictions are right (binomial).
        ks: Kolmogorov-Smirnov distance of the transform's distribution from the uniform, a probability.
        ks_right: below which it is in 95 of 100 test sets if the predictions are right.
        shape: what is wrong, in words; empty where nothing is clear.
        crps: (N,) in units of the labels.
        crps_climatology: (N,), where the test labels themselves are the forecast, whatever the row.
    """

    pit: np.ndarray
    coverage: float
    coverage_right: tuple[float, float]
    ks: float
    ks_right: float
    shape: str
    crps: np.ndarray
    crps_climatology: np.ndarray


def _shape(pit: np.ndarray) -> str:
    bias, width = bias_and_width(np.minimum((pit * (_RANKS + 1)).astype(int), _RANKS), _RANKS)
    words = []
    if abs(bias) > _ERRORS:
        words.append("too low" if bias > 0 else "too high")
    if abs(width) > _ERRORS:
        words.append("too narrow" if width > 0 else "too wide")
    return ", ".join(words)
