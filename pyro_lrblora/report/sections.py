"""What stands in each section of a report."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from importlib.metadata import version

import datasets
import numpy as np
import pandas as pd

from ..comparison import Comparison
from ..data import as_batches
from ..diagnostics.diagnose import Diagnosis
from ..diagnostics.findings import Findings
from ..diagnostics.texts import text_scores
from ..diagnostics.uncertainty import most_uncertain
from ..formatting import brief
from ..model import BayesianLoRA
from ..plots.predictive import draws_needed, entropy_parts, pit_histogram, risk_coverage
from ..plots.reliability import reliability_diagram
from ..plots.structure import correlation, modules, spectrum
from ..plots.training import training_curves
from ..plots.weights import loo_k_hat, weight_tail
from ..posterior import Posterior
from ..predictions import NumberPrediction, Prediction, TokenPrediction
from ..provenance import LABELS, ROWS, data_identity, other_rows, unlike, versions
from .document import Details, Facts, Note, Picture, Table, Text, Verdicts

_ROWS = 10  # of the least sure


def summary(name: str, diagnosis: Diagnosis) -> Iterator:
    tally = diagnosis.tally
    faults = [check for check in diagnosis.checks if check.verdict == "bad"]
    doubts = [check for check in diagnosis.checks if check.verdict == "warning"]
    if faults:
        found = "; ".join(f"{c.check}: {brief(c.value)} (expected {c.threshold})" for c in faults)
        words = f"**{name} should not be used as it is.** {found[:1].upper()}{found[1:]}."
    elif doubts:
        words = f"**{name} can be used with care.** Look at: {', '.join(check.check for check in doubts)}."
    else:
        words = f"**Nothing speaks against {name}.**"
    yield Text(words)
    yield Text(
        f"Good: {tally['good']}. Warnings: {tally['warning']}. Bad: {tally['bad']}. Not checked: "
        f"{tally['not checked']}, each with the reason."
    )
    for part in dict.fromkeys(check.part for check in diagnosis.checks):
        yield Text(f"**{part}**")
        yield Verdicts([check[1:] for check in diagnosis.checks if check.part == part], f"{part}: checks and verdicts")


def built(posterior: Posterior, test, train) -> Iterator:
    model, counts, record = posterior.model, posterior.parameter_counts(), posterior.settings.get("fitted_with", {})
    base = getattr(getattr(model.network, "config", None), "_name_or_path", "") or "built in code"
    yield Facts(
        {
            "network": f"{type(model.network).__name__} ({base})",
            "adapter": repr(model.adapter),
            "adapted modules": len(model.modules),
            "latents D": model.sites.size,
            "prior": repr(model.prior),
            "likelihood": repr(model.likelihood),
            "head": model.head if isinstance(model.head, str) else type(model.head).__name__,
            "guide": repr(posterior.guide_spec),
            "parameters of the posterior": counts["posterior"],
            "parameters of the head": counts["head"],
            "rows fitted (N)": model.size,
            "rows fitted, sha256": record.get(ROWS),
            "labels fitted, sha256": record.get(LABELS),
            "rows tested": len(test) if isinstance(test, datasets.Dataset) else as_batches(test).rows,
            "training rows given": _same_rows(posterior.settings, train),
        }
    )
    settings = {name: value for name, value in posterior.settings.items() if name != "fitted_with"}
    yield Details(
        "Arguments of the fit",
        [Facts({name: value if np.isscalar(value) else str(value) for name, value in settings.items()})],
    )
    here = versions(model.device) | {"arviz": version("arviz")}
    both = pd.DataFrame({"fitted with": record, "reported with": here}, index=list(here))
    note = (
        "" if record else "What it was fitted with is not recorded: it was made by hand, or saved by an older version."
    )
    yield Details("Versions and hardware", [Table(both.rename_axis("of"), "Of the fit and of this report", note=note)])


def _same_rows(settings: Mapping, train) -> str:
    """Whether the rows given as those of the fit have the hashes that the fit recorded."""
    if train is None:
        return "no"
    # A dataset is known by its rows: that takes no tokens.
    batches = None if isinstance(train, datasets.Dataset) else as_batches(train)
    record = settings.get("fitted_with", {})
    known = {name: value for name, value in data_identity(train, batches).items() if name in record}
    if not known:
        return "yes; the fit recorded no hash to know them by"
    wrong = unlike(record, known)
    if not wrong:
        return "yes, by their hashes"
    if not other_rows(settings, train, batches):
        return "yes; whether they are those of the fit is not known: they may come in another order at every pass"
    return f"yes, but others or in another order: not the {' and '.join(wrong)}"


def training(f: Findings) -> Iterator:
    yield Text(f"Verdict: **{f.training.verdict}**. {f.training.reason}.")
    if not f.training.curve.empty:
        bound = "log joint" if f.training.log_joint else "ELBO"
        yield Picture(
            training_curves(f.training),
            f"{bound} per row, its parts and the scales over {len(f.training.curve)} epochs",
            "What is maximised, in nats per row; its penalty in nats; the mean log standard deviation.",
        )
        yield Details("The curve as numbers", [Table(f.training.curve.set_index("epoch"), "A row per epoch")])
    if f.gradient is not None and not f.gradient.table.empty:
        yield Table(f.gradient.table, f"Signal and noise of {f.gradient.batches} gradients where the fit ended")
    if f.training.note:
        yield Note(f.training.note)


def structure(f: Findings) -> Iterator:
    s = f.structure
    if not s.variance > 0:
        yield Note("A point has no covariance: there is no structure to show.")
        return
    words = f"The covariance of the latents has effective rank {s.effective_rank:.1f} of {s.modules['latents'].sum()}"
    yield Text(
        f"{words}; its first direction has {s.share(1):.1%} of the variance, its first eight {s.share(8):.1%}. That of "
        f"W - W0 has effective rank {s.induced_effective_rank:.1f}, with {s.share(1, 'W - W0'):.1%} and "
        f"{s.share(8, 'W - W0'):.1%}, from draws. "
        "These are properties of the guide: whether the posterior itself is low-rank is asked of a reference."
    )
    if f.low_rank is not None:
        caption = "Is the reference low-rank? Not where its effective rank is that without correlation"
        yield Table(f.low_rank.table, caption, {"effective rank": 1, "latents": 0}, note=f.low_rank.note)
    if np.isfinite(s.kl):
        yield Text(
            f"All latents together are {s.kl:.1f} nats from the prior, {s.dependence:.2f} of them in dependence "
            "between modules."
        )
    yield Picture(
        spectrum(s),
        f"Eigenvalues of the covariance of the latents and of W - W0; effective rank {s.effective_rank:.1f}",
        "Eigenvalues, descending. At 1 (dashed) a direction is as wide as the prior: the data say nothing about it.",
    )
    yield Picture(
        modules(s),
        f"Contraction of {len(s.modules)} modules, {s.modules['contraction'].mean():.2f} on average",
        "How much narrower than the prior each module's latents have become.",
    )
    decimals = {
        "latents": 0,
        "effective rank": 1,
        "KL (nats)": 2,
        "effective parameters": 1,
        "W - W0: effective rank": 1,
    }
    yield Table(s.modules, "Modules", decimals)
    if len(s.correlation) > 1:
        yield Picture(
            correlation(s),
            "RV coefficients between modules",
            "How much two modules' latents vary together; the diagonal, which is 1, is left out.",
        )
    for note in filter(None, [s.note, f.missing.get("low_rank")]):
        yield Note(note)


def _given(model: BayesianLoRA) -> str:
    """What the evidence is conditional on."""
    parts = [] if model.head == "bayesian" or not model.head_start else ["a head that is a point"]
    if model.adapter.statistics is not None:
        parts.append("a projection made from the data")
    return f"Conditional on {' and on '.join(parts)}." if parts else ""


def quality(f: Findings, model: BayesianLoRA) -> Iterator:
    if f.importance is not None:
        w, rows = f.importance, f.importance.log_likelihood.shape[1]
        bounds = {"ELBO": w.elbo, "IWAE": w.iwae, "PSIS log evidence": w.log_evidence}
        yield Table(
            pd.DataFrame(
                {
                    "nats": {name: each.value for name, each in bounds.items()},
                    "standard error": {name: each.standard_error for name, each in bounds.items()},
                    "per row": {name: each.value / rows for name, each in bounds.items()},
                }
            ),
            f"The log evidence from {len(w.log_q)} draws: two lower bounds and an estimate",
            note=_given(model),
        )
        yield Picture(weight_tail(w), f"Importance weights by rank, k-hat {w.k_hat:.2f}")
    else:
        yield Note(f"No ELBO and no importance weights: {f.missing['importance']}.")
    if f.loo is not None:
        total = f.loo.total
        yield Text(
            f"Expected log predictive density, leaving each row out: {total.value:.1f} ± {total.standard_error:.1f} "
            f"nats, {total.value / len(f.loo.elpd):.3f} per row."
        )
        yield Picture(loo_k_hat(f.loo), f"k-hat of {len(f.loo.elpd)} rows, limit {f.loo.threshold:.2f}")
    else:
        yield Note(f"No leave-one-out densities: {f.missing['loo']}.")
    if f.reference is not None:
        yield Table(f.reference.table, "Beside the reference posterior", note=f.reference.note)
    else:
        yield Note(f.missing["reference"])


def predictions(f: Findings, name: str) -> Iterator:
    if f.prediction is not None and not isinstance(f.prediction, Prediction):
        yield from _other_labels(f)
        return
    if f.calibration is None:
        yield Note(f"No scores: {f.missing['calibration']}.")
        return
    yield Picture(
        reliability_diagram({name: f.prediction}, f.calibration.bins),
        "Accuracy against confidence in bins",
        "On the diagonal, confidence is accuracy. Bars: Wilson's 95% intervals; below, rows per bin.",
    )
    yield Table(
        f.calibration.errors,
        f"Calibration errors ({f.calibration.bins} bins) beside those of a perfectly calibrated model",
        note="; ".join(filter(None, ["p: how often such a model scores at least as much", f.calibration.note])),
    )
    if f.sweep is not None and len(f.sweep.table) > 1:
        yield Picture(
            draws_needed(f.sweep),
            f"NLL by number of draws up to {f.sweep.draws}",
            "Scores by number of draws, with the Monte Carlo error of so few; the grey band is close enough.",
        )
    if f.votes is not None:
        yield Table(f.votes.table, "Beside people's votes", note="perfect: what so few voters leave a perfect model.")
    if f.temperature is None:
        yield Note(f.missing["temperature"])


def _other_labels(f: Findings) -> Iterator:
    if f.prediction.labels is None:
        yield Note("No scores: the test rows have no labels.")
        return
    by = {"draws": f.prediction, "posterior mean": f.at_mean, "pretrained network": f.at_base}
    scores = {name: prediction.scores() for name, prediction in by.items() if prediction is not None}
    yield Table(pd.DataFrame.from_dict(scores, orient="index").rename_axis("predicted with"), "Scores of the test rows")
    if f.intervals is not None:
        yield Picture(
            pit_histogram(f.intervals),
            f"Predictive probability below the labels; {f.intervals.coverage:.1%} are in the 90% interval",
            "Flat where the predictions are right: heaped at both ends they are too narrow, in the middle too wide. "
            "Grey: where 95% of the bars of a right model are.",
        )


def unsure(f: Findings, test) -> Iterator:
    if isinstance(f.prediction, NumberPrediction):
        p = f.prediction
        columns = {"mean": p.mean, "sd": p.sd, "aleatoric sd": p.aleatoric_sd, "epistemic sd": p.epistemic_sd}
        columns["label"] = p.labels
        frame = pd.DataFrame({name: np.asarray(each) for name, each in columns.items() if each is not None})
        yield Table(frame.rename_axis("row").nlargest(_ROWS, "sd"), "The rows it is least sure of")
        return
    if isinstance(f.prediction, TokenPrediction):
        table = text_scores(f.prediction).nlargest(_ROWS, "NLL per token")
        yield Table(table, "The texts it finds least likely, in nats")
        return
    if f.uncertainty is None:
        yield Note(f.missing["uncertainty"])
        return
    u = f.uncertainty
    yield Text(
        f"Predictive entropy is {u.entropy.mean():.3f} nats per row: {u.expected_entropy.mean():.3f} are aleatoric, in "
        f"the data; {u.mutual_information.mean():.4f} ({u.epistemic_share:.1%}) are epistemic: more data would "
        "take them away."
    )
    if not u.note:
        yield Picture(
            entropy_parts(u),
            "Aleatoric against epistemic part of the entropy of each row",
            "Rows far up are those on which the posterior's draws disagree.",
        )
    if f.selective is not None:
        yield Picture(
            risk_coverage({"posterior": f.selective}),
            f"Risk against coverage, AURC {f.selective.aurc:.3f}",
            "Error rate if only the surest rows are answered; dashed, the best order possible.",
        )
    unsure = most_uncertain(f.prediction, test)
    yield Table(unsure, "The rows it is least sure of", note="; ".join(unsure.attrs["notes"]))
    if f.outside is not None:
        yield Table(f.outside, "Telling rows of another kind apart", note="; ".join(f.outside.attrs["notes"]))
    else:
        yield Note(f.missing["outside"])


def comparison(comparison: Comparison | None, f: Findings) -> Iterator:
    if comparison is None:
        yield Note(f"No comparison: {f.missing.get('prediction') or f.missing['calibration']}.")
        return
    yield Table(
        pd.DataFrame(comparison).rename_axis("posterior"),
        "On the same test rows; differences are paired, with standard errors over rows",
        dict.fromkeys(("parameters", "head", "total"), 0),
        note=" ".join(f"{note}." for note in comparison.attrs["notes"]),
    )
