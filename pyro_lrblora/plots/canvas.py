"""The sheet that every picture here is drawn on. Matplotlib is imported when one is drawn."""

from __future__ import annotations

INK = "#333333"  # text and axes; the report replaces it by the page's own colour
BLUE, ORANGE, GREEN, GREY = "#3a7ebf", "#d9822b", "#5b9a4a", "#8f9499"  # readable on white and on black


def canvas(width: float, height: float, rows: int = 1, columns: int = 1, **options):
    """A Figure and its axes (rows, columns), without upper and right spines, all lines and text in INK.

    Args:
        width, height: inches.
        rows, columns: of axes.
        options: of Figure.subplots.
    """
    from matplotlib import rc_context
    from matplotlib.figure import Figure

    inked = dict.fromkeys(
        ("text.color", "axes.labelcolor", "axes.edgecolor", "xtick.color", "ytick.color", "axes.titlecolor"), INK
    )
    with rc_context(inked | {"axes.spines.top": False, "axes.spines.right": False}):
        figure = Figure(figsize=(width, height), layout="constrained")
        axes = figure.subplots(rows, columns, squeeze=False, **options)
    for each in axes.flat:
        each.tick_params(labelsize=8)
        each.xaxis.label.set_size(9)
        each.yaxis.label.set_size(9)
        each.title.set_size(9)
    return figure, axes
