"""Markov chains on minibatch gradients: what sgld and sghmc share."""

from __future__ import annotations

import time
from collections.abc import Callable
from contextlib import suppress

import pyro.distributions as dist
import torch
from pyro import poutine
from torch import Tensor
from torch.distributions import biject_to
from tqdm.auto import tqdm

from ..data import Batch, as_batches, endless, naming_the_batch, row_weight
from ..latents import LatentSites
from ..model import BayesianLoRA
from ..posterior import Posterior
from ..provenance import fitted_with
from .chains import check_chain_arguments, log_joint, starting_point
from .preconditioner import preconditioner
from .start import in_subspace, prior_sites

_MIXTURES = (
    torch.distributions.MixtureSameFamily,
    dist.MaskedMixture,
    dist.MixtureOfDiagNormals,
    dist.MixtureOfDiagNormalsSharedCovariance,
)

Update = Callable[[Tensor, Tensor, Tensor, Tensor], None]


def stochastic_gradient_chains(
    update: Update, model: BayesianLoRA, train, *, draws: int, burn_in: int, thin: int, batch_size: int, chains: int,
    init: Posterior | None, seed: int, progress: bool, tokenizer, settings: dict,
) -> tuple[BayesianLoRA, dict[str, Tensor], list[dict], dict]:  # fmt: skip
    """Run chains of an update rule on minibatch gradients: what posterior_of_chains takes.

    Args:
        update: changes position and momentum in place, given the gradient and the preconditioner, all (D,).
        settings: the method's name and its own arguments.

    What is not named here is as for sgld.
    """
    counts = {"draws": draws, "burn_in": burn_in, "thin": thin, "batch_size": batch_size, "chains": chains}
    check_chain_arguments(model, **counts)
    # A prior may refuse the stand-in for a subspace that only the data tell: that is looked at again once it is known.
    with suppress(ValueError, KeyError, RuntimeError):
        _check_no_mixture(model)
    tokenizer = tokenizer or model.tokenizer
    batches = as_batches(train, tokenizer, batch_size=batch_size, shuffle=seed).restarted()
    model.check_labels(batches, "training data")
    record = fitted_with(model.device, train, batches)
    steps, history, runs = burn_in + draws * thin, [], []
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = in_subspace(model, init, batches, tokenizer)
        _check_no_mixture(model)
        _check_unconstrained(model)
        values = starting_point(model, init)
        sites = LatentSites({name: value.shape for name, value in values.items()})
        start = sites.join(values)
        scale = preconditioner(model, batches, sites, start)
        with tqdm(total=chains * steps, disable=not progress, desc=settings["method"].upper(), unit="step") as bar:
            for chain in range(chains):
                position, momentum, kept = start.clone(), torch.zeros_like(start), []
                begun, stream = time.perf_counter(), endless(batches)
                with model.attached(dropout=False):
                    for step in range(1, steps + 1):
                        place, batch = next(stream)
                        with naming_the_batch(place):
                            gradient = _gradient(model, batch, sites, position, row_weight(batch, batches))
                        update(position, momentum, gradient, scale)
                        if step > burn_in and (step - burn_in) % thin == 0:
                            kept.append(position.clone())
                        bar.update()
                runs.append(torch.stack(kept))
                history.append({"chain": chain, "step": (chain + 1) * steps, "seconds": time.perf_counter() - begun})
    return model, sites.split(torch.stack(runs)), history, settings | counts | {"seed": seed} | record


def check_step(name: str, value: float, limit: float) -> None:
    """Raise a ValueError unless 0 < value < limit."""
    if not 0 < value < limit:
        raise ValueError(f"expected {name} between 0 and {limit:g}, got {name}={value!r}")


def _gradient(model, batch: Batch, sites: LatentSites, position: Tensor, weight: float) -> Tensor:
    at = position.detach().requires_grad_()
    with torch.enable_grad():
        value = log_joint(model, batch, sites.split(at), weight)
        (gradient,) = torch.autograd.grad(value, at)
    if not (value.isfinite() and gradient.isfinite().all()):
        raise FloatingPointError(f"expected a finite log joint and gradient, got {value.item()}")
    return gradient


def _check_no_mixture(model) -> None:
    with torch.random.fork_rng():
        latents = prior_sites(model)[0]
    for name, fn in latents.items():
        while hasattr(fn, "base_dist"):
            fn = fn.base_dist
        if isinstance(fn, _MIXTURES):
            # Steps as long as its variance allows jump over a narrow part, and shorter ones do not leave it.
            raise TypeError(
                f"expected a prior of one scale for steps of one length, got {model.prior!r}, a mixture at site "
                f"{name!r}; write lb.infer.nuts(model, train)"
            )


def _check_unconstrained(model) -> None:
    trace = poutine.trace(model.sample_prior).get_trace()
    nodes = {name: trace.nodes[name] for name in trace.stochastic_nodes}
    free = lambda node: torch.equal(biject_to(node["fn"].support)(node["value"]), node["value"])
    constrained = [name for name, node in nodes.items() if not free(node)]
    if constrained:
        raise ValueError(
            f"expected a prior without constrained sites, got {model.prior!r} with {constrained}; write "
            "lb.infer.nuts(model, train), which transforms them"
        )
