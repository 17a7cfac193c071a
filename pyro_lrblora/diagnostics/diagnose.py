"""Everything that can be checked about a posterior, as rows with a verdict."""

from __future__ import annotations

import json
import textwrap
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import pandas as pd

from .. import metrics
from ..counts import check_counts
from ..data import as_batches, in_one_order
from ..evidence import check_fitted_rows, importance, psis_loo, why_no_density
from ..formatting import brief
from ..guides.draws import DrawsGuide
from ..guides.ensemble import EnsembleGuide
from ..guides.mixture import MixtureGuide
from ..posterior import Posterior
from ..predictions import NumberPrediction, Prediction, TokenPrediction
from ..predictive import predict, predict_at
from ..provenance import other_rows
from .calibration import calibration
from .draws_sweep import draws_sweep
from .findings import Check, Findings
from .gradient_noise import gradient_noise
from .human_labels import against_votes
from .intervals import intervals
from .low_rank import check_random, low_rank
from .out_of_distribution import out_of_distribution
from .reference import against_reference
from .selective import risk_coverage
from .structure import structure
from .training import training
from .uncertainty import decompose
from .verdicts import verdicts

VERDICTS = ("good", "warning", "bad", "not checked")
_OF_CLASSES = ("calibration", "selective", "sweep", "uncertainty", "temperature", "outside")


def diagnose(
    posterior: Posterior,
    test,
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
    bins: int = 15,
    seed: int = 0,
    progress: bool = True,
    tokenizer=None,
) -> Diagnosis:
    """Check a posterior from its training to its predictions, and say what each number means and what to do.

    What cannot be checked is a row too, with the reason. The rules are in diagnostics/verdicts.py, prediction_rules.py
    and, for numbers and texts, label_rules.py.

    Args:
        posterior: what a fit returned.
        test: rows for the predictive checks; without labels, only those that need none.
        train: the rows that were fitted: adds ELBO, importance weights and LOO.
        validation: rows that the temperature is fitted on.
        outside: rows of another kind, which the posterior should be less sure of.
        reference: a better known posterior in the same subspace (lb.infer.nuts, laplace structure="full").
        random: beside a reference, the same in a subspace of projections.Random(): what low rank it has by chance, see
            diagnostics.low_rank.
        votes: (N, C) counts of many people's labels for the test rows, see diagnostics.against_votes.
        gradient_batches: gradients of the fitted rows to measure signal and noise on, see diagnostics.gradient_noise;
            0 leaves that out, 16 are enough.
        draws: S of the predictions.
        evidence_draws: S of ELBO and LOO.
        bins: of the ECE.
        seed: of all draws.
        progress: show a progress bar over each pass over the data that takes more than two seconds.
        tokenizer: for a datasets.Dataset, where the model has none.

    Returns:
        Prints as a table; `table` is a DataFrame, `to_json()` text, `findings` all that the checks were made from.

    Raises:
        TypeError: not a posterior.
        ValueError: before any prediction: draws < 1, empty data, labels that are no classes of the model, training
            rows that are not as many as were fitted, a reference in another subspace, `random` without a reference
            or in a subspace that is not, votes that are not one row per test row, gradient_batches of 1 or without
            train.
    """
    if not isinstance(posterior, Posterior):
        raise TypeError(f"expected a posterior, what lb.fit returned, got {type(posterior).__name__}")
    check_counts(draws=draws, evidence_draws=evidence_draws)
    tokenizer = tokenizer or posterior.model.tokenizer
    given = {"test": test, "train": train, "validation": validation, "outside": outside}
    data = {
        role: as_batches(in_one_order(rows), tokenizer, batch_size=64, by_length=True)
        for role, rows in given.items()
        if rows is not None
    }
    for role in data.keys() & {"test", "validation"}:
        if data[role].labels is not None:
            posterior.model.check_labels(data[role], f"{role} rows")
    if train is not None:
        check_fitted_rows(posterior, data["train"])
    _check_optional(reference, random, votes, gradient_batches, data)
    findings = {"training": training(posterior), "structure": structure(posterior, seed=seed)}
    if gradient_batches:
        # The rows as they were given: the fit's own batches are made of them.
        findings["gradient"] = gradient_noise(posterior, train, gradient_batches, seed, tokenizer=tokenizer)
    missing = {}
    for part in (
        _evidence(posterior, data.get("train"), evidence_draws, seed, progress),
        _predictions(posterior, data, draws, bins, seed, votes, progress),
        _reference(posterior, reference, random, data["test"], seed, progress),
    ):
        findings |= {name: value for name, value in part.items() if not isinstance(value, str)}
        missing |= {name: value for name, value in part.items() if isinstance(value, str)}
    findings = Findings(
        **findings,
        other_rows=train is not None and other_rows(posterior.settings, train, data["train"]),
        missing=missing,
    )
    return Diagnosis(tuple(verdicts(findings)), findings)


@dataclass(frozen=True, repr=False)
class Diagnosis:
    """What `diagnose` returns.

    Args:
        checks: the rows.
        findings: the results they were made from.
    """

    checks: tuple[Check, ...]
    findings: Findings

    @property
    def table(self) -> pd.DataFrame:
        """A row per check; columns as in Check."""
        return pd.DataFrame(self.checks, columns=Check._fields)

    @property
    def tally(self) -> dict[str, int]:
        """How many checks have each verdict."""
        words = [check.verdict for check in self.checks]
        return {verdict: words.count(verdict) for verdict in VERDICTS}

    def to_json(self) -> str:
        """The rows as a JSON list; what is not a finite number is null."""
        finite = lambda v: None if isinstance(v, float) and not np.isfinite(v) else v
        rows = [{name: finite(value) for name, value in check._asdict().items()} for check in self.checks]
        return json.dumps(rows, indent=2)

    def __repr__(self) -> str:
        lines, part = [], None
        for check in self.checks:
            if check.part != part:
                part = check.part
                lines.append(f"\n{part}" if lines else part)
            value = "" if check.value is None else brief(check.value)
            held = f" ({check.threshold})" if check.threshold and value else ""
            lines.append(f"  [{check.verdict}] {check.check}{': ' if value else ''}{value}{held}")
            words = f"{check.meaning} {check.advice}".strip() if check.verdict != "good" else check.meaning
            lines += textwrap.wrap(words, 112, initial_indent="      ", subsequent_indent="      ")
        tally = ", ".join(f"{count} {verdict}" for verdict, count in self.tally.items() if count)
        return "\n".join([*lines, "", tally])


def _evidence(posterior: Posterior, train, draws: int, seed: int, progress: bool) -> dict:
    if train is None:
        return dict.fromkeys(("importance", "loo"), "no training rows were given: write train=")
    if isinstance(posterior.guide, DrawsGuide):
        reason = "stored draws have no density, and so no ELBO"
        return {"importance": reason, "loo": psis_loo(posterior, train, draws, seed, progress=progress)}
    reason = why_no_density(posterior)
    if reason:
        return dict.fromkeys(("importance", "loo"), reason)
    pieces = importance(posterior, train, draws, seed, progress=progress)
    return {"importance": pieces, "loo": pieces.loo}


def _predictions(posterior: Posterior, data: Mapping, draws: int, bins: int, seed: int, votes, progress: bool) -> dict:
    model, how = posterior.model, {"draws": posterior.balanced_draws(draws), "seed": seed, "progress": progress}
    if not (model.predicts_classes or hasattr(model.likelihood, "prediction")):
        reason = f"the likelihood {model.likelihood!r} does not predict classes, and has no `prediction` of its own"
        return dict.fromkeys(("prediction", "at_mean", *_OF_CLASSES, *([] if votes is None else ["votes"])), reason)
    prediction = predict(posterior, data["test"], **how)
    parts = {"prediction": prediction, "at_mean": _at_mean(posterior, data["test"], progress)}
    if isinstance(prediction, Prediction):
        return parts | _of_classes(posterior, prediction, data, how, bins, votes)
    parts |= dict.fromkeys(_OF_CLASSES, f"this is of class probabilities, and {model.likelihood!r} has none")
    if votes is not None:
        parts["votes"] = parts["calibration"]
    if isinstance(prediction, NumberPrediction):
        known = prediction.labels is not None
        parts["intervals"] = intervals(prediction) if known else "the test rows have no labels"
    elif isinstance(prediction, TokenPrediction):
        pretrained = {name: value.unsqueeze(0) for name, value in model.start().items()}
        parts["at_base"] = predict_at(model, data["test"], pretrained, posterior.head(), progress=progress)
    return parts


def _at_mean(posterior: Posterior, test, progress: bool):
    if posterior.is_point:
        return "a point is its own mean"
    if isinstance(posterior.guide, EnsembleGuide | MixtureGuide):
        return "the mean of several modes is none of them"
    return predict(posterior, test, at="mean", progress=progress)


def _of_classes(posterior: Posterior, prediction: Prediction, data: Mapping, how: Mapping, bins: int, votes) -> dict:
    parts, labels = {"uncertainty": decompose(prediction)}, prediction.labels
    if labels is None:
        parts |= dict.fromkeys(("calibration", "selective", "sweep"), "the test rows have no labels")
    else:
        parts["calibration"] = calibration(prediction.probs, labels, bins=bins, seed=how["seed"])
        parts["selective"] = risk_coverage(prediction.probs, labels)
        parts["sweep"] = draws_sweep(prediction, seed=how["seed"], bins=bins)
        if isinstance(posterior.guide, EnsembleGuide):
            parts["sweep"] = "an ensemble is predicted by all of its members"
    if "validation" not in data:
        parts["temperature"] = "no validation rows were given: temperature scaling left out"
    elif data["validation"].labels is None:
        parts["temperature"] = "the validation rows have no labels: temperature scaling left out"
    else:
        log_probs, known = predict(posterior, data["validation"], **how).log_probs, data["validation"].labels
        parts |= _temperature(log_probs, known)
    if "outside" not in data:
        parts["outside"] = "no rows of another kind were given: write outside="
    else:
        parts["outside"] = out_of_distribution(prediction, predict(posterior, data["outside"], **how))
    if votes is not None:
        parts["votes"] = against_votes(prediction.probs, votes, seed=how["seed"])
    return parts


def _temperature(log_probs, labels) -> dict:
    if metrics.separable(log_probs, labels):
        return {"temperature": f"all {len(labels)} validation rows are right, by which none is best; give more"}
    temperature = metrics.fit_temperature(log_probs, labels)
    untempered, tempered = (metrics.tempered_nll(log_probs, labels, each) for each in (1.0, temperature))
    gain = len(labels) * (untempered - tempered)
    return {"temperature": temperature, "temperature_gain": gain}


def _reference(
    posterior: Posterior, reference: Posterior | None, random: Posterior | None, test, seed: int, progress: bool
) -> dict:
    if reference is None:
        reason = "no reference posterior was given: write reference=lb.infer.nuts(...) where D allows"
        return dict.fromkeys(("reference", "low_rank"), reason)
    parts = {"reference": against_reference(posterior, reference, test, seed=seed, progress=progress)}
    if "r_hat" in reference.settings:
        parts["reference_r_hat"] = float(reference.settings["r_hat"])
    try:
        parts["low_rank"] = low_rank(reference, random, seed=seed)
    except (TypeError, ValueError) as error:  # a reference whose form decides, or too many latents
        parts["low_rank"] = str(error)
    return parts


def _check_optional(reference, random, votes, gradient_batches: int, data: Mapping) -> None:
    if random is not None:
        if reference is None:
            raise ValueError("expected reference= with random=: it is the null that a reference is held against")
        check_random(reference, random)
    if votes is not None and len(votes) != data["test"].rows:
        raise ValueError(
            f"expected votes= with a row of counts per test row, {data['test'].rows}, got {len(votes)}; write "
            "lb.diagnostics.against_votes(prediction.probs, votes) for other rows"
        )
    if gradient_batches and (gradient_batches < 2 or "train" not in data):
        raise ValueError(
            f"expected gradient_batches >= 2 with train=, got {gradient_batches}"
            + ("" if "train" in data else " and no training rows")
        )
