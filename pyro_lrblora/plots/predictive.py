"""Where predictions are unsure, and what that is worth."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from ..diagnostics.draws_sweep import DrawsSweep
from ..diagnostics.intervals import Intervals
from ..diagnostics.selective import RiskCoverage
from ..diagnostics.uncertainty import Uncertainty
from .canvas import BLUE, GREEN, GREY, ORANGE, canvas


def entropy_parts(result: Uncertainty):
    """Aleatoric against epistemic part of every row's entropy, wrong rows in another colour.

    Args:
        result: of diagnostics.uncertainty.decompose.

    Returns:
        A matplotlib Figure.
    """
    figure, ((axis,),) = canvas(5.2, 3.2)
    kinds = [("rows", slice(None), BLUE, "o")]
    if result.right is not None:
        kinds = [("right", result.right, BLUE, "o"), ("wrong", ~result.right, ORANGE, "^")]
    for name, rows, colour, marker in kinds:
        axis.plot(
            result.expected_entropy[rows], result.mutual_information[rows], marker, color=colour, markersize=3,
            alpha=0.6, linestyle="none", label=name,
        )  # fmt: skip
    axis.set_xlabel("aleatoric: expected entropy (nats)")
    axis.set_ylabel("epistemic: mutual information (nats)")
    axis.legend(frameon=False, fontsize=8)
    return figure


def risk_coverage(curves: Mapping[str, RiskCoverage]):
    """Error rate on the surest rows, by the share of rows answered, with the best order as a dashed line.

    Args:
        curves: name -> result of diagnostics.selective.risk_coverage.

    Returns:
        A matplotlib Figure.
    """
    figure, ((axis,),) = canvas(5.2, 3.2)
    for (name, curve), colour in zip(curves.items(), 9 * [BLUE, ORANGE, GREEN, GREY], strict=False):
        axis.plot(curve.coverage, curve.risk, color=colour, linewidth=1.5, label=f"{name}, AURC {curve.aurc:.3f}")
        axis.plot(curve.coverage, curve.oracle, color=colour, linewidth=1, linestyle="--")
    axis.set_xlabel("coverage: share of rows answered, the surest first")
    axis.set_ylabel("risk: share of them wrong")
    axis.set_ylim(bottom=0)
    for text in axis.legend(frameon=False, fontsize=8).get_texts():
        text.set_parse_math(False)
    return figure


def draws_needed(result: DrawsSweep):
    """NLL by the number of draws, with its Monte Carlo error.

    Args:
        result: of diagnostics.draws_sweep.

    Returns:
        A matplotlib Figure.
    """
    figure, ((axis,),) = canvas(5.2, 2.8)
    table = result.table
    axis.axhspan(result.full - result.tolerance, result.full + result.tolerance, color=GREY, alpha=0.25, linewidth=0)
    axis.errorbar(
        table.index, table["NLL"], yerr=table["NLL SE"].fillna(0), fmt="o-", color=BLUE, markersize=4, capsize=2
    )
    axis.set_xscale("log", base=2)
    axis.set_xticks(list(table.index), [str(size) for size in table.index])
    axis.set_xlabel("draws")
    axis.set_ylabel("NLL (nats per row)")
    return figure


def pit_histogram(result: Intervals, bins: int = 10):
    """Predictive probability below each label, with the 95% interval that a bar has where the predictions are right.

    Args:
        result: of diagnostics.intervals.
        bins: of equal width.

    Returns:
        A matplotlib Figure.
    """
    from scipy.stats import binom

    figure, ((axis,),) = canvas(5.2, 2.8)
    counts, edges = np.histogram(result.pit, bins, (0, 1))
    low, high = binom.interval(0.95, len(result.pit), 1 / bins)
    axis.bar(edges[:-1], counts, np.diff(edges), align="edge", color=BLUE, alpha=0.8)
    axis.axhspan(low, high, color=GREY, alpha=0.35, linewidth=0)
    axis.set_xlim(0, 1)
    axis.set_xlabel("predictive probability below the label")
    axis.set_ylabel("rows")
    return figure
