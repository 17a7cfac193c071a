"""The reliability diagram."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from .. import metrics
from ..predictions import Prediction
from .canvas import BLUE, GREY, INK, canvas


def reliability_diagram(predictions: Mapping[str, Prediction], bins: int = 10):
    """Accuracy against confidence, a panel per prediction, with 95% Wilson intervals and the rows of each bin below.

    Args:
        predictions: title -> prediction with labels.
        bins: equal-width bins of the confidence.

    Returns:
        A matplotlib Figure; write it with figure.savefig(path).
    """
    if not predictions:
        raise ValueError("expected at least one prediction, got none")
    width = 2.7 * len(predictions) + 0.5
    figure, (upper, lower) = canvas(width, 3.9, 2, len(predictions), sharex=True, height_ratios=[3, 1])
    for top, bottom, (title, prediction) in zip(upper, lower, predictions.items(), strict=True):
        floor = 1 / prediction.probs.shape[-1]
        curve = metrics.reliability(prediction.probs, prediction.labels, bins)
        low, high = _wilson(curve["accuracy"], curve["rows"])
        top.plot([floor, 1], [floor, 1], color=GREY, linewidth=1, linestyle="--", label="perfect")
        top.errorbar(
            curve["confidence"], curve["accuracy"], yerr=[curve["accuracy"] - low, high - curve["accuracy"]],
            fmt="o-", color=BLUE, markersize=4, linewidth=1.5, capsize=2,
        )  # fmt: skip
        error = metrics.ece(prediction.probs, prediction.labels, bins)
        top.set_title(f"{title}\nECE {error:.3f} ({bins} bins)", fontsize=9, parse_math=False)
        bottom.bar(curve["confidence"], curve["rows"], width=0.7 * (1 - floor) / bins, color=GREY)
        top.set_ylim(0, 1.02)
        bottom.set_xlim(floor - 0.03, 1.03)
    upper[0].set_ylabel("accuracy")
    lower[0].set_ylabel("rows")
    figure.supxlabel("confidence", fontsize=9, color=INK)
    return figure


def _wilson(share: np.ndarray, rows: np.ndarray, z: float = 1.96) -> tuple[np.ndarray, np.ndarray]:
    """Wilson's interval of a share seen in so many rows (Wilson 1927)."""
    centre = (share + z**2 / (2 * rows)) / (1 + z**2 / rows)
    half = z / (1 + z**2 / rows) * np.sqrt(share * (1 - share) / rows + z**2 / (4 * rows**2))
    return np.minimum(centre - half, share), np.maximum(centre + half, share)
