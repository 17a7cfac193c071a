"""The rules for predictions of numbers and of texts, and which rules a kind of prediction has."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import numpy as np

from ..predictions import NumberPrediction, Prediction, TokenPrediction
from .findings import Findings, against_simpler, error, no_better, unchecked
from .intervals import LEVEL
from .prediction_rules import CLASSES, against_mean
from .texts import text_scores

SLACK = 0.05  # of a share or a probability, beyond the noise, up to which a fault is a warning


def rules_for(prediction) -> Mapping[str, tuple[Callable, ...]]:
    """The rules by part of the table; of a kind of prediction that is not known, what every kind has.

    Args:
        prediction: of the test rows, or None.
    """
    if prediction is None or isinstance(prediction, Prediction):
        return CLASSES
    return next((rules for kind, rules in _KINDS.items() if isinstance(prediction, kind)), _ANY)


def _numbers_alone(f: Findings):
    labels = f.prediction.labels
    if labels is None:
        yield unchecked("NLL", f.missing["intervals"])
        return
    labels, losses = labels.double().numpy(), f.prediction.losses()["NLL"]
    sd = labels.std()
    if not sd > 0:
        yield unchecked("NLL", "the test labels are all the same: there is nothing to tell apart")
        return
    base = 0.5 * np.log(2 * np.pi) + np.log(sd) + np.square((labels - labels.mean()) / sd) / 2
    value, alone, limit, verdict = against_simpler(losses, base)
    yield (
        "NLL (nats per row)", value, f"< {limit:.3f}", verdict,
        f"One normal for all rows, at the mean and sd of the test labels, has {alone:.3f}, less two standard errors of "
        f"the difference is the threshold; RMSE is {f.prediction.scores()['RMSE']:.3g}, the labels' sd {sd:.3g}.",
        no_better(value, alone, verdict),
    )  # fmt: skip


def _inside(f: Findings):
    if f.intervals is None:
        yield unchecked(f"share in the {LEVEL:.0%} interval", f.missing["intervals"])
        return
    share, (low, high) = f.intervals.coverage, f.intervals.coverage_right
    off = max(low - share, share - high)
    verdict = "good" if off <= 0 else "warning" if off <= SLACK else "bad"
    yield (
        f"share in the {LEVEL:.0%} interval", share, f"{low:.3f} to {high:.3f}", verdict,
        f"Where it is in 95 of 100 test sets of {len(f.intervals.pit)} rows if the intervals are right (binomial).",
        "" if verdict == "good" else f"The intervals are too {'narrow' if share < low else 'wide'}: "
        "look at the noise's scale, then at the posterior's.",
    )  # fmt: skip


def _uniform(f: Findings):
    if f.intervals is None:
        yield unchecked("labels uniform in their predictions", f.missing["intervals"])
        return
    found = f.intervals
    off = found.ks - found.ks_right
    verdict = "good" if off <= 0 else "warning" if off <= SLACK else "bad"
    shape = f" The predictions are {found.shape}." if found.shape else ""
    yield (
        "labels uniform in their predictions (PIT)", found.ks, f"≤ {found.ks_right:.3f}", verdict,
        "Largest distance from the uniform of the predictive probability below each label, Kolmogorov-Smirnov; up to "
        f"the threshold in 95 of 100 test sets where the predictions are right.{shape}",
        "" if verdict == "good" else "Look at the picture of the transform: at its ends are the surprises.",
    )  # fmt: skip


def _crps(f: Findings):
    if f.intervals is None:
        return
    value, alone, limit, verdict = against_simpler(f.intervals.crps, f.intervals.crps_climatology)
    yield (
        "CRPS (units of the labels)", value, f"< {limit:.3g}", verdict,
        f"± {error(f.intervals.crps):.2g}; all test labels as one forecast for every row have {alone:.3g}, less two "
        "standard errors of the difference is the threshold.",
        no_better(value, alone, verdict),
    )  # fmt: skip


def _variance_share(f: Findings):
    p = f.prediction
    if len(p.loc) == 1:
        yield unchecked("epistemic share of the variance", "one draw: nothing to tell apart")
        return
    share = float(p.epistemic_sd.square().double().sum() / p.sd.square().double().sum())
    yield (
        "epistemic share of the variance", share, "> 0.005", "good" if share > 0.005 else "warning",
        "Variance of the draws' means over the predictive variance: what more data could remove; the rest is noise.",
        "" if share > 0.005 else "The draws hardly differ: this is a point estimate in all but name.",
    )  # fmt: skip


def _perplexity(f: Findings):
    value, before, limit, verdict = against_simpler(f.prediction.losses()["NLL"], f.at_base.losses()["NLL"])
    words = f"Perplexity is {np.exp(value):.4g}, the pretrained network's {np.exp(before):.4g}"
    if f.at_mean is not None:
        words += f", that at the posterior mean {np.exp(f.at_mean.nll):.4g}"
    yield (
        "NLL (nats per token)", value, f"< {limit:.3f}", verdict,
        f"{words}. The threshold is the pretrained network's NLL, less two standard errors of the difference.",
        no_better(
            value, before, verdict, "the pretrained network",
            "Fine-tuning has taught nothing about such texts: check data, rates and epochs.",
        ),
    )  # fmt: skip


def _per_text(f: Findings):
    table = text_scores(f.prediction)
    worst = table["NLL per token"].idxmax()
    yield (
        "NLL per text (nats)", float(table["NLL"].mean()), "", "good",
        f"± {error(table['NLL'].to_numpy()):.3g}, of {table['tokens'].mean():.1f} tokens on average. Per token the "
        f"median text has {table['NLL per token'].median():.3f}, the worst, number {worst}, "
        f"{table.loc[worst, 'NLL per token']:.3f}. The draws' log probabilities of a text differ by "
        f"{table['sd over draws'].mean():.3g} nats.",
        "",
    )  # fmt: skip


def _outside(f: Findings):
    yield unchecked("rows of another kind", f.missing["outside"])


_ANY = {"Predictions": (against_mean,)}
_KINDS = {
    NumberPrediction: {
        "Predictions": (_numbers_alone, against_mean, _inside, _uniform, _crps),
        "Uncertainty": (_variance_share, _outside),
    },
    TokenPrediction: {"Predictions": (_perplexity, against_mean, _per_text), "Uncertainty": (_outside,)},
}
