"""The No-U-Turn sampler (Hoffman and Gelman 2014, arXiv 1111.4246): the reference where N and D are small."""

from __future__ import annotations

import time

import datasets
import torch
from pyro.infer import MCMC, NUTS
from pyro.infer.autoguide.initialization import init_to_value
from torch import Tensor

from ..data import Batch, as_batches, naming_the_batch
from ..model import BayesianLoRA
from ..posterior import Posterior, local_parameters
from ..priors import prior_variance
from ..priors.median import init_to_prior_median
from ..provenance import fitted_with
from .chains import check_chain_arguments, log_joint, posterior_of_chains, starting_point
from .start import in_subspace

_START_SPREAD = 0.5  # prior standard deviations by which chains start apart


@local_parameters
def nuts(
    model: BayesianLoRA,
    train,
    *,
    draws: int = 500,
    warmup: int = 500,
    chains: int = 2,
    seed: int = 0,
    init: Posterior | None = None,
    target_accept: float = 0.8,
    max_tree_depth: int = 10,
    full_mass: bool = False,
    progress: bool = True,
    tokenizer=None,
) -> Posterior:
    """Draw from the posterior by Pyro's NUTS on all rows at once, and return the draws as a posterior.

    Exact up to Monte Carlo error, at up to 2^max_tree_depth gradients of the whole data per draw. Chains run one after
    the other, from starts half a prior standard deviation around the pretrained network or init's mean. Neither the
    model, nor the network, nor Pyro's param store is changed.

    Args:
        model: prepared or not, with head="bayesian", a fixed or a frozen head; any prior.
        train: a datasets.Dataset, Batches, or a re-iterable of batch dicts, with labels; one batch is made of them.
        draws: S per chain, after warm-up, at least 4.
        warmup: steps per chain in which step size and mass matrix adapt.
        chains: two or more, for R-hat to compare different starts; with one it compares its halves.
        seed: of everything random here.
        init: start around the mean of this posterior, in its subspace.
        target_accept: acceptance probability that the step size is adapted to.
        max_tree_depth: of the binary tree of leapfrog steps.
        full_mass: a dense mass matrix, for strongly correlated latents and D up to some hundred.
        progress: show a progress bar.
        tokenizer: for a datasets.Dataset, where the model has none.

    Returns:
        A posterior whose settings hold r_hat (largest), ess (smallest bulk), divergences and seconds; its history has a
        dict per chain.

    Raises:
        ValueError, TypeError, KeyError: a point head, bad arguments or data, batches of several widths.
        FloatingPointError: the log joint is not finite at a start.

    Warns:
        ChainsNotConverged: the largest R-hat is above 1.05.
    """
    check_chain_arguments(model, draws=draws, warmup=warmup, chains=chains, max_tree_depth=max_tree_depth)
    if draws < 4:
        raise ValueError(f"expected draws >= 4, the fewest that Pyro's diagnostics take, got draws={draws}")
    if not 0 < target_accept < 1:
        raise ValueError(f"expected target_accept between 0 and 1, got target_accept={target_accept!r}")
    tokenizer = tokenizer or model.tokenizer
    rows = len(train) if isinstance(train, datasets.Dataset) else 1
    batches = as_batches(train, tokenizer, batch_size=rows).restarted()
    model.check_labels(batches, "training data")
    batch = whole_batch(batches)
    settings = {
        "method": "nuts",
        "draws": draws,
        "warmup": warmup,
        "chains": chains,
        "seed": seed,
        "target_accept": target_accept,
        "max_tree_depth": max_tree_depth,
        "full_mass": full_mass,
        **fitted_with(model.device, train, batches),
    }
    parts, history = [], []
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = in_subspace(model, init, batches, tokenizer)
        batch = model.to_device(batch)
        centre = starting_point(model, init)
        jittered = [*model.sites.shapes, *(model.head_start if model.head == "bayesian" else ())]
        variance = prior_variance(model.sample_prior, jittered)
        for chain in range(chains):
            spread = {name: variance[name].sqrt() * torch.randn_like(centre[name]) for name in jittered}
            start = centre | {name: centre[name] + _START_SPREAD * spread[name] for name in jittered}
            begun = time.perf_counter()
            kernel = NUTS(
                model,
                target_accept_prob=target_accept,
                max_tree_depth=max_tree_depth,
                full_mass=full_mass,
                init_strategy=init_to_value(values=start, fallback=init_to_prior_median),
            )
            sampler = MCMC(kernel, draws, warmup, disable_progbar=not progress)
            with model.attached(dropout=False):
                with naming_the_batch(0), torch.no_grad():
                    _check_finite(log_joint(model, batch, start))
                sampler.run(batch)
            parts.append({name: value.detach() for name, value in sampler.get_samples().items()})
            history.append(
                {
                    "chain": chain,
                    "step": (chain + 1) * (warmup + draws),
                    "divergences": len(sampler.diagnostics()["divergences"]["chain 0"]),
                    "acceptance": sampler.diagnostics()["acceptance rate"]["chain 0"],
                    "seconds": time.perf_counter() - begun,
                }
            )
    settings["divergences"] = sum(row["divergences"] for row in history)
    stacked = {name: torch.stack([part[name] for part in parts]) for name in centre}
    return posterior_of_chains(model, stacked, history, settings)


def whole_batch(batches) -> Batch:
    """All rows as one batch.

    Raises:
        ValueError: the batches are of different widths.
    """
    parts = [{name: v for name, v in batch.items() if isinstance(v, Tensor)} for batch in batches]
    for name in parts[0]:
        shapes = sorted({tuple(part[name].shape[1:]) for part in parts})
        if len(shapes) > 1:
            raise ValueError(
                f"expected batches of one width, to make one of all rows, got {name!r} with row shapes {shapes}; pad "
                "them alike, or write lb.Batches(dataset, tokenizer, batch_size=len(dataset))"
            )
    return {name: torch.cat([part[name] for part in parts]) for name in parts[0]}


def _check_finite(value: Tensor) -> None:
    if not value.isfinite():
        raise FloatingPointError(f"expected a finite log joint at the start, got {value.item()}")
