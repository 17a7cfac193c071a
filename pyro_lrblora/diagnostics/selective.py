"""If the model may abstain on the rows it is least sure of, how often is it wrong on the rest?"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from .. import metrics
from ..metrics import Array


def risk_coverage(probs: Array, labels: Array, confidence: Array | None = None) -> RiskCoverage:
    """Error rate among the most confident rows, for every share of rows answered.

    Args:
        probs: (N, C).
        labels: (N,).
        confidence: (N,), higher is surer, such as the negative mutual information; None is the highest probability.

    Raises:
        ValueError: no labels, probs that are no probabilities, a confidence that is not finite or not (N,).
    """
    risk = metrics.selective_risk(probs, labels, confidence)
    rows = len(risk)
    counts = np.arange(1, rows + 1)
    right = round(rows * (1 - risk[-1]))
    values = metrics.as_array(probs).max(-1) if confidence is None else metrics.as_array(confidence)
    same = rows > 1 and len(np.unique(values)) == 1
    return RiskCoverage(
        coverage=counts / rows,
        risk=risk,
        oracle=np.maximum(counts - right, 0) / counts,
        note="every row has the same confidence: nothing to select by" if same else "",
    )


@dataclass(frozen=True)
class RiskCoverage:
    """The risk-coverage curve (Geifman & El-Yaniv 2017, arXiv 1705.08500) with the best one at the same accuracy.

    Args:
        coverage: (N,) share of rows answered, 1/N to 1.
        risk: (N,) share of wrong rows among them.
        oracle: (N,) the same where every right row is answered before any wrong one.
        note: what the curve cannot say, and why.
    """

    coverage: np.ndarray
    risk: np.ndarray
    oracle: np.ndarray
    note: str = ""

    @property
    def aurc(self) -> float:
        """Area under the curve, a probability; lower is better. `metrics.aurc` is the same number."""
        return float(self.risk.mean())

    @property
    def excess(self) -> float:
        """E-AURC, what a wrong order of the rows loses, at any accuracy (Geifman et al. 2019, arXiv 1805.08206).

        The oracle's area is exact, not its approximation for many rows.
        """
        return float((self.risk - self.oracle).mean())

    def risk_at(self, coverage: float) -> float:
        """Error rate when this share of rows, rounded up to whole ones, is answered."""
        if not 0 < coverage <= 1:
            raise ValueError(f"expected 0 < coverage <= 1, got coverage={coverage}")
        return float(self.risk[np.searchsorted(self.coverage, coverage - 1e-12)])
