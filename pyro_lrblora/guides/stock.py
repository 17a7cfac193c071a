"""Pyro's own autoguides: how they are started here, and the density of their draws."""

from __future__ import annotations

import inspect
import uuid
from collections.abc import Iterable, Mapping
from functools import partial

import pyro.distributions as dist
import torch
from pyro.infer.autoguide import AutoContinuous, AutoGuide, AutoNormal, init_to_value
from torch import Tensor, nn
from torch.distributions import Normal, biject_to

from ..distributions import CovarianceFactors, FullCovariance
from ..priors.median import init_to_prior_median
from .latent_guide import LatentGuide, spread_head


def build_guide(spec, model, start_scale: float | None = None, start: Mapping[str, Tensor] | None = None) -> nn.Module:
    """A guide from a spec, a guide class, or any callable from a model to a guide.

    A stock autoguide class, or a partial of one, starts at `start` and, where it takes an init_scale, at `start_scale`.

    Args:
        spec: guides.LowRank(rank=8), AutoNormal, lambda model: AutoNormal(model, init_scale=0.01), ...
        model: a prepared BayesianLoRA.
        start_scale: standard deviation at the start, of stock autoguides only.
        start: values of sites to start at, likewise; None is the pretrained network.

    Raises:
        TypeError: a guide already built, or something that cannot be called.
    """
    check_guide_spec(spec)
    options = {}
    if is_stock(spec):
        accepted = inspect.signature(spec).parameters
        if "init_loc_fn" in accepted and accepted["init_loc_fn"].default is not None:
            values = model.start() | dict(start or {})
            options["init_loc_fn"] = init_to_value(values=values, fallback=init_to_prior_median)
        if "init_scale" in accepted and start_scale is not None:
            options["init_scale"] = start_scale
    given = spec.keywords if isinstance(spec, partial) else {}
    guide = spec(model, **(options | given))
    if not isinstance(guide, nn.Module):
        raise TypeError(f"expected {spec!r} to return a guide that is a PyroModule, got {type(guide).__name__}")
    if not isinstance(guide, LatentGuide):
        # Pyro names every autoguide after its class: two in one process would share parameters.
        guide._pyro_name = f"{type(guide).__name__}_{uuid.uuid4().hex[:8]}"
        guide()
        if is_stock(spec) and isinstance(guide, AutoNormal) and "init_scale" not in given:
            spread_head(guide, model)
    return guide


def is_stock(spec) -> bool:
    """Whether a spec is one of Pyro's autoguide classes, or a partial of one."""
    family = spec.func if isinstance(spec, partial) else spec
    return isinstance(family, type) and issubclass(family, AutoGuide)


def check_guide_spec(spec) -> None:
    """Raise a TypeError for a guide already built, or something that cannot be called."""
    if isinstance(spec, nn.Module):
        raise TypeError(
            f"expected a guide spec such as guides.LowRank(rank=8) or a class such as AutoNormal, got a built "
            f"{type(spec).__name__}, which belongs to the model it was built on"
        )
    if isinstance(spec, type) and not issubclass(spec, nn.Module):
        raise TypeError(f"expected a guide spec, got the class {spec.__name__} itself; write {spec.__name__}(...)")
    if not callable(spec):
        raise TypeError(f"expected a guide spec such as guides.LowRank(rank=8), got {spec!r}")


def stock_log_prob(guide: AutoGuide, samples: Mapping[str, Tensor]) -> Tensor:
    """Log density in nats, (S,), of draws under an AutoNormal or AutoContinuous guide.

    Args:
        guide: after its first call.
        samples: by site, (S, site shape).

    Raises:
        TypeError: another kind of guide, which has no density to evaluate.
    """
    if not isinstance(guide, AutoNormal | AutoContinuous):
        raise TypeError(f"expected a guide with a density (AutoNormal, AutoContinuous), got {type(guide).__name__}")
    total, flat = 0.0, []
    for name, site in guide.prototype_trace.iter_stochastic_nodes():
        transform, value = biject_to(site["fn"].support), samples[name]
        free = transform.inv(value)
        jacobian = transform.log_abs_det_jacobian(free, value)
        total = total - jacobian.reshape(len(value), -1).sum(-1)
        if isinstance(guide, AutoNormal):
            loc, scale = guide._get_loc_and_scale(name)
            total = total + Normal(loc, scale).log_prob(free).reshape(len(value), -1).sum(-1)
        flat.append(free.reshape(len(value), -1))
    if isinstance(guide, AutoContinuous):
        total = total + guide.get_posterior().log_prob(torch.cat(flat, dim=-1))
    return total


def stock_covariance(guide: AutoGuide, sites: Iterable[str]) -> CovarianceFactors | FullCovariance:
    """The covariance of some sites, one after another, under a guide that is a normal over unconstrained values.

    Args:
        guide: after its first call.
        sites: names of sites on the whole real line, where a value is its own unconstrained value.

    Raises:
        TypeError: not a normal.
    """
    if isinstance(guide, AutoNormal):
        scale = torch.cat([guide._get_loc_and_scale(name)[1].flatten() for name in sites])
        return CovarianceFactors(scale.square(), scale.new_zeros(len(scale), 0))
    if not isinstance(guide, AutoContinuous):
        raise TypeError(_no_normal(guide))
    normal, places, start = guide.get_posterior(), {}, 0
    for name, site in guide.prototype_trace.iter_stochastic_nodes():
        places[name] = torch.arange(start, start := start + site["value"].numel())
    where = torch.cat([places[name] for name in sites])
    match normal:
        case dist.MultivariateNormal():
            return FullCovariance(normal.scale_tril[where])
        case dist.LowRankMultivariateNormal():
            return CovarianceFactors(normal.cov_diag[where], normal.cov_factor[where])
        case dist.Independent(base_dist=dist.Normal(scale=scale)):
            return CovarianceFactors(scale[where].square(), scale.new_zeros(len(where), 0))
    raise TypeError(_no_normal(guide))


def _no_normal(guide: AutoGuide) -> str:
    return (
        f"expected a Gaussian guide for a covariance in closed form, got {type(guide).__name__}; use the sample "
        "covariance of posterior.sample(draws)"
    )
