"""The variance a prior gives each latent, and what it gives them together."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import replace

import pyro
import torch
from pyro import poutine
from pyro.infer.autoguide.initialization import InitMessenger, init_to_median
from torch import Tensor

from .median import base_distribution, init_to_prior_median, median_draws


@torch.no_grad()
def prior_variance(program: Callable[[], object], sites: Iterable[str]) -> dict[str, Tensor]:
    """The variance of each latent under a prior, its own sites (scales) at their median, a learned scale as it is now.

    The medians are exact where the distribution has an inverse cdf, else from draws that are the same in every call.

    Args:
        program: samples the prior.
        sites: the latent sites.

    Returns:
        By site, in its shape; where the variance is infinite, the square of the median magnitude / 0.6745.
    """
    sites = list(sites)
    with _at_median(program, sites) as trace:
        return {name: _variance(trace.nodes[name]["fn"]) for name in sites}


@torch.no_grad()
def prior_covariance(program: Callable[[], object], sites: Iterable[str]) -> dict[str, Tensor]:
    """The covariance of each site under a prior, in independent blocks along its flat vector, float64.

    Args:
        program, sites: as for prior_variance, which its diagonal is.

    Returns:
        By site, (blocks, e, e); e is 1 where all entries are independent.

    Raises:
        TypeError: a site of vectors or matrices whose distribution does not say what their covariance is.
    """
    sites = list(sites)
    with _at_median(program, sites) as trace:
        return {name: _blocks(name, trace.nodes[name]["fn"]) for name in sites}


@contextmanager
def _at_median(program: Callable[[], object], latents: list[str]) -> Iterator[poutine.Trace]:
    """The program's trace with every site at its median; draws inside are seeded and leave the global stream alone."""

    def start(site: dict) -> Tensor:
        # Of a latent the quick one will do: no other site's distribution hangs on its value.
        return init_to_median(site) if site["name"] in latents else init_to_prior_median(site)

    with pyro.settings.context(module_local_params=True), torch.random.fork_rng(), poutine.block():
        torch.manual_seed(0)
        yield poutine.trace(InitMessenger(start)(program)).get_trace()


def _variance(fn) -> Tensor:
    if fn.variance.isfinite().all():
        return fn.variance
    robust = (fn.sample((median_draws(fn),)).abs().median(0).values / 0.6745).square()
    return torch.where(fn.variance.isfinite(), fn.variance, robust)


def _blocks(name: str, fn) -> Tensor:
    base, variance = base_distribution(fn), _variance(fn).double()
    axes, size = len(base.event_shape), base.event_shape.numel()
    if not axes:
        return variance.reshape(-1, 1, 1)
    if hasattr(base, "covariance"):  # one of this library's distributions
        found = base.covariance()
        # Multiplied out in float32, the small eigenvalues of strong correlations would be rounding.
        double = {key: value.double() for key, value in vars(found).items() if isinstance(value, Tensor)}
        dense = replace(found, **double).dense().double()
    elif hasattr(base, "covariance_matrix"):
        dense = base.covariance_matrix.double()
    else:
        raise TypeError(
            f"expected a prior whose covariance is known, got {type(base).__name__} of {tuple(base.event_shape)} at "
            f"site {name!r}; write priors.MatrixNormal(...), or a distribution with covariance_matrix"
        )
    dense = dense.expand(*fn.shape()[:-axes], size, size).reshape(-1, size, size)
    # The matrix of a heavy-tailed distribution may be its scale: the correlations are the same.
    ratio = (variance.reshape(-1, size) / dense.diagonal(dim1=-2, dim2=-1)).sqrt()
    return dense * ratio[:, :, None] * ratio[:, None, :]
