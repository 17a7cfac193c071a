"""What the checks of a posterior are made from, and the rows they become."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import NamedTuple

import pandas as pd

from ..evidence import LOO, Importance
from ..predictive import Prediction
from .calibration import Calibration
from .draws_sweep import DrawsSweep
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
        calibration, selective, sweep: of the test rows, with labels.
        uncertainty: of the test rows.
        temperature: fitted on validation rows.
        temperature_gain: log likelihood of all validation rows that it gains over a temperature of 1, nats.
        outside: table of diagnostics.out_of_distribution.
        reference: see diagnostics.reference.
        low_rank: of the reference, see diagnostics.low_rank.
        missing: name of a part -> why it is None.
    """

    training: Training
    structure: Structure
    importance: Importance | None = None
    loo: LOO | None = None
    prediction: Prediction | None = None
    at_mean: Prediction | None = None
    calibration: Calibration | None = None
    selective: RiskCoverage | None = None
    sweep: DrawsSweep | None = None
    uncertainty: Uncertainty | None = None
    temperature: float | None = None
    temperature_gain: float | None = None
    outside: pd.DataFrame | None = None
    reference: AgainstReference | None = None
    low_rank: LowRankness | None = None
    missing: Mapping[str, str] = field(default_factory=dict)
