"""The rules that turn findings into verdicts."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from ..infer.chains import R_HAT
from .findings import Check, Findings, error, sentence, unchecked
from .label_rules import rules_for
from .training import APART, BROKEN, CANNOT_TELL, CONVERGED, TRAIN_LONGER

MANY_ROWS = 0.05  # share of rows with a high k-hat from which on LOO is doubtful
SHARP = 0.05  # contraction below which a module has learned nothing worth its latents
NATS = 1.0  # between bounds, above which the ELBO is loose
NARROW, WIDE = -0.22, 0.18  # log sd ratio: a fifth too narrow, a fifth too wide


def verdicts(findings: Findings) -> Iterator[Check]:
    """A row per check, in the order of reading.

    Args:
        findings: of diagnose.
    """
    for part, rules in (_FITTED | rules_for(findings.prediction)).items():
        for rule in rules:
            yield from (Check(part, *row) for row in rule(findings))


def _training(f: Findings):
    t = f.training
    verdicts = {BROKEN: "bad", APART: "bad", CONVERGED: "good", CANNOT_TELL: "not checked"}
    verdict = verdicts.get(t.verdict, "warning")
    yield "training", t.verdict, "converged", verdict, sentence(t.reason), _advice(t.advice, verdict)
    if t.note:
        yield "training, left out", None, "", "not checked", sentence(t.note), ""


def _learned(f: Findings):
    if not f.structure.variance > 0:
        yield unchecked("contraction of the modules", "a point has no variance")
        return
    contraction = f.structure.modules["contraction"].to_numpy(float)
    known = contraction[np.isfinite(contraction)]
    if not len(known):
        yield unchecked("contraction of the modules", f.structure.note or "the prior has no finite variance")
        return
    idle = float((known < SHARP).mean())
    verdict = "bad" if idle == 1 else "warning" if idle > 0.5 else "good"
    yield (
        "modules that learned nothing", idle, "≤ 0.5", verdict,
        f"Share of modules whose variance is within {SHARP:.0%} of the prior's; "
        f"the mean contraction is {known.mean():.2f} (0 is the prior, 1 a point).",
        "" if verdict == "good" else "Train longer, raise the prior's scale, or adapt fewer modules.",
    )  # fmt: skip


def _rows(f: Findings):
    if f.other_rows:
        yield (
            "training rows", "others", "those that were fitted", "bad",
            "By their hash train= holds other rows than were fitted, or in another order, of which ELBO and LOO are no "
            "evidence.",
            "Give the rows that were fitted, as they were given to the fit.",
        )  # fmt: skip


def _joint_weights(f: Findings):
    if f.importance is None:
        yield unchecked("ELBO and importance weights", f.missing["importance"])
        return
    w, rows = f.importance, f.importance.log_likelihood.shape[1]
    elbo, gap = w.elbo, w.iwae.value - w.elbo.value
    yield (
        "ELBO per row (nats)", elbo.value / rows, "", "good" if np.isfinite(elbo.value) else "bad",
        f"The evidence lower bound, ± {elbo.standard_error / rows:.2g} from {len(w.log_q)} draws; compare families by "
        "it only on the same data, subspace, prior and head.", "",
    )  # fmt: skip
    if len(w.log_q) == 1:
        yield unchecked("IWAE - ELBO", "one draw, by which both are the same; take more evidence_draws")
        return
    verdict = "good" if gap <= NATS else "warning"
    yield (
        "IWAE - ELBO (nats)", gap, f"≤ {NATS:g}", verdict,
        f"What {len(w.log_q)} weighted draws add to the bound: at least that far is the guide from the posterior.",
        "" if verdict == "good" else "Try a family that can come closer (LowRankPrecision, FullRank), or train longer.",
    )  # fmt: skip
    k = w.k_hat
    if not np.isfinite(k):
        yield unchecked("joint k-hat", f"{len(w.log_q)} draws have no tail to fit; take more evidence_draws")
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
        yield unchecked("PSIS-LOO", f.missing["loo"])
        return
    share, rows = f.loo.share_above(), len(f.loo.elpd)
    if not np.isfinite(share):
        yield unchecked("rows with a high k-hat", f.loo.note or "one draw")
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
    # Of whole rows, as LOO is: the NLL of a text is a mean over its tokens.
    scores = (prediction.log_likelihood.double().logsumexp(0) - np.log(len(prediction.log_likelihood))).numpy()
    test, spread = float(scores.mean()), float(np.hypot(error(scores), f.loo.total.standard_error / rows))
    verdict = "good" if abs(mean - test) <= 2 * spread + 0.01 or not np.isfinite(spread) else "warning"
    yield (
        "LOO per row - test log score (nats)", mean - test, f"within ± {2 * spread + 0.01:.3f}", verdict,
        "What leaving rows out predicts against what the test rows gave; a gap means that the two differ in kind, or "
        "that a point head and a data-made projection have seen the fitted rows.",
        "" if verdict == "good" else "Trust the test rows.",
    )  # fmt: skip


def _against_reference(f: Findings):
    if f.reference is None:
        yield unchecked("against a reference posterior", f.missing["reference"])
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
        ("log sd ratio, absolute", 0.2),
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


def _reference_chains(f: Findings):
    if f.reference_r_hat is None:
        return
    good = f.reference_r_hat <= R_HAT
    yield (
        "R-hat of the reference", f.reference_r_hat, f"≤ {R_HAT:g}", "good" if good else "warning",
        "Whether the chains of the reference agree: above, they have not reached one distribution.",
        "" if good else "Do not trust what is held against this reference; draw longer chains.",
    )  # fmt: skip


def _low_rank(f: Findings):
    if f.low_rank is None:
        if f.reference is not None:
            yield unchecked("effective rank of the reference", f.missing["low_rank"])
        return
    ranks = f.low_rank.table["effective rank"]
    # A random projection may have a precision where the reference has too few draws for one.
    part = "precision from the data" if ("precision from the data", "reference") in ranks.index else "covariance"
    ranks = ranks[part]
    words = f"{ranks['reference, no correlation']:.1f} without correlation"
    if "random projection" in ranks:
        words += f" and {ranks['random projection']:.1f} in a random subspace"
    good = not f.low_rank.doubt
    yield (
        f"effective rank of the reference ({part})", float(ranks["reference"]), "", "good" if good else "warning",
        f"Of {f.low_rank.table['latents'].iloc[0]} directions; {words}. Well below that is structure."
        + ("" if good else f" {sentence(f.low_rank.doubt)}"),
        "" if good else "Do not conclude from it; draw longer chains.",
    )  # fmt: skip


def _gradient(f: Findings):
    if f.gradient is None:
        if "gradient" in f.missing:
            yield unchecked("signal in the gradient", f.missing["gradient"])
        return
    table = f.gradient.table
    if table.empty:
        yield unchecked("signal in the gradient", f.gradient.note)
        return
    kind = table["noise_scale"].idxmax()
    scale = float(table.loc[kind, "noise_scale"])
    lost = f.training.verdict == TRAIN_LONGER and scale > 1
    yield (
        f"signal in the gradient ({kind})", float(table.loc[kind, "snr"]), "", "warning" if lost else "good",
        f"Signal over noise of one batch's gradient, the lowest of {', '.join(table.index)}: {scale:.3g} batches would "
        "have to be averaged for a ratio of 1. After a fit that has converged, no signal is what to expect.",
        "The ELBO still rises and noise hides the way: raise batch_size, accumulate or particles." if lost else "",
    )  # fmt: skip


_FITTED = {
    "Training": (_training, _learned, _gradient),
    "Approximation": (_rows, _joint_weights, _loo, _against_reference, _reference_chains, _low_rank),
}


def _advice(text: str, verdict: str) -> str:
    return "" if verdict == "good" or text in ("", "nothing") else sentence(text)
