"""Should this posterior be believed, and where is the uncertainty: one file per question."""

from .calibration import Calibration, calibration
from .diagnose import Diagnosis, diagnose
from .draws_sweep import DrawsSweep, draws_sweep
from .findings import Check, Findings
from .gradient_noise import GradientNoise, gradient_noise
from .human_labels import HumanAgreement, against_votes
from .intervals import Intervals, intervals
from .low_rank import LowRankness, low_rank
from .out_of_distribution import out_of_distribution
from .reference import AgainstReference, against_reference
from .sbc import SBC, full_rank_fit, sbc
from .selective import RiskCoverage, risk_coverage
from .structure import Structure, structure
from .texts import text_scores
from .tiny_problem import tiny_problem
from .training import Training, training
from .uncertainty import Uncertainty, decompose, most_uncertain

__all__ = [
    "SBC",
    "AgainstReference",
    "Calibration",
    "Check",
    "Diagnosis",
    "DrawsSweep",
    "Findings",
    "GradientNoise",
    "HumanAgreement",
    "Intervals",
    "LowRankness",
    "RiskCoverage",
    "Structure",
    "Training",
    "Uncertainty",
    "against_reference",
    "against_votes",
    "calibration",
    "decompose",
    "diagnose",
    "draws_sweep",
    "full_rank_fit",
    "gradient_noise",
    "intervals",
    "low_rank",
    "most_uncertain",
    "out_of_distribution",
    "risk_coverage",
    "sbc",
    "structure",
    "text_scores",
    "tiny_problem",
    "training",
]
