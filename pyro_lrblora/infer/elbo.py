"""The evidence lower bound with its parts, and with a closed-form KL where there is one."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import torch
from pyro import poutine
from pyro.infer import Trace_ELBO
from torch import Tensor
from torch.distributions import Independent, Normal, kl_divergence

from ..guides import LatentGuide


@dataclass(frozen=True)
class Bound:
    """One estimate of the ELBO, in nats over all N rows.

    Args:
        log_likelihood: expected log likelihood.
        kl: KL from prior to posterior (of a Delta guide, minus the log prior).
    """

    log_likelihood: float
    kl: float

    @property
    def elbo(self) -> float:
        return self.log_likelihood - self.kl


class PartedELBO(Trace_ELBO):
    """Pyro's Trace_ELBO that remembers its parts and can take the KL of the flat latents in closed form.

    Closed form: the guide's "_latents" against the model's latent sites, all of them Normal given the prior's own
    sites, which stay Monte Carlo (so a hierarchical prior is Rao-Blackwellised).

    Args:
        closed_form: use it.
        sites: the names of the model's latent sites, in the flat vector's order.
    """

    def __init__(self, closed_form: bool, sites: Iterable[str], **options):
        super().__init__(**options)
        self.closed_form, self.sites = closed_form, list(sites)
        self.bound: Bound | None = None

    def _differentiable_loss_particle(self, model_trace, guide_trace):
        log_likelihood = sum(
            site["log_prob_sum"]
            for site in model_trace.nodes.values()
            if site["type"] == "sample" and site["is_observed"]
        )
        if not self.closed_form:
            loss, surrogate = super()._differentiable_loss_particle(model_trace, guide_trace)
        else:
            covered = {"_latents", *self.sites}
            log_prior = sum(_latent_log_probs(model_trace, covered))
            log_guide = sum(_latent_log_probs(guide_trace, covered))
            prior = [model_trace.nodes[name]["fn"] for name in self.sites]
            kl = latent_kl(guide_trace.nodes["_latents"]["fn"], prior)
            surrogate = kl + log_guide - log_prior - log_likelihood
            loss = float(surrogate.detach())
        log_likelihood = float(log_likelihood.detach())
        self.bound = Bound(log_likelihood, float(loss) + log_likelihood)
        return loss, surrogate


def latent_kl(guide, prior) -> Tensor:
    """KL in nats from the sites' joint prior to a distribution over the flat vector; draws per row count once.

    Args:
        guide: the distribution of "_latents".
        prior: the Normal site distributions, in the flat vector's order.
    """
    # Every row of a plate has the same guide and the same prior: the first row's KL is everyone's.
    row = lambda fn, moment: moment.reshape(-1, fn.event_shape.numel())[0]
    loc = torch.cat([row(fn, fn.mean) for fn in prior])
    variance = torch.cat([row(fn, fn.variance) for fn in prior])
    return kl_divergence(guide, Independent(Normal(loc, variance.sqrt()), 1)).reshape(-1)[0]


def has_closed_form(model, guide) -> bool:
    """Whether PartedELBO can take this guide's KL in closed form under this model's prior."""
    if not isinstance(guide, LatentGuide):
        return False
    trace = poutine.trace(poutine.replay(model.sample_prior, poutine.trace(guide).get_trace())).get_trace()
    prior = [trace.nodes[name]["fn"] for name in model.sites.shapes]
    if not all(_is_normal(fn) for fn in prior):
        return False
    try:
        latent_kl(guide.distribution(), prior)
    except NotImplementedError:
        return False
    return True


def _is_normal(fn) -> bool:
    while isinstance(fn, Independent):
        fn = fn.base_dist
    return isinstance(fn, Normal)


def _latent_log_probs(trace, covered: set[str]) -> Iterator[Tensor]:
    for name, site in trace.nodes.items():
        if site["type"] == "sample" and not site["is_observed"] and name not in covered:
            yield site["log_prob_sum"]
