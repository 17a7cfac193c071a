"""Do the probabilities mean what they say, as far as so many test rows can tell?"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial

import numpy as np
import pandas as pd

from .. import metrics
from ..metrics import Array


def calibration(probs: Array, labels: Array, bins: int = 15, simulations: int = 300, seed: int = 0) -> Calibration:
    """Calibration errors beside those of a perfectly calibrated model on as many rows, and the CORP reliability curve.

    An ECE is never zero on a finite test set. So labels are drawn from `probs` themselves, many times, and scored the
    same way: an error that is not above those is noise. CORP (Dimitriadis et al. 2021, arXiv 2008.03033) needs no bins:
    the confidence is recalibrated by isotonic regression on the same rows, and the Brier score of "the top class is the
    label" splits into miscalibration - discrimination + uncertainty. There is no PIT here: it needs outcomes in an
    order, and classes have none.

    Args:
        probs: (N, C).
        labels: (N,).
        bins: of the calibration errors.
        simulations: label sets drawn from `probs`, and as many bootstrap resamples.
        seed: of both.

    Raises:
        ValueError: no labels, probs that are no probabilities, bins < 1, fewer than 20 simulations.
    """
    forms = {kind: partial(metrics.ece, bins=bins, kind=kind) for kind in ("width", "mass", "class")}
    forms["CORP"] = lambda probs, labels: _corp(*_top(probs, labels))[0]
    if simulations < 20:
        raise ValueError(f"expected simulations >= 20, got simulations={simulations}")
    values = {name: form(probs, labels) for name, form in forms.items()}
    probs, labels = metrics.as_array(probs, float), metrics.as_array(labels).astype(int)
    perfect, curves = _perfect(forms, probs, simulations, seed)
    rows = {}
    for name, form in forms.items():
        low, high = metrics.bootstrap(form, probs, labels, draws=simulations, seed=seed)
        null = perfect[name].to_numpy()
        # Resampling adds to these errors what sampling had added before: reflect the interval, not shift it further.
        rows[name] = {
            "value": values[name],
            "low": max(0.0, 2 * values[name] - high),
            "high": max(0.0, 2 * values[name] - low),
            "perfect": null.mean(),
            "perfect 95%": np.quantile(null, 0.95, method="higher"),
            "p": (1 + (null >= values[name] - 1e-12).sum()) / (1 + simulations),
        }
    confidence, hits = _top(probs, labels)
    miscalibration, discrimination, uncertainty, curve = _corp(confidence, hits)
    levels, counts = np.unique(confidence, return_counts=True)
    low, high = np.quantile(curves, [0.025, 0.975], axis=0)
    return Calibration(
        errors=pd.DataFrame.from_dict(rows, orient="index"),
        confidence=levels,
        recalibrated=curve,
        low=low,
        high=high,
        rows=counts,
        brier=float(np.square(confidence - hits).mean()),
        miscalibration=miscalibration,
        discrimination=discrimination,
        uncertainty=uncertainty,
        bins=bins,
        note=_note(confidence, hits),
    )


@dataclass(frozen=True)
class Calibration:
    """Calibration of N predictions with U distinct confidences.

    Args:
        errors: rows "width", "mass", "class" (the kinds of `metrics.ece`, with `bins` bins) and "CORP" (the
            miscalibration below). Columns: value; low and high, a 95% bootstrap interval corrected for the resampling's
            own bias; perfect and perfect 95%, mean and quantile of a perfectly calibrated model on as many rows; p, how
            probable a value at least this high is for one.
        confidence: (U,) distinct values of the highest probability, ascending.
        recalibrated: (U,) the isotonic estimate of the accuracy there.
        low, high: (U,) where 95% of the curves of a perfectly calibrated model are, at each confidence.
        rows: (U,) with that confidence.
        brier: mean squared difference of confidence and hit, 0 to 1: miscalibration - discrimination + uncertainty. Not
            `metrics.brier`, which sums over classes.
        miscalibration: what recalibration would take off the Brier score.
        discrimination: what the recalibrated confidence is better than one constant.
        uncertainty: the Brier score of the accuracy as a constant confidence.
        bins: of the ECE.
        note: what the numbers cannot say, and why.
    """

    errors: pd.DataFrame
    confidence: np.ndarray
    recalibrated: np.ndarray
    low: np.ndarray
    high: np.ndarray
    rows: np.ndarray
    brier: float
    miscalibration: float
    discrimination: float
    uncertainty: float
    bins: int
    note: str = ""

    @property
    def outside(self) -> float:
        """Share of rows whose recalibrated accuracy is outside the band; about 0.05 where calibration is perfect."""
        out = (self.recalibrated < self.low - 1e-12) | (self.recalibrated > self.high + 1e-12)
        return float(self.rows[out].sum() / self.rows.sum())


def _perfect(forms, probs: np.ndarray, simulations: int, seed: int) -> tuple[pd.DataFrame, np.ndarray]:
    """Errors (simulations, forms) and CORP curves (simulations, U) of labels drawn from the probabilities."""
    generator = np.random.default_rng(seed)
    cumulated = probs.cumsum(-1)
    errors, curves = [], []
    for _ in range(simulations):
        # Scaled by the row's own sum, because rounding may leave it below 1.
        labels = (cumulated < generator.uniform(size=(len(probs), 1)) * cumulated[:, -1:]).sum(-1)
        errors.append({name: form(probs, labels) for name, form in forms.items()})
        curves.append(_corp(*_top(probs, labels))[3])
    return pd.DataFrame(errors), np.array(curves)


def _top(probs: np.ndarray, labels: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Confidence and hits of the top class, (N,) each."""
    probs, labels = metrics.as_array(probs, float), metrics.as_array(labels)
    return probs.max(-1), (probs.argmax(-1) == labels).astype(float)


def _corp(confidence: np.ndarray, hits: np.ndarray) -> tuple[float, float, float, np.ndarray]:
    """Miscalibration, discrimination, uncertainty, and the isotonic curve (U,) over distinct confidences."""
    from scipy.optimize import isotonic_regression

    _, group, counts = np.unique(confidence, return_inverse=True, return_counts=True)
    curve = isotonic_regression(np.bincount(group, weights=hits) / counts, weights=counts).x
    given, recalibrated, constant = (np.square(p - hits).mean() for p in (confidence, curve[group], hits.mean()))
    return float(given - recalibrated), float(constant - recalibrated), float(constant), curve


def _note(confidence: np.ndarray, hits: np.ndarray) -> str:
    if len(hits) == 1:
        return "one row: no interval says anything"
    if hits.min() == hits.max():
        return f"every row is {'right' if hits[0] else 'wrong'}: the curve is a constant, the intervals are too narrow"
    if len(np.unique(confidence)) == 1:
        return "every row has the same confidence: the curve is one point"
    return ""
