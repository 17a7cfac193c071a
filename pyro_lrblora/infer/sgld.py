"""Stochastic-gradient Langevin dynamics (Welling and Teh 2011), with what it shares with sghmc."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from contextlib import suppress
from itertools import islice

import pyro
import pyro.distributions as dist
import torch
from pyro import poutine
from torch import Tensor
from torch.distributions import biject_to
from tqdm.auto import tqdm

from ..data import Batch, EncodedBatches, as_batches, batch_rows, endless, naming_the_batch, row_weight
from ..latents import LatentSites
from ..model import BayesianLoRA
from ..posterior import Posterior, local_parameters
from ..priors import prior_variance
from ..provenance import fitted_with
from .chains import check_chain_arguments, log_joint, posterior_of_chains, starting_values
from .start import in_subspace, prior_sites

_PROBES = 64  # random score vectors that the preconditioner is made of
_MIXTURES = (
    torch.distributions.MixtureSameFamily,
    dist.MaskedMixture,
    dist.MixtureOfDiagNormals,
    dist.MixtureOfDiagNormalsSharedCovariance,
)

Update = Callable[[Tensor, Tensor, Tensor, Tensor], None]


@local_parameters
def sgld(
    model: BayesianLoRA,
    train,
    *,
    draws: int = 500,
    burn_in: int = 1000,
    thin: int = 10,
    step_size: float = 0.1,
    batch_size: int = 32,
    chains: int = 1,
    init: Posterior | None = None,
    seed: int = 0,
    progress: bool = True,
    tokenizer=None,
) -> Posterior:
    """Draw from the posterior by preconditioned stochastic-gradient Langevin dynamics with a constant step size h.

    theta += h/2 G g + sqrt(h G) xi, where g is the gradient of the log joint, its likelihood scaled from the batch to N
    rows (in batches of several sizes such that every row counts once per pass), and xi is standard normal. The
    preconditioner G is diagonal and constant, so the correction term of Li et al. (arXiv 1512.07666, equation 8) is
    zero: 1 / (diagonals of the prior precision and the Fisher matrix) at the start, divided by the largest eigenvalue
    of the curvature in those units. So h means the same for every model: the posterior variance comes out too large by
    about h N / (4 B) in the stiffest direction, in relative terms, and less elsewhere. There is no accept step. Neither
    the model, nor the network, nor Pyro's param store is changed.

    Args:
        model: prepared or not, with head="bayesian", a fixed or a frozen head, and a prior without constrained sites
            that is no mixture.
        train: a datasets.Dataset, Batches, or a re-iterable of batch dicts, with labels.
        draws: S per chain that are kept.
        burn_in: steps before the first.
        thin: steps between two draws.
        step_size: h, positive and below 4; above it a full-batch chain explodes.
        batch_size: B, rows per step, for a datasets.Dataset.
        chains: run one after the other, all from the same start.
        init: start at the mean of this posterior, in its subspace; None is the pretrained network.
        seed: of everything random here.
        progress: show a progress bar.
        tokenizer: for a datasets.Dataset, where the model has none.

    Returns:
        A posterior whose settings hold r_hat (largest), ess (smallest bulk) and seconds.

    Raises:
        ValueError, TypeError, KeyError: a point head, bad arguments or data, a prior with constrained sites or that is
            a mixture (SpikeSlab).
        FloatingPointError: NaN or infinite log joint or gradient; names the batch.

    Warns:
        ChainsNotConverged: the largest R-hat is above 1.05.
    """
    check_step("step_size", step_size, 4.0)

    def update(position: Tensor, momentum: Tensor, gradient: Tensor, scale: Tensor) -> None:
        noise = torch.randn_like(position)
        position += 0.5 * step_size * scale * gradient + (step_size * scale).sqrt() * noise

    result = stochastic_gradient_chains(
        update, model, train, draws=draws, burn_in=burn_in, thin=thin, batch_size=batch_size, chains=chains, init=init,
        seed=seed, progress=progress, tokenizer=tokenizer, settings={"method": "sgld", "step_size": step_size},
    )  # fmt: skip
    return posterior_of_chains(*result)


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
        values = starting_values(model, init)
        sites = LatentSites({name: value.shape for name, value in values.items()})
        start = sites.join(values)
        scale = preconditioner(model, batches, sites, start)
        bar = tqdm(total=chains * steps, disable=not progress, desc=settings["method"].upper(), unit="step")
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
        bar.close()
    return model, sites.split(torch.stack(runs)), history, settings | counts | {"seed": seed} | record


def preconditioner(model: BayesianLoRA, batches: EncodedBatches, sites: LatentSites, at: Tensor) -> Tensor:
    """G, (D,): inverse diagonal of the log joint's Gauss-Newton matrix P, scaled so that G P is at most about 1.

    The Fisher matrix is that of all sites together, a Bayesian head's too: scores of the network's own labels, summed
    over a batch's rows with random signs, have it as their second moment. 64 of them fix it to a fifth or so. The
    prior's part is 1 / its variance where its latents do not depend on each other, else its own second derivative.

    Args:
        model: in its subspace.
        batches: training data; the first 64 batches are enough.
        sites: of every sampled value.
        at: (D,) the point.
    """
    prior, largest = _prior_curvature(model, sites, at)
    at, head, scores, rows = at.detach().requires_grad_(), model.head_values(), [], 0
    repeats = math.ceil(_PROBES / len(batches))
    with model.attached(dropout=False), torch.enable_grad(), pyro.validation_enabled(False):
        for position, batch in enumerate(islice(batches, _PROBES)):
            batch = model.to_device(batch)
            rows += batch_rows(batch)
            labels = model.label_distribution(model.outputs(batch, sites.split(at), head), batch)
            for _ in range(repeats):
                log_probs = labels.log_prob(labels.sample())
                signs = torch.randint_like(log_probs, 2) * 2 - 1
                scores.append(torch.autograd.grad((signs * log_probs).sum(), at, retain_graph=True)[0])
            with naming_the_batch(position):
                if not scores[-1].isfinite().all():
                    raise FloatingPointError("expected a finite gradient at the start, got NaN or infinity")
    scores = torch.stack(scores) * (model.size / rows / repeats) ** 0.5
    precision = prior + scores.square().sum(0)
    whitened = scores * precision.rsqrt()
    top = largest(precision) + torch.linalg.eigvalsh(whitened @ whitened.T)[-1]
    return 1 / (precision * top)


def check_step(name: str, value: float, limit: float) -> None:
    """Raise a ValueError unless 0 < value < limit."""
    if not 0 < value < limit:
        raise ValueError(f"expected {name} between 0 and {limit:g}, got {name}={value!r}")


def _prior_curvature(model, sites: LatentSites, at: Tensor) -> tuple[Tensor, Callable[[Tensor], Tensor]]:
    """The diagonal (D,) of minus the log prior's second derivative, and its largest eigenvalue in given units.

    Returns:
        The diagonal, and a function of a diagonal matrix U, (D,), to the largest eigenvalue of U^-1/2 H U^-1/2.
    """

    def log_prior(flat: Tensor) -> Tensor:
        with poutine.block(), pyro.validation_enabled(False):
            trace = poutine.trace(poutine.condition(model.sample_prior, data=sites.split(flat))).get_trace()
            return trace.log_prob_sum()

    times = lambda vector: -torch.autograd.functional.vhp(log_prior, at, vector)[1]
    alone = sites.join(prior_variance(model.sample_prior, sites.shapes)).reciprocal()
    # A stream of its own: the chains' does not depend on the prior.
    generator = torch.Generator().manual_seed(0)
    uneven = [1 + torch.rand(len(at), generator=generator).to(at) for _ in range(2)]
    first, second = (times(vector) / vector for vector in uneven)
    if not ((first - second).abs() > 1e-3 * (first.abs() + second.abs())).any():
        # No latent's slope depends on another latent. A Laplace prior has no curvature but a scale, 1 / its precision.
        return alone, lambda units: (alone / units).max()
    signs = [(torch.randint(2, (len(at),), generator=generator) * 2 - 1).to(at) for _ in range(_PROBES)]
    # Of a normal it is at least the precision each latent has by itself; an estimate may not be.
    diagonal = torch.stack([sign * times(sign) for sign in signs]).mean(0).maximum(alone)

    def largest(units: Tensor) -> Tensor:
        vector, size = uneven[0], torch.ones(())
        for _ in range(_PROBES):
            vector = times(vector / size * units.rsqrt()) * units.rsqrt()
            size = vector.norm()
        return size

    return diagonal, largest


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
