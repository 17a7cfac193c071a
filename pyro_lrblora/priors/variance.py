"""The variance a prior gives each latent."""

from __future__ import annotations

from collections.abc import Callable, Iterable

import pyro
import torch
from pyro import poutine
from pyro.infer.autoguide.initialization import InitMessenger, init_to_median
from torch import Tensor


@torch.no_grad()
def prior_variance(program: Callable[[], object], sites: Iterable[str]) -> dict[str, Tensor]:
    """The variance of each latent under a prior, its own sites (scales) at their median, a learned scale as it is now.

    Args:
        program: samples the prior.
        sites: the latent sites.

    Returns:
        By site, in its shape; where the variance is infinite, the square of the median magnitude / 0.6745.
    """
    with pyro.settings.context(module_local_params=True), torch.random.fork_rng(), poutine.block():
        torch.manual_seed(0)
        trace = poutine.trace(InitMessenger(init_to_median)(program)).get_trace()
        variances = {}
        for name in sites:
            fn = trace.nodes[name]["fn"]
            variances[name] = fn.variance
            if not fn.variance.isfinite().all():
                robust = (fn.sample((401,)).abs().median(0).values / 0.6745).square()
                variances[name] = torch.where(fn.variance.isfinite(), fn.variance, robust)
    return variances
