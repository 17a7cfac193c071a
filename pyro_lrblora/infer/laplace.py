"""Laplace approximation: a normal at the mode with the curvature there (Daxberger et al. 2021, arXiv 2106.14806)."""

from __future__ import annotations

import math

import torch
from pyro import poutine
from torch import Tensor

from ..counts import check_counts
from ..data import as_batches, batch_rows
from ..evidence import check_fitted_rows
from ..guides import Delta, FullRank
from ..model import BayesianLoRA
from ..posterior import Posterior, local_parameters
from ..priors import Normal
from ..provenance import fitted_with
from ..storage import describe
from .chains import log_joint
from .elbo import is_normal, sites_of_latents
from .gauss_newton import DiagonalMatrix, FullMatrix, KroneckerMatrix, LowRankMatrix, log_evidence
from .start import check_start, prior_sites, same_head, subspace_known
from .svi import svi

_STRUCTURES = ("diagonal", "kron", "low_rank", "full")
_TUNINGS = ("fixed", "marginal_likelihood", "per_module")


@local_parameters
def laplace(
    model: BayesianLoRA,
    train,
    *,
    structure: str = "kron",
    rank: int = 20,
    prior_precision: str = "fixed",
    init: Posterior | None = None,
    seed: int = 0,
    tokenizer=None,
    **options,
) -> Posterior:
    """Fit a point, then take the inverse of the Gauss-Newton matrix plus the prior precision as its covariance.

    With LoRAXS it is L-LoRA-XS (arXiv 2605.07706), with LoRA and "kron" Laplace-LoRA (Yang et al. 2024, arXiv
    2308.13111); both predict with predict(..., method="linearised"). The head is a point, and the evidence is
    conditional on it.

    Args:
        model: with a Normal prior, of latents independent of each other and no sites beside them.
        train: as for svi.
        structure: "diagonal", "kron" (Kronecker per module, in its eigenbasis), "low_rank" (leading eigenvectors and
            the rest of the diagonal) or "full" (D x D).
        rank: eigenvectors of "low_rank".
        prior_precision: "fixed" keeps the prior; "marginal_likelihood" takes the one scale with the greatest evidence
            given the mode and curvature found; "per_module" one scale per module. The returned model carries it.
        init: a point posterior of this model fitted to these rows; then nothing is trained, and options are refused.
        seed: of the point fit.
        tokenizer: for a datasets.Dataset, where the model has none.
        options: of svi, for the point fit.

    Returns:
        A Posterior; settings["log_evidence"] is the Laplace log evidence in nats.

    Raises:
        ValueError: another prior or head, an unknown structure, more memory than "full" allows, init of another
            model or fitted to another number of rows, "per_module" where a latent site does not cover all modules.
    """
    for name, value, choices in (
        ("structure", structure, _STRUCTURES),
        ("prior_precision", prior_precision, _TUNINGS),
    ):
        if value not in choices:
            raise ValueError(f"expected {name} to be one of {list(choices)}, got {name}={value!r}")
    if init is not None and (options or not init.is_point):
        raise ValueError(
            "expected init= to be a point posterior and no options of a fit beside it, got "
            f"{init.guide_spec!r} and {sorted(options)}"
        )
    if init is not None:
        check_start(model, init)
        for part in ("prior", "likelihood", "head"):
            ours, theirs = getattr(model, part), getattr(init.model, part)
            # By value: a loaded posterior has tuples of what a user wrote as lists, and its frozen head as tensors.
            same = same_head(model, init.model) if part == "head" else describe(ours) == describe(theirs)
            if not same:
                raise ValueError(f"expected init= fitted with the model's {part} {ours!r}, got {theirs!r}")
    _check_program(model, prior_precision)
    if structure == "low_rank":
        check_counts(rank=rank)
    if structure == "full" and subspace_known(model):
        FullRank().check_memory(model)
    tokenizer = tokenizer or model.tokenizer
    if init is None:
        init = svi(model, train, guide=Delta(), seed=seed, tokenizer=tokenizer, **options)
    model = init.model
    _check_program(model, prior_precision)
    batches = as_batches(train, tokenizer, batch_size=options.get("batch_size", 32), by_length=True).restarted()
    check_fitted_rows(init, batches)
    at = model.sites.join(init.mean())
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        match structure:
            case "diagonal":
                curvature = DiagonalMatrix.of(model, batches, at)
            case "kron":
                curvature = KroneckerMatrix.of(model, batches, at)
            case "low_rank":
                curvature = LowRankMatrix.of(model, batches, at, rank)
            case "full":
                curvature = FullMatrix.of(model, batches, at)
        if prior_precision != "fixed":
            scales = _best_scales(model, curvature, at, prior_precision == "per_module")
            model = model._copy(prior=Normal(scales))
        precision = _prior_precision(model)
        guide, spec = curvature.posterior(model, at, precision)
    settings = {
        "method": "laplace",
        "structure": structure,
        "prior_precision": prior_precision,
        "seed": seed,
        "log_evidence": log_evidence(_log_joint(model, batches, at), curvature.log_det(precision), len(at)),
        **fitted_with(model.device, train, batches),
    }
    return Posterior(model, guide, spec, list(init.history), settings | {"point fit": init.settings})


def _check_program(model: BayesianLoRA, prior_precision: str) -> None:
    """Raise a ValueError unless the prior is Normal in the latents, samples nothing else, and can be tuned as asked."""
    if model.head == "bayesian":
        raise ValueError("expected head='point', 'frozen' or a FixedHead for a Laplace approximation, got 'bayesian'")
    latents, others = prior_sites(model)
    found = None
    if others:
        found = f"sites {others}"
    elif not all(is_normal(fn) for fn in latents.values()):
        found = "another distribution"
    elif subspace_known(model) and (changed := _beyond_the_distributions(model)):
        found = changed
    if found:
        raise ValueError(
            f"expected a Normal prior for a Laplace approximation, got {model.prior!r} with {found}: its curvature at "
            "the mode is not that of a normal; write prior=lb.priors.Normal(0.1), or fit by lb.fit or lb.infer.nuts"
        )
    if prior_precision != "fixed" and not isinstance(model.prior, Normal):
        raise ValueError(
            f"expected lb.priors.Normal for prior_precision={prior_precision!r}, which would take its place, got "
            f"{model.prior!r}; write prior_precision='fixed'"
        )
    if prior_precision == "marginal_likelihood" and isinstance(model.prior.scale, tuple):
        raise ValueError(
            f"expected a prior of one scale for prior_precision='marginal_likelihood', got {model.prior!r}; write "
            "prior_precision='per_module'"
        )
    # As many modules at every site need not be the same ones. (A stand-in for an unknown subspace has all.)
    modules = {fn.event_shape[0] for fn in latents.values()}
    if prior_precision == "per_module" and modules != {len(model.modules)}:
        raise ValueError("expected every latent site to cover all modules for prior_precision='per_module'")


def _beyond_the_distributions(model: BayesianLoRA) -> str | None:
    """What a prior's program does to its density that the distributions of its latents do not show."""
    with torch.random.fork_rng():
        nodes = poutine.trace(model.sample_prior).get_trace().nodes
    if any(nodes[name]["scale"] != 1 or nodes[name]["mask"] is not None for name in model.sites.shapes):
        return "poutine.scale or poutine.mask"
    if dependent := sites_of_latents(model):
        return f"sites that depend on the latents, {dependent}"
    return None


def _prior_precision(model: BayesianLoRA) -> Tensor:
    """(D,)."""
    fns = prior_sites(model)[0].values()
    return torch.cat([fn.variance.detach().expand(fn.event_shape).flatten() for fn in fns]).reciprocal()


@torch.no_grad()
def _log_joint(model: BayesianLoRA, batches, at: Tensor) -> float:
    """Log prior plus log likelihood of all rows at a point, in nats."""
    with model.attached(dropout=False):
        # A batch's own estimate has the prior whole and the likelihood scaled to N: weighted by B / N they add up.
        parts = [
            batch_rows(batch) / model.size * log_joint(model, model.to_device(batch), model.sites.split(at)).double()
            for batch in batches
        ]
    return float(sum(parts))


def _best_scales(model: BayesianLoRA, curvature, at: Tensor, per_module: bool) -> float | tuple[float, ...]:
    """The prior's standard deviations with the greatest evidence, mode and curvature held fixed."""
    places = list(model.sites.modules())
    modules = len(model.modules) if per_module else 1
    squares = torch.stack([at[where].double().square().sum() for where in places])
    counts = torch.tensor([where.stop - where.start for where in places], device=at.device)
    sizes, owner = counts.double(), torch.arange(len(places), device=at.device) % modules
    expand = owner.repeat_interleave(counts)
    precision = _prior_precision(model)
    start = torch.stack([precision.double().log()[expand == m].mean() for m in range(modules)])
    # A module that the data do not move wants an infinite precision. The start is inside, where there is a gradient.
    lowest, highest = (power * math.log(10) for power in (-12, 12))
    log_precision = start.clamp(lowest + 1, highest - 1).requires_grad_()
    optimiser = torch.optim.LBFGS([log_precision], max_iter=200, line_search_fn="strong_wolfe")

    def minus_evidence():
        optimiser.zero_grad()
        bounded = log_precision.clamp(lowest, highest)
        each = bounded[owner]
        log_prior = 0.5 * (sizes * each - each.exp() * squares).sum()
        value = 0.5 * curvature.log_det(bounded.exp()[expand].to(at)).double() - log_prior
        value.backward()
        return value

    with torch.enable_grad():
        optimiser.step(minus_evidence)
    scales = (-0.5 * log_precision.detach().clamp(lowest, highest)).exp().tolist()
    return tuple(scales) if per_module else scales[0]
