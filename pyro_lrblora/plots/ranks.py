"""Pictures of simulation-based calibration: rank histograms, and ECDFs with their simultaneous band."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from ..diagnostics.sbc import SBC
from ..diagnostics.uniformity import bin_edges
from .canvas import BLUE, GREY, INK, ORANGE, canvas

_PANELS = 12
_COLUMNS = 4


def rank_histograms(result: SBC, quantities: Sequence[str] | None = None):
    """A histogram of ranks per quantity, with the 95% interval that a bin of uniform ranks would have.

    Args:
        result: of diagnostics.sbc.
        quantities: which; None takes the log likelihood, then the 11 furthest from uniform.

    Returns:
        A matplotlib Figure.

    Raises:
        ValueError: no quantities, or unknown ones.
    """
    from scipy.stats import binom

    names = _chosen(result, quantities)
    columns = min(_COLUMNS, len(names))
    rows = -(-len(names) // columns)
    figure, axes = canvas(max(1.75 * columns, 3.5), 1.45 * rows + 0.5, rows, columns, sharex=True, sharey=True)
    edges = bin_edges(len(result.ranks), result.draws)
    share = np.diff(edges) / (result.draws + 1)
    low, high = (binom.ppf(level, len(result.ranks), share) for level in (0.025, 0.975))
    for axis, name in zip(axes.flat, names, strict=False):
        off = result.table.loc[name, "shape"] != "uniform"
        counts = np.histogram(result.ranks[name], edges)[0]
        axis.bar(edges[:-1], counts, np.diff(edges), align="edge", color=ORANGE if off else BLUE, alpha=0.8)
        axis.fill_between(edges, [*low, low[-1]], [*high, high[-1]], step="post", color=GREY, alpha=0.35, linewidth=0)
        shape = result.table.loc[name, "shape"].replace(", ", "\n")
        axis.set_title(f"{name}\n{shape}", fontsize=8, parse_math=False)
    for axis in axes.flat[len(names) :]:
        axis.set_axis_off()
    axes.flat[0].set_xlim(0, result.draws + 1)
    figure.supxlabel(f"rank of the truth among {result.draws} draws", fontsize=9, color=INK)
    figure.supylabel("simulations", fontsize=9, color=INK)
    return figure


def ecdf_differences(result: SBC, level: float = 0.95):
    """ECDF of the ranks minus that of uniform ranks, a line per quantity, and the band one quantity keeps to.

    Args:
        result: of diagnostics.sbc.
        level: probability with which uniform ranks stay inside the band everywhere.

    Returns:
        A matplotlib Figure.
    """
    test = result.ecdf_test
    figure, axes = canvas(5.5, 3.2)
    axis, share = axes.flat[0], test.share
    low, high = (limit - share for limit in test.band(level))
    axis.fill_between(share, low, high, color=GREY, alpha=0.3, linewidth=0, label=f"{level:.0%} band of uniform ranks")
    axis.axhline(0, color=GREY, linewidth=0.8)
    off = result.table["shape"] != "uniform"
    for group, color, label in ((~off, BLUE, "uniform"), (off, ORANGE, "not uniform")):
        for number, name in enumerate(result.table.index[group]):
            line = test.ecdf(result.ranks[name].to_numpy()) - share
            axis.plot(share, line, color=color, linewidth=0.9, alpha=0.7, label=None if number else label)
    for name in result.table[off]["adjusted p"].sort_values(kind="stable").index[:3]:
        line = test.ecdf(result.ranks[name].to_numpy()) - share
        place = int(np.abs(line).argmax())
        axis.annotate(
            name, (share[place], line[place]), xytext=(4, 2), textcoords="offset points", fontsize=8, color=INK
        )
    axis.set_xlim(0, 1)
    axis.set_xlabel("rank / (draws + 1)")
    axis.set_ylabel("ECDF minus uniform")
    axis.legend(frameon=False, fontsize=8, labelcolor=INK)
    return figure


def _chosen(result: SBC, quantities: Sequence[str] | None) -> list[str]:
    if quantities is None:
        worst = result.table.sort_values("adjusted p", kind="stable").index
        return ["log likelihood", *(name for name in worst if name != "log likelihood")][:_PANELS]
    unknown = [name for name in quantities if name not in result.ranks]
    if unknown or not quantities:
        raise ValueError(f"expected quantities among {list(result.ranks)}, got {list(quantities)}")
    return list(quantities)
