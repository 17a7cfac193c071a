"""Are ranks uniform on 0..S: a chi-squared test, and the ECDF with a simultaneous band."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

_NULL = 20_000  # simulated data sets of uniform ranks
_POINTS = 100  # at most so many places where an ECDF is looked at


def chi_squared(ranks: np.ndarray, draws: int) -> float:
    """P-value (probability) of Pearson's chi-squared test that ranks are uniform, in the bins of `bin_edges`.

    Args:
        ranks: (n,) integers 0..draws.
        draws: S.
    """
    from scipy.stats import chisquare

    edges = bin_edges(len(ranks), draws)
    expected = len(ranks) * np.diff(edges) / (draws + 1)
    return float(chisquare(np.histogram(ranks, edges)[0], expected).pvalue)


def bin_edges(n: int, draws: int) -> np.ndarray:
    """Edges of about equal bins of the ranks 0..draws: at most 20, with 5 expected ranks or more in each where n >= 10.

    Returns:
        (bins + 1,), from 0 to draws + 1; a bin holds the ranks from its left edge up to below its right one.
    """
    bins = min(max(2, min(20, n // 5)), draws + 1)
    return np.linspace(0, draws + 1, bins + 1).round().astype(int)


@dataclass(frozen=True)
class EcdfTest:
    """The ECDF of n ranks against its simultaneous band (Saeilynoja et al. 2022, arXiv 2103.10522, section 2).

    The statistic is the least two-sided binomial tail of the ECDF over all places; its distribution is simulated.

    Args:
        draws: S.
        thresholds: (K,) the places: how many of the n ranks are below each of these.
        tails: (K, n + 1) two-sided binomial tail of every such count.
        null: (M,) sorted statistics of uniform ranks.
    """

    draws: int
    thresholds: np.ndarray
    tails: np.ndarray
    null: np.ndarray

    @classmethod
    def of(cls, n: int, draws: int, simulated: int = _NULL) -> EcdfTest:
        """The test for n ranks on 0..draws; the same numbers at every call."""
        from scipy.stats import binom

        thresholds = np.unique(np.linspace(1, draws, min(draws, _POINTS)).round().astype(int))
        share = (thresholds / (draws + 1))[:, None]
        counts = np.arange(n + 1)
        tails = np.minimum(1.0, 2 * np.minimum(binom.cdf(counts, n, share), binom.sf(counts - 1, n, share)))
        steps = np.diff(thresholds, prepend=0, append=draws + 1) / (draws + 1)
        below = np.random.default_rng(0).multinomial(n, steps, size=simulated)[:, :-1].cumsum(1)
        null = tails[np.arange(len(thresholds)), below].min(1)
        return cls(draws, thresholds, tails, np.sort(null))

    @property
    def share(self) -> np.ndarray:
        """(K,) what the ECDF of uniform ranks is in expectation."""
        return self.thresholds / (self.draws + 1)

    def ecdf(self, ranks: np.ndarray) -> np.ndarray:
        """(K,) share of the ranks below each threshold."""
        return self._below(ranks) / len(ranks)

    def p_value(self, ranks: np.ndarray) -> float:
        """Probability of an ECDF this far out anywhere, at least 1 / (M + 1).

        Args:
            ranks: (n,) integers 0..draws.
        """
        statistic = self.tails[np.arange(len(self.thresholds)), self._below(ranks)].min()
        return float((1 + np.searchsorted(self.null, statistic, side="right")) / (len(self.null) + 1))

    def band(self, level: float = 0.95) -> tuple[np.ndarray, np.ndarray]:
        """Lower and upper limit (K,) of the ECDF, kept everywhere by uniform ranks with probability `level` or more."""
        values, counts = np.unique(self.null, return_counts=True)
        outside = values[counts.cumsum() <= (1 - level) * len(self.null)]
        inside = self.tails > (outside[-1] if len(outside) else 0.0)
        n = self.tails.shape[1] - 1
        return inside.argmax(1) / n, (n - inside[:, ::-1].argmax(1)) / n

    def _below(self, ranks: np.ndarray) -> np.ndarray:
        return np.searchsorted(np.sort(ranks), self.thresholds, side="left")


def bias_and_width(ranks: np.ndarray, draws: int) -> tuple[float, float]:
    """How many standard errors the ranks' mean and variance are above those of uniform ranks.

    Args:
        ranks: (n,) integers 0..draws.
        draws: S.
    """
    n = len(ranks)
    every = (np.arange(draws + 1) + 0.5) / (draws + 1) - 0.5
    seen = (np.asarray(ranks) + 0.5) / (draws + 1) - 0.5
    variance, fourth = (every**2).mean(), (every**4).mean()
    width = seen.var(ddof=1) if n > 1 else variance
    spread = ((fourth - variance**2) / n) ** 0.5
    # Of two ranks only, 0 and 1, the square has no spread.
    return float(seen.mean() / (variance / n) ** 0.5), float((width - variance) / spread) if spread else 0.0


def holm(p_values: np.ndarray) -> np.ndarray:
    """P-values (m,) adjusted for being m tests, whatever their dependence (Holm 1979)."""
    order = np.argsort(p_values)
    steps = (len(order) - np.arange(len(order))) * np.asarray(p_values)[order]
    adjusted = np.empty(len(order))
    adjusted[order] = np.maximum.accumulate(steps).clip(max=1.0)
    return adjusted
