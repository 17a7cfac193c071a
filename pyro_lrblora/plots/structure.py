"""The covariance of a posterior: its spectrum, what its modules learned, and how they hang together."""

from __future__ import annotations

import numpy as np

from ..diagnostics.structure import Structure
from .canvas import BLUE, GREY, ORANGE, canvas

_LABELS = 40  # modules, above which only some are named


def spectrum(result: Structure):
    """Eigenvalues of the covariance of the latents, in the prior's units, and of W - W0; effective rank as a line.

    Args:
        result: of diagnostics.structure.

    Returns:
        A matplotlib Figure.
    """
    figure, ((left, right),) = canvas(7, 2.8, 1, 2)
    for axis, title in ((left, "covariance of the latents, prior = 1"), (right, "covariance of W - W0")):
        axis.set_title(title, fontsize=9)
        axis.set_xlabel("eigenvalue number")
        axis.set_xscale("log")
    for axis, values in ((left, result.whitened), (right, result.induced)):
        values = values[values > 1e-12 * max(values.max(initial=0), 1e-300)]
        if len(values) and values.max() > 0:
            axis.plot(np.arange(1, len(values) + 1), values, "o-", color=BLUE, markersize=3, linewidth=1)
            axis.set_yscale("log")
            axis.tick_params(which="both", labelsize=8)
    left.axhline(1, color=GREY, linewidth=1, linestyle="--")
    if np.isfinite(result.whitened_effective_rank):
        left.axvline(result.whitened_effective_rank, color=ORANGE, linewidth=1)
        left.annotate(
            f"effective rank {result.whitened_effective_rank:.1f}", (result.whitened_effective_rank, 0.03), fontsize=8,
            color=ORANGE,
            xycoords=("data", "axes fraction"), xytext=(-4, 0), textcoords="offset points", ha="right",
        )  # fmt: skip
    return figure


def modules(result: Structure):
    """Contraction of every module from the prior, as bars.

    Args:
        result: of diagnostics.structure.

    Returns:
        A matplotlib Figure.
    """
    table = result.modules
    figure, ((axis,),) = canvas(7, 0.8 + 0.18 * min(len(table), _LABELS))
    places = np.arange(len(table))
    axis.barh(places, table["contraction"], color=BLUE, height=0.7)
    axis.set_yticks(*_named(table.index))
    axis.set_ylim(len(table) - 0.4, -0.6)
    axis.set_xlim(min(0.0, 1.1 * table["contraction"].min()), 1)
    axis.set_xlabel("contraction: 0 is the prior, 1 a point")
    return figure


def correlation(result: Structure):
    """RV coefficients between modules, as a heat map.

    Args:
        result: of diagnostics.structure.

    Returns:
        A matplotlib Figure.
    """
    from matplotlib.colors import LinearSegmentedColormap

    values = result.correlation.to_numpy().copy()
    np.fill_diagonal(values, np.nan)
    size = 2.6 + 0.16 * min(len(values), _LABELS)
    figure, ((axis,),) = canvas(size + 1.6, size)
    shades = LinearSegmentedColormap.from_list("blues", [BLUE + "11", BLUE])
    top = max(np.nanmax(values, initial=0.01), 0.01)
    image = axis.imshow(values, cmap=shades, vmin=0, vmax=top, aspect="equal")
    axis.set_yticks(*_named(result.correlation.index))
    axis.set_xticks(_named(result.correlation.index)[0], _named(result.correlation.index)[1], rotation=90)
    axis.tick_params(labelsize=6)
    bar = figure.colorbar(image, ax=axis, shrink=0.7)
    bar.ax.tick_params(labelsize=8)
    bar.set_label("RV coefficient", fontsize=8)
    return figure


def _named(index) -> tuple[np.ndarray, list[str]]:
    """Which modules are named, and their names without the parts that all of them begin with."""
    places = np.arange(0, len(index), -(-len(index) // _LABELS))
    names = [str(name).split(".") for name in index]
    shared = 0
    while len(names) > 1 and len({tuple(name[: shared + 1]) for name in names}) == 1:
        shared += 1
    return places, [".".join(names[place][shared:]) for place in places]
