"""Was the fit long enough: the ELBO's slope at its end, the scales' drift, and the validation NLL."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

import numpy as np
import pandas as pd

from ..infer.chains import R_HAT
from ..infer.progress import DRIFT, multiplier
from ..posterior import Posterior

BROKEN, FALLS, TRAIN_LONGER, OVERFITTED = "not finite", "falls", "train longer", "overfitted"
CANNOT_TELL, CONVERGED, APART = "cannot tell", "converged", "chains apart"

_EPOCHS = 4  # fewer have no noise to measure a slope against
_COLUMNS = ("elbo", "kl", "log_likelihood", "mean_log_sd", "validation_nll")


def training(posterior: Posterior, tolerance: float = 0.01) -> Training:
    """Whether a fit should have gone on, from the history it left.

    Everything is measured against the learning rate spent, in epochs at the full rate: a decaying schedule makes any
    curve look flat at its end. The ELBO per row rises where a line through the last quarter of the rate spent (at least
    4 epochs) gains more than `tolerance` per epoch and more than the one-sided 95% error of its slope. It is flat where
    the line gains less, and the upper end of that interval is below 5 x tolerance; in between the noise hides it. It
    falls where the line loses more than both. (A relative change, as Kucukelbir et al. 2017, arXiv 1603.00788, stop at,
    depends on an arbitrary zero, and without the noise it stops too soon: Dhaka et al. 2020, arXiv 2009.00666.) The
    scales have converged where the mean log sd drifts by less than `infer.progress.DRIFT`. A fit is overfitted where
    the mean validation NLL of its last (up to three) epochs is above that of the best by more than `tolerance` and 4
    times the curve's own noise.

    Args:
        posterior: what a fit returned; of an ensemble the worst member counts.
        tolerance: nats per row.

    Raises:
        ValueError: tolerance <= 0.
    """
    if not tolerance > 0:
        raise ValueError(f"expected tolerance > 0 nats per row, got {tolerance!r}")
    settings = posterior.settings.get("member", posterior.settings)
    joint = not posterior.has_bound or settings.get("method", "svi") != "svi"
    empty = pd.DataFrame(columns=["member", "epoch", "step", "spent", *_COLUMNS])
    result = Training(empty, CANNOT_TELL, "", "", np.nan, np.nan, np.nan, None, joint, "")
    if not any("elbo" in row for row in posterior.history):
        return replace(result, **_without_curve(posterior))
    fitted = settings.get("point fit", settings)  # of whom the history is
    curve, notes = _curve(posterior.history, fitted)
    if settings.get("method", "svi") != "svi":
        notes.append(f"the curve is of the point fit that {settings['method']} was built on")
    judged = {
        member: _judge(replace(result, curve=part), fitted, tolerance) for member, part in curve.groupby("member")
    }
    order = (BROKEN, FALLS, TRAIN_LONGER, OVERFITTED, CANNOT_TELL, CONVERGED)
    member = min(judged, key=lambda name: [judged[name].verdict.startswith(each) for each in order].index(True))
    worst, which = judged[member], f"member {member}: " if len(judged) > 1 else ""
    note = "; ".join([*notes, *filter(None, [worst.note])])
    return replace(worst, curve=curve, reason=which + worst.reason, note=note)


@dataclass(frozen=True)
class Training:
    """What a fit's history says about its end.

    Args:
        curve: a row per epoch (and member): step; spent, epochs at the full learning rate so far; elbo and
            log_likelihood, nats per row; kl, nats; mean_log_sd; validation_nll, nats per row; NaN where not recorded.
        verdict: "not finite", "falls", "train longer", "overfitted since epoch k", "chains apart", "cannot tell" or
            "converged".
        reason: in words, with the numbers.
        advice: what to do.
        gain: slope of the ELBO at the end, nats per row and epoch at the full rate; NaN where unknown.
        gain_error: half the width of its one-sided 95% interval.
        drift: of the mean log sd at the end, per epoch at the full rate; NaN where unknown.
        best_epoch: of the validation NLL; None without validation rows.
        log_joint: the curve is of a point's log joint, and its "kl" is minus the log prior.
        note: what could not be computed, and why.
    """

    curve: pd.DataFrame
    verdict: str
    reason: str
    advice: str
    gain: float
    gain_error: float
    drift: float
    best_epoch: int | None
    log_joint: bool
    note: str


def _without_curve(posterior: Posterior) -> dict[str, str]:
    settings = posterior.settings
    method = settings.get("method", "this posterior")
    if "r_hat" in settings:
        converged = settings["r_hat"] <= R_HAT
        reason = (
            f"the largest R-hat of the chains is {settings['r_hat']:.3f}, {R_HAT:g} or less being converged, their "
            f"smallest ESS {settings['ess']:.0f}"
        )
        advice = "nothing" if converged else f"draw longer chains until R-hat is below {R_HAT:g}"
        verdict = CONVERGED if converged else APART
        return {"verdict": verdict, "reason": reason, "advice": advice, "note": "chains have no ELBO, and so no curve"}
    reason = f"{method} left no ELBO in the history"
    return {"reason": reason, "advice": "judge the posterior by its predictions", "note": "no ELBO curve"}


def _curve(history: list[dict], settings: Mapping) -> tuple[pd.DataFrame, list[str]]:
    rows = pd.DataFrame([row for row in history if "elbo" in row])
    curve = rows.reindex(columns=["member", "epoch", "step", *_COLUMNS])
    curve[list(_COLUMNS)] = curve[list(_COLUMNS)].astype(float)
    curve["member"] = 0 if "member" not in rows else curve["member"].astype(int)
    notes = []
    if not {"schedule", "warmup", "epochs"} <= settings.keys():
        notes.append("the schedule of the learning rate is unknown: every epoch counts as one at the full rate")
    spent = [_spent(part["step"].to_numpy(), settings) for _, part in curve.groupby("member")]
    curve.insert(3, "spent", np.concatenate(spent))
    if curve["mean_log_sd"].isna().all():
        notes.append("no scales to watch: the guide has none, or no closed form of them")
    if curve["validation_nll"].isna().all():
        notes.append("no validation rows: overfitting was not checked; write fit(..., validation=)")
    return curve, notes


def _spent(steps: np.ndarray, settings: Mapping) -> np.ndarray:
    if not {"schedule", "warmup", "epochs"} <= settings.keys():
        return np.arange(1.0, len(steps) + 1)
    total = settings.get("steps") or settings["epochs"] * int(steps[0])
    pace = multiplier(settings["schedule"], settings["warmup"], total)
    return np.cumsum([pace(step) for step in range(int(steps[-1]))])[steps - 1] / steps[0]


def _judge(result: Training, settings: Mapping, tolerance: float) -> Training:
    curve = result.curve
    elbo, spent = curve["elbo"].to_numpy(), curve["spent"].to_numpy()
    name = "log joint" if result.log_joint else "ELBO"
    broken = ~np.isfinite(elbo)
    if broken.any():
        epoch = curve["epoch"].to_numpy()[broken.argmax()]
        return replace(
            result, verdict=BROKEN, reason=f"the {name} is not finite in epoch {epoch}",
            advice="lower the learning rates or clip more",
        )  # fmt: skip
    best, overfitted = _validation(curve, tolerance)
    gain, error = _slope(spent, elbo)
    drift = _drift(spent, curve["mean_log_sd"].to_numpy())
    result = replace(result, gain=gain, gain_error=error, drift=drift, best_epoch=best)
    if overfitted and settings.get("patience") is None and not settings.get("keep_best"):
        return replace(
            result, verdict=f"{OVERFITTED} since epoch {best}",
            reason=f"the validation NLL was best in epoch {best} and {overfitted:.3f} nats per row higher at the end",
            advice=f"stop at epoch {best} (patience= or keep_best=), or take a tighter prior or a wider family",
        )  # fmt: skip
    if overfitted:
        reason = f"the parameters are those of epoch {best}, the best validation NLL"
        return replace(result, verdict=CONVERGED, reason=reason, advice="nothing")
    if drift > DRIFT:
        return replace(
            result, verdict=TRAIN_LONGER,
            reason=f"the mean log sd still moves by {drift:.2f} per epoch at the full rate (converged: below {DRIFT})",
            advice="more epochs, or a higher rates.scale",
        )  # fmt: skip
    if len(elbo) < _EPOCHS:
        reason = f"{len(elbo)} epochs are too few to tell a slope from noise"
        return replace(result, reason=reason, advice=f"at least {_EPOCHS} epochs")
    moved = f"the {name} gains {gain:.4f} ± {error:.4f} nats per row and epoch at the full rate"
    if gain > max(tolerance, error):
        return replace(result, verdict=TRAIN_LONGER, reason=moved, advice="more epochs, or higher rates")
    if gain < -max(tolerance, error):
        return replace(result, verdict=FALLS, reason=moved, advice="lower the learning rates")
    if gain <= tolerance and gain + error <= 5 * tolerance:
        scales = "" if np.isnan(drift) else f", the mean log sd moves by {drift:.3f}"
        return replace(result, verdict=CONVERGED, reason=f"{moved} (flat: below {tolerance}){scales}", advice="nothing")
    return replace(result, reason=f"{moved}: noise hides the slope", advice="more epochs, particles or larger batches")


def _slope(spent: np.ndarray, elbo: np.ndarray) -> tuple[float, float]:
    """Least-squares slope over the end of the curve and the half-width of its one-sided 95% interval."""
    from scipy.stats import t

    if len(elbo) < _EPOCHS:
        return np.nan, np.nan
    rows = max(_EPOCHS, int((spent >= 0.75 * spent[-1]).sum()))
    x, y = spent[-rows:] - spent[-rows:].mean(), elbo[-rows:] - elbo[-rows:].mean()
    slope = float(x @ y / (x @ x))
    variance = float(np.square(y - slope * x).sum() / (rows - 2) / (x @ x))
    return slope, float(t.ppf(0.95, rows - 2)) * variance**0.5


def _drift(spent: np.ndarray, level: np.ndarray) -> float:
    # The measure of infer.progress.ScaleWatch, which warns at the end of a fit.
    earlier = np.flatnonzero(spent <= 0.75 * spent[-1])
    if not len(earlier):
        return np.nan
    return float(abs(level[-1] - level[earlier[-1]]) / (spent[-1] - spent[earlier[-1]]))


def _validation(curve: pd.DataFrame, tolerance: float) -> tuple[int | None, float]:
    """The best epoch, and by how much the NLL rose after it; 0 where that is within tolerance and noise."""
    known = curve[np.isfinite(curve["validation_nll"])]
    if known.empty:
        return None, 0.0
    nll = known["validation_nll"].to_numpy()
    best = int(nll.argmin())
    epoch, later = int(known["epoch"].iloc[best]), nll[best + 1 :]
    if len(later) < 2:
        return epoch, 0.0
    # Second differences see noise and hardly a trend (Gasser et al. 1986); the median, hardly the steep first epochs.
    noise = 1.4826 * float(np.median(np.abs(np.diff(nll, 2)))) / 6**0.5 if len(nll) > 3 else 0.0
    rise = float(later[-3:].mean() - nll[best])
    return epoch, rise if rise > max(tolerance, 4 * noise) else 0.0
