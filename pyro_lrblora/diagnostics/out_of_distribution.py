"""Does the uncertainty rise on data that the model was not made for?"""

from __future__ import annotations

import numpy as np
import pandas as pd

from .. import metrics
from ..predictions import Prediction
from .uncertainty import decompose

_NEEDS_DRAWS = ["mutual information", "disagreement"]


def out_of_distribution(inside: Prediction, outside: Prediction) -> pd.DataFrame:
    """How well each measure of uncertainty tells rows of other data from rows of the model's own.

    Args:
        inside: a prediction for rows like those that were fitted, logits (S, N, C); labels are not used.
        outside: one by the same posterior for other rows, logits (S, M, C).

    Returns:
        Rows of entropy, mutual information, disagreement, max probability (its negative). Columns of AUROC (0.5 is
        chance) with DeLong's standard error (DeLong et al. 1988); AUPR, rows from outside being the positive ones, and
        what chance reaches, their share; FPR95, the share of inside rows flagged by the threshold that finds 95% of
        those from outside (Hendrycks & Gimpel 2017, arXiv 1610.02136). NaN where one draw has nothing to say, with the
        reason in attrs["notes"].

    Raises:
        ValueError: predictions with different numbers of draws or classes.
    """
    if inside.logits.shape[::2] != outside.logits.shape[::2]:
        raise ValueError(
            f"expected two predictions with the same draws and classes (S, C), got {tuple(inside.logits.shape[::2])} "
            f"and {tuple(outside.logits.shape[::2])}; write predict(posterior, ..., draws=S) with one S for both"
        )
    parts = [decompose(prediction) for prediction in (inside, outside)]
    scores = {
        "entropy": np.concatenate([part.entropy for part in parts]),
        "mutual information": np.concatenate([part.mutual_information for part in parts]),
        "disagreement": np.concatenate([part.disagreement for part in parts]),
        "max probability": -np.concatenate([part.max_probability for part in parts]),
    }
    other = np.repeat([False, True], [len(part.entropy) for part in parts])
    point = len(inside.logits) == 1
    table = pd.DataFrame.from_dict(
        {
            name: {
                "AUROC": metrics.auroc(score, other),
                "AUROC SE": _delong(score, other),
                "AUPR": metrics.average_precision(score, other),
                "AUPR of chance": other.mean(),
                "FPR95": metrics.false_positive_rate(score, other, 0.95),
            }
            for name, score in scores.items()
        },
        orient="index",
    )
    if point:
        table.loc[_NEEDS_DRAWS, ["AUROC", "AUROC SE", "AUPR", "FPR95"]] = np.nan
    table.attrs["notes"] = ["one draw: no mutual information and no disagreement"] if point else []
    return table


def _delong(scores: np.ndarray, positive: np.ndarray) -> float:
    """Standard error of the AUROC over rows of both kinds; NaN with fewer than two of either."""
    from scipy.stats import rankdata

    if min(positive.sum(), (~positive).sum()) < 2:
        return float("nan")
    ranks = rankdata(scores)
    variance = 0.0
    for kind in (positive, ~positive):
        # How many rows of the other kind each row exceeds: its rank among all less its rank among its own.
        share = (ranks[kind] - rankdata(scores[kind])) / (~kind).sum()
        variance += share.var(ddof=1) / kind.sum()
    return float(np.sqrt(variance))
