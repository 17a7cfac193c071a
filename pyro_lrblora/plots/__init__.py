"""Pictures of what the diagnostics return: functions of a result that give a matplotlib Figure."""

from .predictive import draws_needed, entropy_parts, pit_histogram, risk_coverage
from .ranks import ecdf_differences, rank_histograms
from .reliability import reliability_diagram
from .structure import correlation, modules, spectrum
from .training import training_curves
from .weights import loo_k_hat, weight_tail

__all__ = [
    "correlation",
    "draws_needed",
    "ecdf_differences",
    "entropy_parts",
    "loo_k_hat",
    "modules",
    "pit_histogram",
    "rank_histograms",
    "reliability_diagram",
    "risk_coverage",
    "spectrum",
    "training_curves",
    "weight_tail",
]
