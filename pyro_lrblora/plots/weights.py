"""Importance weights: the tail of the joint ones, and the k-hat of every row's."""

from __future__ import annotations

import math

import numpy as np

from ..evidence import LOO, Importance
from .canvas import BLUE, GREY, INK, ORANGE, canvas

_LOWEST = 1e-8  # share of all weight: what is below cannot matter


def weight_tail(pieces: Importance):
    """Every draw's share of the joint weight in descending order, with the slope that k-hat says the tail has.

    Args:
        pieces: what `importance` returned.

    Returns:
        A matplotlib Figure, both axes logarithmic, where a Pareto tail is a line, its slope minus k-hat.
    """
    share = pieces.log_weights.softmax(0).sort(descending=True).values.numpy()
    draws, k_hat, seen = len(share), pieces.k_hat, share[share > _LOWEST]
    rank, hidden = np.arange(1, len(seen) + 1), draws - len(seen)
    figure, ((axes,),) = canvas(5, 3.3)
    label = "draws" + (f" ({hidden} below {_LOWEST:g} left out)" if hidden else "")
    axes.loglog(rank, seen, "o", color=BLUE, markersize=3, label=label)
    axes.axhline(1 / draws, color=GREY, linewidth=1, linestyle="--", label="equal weights")
    tail = min(math.ceil(min(draws / 5, 3 * draws**0.5)), len(seen))  # the draws that k-hat is fitted to
    if k_hat > 0 and tail > 1:
        height = np.exp(np.mean(np.log(seen[:tail]) + k_hat * np.log(rank[:tail])))
        axes.loglog(
            rank[:tail],
            height * rank[:tail] ** -k_hat,
            color=ORANGE,
            linewidth=1.5,
            label=f"Pareto tail, k-hat {k_hat:.2f}",
        )
    axes.set_xlim(0.8, 1.3 * draws)
    axes.set_ylim(seen.min() / 2, 2)
    axes.set_xlabel("rank of the weight")
    axes.set_ylabel("share of all weight")
    known = "unknown" if math.isnan(k_hat) else f"{k_hat:.2f}"
    axes.set_title(
        f"k-hat {known} (limit {pieces.threshold:.2f}); {draws} draws are worth {pieces.effective_draws:.1f}, "
        f"the largest has {pieces.largest_share:.0%}",
        fontsize=9,
    )
    axes.legend(frameon=False, fontsize=8)
    return figure


def loo_k_hat(loo: LOO):
    """The k-hat of every row's leave-one-out weights, those above the limit marked.

    Args:
        loo: what `psis_loo` returned.

    Returns:
        A matplotlib Figure.
    """
    k_hat, rows = loo.k_hat.numpy(), np.arange(len(loo.k_hat))
    known = ~np.isnan(k_hat)
    high = known & (k_hat > loo.threshold)
    figure, ((axes,),) = canvas(5.5, 3.3)
    for where, color, label in ((known & ~high, BLUE, "reliable"), (high, ORANGE, "above the limit")):
        axes.plot(rows[where], k_hat[where], "o", color=color, markersize=3, label=f"{label} ({where.sum()})")
    if not math.isnan(loo.threshold):
        axes.axhline(loo.threshold, color=INK, linewidth=1, linestyle="--")
    axes.set_xlabel("row")
    axes.set_ylabel("k-hat of the leave-one-out weights")
    axes.set_title(
        f"limit {loo.threshold:.2f} for {loo.draws} draws"
        + (f"; unknown for {(~known).sum()} of {len(rows)} rows" if not known.all() else ""),
        fontsize=9, loc="left",
    )  # fmt: skip
    axes.legend(frameon=False, fontsize=8, ncols=2, loc="lower right", bbox_to_anchor=(1, 1))
    return figure
