"""Bayesian LoRA in a projected subspace, on Pyro: fine-tune a transformer and know how sure it is."""

from . import (
    adapters,
    callbacks,
    data,
    diagnostics,
    distributions,
    evidence,
    guides,
    infer,
    likelihoods,
    metrics,
    plots,
    priors,
    projections,
    sharing,
)
from .adapters import LoRA, LoRAXS
from .comparison import Comparison, compare
from .data import Batches
from .diagnostics import Diagnosis, diagnose
from .generation import Generation, generate
from .head import FixedHead
from .infer import ChainsNotConverged, Rates, ScalesNotConverged, parallel_fits
from .infer import svi as fit
from .model import BayesianLoRA
from .peft_io import import_peft
from .posterior import Posterior, fixed_from
from .predictions import NumberPrediction, Prediction, TokenPrediction
from .predictive import predict
from .report import Report, report

__all__ = [
    "Batches",
    "BayesianLoRA",
    "ChainsNotConverged",
    "Comparison",
    "Diagnosis",
    "FixedHead",
    "Generation",
    "LoRA",
    "LoRAXS",
    "NumberPrediction",
    "Posterior",
    "Prediction",
    "Rates",
    "Report",
    "ScalesNotConverged",
    "TokenPrediction",
    "adapters",
    "callbacks",
    "compare",
    "data",
    "diagnose",
    "diagnostics",
    "distributions",
    "evidence",
    "fit",
    "fixed_from",
    "generate",
    "guides",
    "import_peft",
    "infer",
    "likelihoods",
    "metrics",
    "parallel_fits",
    "plots",
    "predict",
    "priors",
    "projections",
    "report",
    "sharing",
]
