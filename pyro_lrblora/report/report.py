"""One page about a posterior: should it be believed, and where is the uncertainty."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from ..comparison import Comparison, check_comparable, compare
from ..data import as_batches, in_one_order
from ..diagnostics.diagnose import Diagnosis, diagnose
from ..posterior import Posterior
from . import sections
from .document import Document, Section
from .html import to_html
from .markdown import to_markdown


def report(
    posteriors: Mapping[str, Posterior],
    test,
    path,
    *,
    train=None,
    validation=None,
    outside=None,
    reference: Posterior | None = None,
    random: Posterior | None = None,
    votes=None,
    gradient_batches: int = 0,
    draws: int = 32,
    evidence_draws: int = 100,
    seed: int = 0,
    title: str = "Posterior report",
    progress: bool = True,
    tokenizer=None,
) -> Report:
    """Examine the first posterior, compare it with the others, and write it all to one page.

    Args:
        posteriors: name -> what a fit returned; the first is examined, all are compared.
        test, train, validation, outside, reference, random, votes: as for diagnose.
        gradient_batches, draws, evidence_draws, seed, tokenizer: likewise; the evidence of the others is left out.
        path: ends in .html for one self-contained file, or in .md for Markdown with its pictures in a folder beside it.
        title: of the page.
        progress: show progress bars.

    Returns:
        What was written, with the diagnosis and the comparison that its numbers come from.

    Raises:
        ValueError: no posteriors, another ending, and what diagnose and compare raise.
    """
    path = Path(path)
    if path.suffix not in (".html", ".md"):
        raise ValueError(f"expected a path ending in .html or .md, got {str(path)!r}; write 'report.html'")
    check_comparable(posteriors)
    name, posterior = next(iter(posteriors.items()))
    test = in_one_order(test)  # once for the checks and the comparison
    diagnosis = diagnose(
        posterior, test, train=train, validation=validation, outside=outside, reference=reference, random=random,
        votes=votes, gradient_batches=gradient_batches, draws=draws, evidence_draws=evidence_draws, seed=seed,
        progress=progress, tokenizer=tokenizer,
    )  # fmt: skip
    held = None if validation is None else as_batches(validation, tokenizer or posterior.model.tokenizer)
    scaled_on = None if held is None or held.labels is None else validation
    predicted = diagnosis.findings.prediction
    labelled = predicted is not None and predicted.labels is not None
    comparison = (
        compare(posteriors, test, validation=scaled_on, draws=draws, seed=seed, progress=progress, tokenizer=tokenizer)
        if labelled
        else None
    )
    document = Document(
        title,
        f"**{name}** among {len(posteriors)} posteriors" if len(posteriors) > 1 else f"**{name}**",
        [
            Section("Summary", list(sections.summary(name, diagnosis))),
            Section("How it was built", list(sections.built(posterior, test, train))),
            Section("Training", list(sections.training(diagnosis.findings))),
            Section("Structure", list(sections.structure(diagnosis.findings))),
            Section("Quality of the approximation", list(sections.quality(diagnosis.findings, posterior.model))),
            Section("Predictions", list(sections.predictions(diagnosis.findings, name))),
            Section("Where it is unsure", list(sections.unsure(diagnosis.findings, test))),
            Section("Comparison", list(sections.comparison(comparison, diagnosis.findings))),
        ],
    )
    written = Report(document, diagnosis, comparison, path)
    path.parent.mkdir(parents=True, exist_ok=True)
    text = written.to_html() if path.suffix == ".html" else to_markdown(document, path.with_suffix(""))
    path.write_text(text, encoding="utf-8")
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
