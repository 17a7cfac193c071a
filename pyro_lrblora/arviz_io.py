"""Posteriors as ArviZ data. The only file that knows ArviZ 0.x from 1.x."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import suppress

import numpy as np
import torch

from .data import as_batches
from .posterior import Posterior
from .predictive import predict

_AXES = ("module", "row", "col")


def to_arviz(posterior: Posterior, data=None, draws: int = 100, seed: int = 0):
    """A posterior's draws, prior draws and predictions: InferenceData on ArviZ 0.x, an xarray DataTree on 1.x.

    Groups: posterior, prior and sample_stats (log_q, the guide's log density in nats, where it has one); with data
    also posterior_predictive, and with labels log_likelihood and observed_data. Draws are independent: one chain, no
    R-hat or ESS to look at. Latent sites have the dims (module, row, col), with module names as coordinates.

    Args:
        posterior: what a fit returned.
        data: rows to predict, see predict; None leaves out the groups that need them.
        draws: S.
        seed: of the draws.
    """
    samples = posterior.sample(draws, seed=seed)
    with torch.random.fork_rng(), torch.no_grad():
        torch.manual_seed(seed)
        prior = [posterior.model.sample_prior() for _ in range(draws)]
    groups = {
        "posterior": _one_chain(samples),
        "prior": _one_chain({name: torch.stack([draw[name] for draw in prior]) for name in prior[0]}),
    }
    with suppress(TypeError):  # the guide has no density
        groups["sample_stats"] = _one_chain({"log_q": posterior.log_prob(samples)})
    if data is not None:
        batches = as_batches(data, posterior.model.tokenizer, batch_size=64, by_length=True)
        prediction = predict(posterior, batches, draws=draws, seed=seed)
        log_probs = prediction.logits.log_softmax(-1)
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            groups["posterior_predictive"] = _one_chain(
                {"labels": torch.distributions.Categorical(logits=log_probs).sample()}
            )
        if prediction.labels is not None:
            index = prediction.labels.expand(draws, -1).unsqueeze(-1)
            groups["log_likelihood"] = _one_chain({"labels": log_probs.gather(-1, index).squeeze(-1)})
            groups["observed_data"] = {"labels": prediction.labels.numpy()}
    dims, coords = _dims_and_coords(posterior.model, groups["posterior"])
    return from_groups(groups, dims, coords)


def from_groups(
    groups: Mapping[str, Mapping[str, np.ndarray]],
    dims: Mapping[str, list[str]],
    coords: Mapping[str, list],
):
    """ArviZ data from arrays of shape (chain, draw, ...), observed_data without those two axes.

    Args:
        groups: group -> variable -> array.
        dims: variable -> names of the axes after chain and draw.
        coords: axis -> labels.
    """
    import arviz as az

    groups = {group: dict(variables) for group, variables in groups.items()}
    if int(az.__version__.split(".")[0]) >= 1:
        return az.from_dict(groups, dims=dict(dims), coords=dict(coords))
    return az.from_dict(**groups, dims=dict(dims), coords=dict(coords))


def _one_chain(values: Mapping[str, torch.Tensor]) -> dict[str, np.ndarray]:
    """(S, ...) as (chain=1, draw=S, ...)."""
    return {name: value.detach().cpu().numpy()[None] for name, value in values.items()}


def _dims_and_coords(model, variables: Mapping[str, np.ndarray]) -> tuple[dict, dict]:
    """Axis names of every latent site and of the prior's scales that follow its axes."""
    sites, dims, coords = model.sites.shapes, {"labels": ["observation"]}, {}
    for site, shape in sites.items():
        # With several sites, "module" means other modules in each: the axes carry the site's name.
        axes = [axis if len(sites) == 1 else f"{axis}_{site}" for axis in _AXES]
        coords[axes[0]] = model.adapted.members[site]
        for name, array in variables.items():
            own = array.shape[2:]
            if (name == site or name.startswith(f"{site}_")) and own == tuple(shape[: len(own)]) and name not in dims:
                dims[name] = axes[: len(own)]
    return dims, coords
