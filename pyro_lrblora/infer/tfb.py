"""One scale around a point fit, found by search (TFB; Shi et al. 2024, arXiv 2412.05723)."""

from __future__ import annotations

import math

import torch

from ..data import as_batches
from ..guides import Diagonal
from ..posterior import Posterior, local_parameters
from ..predictive import predict
from ..priors import prior_variance
from .start import base_guide


@local_parameters
@torch.no_grad()
def tfb(
    point: Posterior,
    anchor,
    *,
    tolerance: float = 0.003,
    draws: int = 10,
    steps: int = 12,
    seed: int = 0,
    tokenizer=None,
) -> Posterior:
    """The widest isotropic normal around a point that costs at most `tolerance` of its NLL on an anchor set.

    The NLL of densities may be negative: what is allowed is the point's NLL plus `tolerance` times its absolute value.

    No training: bisection over the scale, the same draws of noise at each. On LoRA-XS it widens R; on LoRA the
    factor A, B staying a point. (The paper scales A's noise by the singular values of B.)

    Args:
        point: a fit with a Delta guide.
        anchor: rows with labels, from training or validation, never the rows that are scored.
        tolerance: increase of the NLL relative to its absolute value, 0.003 in the paper.
        draws: S, for each NLL.
        steps: bisections; 12 find the scale within 0.2% of the range searched, in its logarithm.
        seed: of the draws.
        tokenizer: for a datasets.Dataset, where the model has none.

    Returns:
        A Posterior with a Diagonal guide; settings hold the scale as a share of the prior's and both NLLs.

    Raises:
        ValueError: not a point, a Bayesian head, or no labels in the anchor set.
    """
    if not point.is_point or not hasattr(point.guide, "loc"):
        raise ValueError(f"expected a point posterior, fitted with guide=lb.guides.Delta(), got {point.guide_spec!r}")
    if point.model.head == "bayesian":
        raise ValueError("expected a point fitted with head='point', 'frozen' or a FixedHead, got head='bayesian'")
    if tolerance <= 0 or steps < 1:
        raise ValueError(f"expected tolerance > 0 and steps >= 1, got tolerance={tolerance}, steps={steps}")
    model = point.model
    batches = as_batches(anchor, tokenizer or model.tokenizer, batch_size=64, by_length=True)
    model.check_labels(batches, "anchor set")
    both = any(site[0] == "B" for site in model.sites.shapes)
    spec = Diagonal(point_sites=("B",) if both else ())
    guide = base_guide(model, spec, point)
    prior_sd = model.sites.join(prior_variance(model.sample_prior, model.sites.shapes)).sqrt()
    # The rows are those of the point's fit: the anchor only widens it.
    record = {name: value for name, value in point.settings.items() if name == "fitted_with"}
    posterior = Posterior(model, guide, spec, list(point.history), record | {"point fit": point.settings})

    def score(share: float) -> float:
        guide.scale = (share * prior_sd.mean()).expand(guide.scale.shape).clone()
        return predict(posterior, batches, draws=draws, seed=seed).nll

    base = predict(point, batches, draws=1).nll
    allowed = base + tolerance * abs(base)
    low, high = -9.0, 3.0  # of the log of the scale's share of the prior's
    for _ in range(steps):
        middle = (low + high) / 2
        low, high = (middle, high) if score(math.exp(middle)) <= allowed else (low, middle)
    share = math.exp(low)
    found = score(share)
    posterior.settings.update(
        method="tfb", tolerance=tolerance, draws=draws, seed=seed, scale=share, nll=found, nll_at_point=base
    )
    return posterior
