"""The rules for predictions of classes, and for what any prediction has."""

from __future__ import annotations

import numpy as np

from .. import metrics
from ..predictions import TokenPrediction
from .findings import Findings, against_simpler, error, no_better, unchecked

TEMPERATURE = (0.8, 1.25)  # outside of which scaling changes the probabilities visibly
LIKELIHOOD_RATIO = 1.92  # nats that one free parameter gains by chance in 19 of 20 data sets
NEAR = 0.05  # total variation above that of a perfect model, which nobody would notice
WORTH = 0.005  # nats per row, below which a difference of NLLs is nothing to act on


def _calibration(f: Findings):
    if f.calibration is None:
        yield unchecked("calibration", f.missing["calibration"])
        return
    row = f.calibration.errors.loc["width"]
    over = float(f.prediction.probs.max(-1).values.mean()) - metrics.accuracy(f.prediction.probs, f.prediction.labels)
    verdict = "good" if row["p"] > 0.05 else "warning" if row["value"] <= row["perfect 95%"] + 0.05 else "bad"
    word = "overconfident" if over > 0 else "underconfident"
    yield (
        f"ECE ({f.calibration.bins} bins)", float(row["value"]), f"≤ {row['perfect 95%']:.3f}", verdict,
        f"A perfectly calibrated model scores {row['perfect']:.3f} on so many rows, and up to the threshold in 95 of "
        f"100 test sets. Mean confidence minus accuracy is {over:+.3f}"
        + ("." if verdict == "good" else f": {word}. {f.calibration.note}".rstrip()),
        "" if verdict == "good" else "Scale the temperature on validation rows, or "
        + ("widen the posterior." if over > 0 else "tighten the prior: the posterior is too wide."),
    )  # fmt: skip


def _temperature(f: Findings):
    if f.temperature is None:
        yield unchecked("temperature", f.missing["temperature"])
        return
    low, high = TEMPERATURE
    verdict = "good" if low <= f.temperature <= high or f.temperature_gain <= LIKELIHOOD_RATIO else "warning"
    yield (
        "temperature", f.temperature, f"{low} to {high}", verdict,
        "What the log probabilities should be divided by, from validation rows: above 1 the posterior is too sure. It "
        f"gains {f.temperature_gain:.1f} nats over all of them; up to {LIKELIHOOD_RATIO} is noise, whatever its value.",
        "" if verdict == "good" else "Apply it, or change the prior's scale: the posterior alone is off.",
    )  # fmt: skip


def _against_simple(f: Findings):
    p = f.prediction
    if p is None or p.labels is None:
        reason = f.missing.get("prediction") or f.missing["calibration"]
        yield unchecked("NLL", reason)
        return
    labels, losses = np.asarray(p.labels), p.losses()["NLL"]
    shares = np.bincount(labels, minlength=p.probs.shape[1]) / len(labels)
    value, base, limit, verdict = against_simpler(losses, -np.log(shares[labels]))
    if base == 0:
        yield unchecked("NLL", "the test rows have one class only: there is nothing to tell apart")
    else:
        yield (
            "NLL (nats per row)", value, f"< {limit:.3f}", verdict,
            f"The label shares alone have {base:.3f}, less two standard errors of the difference is the threshold; "
            f"accuracy is {metrics.accuracy(p.probs, p.labels):.3f}.",
            no_better(value, base, verdict),
        )  # fmt: skip


def against_mean(f: Findings):
    """Of any prediction: are the draws worth more than one network at their mean?"""
    p = f.prediction
    if p is None or p.labels is None:
        return
    if f.at_mean is None:
        yield unchecked("NLL - NLL of the posterior mean", f.missing["at_mean"])
        return
    difference = p.losses()["NLL"] - f.at_mean.losses()["NLL"]
    gain, spread = float(difference.mean()), error(difference)
    limit = max(2 * spread, WORTH)
    verdict = "warning" if gain > limit else "good"
    word = "better" if gain < 0 else "worse"
    of = "token" if isinstance(p, TokenPrediction) else "row"
    yield (
        "NLL - NLL of the posterior mean", gain, f"≤ {limit:.3f}", verdict,
        f"Averaging over draws is {abs(gain):.3f} ± {spread:.3f} nats per {of} {word} than one network at the mean.",
        "" if verdict == "good" else "The draws hurt: the posterior is too wide; tighten the prior or train longer.",
    )  # fmt: skip


def _draws(f: Findings):
    if f.sweep is None:
        yield unchecked("draws that are enough", f.missing["sweep"])
        return
    enough, draws = f.sweep.enough, f.sweep.draws
    if draws == 1:
        yield unchecked("draws that are enough", "one draw: nothing to average")
        return
    verdict = "good" if enough is not None else "warning"
    yield (
        "draws that are enough", enough or f"{draws} or more", f"< {draws}", verdict,
        f"The least number of draws whose NLL is within {f.sweep.tolerance:.4f} nats per row of all {draws}.",
        "" if enough else f"Predict with more than {draws} draws.",
    )  # fmt: skip


def _selective(f: Findings):
    if f.selective is None:
        yield unchecked("confidence tells right from wrong", f.missing["selective"])
        return
    right = f.uncertainty.right
    if right.all() or not right.any():
        yield unchecked("confidence tells right from wrong", f"every row is {'right' if right.all() else 'wrong'}")
        return
    area = metrics.auroc(f.uncertainty.max_probability, right)
    verdict = "good" if area > 0.6 else "warning" if area > 0.5 else "bad"
    yield (
        "confidence tells right from wrong (AUROC)", area, "> 0.6", verdict,
        f"How often a right row is surer than a wrong one; the error rate is {f.selective.risk[-1]:.3f} on all rows "
        f"and {f.selective.risk_at(0.5):.3f} on the surer half. AURC {f.selective.aurc:.3f}.",
        "" if verdict == "good" else "Do not let this confidence decide which rows a person sees.",
    )  # fmt: skip


def _model_part(f: Findings):
    if f.uncertainty is None:
        yield unchecked("epistemic share of the entropy", f.missing["uncertainty"])
        return
    if f.uncertainty.note:
        yield unchecked("epistemic share of the entropy", f.uncertainty.note)
        return
    share = f.uncertainty.epistemic_share
    yield (
        "epistemic share of the entropy", share, "> 0.005", "good" if share > 0.005 else "warning",
        "Mutual information over predictive entropy: what more data could remove; the rest is in the labels.",
        "" if share > 0.005 else "The draws hardly differ: this is a point estimate in all but name.",
    )  # fmt: skip


def _outside(f: Findings):
    if f.outside is None:
        yield unchecked("rows of another kind", f.missing["outside"])
        return
    entropy, model = f.outside.loc["entropy"], f.outside.loc["mutual information"]
    value = float(entropy["AUROC"])
    verdict = "good" if value > 0.6 else "warning" if value > 0.5 else "bad"
    beside = "" if np.isnan(model["AUROC"]) else f" (mutual information: {model['AUROC']:.3f})"
    yield (
        "rows of another kind (AUROC of the entropy)", value, "> 0.6", verdict,
        f"How often such a row has the higher entropy{beside}; ± {entropy['AUROC SE']:.3f}.",
        "" if verdict == "good" else "Do not rely on the uncertainty to notice such inputs.",
    )  # fmt: skip


def _votes(f: Findings):
    if f.votes is None:
        if "votes" in f.missing:
            yield unchecked("distance to people's votes", f.missing["votes"])
        return
    row, voter = f.votes.table.loc["total_variation"], f.votes.table.loc["vote_share", "mean"]
    limit = float(row["perfect"] + 2 * np.nan_to_num(row["SE"]) + NEAR)
    good = row["mean"] <= limit
    yield (
        "distance to people's votes (total variation)", float(row["mean"]), f"≤ {limit:.3f}",
        "good" if good else "warning",
        f"Half the summed differences from the votes' shares, mean over rows; so few voters leave a perfect model "
        f"{row['perfect']:.3f}. A random voter agrees with the predicted class with probability {voter:.3f}, with the "
        f"majority's with {f.votes.ceiling:.3f}.",
        "" if good else "The probabilities are not the shares of people who say so: train on soft labels.",
    )  # fmt: skip


CLASSES = {
    "Predictions": (_against_simple, against_mean, _calibration, _temperature, _draws, _votes),
    "Uncertainty": (_selective, _model_part, _outside),
}
