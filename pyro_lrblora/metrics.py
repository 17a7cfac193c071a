"""Scores of probabilistic classification: NLL, Brier, calibration, ranking and selection, bootstrap, temperature.

All raise a ValueError where labels are missing, shapes do not fit, or rows are not probabilities.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import torch
from scipy import optimize, special
from torch import Tensor

Array = np.ndarray | Tensor


def given(labels: Array | None) -> Array:
    """The labels; a ValueError where there are none."""
    if labels is None:
        raise ValueError("expected labels (N,), got None; predict on data that have a label column")
    return labels


def class_labels(labels: Array | None, count: int) -> np.ndarray:
    """The labels (N,) as integers; a ValueError where there are none, or one is none of 0 .. count - 1."""
    labels = as_array(given(labels))
    wrong = labels[~((labels >= 0) & (labels < count) & (labels == np.floor(labels)))]
    if len(wrong):
        raise ValueError(
            f"expected labels 0..{count - 1}, got {wrong[0]}; -1 marks rows without a label in many data sets: drop "
            "them, or the column of labels"
        )
    return labels.astype(int)


def as_array(values: Array, dtype: type | None = None) -> np.ndarray:
    """As numpy has it, from any device and with or without a graph."""
    return np.asarray(values.detach().cpu() if isinstance(values, Tensor) else values, dtype=dtype)


def check_probabilities(probs: np.ndarray) -> None:
    """Raise a ValueError unless the rows of probs (N, C) are probabilities."""
    if not np.all(np.abs(probs.sum(-1) - 1) < 1e-3) or probs.min() < -1e-6:
        raise ValueError("expected rows of probs to be probabilities that add up to 1; write logits.softmax(-1)")


def accuracy(probs: Array, labels: Array) -> float:
    """Share of rows whose most probable class is the label; probs (N, C), labels (N,)."""
    probs, labels = _check(probs, labels)
    return float((probs.argmax(-1) == labels).mean())


def nll(probs: Array, labels: Array) -> float:
    """Mean negative log likelihood in nats; probs (N, C), labels (N,). Zero probabilities count as 1e-30."""
    probs, labels = _check(probs, labels)
    return float(-np.log(np.maximum(probs[np.arange(len(labels)), labels], 1e-30)).mean())


def brier(probs: Array, labels: Array) -> float:
    """Mean squared distance to the one-hot label, between 0 and 2; probs (N, C), labels (N,) (Brier 1950)."""
    probs, labels = _check(probs, labels)
    return float((np.square(probs - np.eye(probs.shape[1])[labels]).sum(-1)).mean())


def ece(probs: Array, labels: Array, bins: int = 15, kind: str = "width") -> float:
    """Expected calibration error: mean absolute confidence - accuracy over bins, weighted by their rows.

    Args:
        probs: (N, C).
        labels: (N,).
        bins: how many; figures with different bins are not comparable.
        kind: "width" for bins of equal width in confidence (Guo et al. 2017), "mass" for bins of equal size, "class"
            for the mean over classes of the equal-width error of each class's own probability (Nixon et al. 2019).
    """
    probs, labels = _check(probs, labels)
    if kind == "class":
        # A class's bins follow those of the class before it, so that one count serves all classes.
        places = _bin_of(probs, bins, "width") + bins * np.arange(probs.shape[1])
        gaps = np.bincount(places.ravel(), weights=probs.ravel())
        hits = np.bincount(places[np.arange(len(labels)), labels], minlength=len(gaps))
        return float(np.abs(gaps - hits).sum() / probs.size)
    return _binned_error(probs.max(-1), (probs.argmax(-1) == labels).astype(float), bins, kind)


def crps_of_normals(loc: Array, scale: Array, labels: Array) -> np.ndarray:
    """Continuous ranked probability score of equal mixtures of S normals, (N,), in units of the labels; 0 is perfect.

    Args:
        loc: (S, N).
        scale: (S, N).
        labels: (N,).

    Source: Grimit et al. 2006 (doi 10.1256/qj.05.235), equation 5.
    """
    loc, scale, labels = (as_array(value, float) for value in (loc, scale, labels))
    if loc.shape != scale.shape or loc.ndim != 2 or labels.shape != loc.shape[1:]:
        raise ValueError(
            f"expected loc and scale (S, N) and labels (N,), got {loc.shape}, {scale.shape}, {labels.shape}"
        )
    total = _mean_distance(labels - loc, scale).mean(0)
    for one, spread in zip(loc, scale, strict=True):  # a draw at a time: S x S x N would be large
        total -= _mean_distance(loc - one, np.hypot(scale, spread)).mean(0) / (2 * len(loc))
    return total


def reliability(probs: Array, labels: Array, bins: int = 15) -> dict[str, np.ndarray]:
    """Confidence, accuracy and rows of each non-empty equal-width bin, for a reliability diagram."""
    probs, labels = _check(probs, labels)
    confidence, hits = probs.max(-1), (probs.argmax(-1) == labels).astype(float)
    places = _bin_of(confidence, bins, "width")
    used = [np.flatnonzero(places == b) for b in np.unique(places)]
    return {
        "confidence": np.array([confidence[rows].mean() for rows in used]),
        "accuracy": np.array([hits[rows].mean() for rows in used]),
        "rows": np.array([len(rows) for rows in used]),
    }


def selective_risk(probs: Array, labels: Array, confidence: Array | None = None) -> np.ndarray:
    """Share of wrong rows among the k most confident, (N,) for k = 1..N.

    Rows of equal confidence come in random order: the risk is its expectation over those orders.

    Args:
        probs: (N, C).
        labels: (N,).
        confidence: (N,), higher is surer; None is the highest probability.

    Raises:
        ValueError: a confidence that is not finite or not one number per row.
    """
    probs, labels = _check(probs, labels)
    confidence = probs.max(-1) if confidence is None else as_array(confidence, float)
    if confidence.shape != labels.shape or not np.isfinite(confidence).all():
        raise ValueError(f"expected confidence (N,) of finite numbers, N={len(labels)}, got {confidence.shape}")
    wrong = (probs.argmax(-1) != labels).astype(float)
    _, group, rows = np.unique(-confidence, return_inverse=True, return_counts=True)
    share = np.bincount(group, weights=wrong) / rows
    counts = np.arange(1, len(labels) + 1)
    return np.repeat(share, rows).cumsum() / counts


def aurc(probs: Array, labels: Array, confidence: Array | None = None) -> float:
    """Area under the risk-coverage curve, the mean of `selective_risk` (Geifman et al. 2019, arXiv 1805.08206).

    Args:
        probs: (N, C).
        labels: (N,).
        confidence: (N,), higher is surer; None is the highest probability.
    """
    return float(selective_risk(probs, labels, confidence).mean())


def auroc(scores: Array, positive: Array) -> float:
    """Probability that a positive row scores above a negative one, ties counting half (Mann-Whitney's U).

    Args:
        scores: (N,), higher speaks for positive.
        positive: (N,) bool, both kinds present.
    """
    from scipy.stats import rankdata

    scores, positive = _check_detection(scores, positive)
    hits = positive.sum()
    ranks = rankdata(scores)[positive].sum()
    return float((ranks - hits * (hits + 1) / 2) / (hits * (len(scores) - hits)))


def average_precision(scores: Array, positive: Array) -> float:
    """Area under the precision-recall curve (AUPR), as steps, without interpolation.

    Args:
        scores: (N,), higher speaks for positive.
        positive: (N,) bool, both kinds present; a score that says nothing reaches their share.
    """
    true, false = _detected(*_check_detection(scores, positive))
    return float((np.diff(true, prepend=0) * true / (true + false)).sum() / true[-1])


def false_positive_rate(scores: Array, positive: Array, recall: float = 0.95) -> float:
    """Share of negative rows above the highest threshold that finds `recall` of the positive ones (FPR at 95% TPR).

    Args:
        scores: (N,), higher speaks for positive.
        positive: (N,) bool, both kinds present.
        recall: share of the positive rows to find, above 0.
    """
    if not 0 < recall <= 1:
        raise ValueError(f"expected 0 < recall <= 1, got recall={recall}")
    true, false = _detected(*_check_detection(scores, positive))
    return float(false[np.argmax(true >= recall * true[-1])] / false[-1])


def standard_error(values: Array) -> float:
    """Of the mean of independent values (N,); NaN of one alone."""
    values = as_array(values, float)
    return float(values.std(ddof=1) / len(values) ** 0.5) if len(values) > 1 else float("nan")


def bootstrap(
    metric: Callable[[np.ndarray, np.ndarray], float],
    probs: Array,
    labels: Array,
    draws: int = 1000,
    level: float = 0.95,
    seed: int = 0,
) -> tuple[float, float]:
    """Percentile interval of a metric over resampled rows.

    Args:
        metric: any function of (probs, labels) here.
        probs: (N, C).
        labels: (N,).
        draws: resamples.
        level: of the interval, between 0 and 1.
        seed: of the resampling.
    """
    probs, labels = _check(probs, labels)
    if not 0 < level < 1 or draws < 1:
        raise ValueError(f"expected 0 < level < 1 and draws >= 1, got level={level}, draws={draws}")
    generator = np.random.default_rng(seed)
    rows = generator.integers(len(labels), size=(draws, len(labels)))
    values = [metric(probs[r], labels[r]) for r in rows]
    low, high = np.quantile(values, [(1 - level) / 2, (1 + level) / 2])
    return float(low), float(high)


def fit_temperature(log_probs: Array, labels: Array) -> float:
    """The temperature T > 0 that minimises the NLL of softmax(log_probs / T) (Guo et al. 2017).

    Args:
        log_probs: (N, C) of *validation* rows, never of the rows that are scored. Where all of them are right there is
            no best T, and what returns is as low as the search goes; see separable.
        labels: (N,).
    """
    scores, classes = _bounded(log_probs, labels)
    # Convex in 1 / T, so with one minimum in its logarithm; bounded, because on separable rows the best T is zero.
    loss = lambda log_inverse: float(torch.nn.functional.cross_entropy(scores * math.exp(log_inverse), classes))
    found = optimize.minimize_scalar(loss, bounds=(-5, 5), method="bounded", options={"xatol": 1e-6})
    return math.exp(-found.x)


def tempered_nll(log_probs: Array, labels: Array, temperature: float) -> float:
    """Mean NLL of softmax(log_probs / temperature) in nats, what fit_temperature minimises.

    Unlike `nll` it counts a tiny probability as it is: down to a log of -1e4, which stands for zero.

    Args:
        log_probs: (N, C).
        labels: (N,).
        temperature: T > 0.
    """
    scores, classes = _bounded(log_probs, labels)
    return float(torch.nn.functional.cross_entropy(scores / temperature, classes))


def _bounded(log_probs: Array, labels: Array) -> tuple[torch.Tensor, torch.Tensor]:
    """Log probabilities (N, C) and labels (N,) as tensors."""
    # Of a probability of zero the logarithm is as good as this one, and has no limits to multiply by.
    scores = torch.as_tensor(np.maximum(as_array(log_probs, float), -1e4))
    return scores, torch.as_tensor(class_labels(labels, scores.shape[-1]))


def separable(log_probs: Array, labels: Array) -> bool:
    """Whether every row is right: the likelihood then rises without end as the temperature falls, and none is best.

    Args:
        log_probs: (N, C).
        labels: (N,).
    """
    scores = as_array(log_probs, float)
    own = np.take_along_axis(scores, class_labels(labels, scores.shape[-1])[:, None], 1)
    return bool(((scores >= own).sum(-1) == 1).all())


def apply_temperature(log_probs: Array, temperature: float) -> np.ndarray:
    """softmax(log_probs / temperature), (N, C)."""
    return torch.softmax(torch.as_tensor(as_array(log_probs, float)) / temperature, -1).numpy()


def _binned_error(confidence: np.ndarray, hits: np.ndarray, bins: int, kind: str) -> float:
    places = _bin_of(confidence, bins, kind)
    if kind == "mass":
        # Rows of one confidence may lie in two bins, which hold them by chance: each has the mean of their hits.
        _, group = np.unique(confidence, return_inverse=True)
        hits = (np.bincount(group, weights=hits) / np.bincount(group))[group]
    gaps = np.bincount(places, weights=confidence - hits)
    return float(np.abs(gaps).sum() / len(confidence))


def _bin_of(confidence: np.ndarray, bins: int, kind: str) -> np.ndarray:
    if bins < 1:
        raise ValueError(f"expected bins >= 1, got bins={bins}")
    if kind == "width":
        # Right-closed bins, as in the reference implementations.
        return np.clip(np.ceil(confidence * bins).astype(int) - 1, 0, bins - 1)
    if kind == "mass":
        places = np.empty(len(confidence), dtype=int)
        places[np.argsort(confidence, kind="stable")] = np.arange(len(confidence)) * bins // len(confidence)
        return places
    raise ValueError(f"expected kind='width', 'mass' or 'class', got kind={kind!r}")


def _detected(scores: np.ndarray, positive: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Positive and negative rows at or above each distinct score, from the highest down."""
    _, group = np.unique(-scores, return_inverse=True)
    return np.bincount(group, weights=positive).cumsum(), np.bincount(group, weights=~positive).cumsum()


def _check_detection(scores: Array, positive: Array) -> tuple[np.ndarray, np.ndarray]:
    scores, positive = as_array(scores, float), as_array(positive).astype(bool)
    if scores.ndim != 1 or scores.shape != positive.shape or np.isnan(scores).any():
        raise ValueError(f"expected scores (N,) without NaN and positive (N,), got {scores.shape}, {positive.shape}")
    if positive.all() or not positive.any():
        raise ValueError(f"expected positive and negative rows, got {positive.sum()} positive of {len(positive)}")
    return scores, positive


def _mean_distance(mean: np.ndarray, sd: np.ndarray) -> np.ndarray:
    """E|X| of X normal."""
    z = mean / sd
    return mean * (2 * special.ndtr(z) - 1) + 2 * sd * np.exp(-(z**2) / 2) / np.sqrt(2 * np.pi)


def _check(probs: Array, labels: Array) -> tuple[np.ndarray, np.ndarray]:
    probs, labels = as_array(probs, float), as_array(given(labels))
    if probs.ndim != 2 or labels.shape != probs.shape[:1] or len(labels) == 0:
        raise ValueError(f"expected probs (N, C) and labels (N,) with N >= 1, got {probs.shape} and {labels.shape}")
    check_probabilities(probs)
    return probs, class_labels(labels, probs.shape[1])
