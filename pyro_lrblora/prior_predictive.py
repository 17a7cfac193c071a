"""What a prior means before any data: for the weights of each module, and for the labels."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from .adapters.targets import weight_shape
from .context import check_context
from .counts import check_counts
from .data import as_batches
from .posterior import local_parameters
from .predictions import Prediction
from .predictive import predict_at
from .tracing import traced_values


@local_parameters
@torch.no_grad()
def prior_predictive(
    model, data, draws: int = 100, seed: int = 0, *, batch_size: int = 64, precision: str = "fp32", tokenizer=None
) -> Prediction:
    """Predict with S draws from the prior, the same S functions for every row.

    A Bayesian head is drawn from its prior too; any other head is the model's own, a learned scale as it is now.

    Args:
        model: a BayesianLoRA; prepared, where its projection looks at data.
        data: a datasets.Dataset, Batches, or a re-iterable of batch dicts; labels are optional.
        draws: S, at least 1.
        seed: of the draws; the same seed gives the same predictions.
        batch_size: rows per forward, for a datasets.Dataset.
        precision: "fp32", "bf16" or "fp16".
        tokenizer: for a datasets.Dataset, where the model has none.

    Raises:
        ValueError: draws < 1, empty data.
    """
    check_counts(draws=draws)
    batches = as_batches(data, tokenizer or model.tokenizer, batch_size=batch_size, by_length=True)
    check_context(model.network, batches.longest, "data")
    return predict_at(model, batches, prior_draws(model, draws, seed), model.head_values(), precision)


@local_parameters
@torch.no_grad()
def prior_draws(model, draws: int, seed: int) -> dict[str, Tensor]:
    """Draws of every site from the prior, its scales and a Bayesian head among them: by site, (S, site shape).

    Args:
        model: a BayesianLoRA.
        draws: S.
        seed: of the draws.
    """
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        samples = [traced_values(model.sample_prior) for _ in range(draws)]
    return {name: torch.stack([sample[name] for sample in samples]) for name in samples[0]}


def induced_sd(model, draws: int = 200, seed: int = 0) -> dict[str, float]:
    """Prior standard deviation of the entries of W - W0 (root mean square over entries), per module.

    Args:
        model: a BayesianLoRA.
        draws: prior draws.
        seed: of the draws.
    """
    squares = dict.fromkeys(model.modules, 0.0)
    samples = prior_draws(model, draws, seed)
    for draw in range(draws):
        latents = model.adapted.per_module({name: samples[name][draw] for name in model.sites.shapes})
        for name, latent in latents.items():
            left, right = model.adapted.low_rank_factors(name, latent)
            # |L R|_F^2 = tr(L'L R R'): r x r throughout.
            squares[name] += float(((left.T @ left) * (right @ right.T)).sum()) / draws
    sizes = {name: math.prod(weight_shape(module)) for name, module in model.modules.items()}
    return {name: (square / sizes[name]) ** 0.5 for name, square in squares.items()}
