"""What `svi` asks of its settings, its callbacks, and how a prior and a guide fit together, before it does any work."""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence

import torch
from pyro import poutine
from pyro.poutine.util import site_is_subsample

from ..counts import check_counts
from ..guides import LatentGuide
from ..likelihoods import check_classes
from ..model import PRECISIONS, BayesianLoRA
from .progress import SCHEDULES
from .step import Rates

_CHOICES = {
    "schedule": SCHEDULES,
    "kl": ("auto", "closed", "mc"),
    "draws": ("auto", "row", "shared"),
    "precision": PRECISIONS,
}
_COUNTS = ("epochs", "batch_size", "accumulate", "particles", "validation_draws")
_OPTIONAL_COUNTS = ("steps", "patience", "warm_start_rows")


def check_settings(settings: Mapping[str, object]) -> None:
    """Raise a ValueError or TypeError for the first setting of `svi` that has no meaning.

    Args:
        settings: by the names of svi's arguments.
    """
    for name, choices in _CHOICES.items():
        if settings[name] not in choices:
            raise ValueError(f"expected {name} to be one of {list(choices)}, got {name}={settings[name]!r}")
    given = [name for name in _OPTIONAL_COUNTS if settings[name] is not None]
    least = dict.fromkeys((*_COUNTS, *given), 1) | {"map_epochs": 0, "seed": 0}
    for name, bound in least.items():
        check_counts(bound, **{name: settings[name]})
    clip, warmup, rates = settings["clip"], settings["warmup"], settings["rates"]
    if clip is not None and not clip > 0:
        raise ValueError(f"expected clip > 0, got clip={clip!r}; write clip=None for no clipping")
    if not 0 <= warmup < 1:
        raise ValueError(f"expected warmup, a share of all steps, within 0..1, got warmup={warmup!r}")
    if not isinstance(rates, Rates):
        raise TypeError(f"expected rates of pyro_lrblora.Rates, got {rates!r}; write Rates(loc={rates!r})")
    if settings["path_derivative"] and settings["kl"] == "closed":
        raise ValueError("expected kl='mc' or 'auto' with path_derivative=True: a closed-form KL has no score term")


def check_callbacks(callbacks) -> None:
    """Raise a TypeError unless these are a sequence of callables that each take a row and a posterior."""
    if not isinstance(callbacks, Sequence) or not all(callable(callback) for callback in callbacks):
        raise TypeError(f"expected callbacks to be a list of callables, got {callbacks!r}; write callbacks=[...]")
    for callback in callbacks:
        try:
            signature = inspect.signature(callback, follow_wrapped=False)
        except (TypeError, ValueError):  # what is written in C, or pretends to be a function, may have none
            continue
        try:
            signature.bind({}, None)
        except TypeError as error:
            name = getattr(callback, "__name__", repr(callback))
            raise TypeError(
                f"expected callbacks called with (row, posterior), got {name}{signature}: {error}"
            ) from None


def check_device(model: BayesianLoRA, device: str | None) -> None:
    """Raise a ValueError where a network cannot be moved to a device, or the algebra of guides cannot run on it."""
    if device is not None and len(set(getattr(model.network, "hf_device_map", {}).values())) > 1:
        raise ValueError(f"expected device=None for a network spread by a device_map, got device={device!r}")
    if device not in (None, "auto") and torch.device(device).type == "cuda" and not torch.cuda.is_available():
        raise ValueError(f"expected device='cpu' or 'auto' where torch sees no CUDA device, got device={device!r}")
    if "mps" in (device, model.device.type):
        raise ValueError("expected a CPU or CUDA device, got 'mps', which has no float64; write device='cpu'")


def check_prior(model: BayesianLoRA) -> None:
    """Raise a ValueError for a prior whose program SVI cannot take, or would silently get wrong.

    Parameters of its own, which nothing would train; a plate, which would take the data's place; latents that are not
    sampled, or not as one event of their shape over all real numbers.
    """
    with torch.random.fork_rng():
        prior = poutine.trace(model.sample_prior).get_trace()
    trained = [] if model.learned_scale is not None else list(prior.param_nodes)
    if trained:
        raise ValueError(
            f"expected a prior without parameters of its own, got pyro.param {trained}, which a fit would not train; "
            "write priors.Learned(...) for a trained scale"
        )
    plates = [name for name, node in prior.nodes.items() if site_is_subsample(node)]
    if plates:
        raise ValueError(
            f"expected a prior without pyro.plate, which would take the data's place, got {plates}; write "
            "dist.Normal(...).expand([L]).to_event(1)"
        )
    latents = set(model.sites.shapes) - set(prior.stochastic_nodes)
    if latents:
        raise ValueError(
            f"expected the prior to sample the latents themselves, got {sorted(latents)} otherwise, such as by "
            "pyro.deterministic; write pyro.sample(name, dist.Normal(0, scale).expand(shape).to_event())"
        )

    returned = prior.nodes["_RETURN"]["value"]
    changed = [name for name in model.sites.shapes if not torch.equal(returned[name], prior.nodes[name]["value"])]
    if changed:
        raise ValueError(
            f"expected the prior to return the latents as it samples them, got {changed} changed: draws of the "
            "posterior would be of another function; write the scale into the distribution"
        )
    for name, shape in model.sites.shapes.items():
        fn = prior.nodes[name]["fn"]
        if fn.event_shape != shape or fn.batch_shape:
            raise ValueError(
                f"expected the prior to sample {name!r} as one event of shape {tuple(shape)}, got batch shape "
                f"{tuple(fn.batch_shape)} and event shape {tuple(fn.event_shape)}; write "
                "dist.Normal(0, scale).expand(shape).to_event()"
            )
        far = torch.full(shape, 1e3, device=model.device)
        if not all(bool(torch.as_tensor(fn.support.check(value)).all()) for value in (far, -far)):
            raise ValueError(
                f"expected the prior of {name!r} over all real numbers, got support {fn.support}, which a "
                "guide's draws would leave; write a prior such as dist.Normal or dist.StudentT"
            )


def check_predictable(model: BayesianLoRA, validation) -> None:
    """Raise a TypeError for a user's own likelihood whose rows `predict` cannot score, as it does after every epoch."""
    if hasattr(model.likelihood, "logits") or not model.predicts_classes:
        return
    batch = model.to_device(next(iter(validation)))
    with torch.no_grad():
        check_classes(model.likelihood, model.pretrained_outputs(batch, model.head_start), batch)


def check_sites(model: BayesianLoRA, guide: torch.nn.Module) -> None:
    """Raise a ValueError where the prior has a site that the guide does not sample."""
    wanted = set(poutine.trace(model.sample_prior).get_trace().stochastic_nodes)
    missing = sorted(wanted - set(poutine.trace(guide).get_trace().stochastic_nodes))
    if missing:
        raise ValueError(
            f"expected the guide to sample every site of the prior, {type(guide).__name__} lacks {missing}"
        )


def check_distribution(guide: LatentGuide, size: int) -> None:
    """Raise a ValueError where a family's distribution is not one event over the D latents, or not reparameterised."""
    family, q = type(guide).__name__, guide.distribution()
    if q.event_shape != (size,) or q.batch_shape:
        raise ValueError(
            f"expected {family}.distribution() over the D latents as one event, shape ({size},), got batch shape "
            f"{tuple(q.batch_shape)} and event shape {tuple(q.event_shape)}; write .to_event(1)"
        )
    if not q.has_rsample:
        raise ValueError(
            f"expected a reparameterised distribution, one with rsample, from {family}, got {type(q).__name__}: "
            "without it the gradient is wrong; for a mixture write lb.distributions.EqualMixture"
        )


def check_estimator(guide: torch.nn.Module, settings: Mapping[str, object], per_row: bool) -> None:
    """Raise a TypeError or ValueError where a guide cannot be drawn from, or differentiated, in the way asked for."""
    if settings["path_derivative"] and not getattr(guide, "has_density", False):
        raise TypeError(
            f"expected a guide of pyro_lrblora.guides with a density for path_derivative=True, got "
            f"{type(guide).__name__}; write path_derivative=False"
        )
    if settings["antithetic"] and not (getattr(guide, "symmetric", False) and guide.has_density):
        raise TypeError(
            f"expected a guide symmetric about its mean for antithetic=True, got {type(guide).__name__}; write "
            "antithetic=False"
        )
    if settings["antithetic"] and not per_row and settings["particles"] % 2:
        raise ValueError(
            f"expected an even number of particles with shared antithetic draws, got {settings['particles']}"
        )
