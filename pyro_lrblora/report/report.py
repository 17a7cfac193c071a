"""One page about a posterior: should it be believed, and where is the uncertainty."""

from __future__ import annotations

import platform
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path

import numpy as np
import pandas as pd
import torch

from ..comparison import Comparison, compare
from ..diagnostics.diagnose import Diagnosis, diagnose
from ..diagnostics.findings import Findings
from ..diagnostics.uncertainty import most_uncertain
from ..formatting import brief
from ..plots.predictive import draws_needed, entropy_parts, risk_coverage
from ..plots.reliability import reliability_diagram
from ..plots.structure import correlation, modules, spectrum
from ..plots.training import training_curves
from ..plots.weights import loo_k_hat, weight_tail
from ..posterior import Posterior
from .document import Details, Document, Facts, Note, Picture, Section, Table, Text, Verdicts
from .html import to_html
from .markdown import to_markdown

_PACKAGES = ("pyro_lrblora", "torch", "pyro-ppl", "transformers", "arviz", "numpy")


def report(
    posteriors: Mapping[str, Posterior],
    test,
    path,
    *,
    train=None,
    validation=None,
    outside=None,
    reference: Posterior | None = None,
    draws: int = 32,
    evidence_draws: int = 100,
    seed: int = 0,
    title: str = "Posterior report",
    tokenizer=None,
) -> Report:
    """Examine the first posterior, compare it with the others, and write it all to one page.

    Args:
        posteriors: name -> what a fit returned; the first is examined, all are compared.
        test, train, validation, outside, reference, draws, evidence_draws, seed, tokenizer: as for diagnose; the
            evidence of the others is left out.
        path: ends in .html for one self-contained file, or in .md for Markdown with its pictures in a folder beside it.
        title: of the page.

    Returns:
        What was written, with the diagnosis and the comparison that its numbers come from.

    Raises:
        ValueError: no posteriors, another ending, and what diagnose and compare raise.
    """
    path = Path(path)
    if path.suffix not in (".html", ".md"):
        raise ValueError(f"expected a path ending in .html or .md, got {str(path)!r}; write 'report.html'")
    if not posteriors:
        raise ValueError("expected at least one posterior, got none; write {'name': posterior}")
    name, posterior = next(iter(posteriors.items()))
    diagnosis = diagnose(
        posterior, test, train=train, validation=validation, outside=outside, reference=reference, draws=draws,
        evidence_draws=evidence_draws, seed=seed, tokenizer=tokenizer,
    )  # fmt: skip
    labelled = diagnosis.findings.calibration is not None
    comparison = (
        compare(posteriors, test, validation=validation, draws=draws, seed=seed, tokenizer=tokenizer)
        if labelled
        else None
    )
    document = Document(
        title,
        f"**{name}** among {len(posteriors)} posteriors" if len(posteriors) > 1 else f"**{name}**",
        [
            Section("Summary", list(_summary(name, diagnosis))),
            Section("How it was built", list(_built(posterior, test, train))),
            Section("Training", list(_training(diagnosis.findings))),
            Section("Structure", list(_structure(diagnosis.findings))),
            Section("Quality of the approximation", list(_quality(diagnosis.findings))),
            Section("Predictions", list(_predictions(diagnosis.findings, name))),
            Section("Where it is unsure", list(_unsure(diagnosis.findings, test))),
            Section("Comparison", list(_comparison(comparison, diagnosis.findings))),
        ],
    )
    written = Report(document, diagnosis, comparison, path)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(written.to_html() if path.suffix == ".html" else to_markdown(document, path.with_suffix("")))
    return written


@dataclass(frozen=True, repr=False)
class Report:
    """What `report` wrote.

    Args:
        document: its blocks.
        diagnosis: of the first posterior.
        comparison: of all of them; None where the test rows have no labels.
        path: where it was written.
    """

    document: Document
    diagnosis: Diagnosis
    comparison: Comparison | None
    path: Path

    def __repr__(self) -> str:
        return f"Report({str(self.path)!r})"

    def to_html(self) -> str:
        """The page as one HTML file."""
        return to_html(self.document)

    def to_markdown(self, pictures: str | Path | None = None) -> str:
        """The page as Markdown; its pictures go to a folder, or are left out."""
        return to_markdown(self.document, pictures)


def _summary(name: str, diagnosis: Diagnosis) -> Iterator:
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
        yield Verdicts([check[1:] for check in diagnosis.checks if check.part == part])


def _built(posterior: Posterior, test, train) -> Iterator:
    model, counts = posterior.model, posterior.parameter_counts()
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
            "rows tested": len(test) if hasattr(test, "__len__") else None,
            "training rows given": "yes" if train is not None else "no",
        }
    )
    settings = {name: value if np.isscalar(value) else str(value) for name, value in posterior.settings.items()}
    yield Details("Arguments of the fit", [Facts(settings)])
    yield Details("Versions and hardware", [Facts(_versions(model))])


def _versions(model) -> dict[str, str]:
    cuda = model.device.type == "cuda"
    device = torch.cuda.get_device_name(model.device) if cuda else platform.processor() or platform.machine()
    machine = {"Python": platform.python_version(), "device": f"{model.device} {device}".strip()}
    return machine | {"threads": str(torch.get_num_threads())} | {name: version(name) for name in _PACKAGES}


def _training(f: Findings) -> Iterator:
    yield Text(f"Verdict: **{f.training.verdict}**. {f.training.reason}.")
    if not f.training.curve.empty:
        bound = "log joint" if f.training.log_joint else "ELBO"
        yield Picture(
            training_curves(f.training),
            f"{bound} per row, its parts and the scales over {len(f.training.curve)} epochs",
            "What is maximised, in nats per row; its penalty in nats; the mean log standard deviation.",
        )
        yield Details("The curve as numbers", [Table(f.training.curve.set_index("epoch"), "A row per epoch")])
    if f.training.note:
        yield Note(f.training.note)


def _structure(f: Findings) -> Iterator:
    s = f.structure
    if not s.variance > 0:
        yield Note("A point has no covariance: there is no structure to show.")
        return
    words = f"The covariance of the latents has effective rank {s.effective_rank:.1f} of {s.modules['latents'].sum()}"
    yield Text(
        f"{words}; its first direction has {s.share(1):.1%} of the variance, its first eight {s.share(8):.1%}. "
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
    yield Table(s.modules, "Modules", {"latents": 0, "effective rank": 1, "KL (nats)": 2, "effective parameters": 1})
    if len(s.correlation) > 1:
        yield Picture(
            correlation(s),
            "RV coefficients between modules",
            "How much two modules' latents vary together; the diagonal, which is 1, is left out.",
        )
    for note in filter(None, [s.note, f.missing.get("low_rank")]):
        yield Note(note)


def _quality(f: Findings) -> Iterator:
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
            f"Bounds on the log evidence from {len(w.log_q)} draws",
            note="Conditional on a point head and on a projection made from the data.",
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


def _predictions(f: Findings, name: str) -> Iterator:
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
    if len(f.sweep.table) > 1:
        yield Picture(
            draws_needed(f.sweep),
            f"NLL by number of draws up to {f.sweep.draws}",
            "Scores by number of draws, with the Monte Carlo error of so few; the grey band is close enough.",
        )
    if f.temperature is None:
        yield Note(f.missing["temperature"])


def _unsure(f: Findings, test) -> Iterator:
    if f.uncertainty is None:
        yield Note(f.missing["uncertainty"])
        return
    u = f.uncertainty
    yield Text(
        f"Predictive entropy is {u.entropy.mean():.3f} nats per row: {u.expected_entropy.mean():.3f} are in the data, "
        f"{u.mutual_information.mean():.4f} ({u.model_share:.1%}) in the model and could be learned away."
    )
    if not u.note:
        yield Picture(
            entropy_parts(u),
            "Data part against model part of the entropy of each row",
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


def _comparison(comparison: Comparison | None, f: Findings) -> Iterator:
    if comparison is None:
        yield Note(f"No comparison: {f.missing['calibration']}.")
        return
    yield Table(
        pd.DataFrame(comparison).rename_axis("posterior"),
        "On the same test rows; differences are paired, with standard errors over rows",
        dict.fromkeys(("parameters", "head", "total"), 0),
        note=" ".join(f"{note}." for note in comparison.attrs["notes"]),
    )
