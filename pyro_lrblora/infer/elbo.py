"""The evidence lower bound with its parts, and with a closed-form KL where there is one."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import nullcontext
from dataclasses import dataclass

import torch
from pyro import poutine
from pyro.infer import Trace_ELBO
from pyro.infer.util import is_validation_enabled
from pyro.poutine.util import prune_subsample_sites
from pyro.util import check_model_guide_match
from torch import Tensor
from torch.distributions import Independent, Normal, kl_divergence

from ..guides import LatentGuide
from ..guides.mirrored import Mirrored


@dataclass(frozen=True)
class Bound:
    """One estimate of the ELBO, in nats over all N rows.

    Args:
        log_likelihood: expected log likelihood.
        kl: KL(guide || prior) (of a Delta guide, minus the log prior).
    """

    log_likelihood: float
    kl: float

    @property
    def elbo(self) -> float:
        """The bound itself."""
        return self.log_likelihood - self.kl


class PartedELBO(Trace_ELBO):
    """Pyro's Trace_ELBO that remembers its parts, with a closed-form KL and two more gradient estimators.

    Closed form: the guide's "_latents" against the model's latent sites, all of them Normal given the prior's own
    sites, which stay Monte Carlo (so a hierarchical prior is Rao-Blackwellised).

    Args:
        closed_form: use it.
        sites: the names of the model's latent sites, in the flat vector's order.
        path_derivative: a LatentGuide whose log density is differentiated through the draw alone: the score term, whose
            mean is zero, is left out, so that the gradient vanishes where the guide is the posterior ("sticking the
            landing", Roeder et al. 2017, arXiv 1703.09194). Monte Carlo KL only.
        antithetic: draws in pairs mirrored at the guide's mean: rows of a batch, or consecutive particles.
        num_particles: draws (per row) that the estimate is averaged over.
    """

    def __init__(
        self,
        closed_form: bool,
        sites: Iterable[str],
        path_derivative: LatentGuide | None = None,
        antithetic: bool = False,
        **options,
    ):
        super().__init__(**options)
        self.closed_form, self.sites = closed_form, list(sites)
        self.path_derivative, self.antithetic = path_derivative, antithetic
        self._bounds: list[Bound] = []

    @property
    def bound(self) -> Bound:
        """The last estimate, averaged over its particles."""
        mean = lambda part: sum(getattr(bound, part) for bound in self._bounds) / len(self._bounds)
        return Bound(mean("log_likelihood"), mean("kl"))

    def differentiable_loss(self, model, guide, *args, **kwargs) -> Tensor:
        self._bounds = []
        with Mirrored() if self.antithetic else nullcontext():
            return super().differentiable_loss(model, guide, *args, **kwargs)

    def _get_trace(self, model, guide, args, kwargs):
        if not self.closed_form:
            return super()._get_trace(model, guide, args, kwargs)
        # What get_importance_trace does, without the densities that the closed form stands for.
        guide_trace = poutine.trace(guide).get_trace(*args, **kwargs)
        model_trace = poutine.trace(poutine.replay(model, trace=guide_trace)).get_trace(*args, **kwargs)
        if is_validation_enabled():
            check_model_guide_match(model_trace, guide_trace)
        covered = {"_latents", *self.sites}
        traces = prune_subsample_sites(model_trace), prune_subsample_sites(guide_trace)
        for trace in traces:
            trace.compute_log_prob(lambda name, site: name not in covered)
        return traces

    def _differentiable_loss_particle(self, model_trace, guide_trace):
        log_likelihood = sum(
            site["log_prob_sum"]
            for site in model_trace.nodes.values()
            if site["type"] == "sample" and site["is_observed"]
        )
        if not self.closed_form:
            loss, surrogate = super()._differentiable_loss_particle(model_trace, guide_trace)
            if self.path_derivative is not None:
                surrogate = surrogate - score_term(self.path_derivative, guide_trace.nodes["_latents"])
        else:
            covered = {"_latents", *self.sites}
            log_prior = sum(_latent_log_probs(model_trace, covered))
            log_guide = sum(_latent_log_probs(guide_trace, covered))
            prior = [model_trace.nodes[name]["fn"] for name in self.sites]
            kl = latent_kl(guide_trace.nodes["_latents"]["fn"], prior)
            surrogate = kl + log_guide - log_prior - log_likelihood
            loss = float(surrogate.detach())
        log_likelihood = float(log_likelihood.detach())
        self._bounds.append(Bound(log_likelihood, float(loss) + log_likelihood))
        return loss, surrogate


def score_term(guide: LatentGuide, node) -> Tensor:
    """A scalar of value zero whose gradient is that of log q in the guide's parameters, the draw held fixed."""
    frozen = [p for p in guide.parameters() if p.requires_grad]
    for parameter in frozen:
        parameter.requires_grad_(False)
    try:
        through_draw = (guide.distribution().log_prob(node["value"]) * node["scale"]).sum()
    finally:
        for parameter in frozen:
            parameter.requires_grad_(True)
    return node["log_prob_sum"] - through_draw


def latent_kl(guide, prior) -> Tensor:
    """KL(guide || prior) in nats of a distribution over the flat vector; draws per row count once.

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
    nodes = [trace.nodes[name] for name in model.sites.shapes]
    prior = [node["fn"] for node in nodes]
    if any(node["scale"] != 1 or node["mask"] is not None for node in nodes):
        return False  # poutine.scale or mask, which the distribution does not show
    if not all(is_normal(fn) for fn in prior) or set(sites_of_latents(model)) & set(model.sites.shapes):
        return False
    try:
        latent_kl(guide.distribution(), prior)
    except NotImplementedError:
        return False
    return True


def sites_of_latents(model) -> list[str]:
    """The prior's sites whose density depends on the latents: latents, pyro.factor and observed ones among them."""
    with torch.random.fork_rng():
        first = poutine.trace(model.sample_prior).get_trace()
        names = [name for name, node in first.nodes.items() if node["type"] == "sample"]
        own = {name: first.nodes[name]["value"] for name in first.stochastic_nodes if name not in model.sites.shapes}
        again = poutine.trace(poutine.condition(model.sample_prior, own)).get_trace()

    def density(trace, name):
        # Latents differ between the two, what they are compared at must not.
        value = (first if name in model.sites.shapes else trace).nodes[name]["value"]
        return trace.nodes[name]["fn"].log_prob(value).sum()

    return [name for name in names if not torch.equal(density(first, name), density(again, name))]


def is_normal(fn) -> bool:
    """Whether a site's distribution is independent Normals."""
    while isinstance(fn, Independent):
        fn = fn.base_dist
    return isinstance(fn, Normal)


def _latent_log_probs(trace, covered: set[str]) -> Iterator[Tensor]:
    for name, site in trace.nodes.items():
        if site["type"] == "sample" and not site["is_observed"] and name not in covered:
            yield site["log_prob_sum"]
