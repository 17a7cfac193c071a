"""Where a fit begins: the model's own copy in the right subspace, and the guide at its starting parameters."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import suppress

import torch
from pyro import poutine

from ..adapters.targets import weight_shape
from ..data import check_class_order
from ..fisher import fisher
from ..guides import Curvature, Delta, LatentGuide
from ..guides.stock import build_guide, is_stock
from ..model import BayesianLoRA
from ..posterior import Posterior, fixed_from
from ..priors import prior_variance
from ..storage import describe
from .progress import under


def in_subspace(model: BayesianLoRA, init: Posterior | None, train, tokenizer) -> BayesianLoRA:
    """A copy for this fit alone: prepared, of the data's size, its head at the start."""
    same_task = False
    if init is not None:
        check_start(model, init)
        head = fixed_from(init).values
        # Another number of classes is another task: its latents carry over, its head does not.
        same_task = _shapes(head) == _shapes(model.head_start)
        if same_task:
            check_class_order(init.model._class_names, train.class_names, "training data")
        model = model.in_subspace_of(init.model, head if same_task else None)
    if not (model.prepared or same_task):
        model = model.prepare(train, tokenizer=tokenizer)
    return model.with_size(train.rows)


def check_start(model: BayesianLoRA, init: Posterior) -> None:
    """Raise a ValueError unless both adapt modules of the same names and shapes in the same way and subspace."""
    other = init.model
    check_same_modules(model, other, "init=")
    if model.prepared and not same_tensors(model.adapted.tensors(), other.adapted.tensors()):
        raise ValueError(
            "expected init= to be fitted in the same subspace, got another; fit both from one model.prepare(train)"
        )


def check_same_modules(model: BayesianLoRA, other: BayesianLoRA, given: str) -> None:
    """Raise a ValueError unless a model `given` as such adapts modules of the same names and shapes in the same way."""
    if describe(model.adapter) != describe(other.adapter):
        raise ValueError(
            f"expected {given} with the model's adapter, got {other.adapter!r} where the model has {model.adapter!r}; "
            "make both from one model.prepare(train)"
        )
    ours, theirs = ({name: weight_shape(m) for name, m in each.modules.items()} for each in (model, other))
    if ours != theirs:
        raise ValueError(
            f"expected {given} on modules of the model's names and shapes, got {type(other.network).__name__} with "
            f"such as {sorted(theirs.items() - ours.items())[:2]}"
        )


def same_head(first: BayesianLoRA, second: BayesianLoRA) -> bool:
    """Whether both train the head, or both sample it, or both hold it at the same values."""
    changing = ("point", "bayesian")
    if first.head in changing or second.head in changing:
        return first.head == second.head
    # In one dtype: the network's own may be bf16 where a stored one is not.
    first, second = ({name: value.float() for name, value in m.head_values().items()} for m in (first, second))
    return same_tensors(first, second)


def subspace_of(model: BayesianLoRA) -> tuple[dict[str, torch.Tensor], dict]:
    """What `in_subspace` decided, as tensors and JSON: the adapter's frozen part, the head's start and its prior."""
    tensors = {f"adapter.{name}": value for name, value in model.adapted.tensors().items()}
    tensors |= {f"head.{name}": value for name, value in model.head_start.items()}
    tensors |= {f"head_centre.{name}": value for name, value in model.head_centre.items()}
    return tensors, {"head_scale": model.head_scale, "class_names": model._class_names, "prepared": model.prepared}


def in_same_subspace(
    model: BayesianLoRA, tensors: Mapping[str, torch.Tensor], values: Mapping, rows: int, tokenizer
) -> BayesianLoRA:
    """in_subspace without its passes over the data, from what `subspace_of` returned."""
    shapes = {name: tuple(weight_shape(module)) for name, module in model.modules.items()}
    frozen = {name: value.to(model.device) for name, value in under("adapter.", tensors).items()}
    head, centre = under("head.", tensors), under("head_centre.", tensors)
    new = model._copy(
        size=rows,
        tokenizer=tokenizer or model.tokenizer,
        head_scale=values["head_scale"],
        prepared=values["prepared"],
        _class_names=values["class_names"],
        _adapted=model.adapter.restore(frozen, shapes),
    )
    # In the network's order, which is the order draws are made in; a file's is alphabetical.
    new._set_head(model.head, {name: head[name] for name in model.head_start}, centre)
    return new


def start_at(model: BayesianLoRA, init: Posterior | None, train, tokenizer) -> Posterior:
    """A point posterior at the base, or at init's mean, that nothing has trained."""
    model = in_subspace(model, init, train, tokenizer)
    return Posterior(model, base_guide(model, Delta(), init), Delta())


def subspace_known(model: BayesianLoRA) -> bool:
    """Whether the shapes of the latents are known: prepared, or with an adapter that looks at no data."""
    return model._adapted is not None or model.adapter.statistics is None


def prior_sites(model: BayesianLoRA) -> tuple[dict[str, object], list[str]]:
    """The distributions of the latent sites by name, and the names of all other sites (scales, a Bayesian head)."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        if subspace_known(model):
            trace, latents = poutine.trace(model.sample_prior).get_trace(), list(model.sites.shapes)
        else:
            # The subspace is not known yet; what kind of prior it is shows on a stand-in.
            latents = ["R"]
            trace = poutine.trace(model.prior).get_trace({"R": torch.Size([len(model.modules), 2, 2])})
    others = sorted(set(trace.stochastic_nodes) - set(latents))
    return {name: trace.nodes[name]["fn"] for name in latents}, others


def _shapes(tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Size]:
    return {name: value.shape for name, value in tensors.items()}


def same_tensors(first: Mapping[str, torch.Tensor], second: Mapping[str, torch.Tensor]) -> bool:
    return first.keys() == second.keys() and all(torch.equal(first[k].cpu(), second[k].cpu()) for k in first)


def base_guide(model, spec, init: Posterior | None) -> torch.nn.Module:
    """The guide at init's mean or at the pretrained network, as wide as its own start_scale says."""
    start = starting_values(model, init)
    guide = build_guide(spec, model, start=start)
    if isinstance(guide, LatentGuide):
        with torch.no_grad():
            guide.begin_at(model.sites.join(start).to(model.device))
            if init is not None:
                # Not at a point's scales, which go to zero together with the latents.
                others = {n: value for n, value in start.items() if not init.is_point or n in model.head_start}
                guide.begin_others_at(others, getattr(init.guide, "extra", None))
    return guide


def spread_guide(guide, model, spec, train, init, warm_start: bool, rows: int | None) -> torch.nn.Module:
    """What base_guide built, now as wide as the Fisher matrix or init say; a stock guide is built anew for that."""
    start = starting_values(model, init)
    loc = model.sites.join(start).to(model.device)
    rank, curvature = getattr(spec, "fisher_rank", 1), None
    precision = model.sites.join(prior_variance(model.sample_prior, model.sites.shapes)).reciprocal()
    if warm_start and rank:
        curvature = Curvature(loc, precision, fisher(model, train, loc, rank, rows))
    elif init is not None:
        with torch.no_grad(), suppress(NotImplementedError, TypeError):  # a flow and a point have no variance
            curvature = Curvature.of(_distribution(init), precision)
    if curvature is None:
        return guide
    if isinstance(guide, LatentGuide):
        with torch.no_grad():
            guide.begin(curvature)
    elif is_stock(spec):
        return build_guide(spec, model, float(curvature.diagonal.rsqrt().log().mean().exp()), start)
    return guide


def _distribution(init: Posterior):
    """What init says of the flat latents: its guide's own distribution, or a normal as wide as its draws."""
    if isinstance(init.guide, LatentGuide) and init.guide.has_density:
        return init.guide.distribution()
    variance = init.covariance().variance
    if not bool((variance > 0).all()):
        raise TypeError("a point")
    return torch.distributions.Normal(init.model.sites.join(init.mean()).to(variance), variance.sqrt())


def starting_values(model: BayesianLoRA, init: Posterior | None) -> dict[str, torch.Tensor]:
    """Sites by name where a fit begins: at init's mean, or at the pretrained network.

    Of an init for another number of classes a Bayesian head is left out, as a point head is.
    """
    start = model.start()
    if init is None:
        return start
    fits = lambda name, value: name not in start or value.shape == start[name].shape
    # Copies on the model's device: init may have been fitted on another.
    return start | {n: value.to(model.device, copy=True) for n, value in init.mean().items() if fits(n, value)}
