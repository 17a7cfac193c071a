"""The course of a fit."""

from __future__ import annotations

from ..diagnostics.training import Training
from .canvas import BLUE, GREEN, GREY, INK, ORANGE, canvas


def training_curves(result: Training):
    """ELBO per row with its likelihood part, KL, mean log sd and validation NLL, over steps.

    What the history lacks has no panel.

    Args:
        result: what diagnostics.training.training returned; an ensemble has a line per member.

    Returns:
        A matplotlib Figure with 2 to 4 panels.

    Raises:
        ValueError: no curve in the history.
    """
    curve = result.curve
    if curve.empty:
        raise ValueError(f"expected a posterior with an ELBO in its history, got none: {result.reason}")
    wanted = [name for name in ("mean_log_sd", "validation_nll") if curve[name].notna().any()]
    rows = 2 if wanted else 1
    figure, axes = canvas(6.4, 2.3 * rows + 0.2, rows, 2, sharex=True)
    panels = list(axes.flat)
    bound, penalty = ("log joint", "minus log prior") if result.log_joint else ("ELBO", "KL")
    for number, part in enumerate(part for _, part in curve.groupby("member")):
        label = lambda text, first=number == 0: text if first else None
        line = lambda axis, name, colour, text=None, data=part: axis.plot(
            data["step"], data[name], "o-", color=colour, markersize=2.5, linewidth=1.2, label=text
        )
        line(panels[0], "log_likelihood", GREY, label("log likelihood"))
        line(panels[0], "elbo", BLUE, label(bound))
        line(panels[1], "kl", ORANGE)
        for axis, name in zip(panels[2:], wanted, strict=False):
            line(axis, name, GREEN if name == "mean_log_sd" else BLUE)
    panels[0].legend(frameon=False, fontsize=8)
    panels[0].set_title(f"{bound} and log likelihood (nats per row)", fontsize=9)
    panels[1].set_title(f"{penalty} (nats)", fontsize=9)
    titles = {"mean_log_sd": "mean log sd", "validation_nll": "validation NLL (nats per row)"}
    for axis, name in zip(panels[2:], wanted, strict=False):
        axis.set_title(titles[name], fontsize=9)
        if name == "validation_nll" and result.best_epoch is not None and curve["member"].nunique() == 1:
            best = curve.loc[curve["epoch"] == result.best_epoch, "step"].iloc[0]
            axis.axvline(best, color=INK, linewidth=0.8, linestyle="--", label=f"best: epoch {result.best_epoch}")
            axis.legend(frameon=False, fontsize=8)
    for axis in panels:
        axis.ticklabel_format(axis="y", useOffset=False)
    used = 2 + len(wanted)
    for axis in panels[used:]:
        axis.remove()
    for axis in panels[max(0, used - 2) : used]:
        axis.set_xlabel("step", fontsize=9)
        axis.xaxis.get_major_locator().set_params(integer=True)
        axis.tick_params(labelbottom=True)
    return figure
