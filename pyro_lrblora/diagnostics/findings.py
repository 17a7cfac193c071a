"""What the checks of a posterior are made from, and the rows they become."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np
import pandas as pd

from ..evidence import LOO, Importance
from ..metrics import standard_error
from ..predictions import NumberPrediction, Prediction, TokenPrediction
from .calibration import Calibration
from .draws_sweep import DrawsSweep
from .gradient_noise import GradientNoise
from .human_labels import HumanAgreement
from .intervals import Intervals
from .low_rank import LowRankness
from .reference import AgainstReference
from .selective import RiskCoverage
from .structure import Structure
from .training import Training
from .uncertainty import Uncertainty


class Check(NamedTuple):
    """One row: what was checked, what came out, what it is held against, and what follows."""

    part: str
    check: str
    value: float | str | None
    threshold: str
    verdict: str
    meaning: str
    advice: str


@dataclass(frozen=True)
class Findings:
    """What the checks are made from; a part that could not be had is None, with its reason in `missing`.

    Args:
        training: see diagnostics.training.
        structure: see diagnostics.structure.
        importance: log densities of draws over the fitted rows, for ELBO, IWAE and k-hat.
        loo: PSIS-LOO of the fitted rows.
        prediction: of the test rows.
        at_mean: the same at the posterior mean.
        at_base: of texts, the same by the pretrained network.
        intervals: of numbers, see diagnostics.intervals.
        calibration, selective, sweep: of classes, of the test rows with labels.
        uncertainty: of the test rows.
        temperature: fitted on validation rows.
        temperature_gain: log likelihood of all validation rows that it gains over a temperature of 1, nats.
        outside: table of diagnostics.out_of_distribution.
        votes: see diagnostics.against_votes.
        gradient: see diagnostics.gradient_noise.
        reference: see diagnostics.reference.
        reference_r_hat: the largest, of the chains of a reference that has any.
        low_rank: of the reference, see diagnostics.low_rank.
        other_rows: the training rows are, by their hash, not those that were fitted, or in another order.
        missing: name of a part -> why it is None; a part nobody asked for may be in neither.
    """

    training: Training
    structure: Structure
    importance: Importance | None = None
    loo: LOO | None = None
    prediction: Prediction | NumberPrediction | TokenPrediction | None = None
    at_mean: Prediction | NumberPrediction | TokenPrediction | None = None
    at_base: TokenPrediction | None = None
    intervals: Intervals | None = None
    calibration: Calibration | None = None
    selective: RiskCoverage | None = None
    sweep: DrawsSweep | None = None
    uncertainty: Uncertainty | None = None
    temperature: float | None = None
    temperature_gain: float | None = None
    outside: pd.DataFrame | None = None
    votes: HumanAgreement | None = None
    gradient: GradientNoise | None = None
    reference: AgainstReference | None = None
    reference_r_hat: float | None = None
    low_rank: LowRankness | None = None
    other_rows: bool = False
    missing: Mapping[str, str] = field(default_factory=dict)


def unchecked(check: str, reason: str) -> tuple:
    """The row, without its part, of what cannot be checked."""
    return check, None, "", "not checked", sentence(reason), ""


def sentence(text: str) -> str:
    return text[:1].upper() + text[1:].rstrip(".") + "."


def against_simpler(losses: np.ndarray, simpler: np.ndarray) -> tuple[float, float, float, str]:
    """Are losses (N,) below a simpler model's? Their mean, its mean, that less two standard errors, and the verdict.

    What knows nothing is below a simpler model by chance every other time, hence the standard errors.
    """
    value, base = float(losses.mean()), float(simpler.mean())
    limit = base - 2 * error(losses - simpler)
    return value, base, limit, "good" if value < limit else "warning" if value < base else "bad"


def no_better(
    value: float,
    base: float,
    verdict: str,
    simpler: str = "no model",
    advice: str = "The model predicts no better than no model: check labels, rates and data.",
) -> str:
    """What follows from against_simpler's verdict; the advice is for what is worse than the simpler model."""
    if verdict == "good":
        return ""
    return f"Better than {simpler} by less than chance can give: test on more rows." if value < base else advice


def error(values: np.ndarray) -> float:
    """Standard error of the mean; 0 of one row, so that a limit made of it stays a number."""
    return float(np.nan_to_num(standard_error(values)))
