"""The rules that turn findings into verdicts."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from .. import metrics
from .findings import Check, Findings

MANY_ROWS = 0.05  # share of rows with a high k-hat from which on LOO is doubtful
SHARP = 0.05  # contraction below which a module has learned nothing worth its latents
NATS = 1.0  # between bounds, above which the ELBO is loose
TEMPERATURE = (0.8, 1.25)  # outside of which scaling changes the probabilities visibly
LIKELIHOOD_RATIO = 1.92  # nats that one free parameter gains by chance in 19 of 20 data sets
WORTH = 0.005  # nats per row, below which a difference of NLLs is nothing to act on
NARROW, WIDE = -0.22, 0.18  # log sd ratio: a fifth too narrow, a fifth too wide


def verdicts(findings: Findings) -> Iterator[Check]:
    """A row per check, in the order of reading.

    Args:
        findings: of diagnose.
    """
    for part, rules in _RULES.items():
        for rule in rules:
            yield from (Check(part, *row) for row in rule(findings))


def _training(f: Findings):
    t = f.training
    verdict = {"converged": "good", "cannot tell": "not checked"}.get(t.verdict, "warning")
    yield "training", t.verdict, "converged", verdict, _sentence(t.reason), _advice(t.advice, verdict)
    if t.note:
        yield "training, left out", None, "", "not checked", _sentence(t.note), ""


def _learned(f: Findings):
    if not f.structure.variance > 0:
        yield _unknown("contraction of the modules", "a point has no variance")
        return
    contraction = f.structure.modules["contraction"].to_numpy(float)
    known = contraction[np.isfinite(contraction)]
    if not len(known):
        yield _unknown("contraction of the modules", f.structure.note or "the prior has no finite variance")
        return
    idle = float((known < SHARP).mean())
    verdict = "bad" if idle == 1 else "warning" if idle > 0.5 else "good"
    yield (
        "modules that learned nothing", idle, "≤ 0.5", verdict,
        f"Share of modules whose variance is within {SHARP:.0%} of the prior's; "
        f"the mean contraction is {known.mean():.2f} (0 is the prior, 1 a point).",
        "" if verdict == "good" else "Train longer, raise the prior's scale, or adapt fewer modules.",
    )  # fmt: skip


def _joint_weights(f: Findings):
    if f.importance is None:
        yield _unknown("ELBO and importance weights", f.missing["importance"])
        return
    w, rows = f.importance, f.importance.log_likelihood.shape[1]
    elbo, gap = w.elbo, w.iwae.value - w.elbo.value
    yield (
        "ELBO per row (nats)", elbo.value / rows, "", "good" if np.isfinite(elbo.value) else "bad",
        f"The evidence lower bound, ± {elbo.standard_error / rows:.2g} from {len(w.log_q)} draws; compare families by "
        "it only on the same data, subspace, prior and head.", "",
    )  # fmt: skip
    verdict = "good" if gap <= NATS else "warning"
    yield (
        "IWAE - ELBO (nats)", gap, f"≤ {NATS:g}", verdict,
        f"What {len(w.log_q)} weighted draws add to the bound: at least that far is the guide from the posterior.",
        "" if verdict == "good" else "Try a wider family (LowRankPrecision, FullRank) or train longer.",
    )  # fmt: skip
    k = w.k_hat
    if not np.isfinite(k):
        yield _unknown("joint k-hat", f"{len(w.log_q)} draws have no tail to fit; take more evidence_draws")
        return
    verdict = "good" if k <= w.threshold else "warning"
    yield (
        "joint k-hat", k, f"≤ {w.threshold:.2f}", verdict,
        f"The tail of the weights over the whole data; these draws are worth {w.effective_draws:.1f} of the "
        "posterior's own. In hundreds of dimensions a tiny error is enough to exceed the threshold.",
        "" if verdict == "good" else "Do not reweight these draws; rely on the rows below and on a reference.",
    )  # fmt: skip


def _loo(f: Findings):
    if f.loo is None:
        yield _unknown("PSIS-LOO", f.missing["loo"])
        return
    share, rows = f.loo.share_above(), len(f.loo.elpd)
    if not np.isfinite(share):
        yield _unknown("rows with a high k-hat", f.loo.note or "one draw")
    else:
        verdict = "good" if share <= MANY_ROWS else "warning"
        yield (
            "rows with a high k-hat", share, f"≤ {MANY_ROWS:g}", verdict,
            f"Share of the {rows} fitted rows whose leave-one-out weights have a tail above {f.loo.threshold:.2f}.",
            "" if verdict == "good" else "Do not rank posteriors by LOO; use rows that were held out.",
        )  # fmt: skip
    mean = float(f.loo.elpd.mean())
    prediction = f.prediction
    if prediction is None or prediction.labels is None:
        yield "LOO per row (nats)", mean, "", "good", "Expected log predictive density of a row left out.", ""
        return
    scores = -prediction.losses()["NLL"]
    test, error = float(scores.mean()), _error(scores)
    off = abs(mean - test)
    error = float(np.hypot(error, f.loo.total.standard_error / rows))
    verdict = "good" if off <= 2 * error + 0.01 or not np.isfinite(error) else "warning"
    yield (
        "LOO per row - test log score (nats)", mean - test, f"within ± {2 * error + 0.01:.3f}", verdict,
        "What leaving rows out predicts against what the test rows gave; a gap means that the two differ in kind, or "
        "that a point head and a data-made projection have seen the fitted rows.",
        "" if verdict == "good" else "Trust the test rows.",
    )  # fmt: skip


def _against_reference(f: Findings):
    if f.reference is None:
        yield _unknown("against a reference posterior", f.missing["reference"])
        return
    table = f.reference.table
    ratio = table.loc["log sd ratio", "value"]
    verdict = "good" if NARROW <= ratio <= WIDE else "warning" if abs(ratio) < 0.5 else "bad"
    yield (
        "log sd ratio to the reference", ratio, f"{NARROW} to {WIDE}", verdict,
        "Mean over latents; negative is too narrow, positive too wide.",
        "" if verdict == "good" else "Take a wider family, or train the scales longer.",
    )  # fmt: skip
    for name, limit in (
        ("mean error, absolute (reference sds)", 0.2),
        ("correlation error (RMS)", 0.1),
        ("sliced Wasserstein-2 (reference sds)", 0.3),
        ("predictive total variation", 0.05),
    ):
        value, floor = table.loc[name, "value"], table.loc[name, "floor"]
        if np.isnan(value):
            continue
        # Two halves of the reference already differ by the floor.
        verdict = "good" if value <= max(limit, 2 * floor) else "warning" if value <= 3 * limit else "bad"
        advice = "" if verdict == "good" else "Compare families against the same reference."
        yield name, float(value), f"≤ {max(limit, 2 * floor):.3f}", verdict, f"The noise floor is {floor:.3f}.", advice


def _calibration(f: Findings):
    if f.calibration is None:
        yield _unknown("calibration", f.missing["calibration"])
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
        "" if verdict == "good" else "Scale the temperature on validation rows, or widen the posterior.",
    )  # fmt: skip


def _temperature(f: Findings):
    if f.temperature is None:
        yield _unknown("temperature", f.missing["temperature"])
        return
    low, high = TEMPERATURE
    verdict = "good" if low <= f.temperature <= high or f.temperature_gain <= LIKELIHOOD_RATIO else "warning"
    yield (
        "temperature", f.temperature, f"{low} to {high}", verdict,
        "What the log probabilities should be divided by, from validation rows: above 1 the posterior is too sure. It "
        f"gains {f.temperature_gain:.1f} nats over all of them; up to {LIKELIHOOD_RATIO} is noise.",
        "" if verdict == "good" else "Apply it, or change the prior's scale: the posterior alone is off.",
    )  # fmt: skip


def _against_simple(f: Findings):
    p = f.prediction
    if p is None or p.labels is None:
        reason = f.missing.get("prediction") or f.missing["calibration"]
        yield _unknown("NLL", reason)
        return
    labels, losses = np.asarray(p.labels), p.losses()["NLL"]
    shares = np.bincount(labels, minlength=p.probs.shape[1]) / len(labels)
    value, base = float(losses.mean()), float(-np.log(shares[labels]).mean())
    if base == 0:
        yield _unknown("NLL", "the test rows have one class only: there is nothing to tell apart")
    else:
        # What does not depend on the text at all is below its own label shares by chance every other time.
        limit = base - 2 * _error(losses + np.log(shares[labels]))
        verdict = "good" if value < limit else "warning" if value < base else "bad"
        yield (
            "NLL (nats per row)", value, f"< {limit:.3f}", verdict,
            f"The label shares alone have {base:.3f}, less two standard errors of the difference is the threshold; "
            f"accuracy is {metrics.accuracy(p.probs, p.labels):.3f}.",
            "" if verdict == "good" else "The model predicts no better than no model: check labels, rates and data.",
        )  # fmt: skip
    if f.at_mean is None:
        yield _unknown("NLL - NLL of the posterior mean", f.missing["at_mean"])
        return
    difference = losses - f.at_mean.losses()["NLL"]
    gain, error = float(difference.mean()), _error(difference)
    limit = max(2 * error, WORTH)
    verdict = "warning" if gain > limit else "good"
    word = "better" if gain < 0 else "worse"
    yield (
        "NLL - NLL of the posterior mean", gain, f"≤ {limit:.3f}", verdict,
        f"Averaging over draws is {abs(gain):.3f} ± {error:.3f} nats per row {word} than one network at the mean.",
        "" if verdict == "good" else "The draws hurt: the posterior is too wide; tighten the prior or train longer.",
    )  # fmt: skip


def _draws(f: Findings):
    if f.sweep is None:
        yield _unknown("draws that are enough", f.missing["sweep"])
        return
    enough, draws = f.sweep.enough, f.sweep.draws
    if draws == 1:
        yield _unknown("draws that are enough", "one draw: nothing to average")
        return
    verdict = "good" if enough is not None else "warning"
    yield (
        "draws that are enough", draws if enough is None else enough, f"≤ {draws}", verdict,
        f"The least number of draws whose NLL is within {f.sweep.tolerance:.4f} nats per row of all {draws}.",
        "" if enough else f"Predict with more than {draws} draws.",
    )  # fmt: skip


def _selective(f: Findings):
    if f.selective is None:
        yield _unknown("confidence tells right from wrong", f.missing["selective"])
        return
    right = f.uncertainty.right
    if right.all() or not right.any():
        yield _unknown("confidence tells right from wrong", f"every row is {'right' if right.all() else 'wrong'}")
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
        yield _unknown("model's share of the entropy", f.missing["uncertainty"])
        return
    if f.uncertainty.note:
        yield _unknown("model's share of the entropy", f.uncertainty.note)
        return
    share = f.uncertainty.model_share
    yield (
        "model's share of the entropy", share, "> 0.005", "good" if share > 0.005 else "warning",
        "Mutual information over predictive entropy: what more data could remove; the rest is in the labels.",
        "" if share > 0.005 else "The draws hardly differ: this is a point estimate in all but name.",
    )  # fmt: skip


def _outside(f: Findings):
    if f.outside is None:
        yield _unknown("rows of another kind", f.missing["outside"])
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


_RULES = {
    "Training": (_training, _learned),
    "Approximation": (_joint_weights, _loo, _against_reference),
    "Predictions": (_against_simple, _calibration, _temperature, _draws),
    "Uncertainty": (_selective, _model_part, _outside),
}


def _unknown(check: str, reason: str) -> tuple:
    return check, None, "", "not checked", _sentence(reason), ""


def _sentence(text: str) -> str:
    return text[:1].upper() + text[1:].rstrip(".") + "."


def _advice(text: str, verdict: str) -> str:
    return "" if verdict == "good" or text in ("", "nothing") else _sentence(text)


def _error(values: np.ndarray) -> float:
    """Of the mean; 0 of one row, so that a limit made of it stays a number."""
    return float(np.nan_to_num(metrics.standard_error(values)))
