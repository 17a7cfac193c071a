"""Posteriors as ArviZ data. This file and arviz_plots.py are the only two that know ArviZ 0.x from 1.x."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import suppress

import numpy as np
import torch

from .data import as_batches
from .guides.draws import DrawsGuide
from .posterior import Posterior
from .predictions import Prediction, TokenPrediction
from .predictive import predict
from .prior_predictive import prior_draws

_AXES = ("module", "row", "col")


def to_arviz(posterior: Posterior, data=None, draws: int | None = None, seed: int = 0):
    """A posterior's draws, prior draws and predictions: InferenceData on ArviZ 0.x, an xarray DataTree on 1.x.

    Groups: posterior, prior and sample_stats (log_q, the guide's log density in nats, where it has one); with data
    also posterior_predictive, and with labels log_likelihood and observed_data. Given texts are scored, not predicted:
    log_likelihood holds "text", nats of each whole text, observed_data "tokens" (-100 in place of prompts and padding;
    a row's first token may be there though a decoder does not score it), and there is no posterior_predictive. Stored
    draws keep their chains; any others are independent: one chain, no R-hat or ESS to look at. Latent sites have the
    dims (module, row, col), with module names as coordinates.

    A point has no log_likelihood: one draw leaves no row out, and what az.loo made of it would be its training log
    likelihood, by which the most overfitted ranks first. Of every other guide az.loo takes the draws as the exact
    posterior's; the LOO that corrects for what they are is lb.evidence.psis_loo.

    Args:
        posterior: what a fit returned.
        data: rows to predict, see predict; None leaves out the groups that need them.
        draws: S, of all chains together, rounded down to equally many from each; None is 100, or all stored ones.
        seed: of the draws, which are those of posterior.sample(draws, seed); prior draws and labels have streams of
            their own made from it.
    """
    # One stream for all three would make the posterior, the prior and the labels' noise the same random numbers.
    prior_seed, label_seed = np.random.SeedSequence(seed % 2**64).generate_state(2).tolist()
    samples, chains = posterior_draws(posterior, draws, seed)
    draws = len(next(iter(samples.values())))
    by_chain = lambda values: _by_chain(values, chains)
    groups = {
        "posterior": by_chain(samples),
        "prior": _by_chain(prior_draws(posterior.model, draws, prior_seed), 1),
    }
    with suppress(TypeError):  # the guide has no density
        groups["sample_stats"] = by_chain({"log_q": posterior.log_prob(samples)})
    if data is not None:
        batches = as_batches(data, posterior.model.tokenizer, batch_size=64, by_length=True)
        prediction = predict(posterior, batches, draws=draws, seed=seed, antithetic=False)
        if hasattr(prediction, "draw_labels"):
            with torch.random.fork_rng():
                torch.manual_seed(label_seed)
                groups["posterior_predictive"] = by_chain({"labels": prediction.draw_labels()})
        if isinstance(prediction, TokenPrediction):
            groups["log_likelihood"] = by_chain({"text": prediction.log_likelihood})
            groups["observed_data"] = {"tokens": batches.labels.numpy()}
        elif prediction.labels is not None and not _hidden(prediction):
            groups["log_likelihood"] = by_chain({"labels": prediction.log_likelihood})
            groups["observed_data"] = {"labels": prediction.labels.numpy()}
        if posterior.is_point:
            groups.pop("log_likelihood", None)
    dims, coords = _dims_and_coords(posterior.model, groups["posterior"])
    return from_groups(groups, dims, coords)


def _hidden(prediction) -> bool:
    """Whether labels are kept back, as those of many test splits are: -1 is no class."""
    return isinstance(prediction, Prediction) and bool((prediction.labels < 0).any())


def posterior_draws(posterior: Posterior, draws: int | None = None, seed: int = 0) -> tuple[dict, int]:
    """Draws of every site, (S, site shape) chain after chain, and how many chains they are of (1: independent).

    Args:
        posterior, draws, seed: as for to_arviz.
    """
    chains = 1
    if isinstance(posterior.guide, DrawsGuide):
        chains, total = posterior.guide.chains, posterior.guide.total
        draws = max(1, min(total if draws is None else draws, total) // chains) * chains
    return posterior.sample(100 if draws is None else draws, seed=seed), chains


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
    if arviz_1():
        return az.from_dict(groups, dims=dict(dims), coords=dict(coords))
    return az.from_dict(**groups, dims=dict(dims), coords=dict(coords))


def convergence(draws: Mapping[str, torch.Tensor]) -> tuple[float, float]:
    """The largest rank-normalised split R-hat and the smallest bulk ESS over all entries of all sites.

    Args:
        draws: by site, (chains, S, site shape); the halves of a lone chain are compared. NaN where an entry never
            moves or a chain is too short.

    Returns:
        R-hat and the effective sample size of all chains together (Vehtari et al. 2021, arXiv 1903.08008).
    """
    import arviz as az

    flat = [value.detach().cpu().double().reshape(*value.shape[:2], -1) for value in draws.values()]
    entries = torch.cat(flat, dim=2).movedim(2, 0).numpy()
    if entries.shape[1] == 1:
        half = entries.shape[2] // 2
        entries = entries[:, :, -2 * half :].reshape(-1, 2, half)
    # Two axes at a time: the one form that both lines of ArviZ take. NaN passes through max and min.
    return tuple(float(best([of(entry) for entry in entries])) for best, of in ((np.max, az.rhat), (np.min, az.ess)))


def psis(log_weights: np.ndarray, tolerance: float = 1e-6) -> tuple[np.ndarray, np.ndarray]:
    """Pareto-smoothed importance sampling (Vehtari et al. 2024, arXiv 1507.02646).

    Args:
        log_weights: (N, S), one row at a time; in nats up to a constant.
        tolerance: a row whose range is below it has constant weights and k-hat 0.

    Returns:
        Normalised smoothed log weights (N, S) and k-hat (N,). Where there is no tail to fit (S < 25, or one of equal
        weights) the weights are normalised only, and k-hat is NaN.
    """
    import arviz as az

    if arviz_1():
        from arviz_stats.base import array_stats

        smooth = lambda row: array_stats.psislw(-row)
    else:
        smooth = az.psislw
    smoothed = log_weights - np.logaddexp.reduce(log_weights, axis=1, keepdims=True)
    constant = (np.ptp(log_weights, axis=1) < tolerance) & (log_weights.shape[1] > 1)
    k_hat = np.where(constant, 0.0, np.nan)
    if log_weights.shape[1] < 25:
        return smoothed, k_hat
    for number in np.flatnonzero(~constant):
        # ArviZ 1.x raises on a tail of equal weights, 0.x says infinity.
        with suppress(ValueError):
            row, k = smooth(log_weights[number])
            if np.isfinite(k):
                smoothed[number], k_hat[number] = row, k
    return smoothed, k_hat


def elpd_data(loo):
    """Leave-one-out densities as ArviZ's ELPDData; its effective number of parameters is unknown (NaN).

    Args:
        loo: what evidence.psis_loo returned.
    """
    import xarray

    elpd, k_hat = loo.elpd.numpy(), loo.k_hat.numpy()
    rows = lambda values: xarray.DataArray(np.asarray(values, dtype=float), dims="observation")
    total, error, bad = float(np.sum(elpd)), float(np.std(elpd) * len(elpd) ** 0.5), bool((k_hat > loo.threshold).any())
    shared = {"scale": "log", "se": error, "warning": bad}
    shared |= {"n_samples": loo.draws, "n_data_points": len(elpd), "good_k": loo.threshold}
    if arviz_1():
        from arviz_stats import utils

        # The later releases of the line have a class per estimator.
        kind = getattr(utils, "ELPDDataLOO", None) or utils.ELPDData
        return kind(kind="loo", elpd=total, p=np.nan, elpd_i=rows(elpd), pareto_k=rows(k_hat), **shared)
    from arviz.stats.stats_utils import ELPDData

    # Its text form reads the first three entries by place.
    values = {"elpd_loo": total, "se": error, "p_loo": np.nan, "loo_i": rows(elpd), "pareto_k": rows(k_hat)}
    return ELPDData(data=values | shared)


def arviz_1() -> bool:
    """Whether the ArviZ installed is of the 1.x line."""
    import arviz as az

    return int(az.__version__.split(".")[0]) >= 1


def _by_chain(values: Mapping[str, torch.Tensor], chains: int) -> dict[str, np.ndarray]:
    """(S, ...) as (chain, draw, ...)."""
    return {name: value.detach().cpu().unflatten(0, (chains, -1)).numpy() for name, value in values.items()}


def _dims_and_coords(model, variables: Mapping[str, np.ndarray]) -> tuple[dict, dict]:
    """Axis names of every latent site and of the prior's scales that follow its axes."""
    sites, coords = model.sites.shapes, {}
    dims = {"labels": ["observation"], "text": ["observation"], "tokens": ["observation", "token"]}
    for site, shape in sites.items():
        # With several sites, "module" means other modules in each: the axes carry the site's name.
        axes = [axis if len(sites) == 1 else f"{axis}_{site}" for axis in _AXES]
        coords[axes[0]] = model.adapted.members[site]
        for name, array in variables.items():
            own = array.shape[2:]
            if (name == site or name.startswith(f"{site}_")) and own == tuple(shape[: len(own)]) and name not in dims:
                dims[name] = axes[: len(own)]
    return dims, coords
