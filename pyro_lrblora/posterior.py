"""What inference returns, whatever the method."""

from __future__ import annotations

import threading
from collections.abc import Mapping
from contextlib import nullcontext, suppress
from dataclasses import dataclass, field
from functools import wraps

import pyro
import torch
from pyro import poutine
from pyro.infer.autoguide import AutoDelta, AutoGuide, AutoLaplaceApproximation
from pyro.nn import PyroModule
from torch import Tensor

from .counts import check_counts
from .distributions import BlockCovariance, CovarianceFactors, FullCovariance
from .guides import LatentGuide
from .guides.delta import DeltaGuide
from .guides.draws import DrawsGuide
from .guides.ensemble import EnsembleGuide
from .guides.mirrored import Mirrored
from .guides.stock import stock_covariance, stock_log_prob
from .head import FixedHead
from .model import BayesianLoRA
from .tracing import traced_values

_PYRO = threading.RLock()  # its effect handlers and settings are the process's, not a thread's


def local_parameters(method):
    """Run under Pyro's module_local_params, so that reading a guide leaves the global param store alone.

    Handlers around the call (a trace, a scale, a condition) neither see nor change what is sampled within. Calls from
    several threads wait for one another.
    """

    @wraps(method)
    def wrapped(*args, **kwargs):
        with _PYRO, pyro.settings.context(module_local_params=True), poutine.block():
            return method(*args, **kwargs)

    return wrapped


@dataclass
class Posterior:
    """An approximate posterior over the latents of one model, with the point head that was trained beside it.

    Args:
        model: a copy of the fitted BayesianLoRA that owns the trained head.
        guide: the fitted Pyro guide.
        guide_spec: what the guide was built from.
        history: one dict per epoch; elbo and log_likelihood per observation, kl in all, in nats.
        settings: the arguments of the fit, and "fitted_with": versions, device and hashes of the training data then.
    """

    model: BayesianLoRA
    guide: torch.nn.Module
    guide_spec: object
    history: list[dict] = field(default_factory=list)
    settings: dict = field(default_factory=dict)

    def __post_init__(self):
        # A guide fitted by hand was built for the global param store and lacks what reading it locally needs.
        for root in (self.guide, self.model.point_head):
            for module in root.modules() if root is not None else ():
                if isinstance(module, PyroModule) and not hasattr(module._pyro_context, "param_state"):
                    module._pyro_context.param_state = {"params": {}, "constraints": {}}

    def __repr__(self) -> str:
        return f"Posterior({self.guide_spec!r}, {self.model!r})"

    @property
    def is_point(self) -> bool:
        """Whether all mass is on one point (a Delta guide), with nothing to average over, and no evidence bound."""
        return isinstance(self.guide, DeltaGuide | AutoDelta)

    def balanced_draws(self, draws: int) -> int:
        """So many draws, or what is closest to it from above by which the members of an ensemble count alike.

        Of points one for each is all there is.
        """
        if self.is_point:
            return 1
        if not isinstance(self.guide, EnsembleGuide):
            return draws
        members = self.guide.members
        points = all(isinstance(member, DeltaGuide | AutoDelta) for member in members)
        return len(members) if points else -(-draws // len(members)) * len(members)

    @property
    def has_bound(self) -> bool:
        """Whether a fit of it maximises an evidence bound, since its guide has a density, or else the log joint."""
        spec = getattr(self.guide_spec, "func", self.guide_spec)  # of a partial
        at_mode = self.is_point or spec is AutoLaplaceApproximation
        return not at_mode and getattr(self.guide, "has_density", True)

    @local_parameters
    @torch.no_grad()
    def sample(self, draws: int, seed: int | None = None, antithetic: bool = False) -> dict[str, Tensor]:
        """Draws of every site: the latents, a prior's scales, a Bayesian head. Independent unless antithetic.

        Of stored draws (a Markov chain's) it takes `draws` evenly spaced over all of them, whatever the seed.

        Args:
            draws: S, at least 1.
            seed: makes the draws reproducible; None uses torch's own generator.
            antithetic: draws in pairs, one after the other, mirrored at the mean of a guide that is symmetric about it;
                those of other guides are independent all the same.

        Returns:
            By site, (S, site shape).
        """
        check_counts(draws=draws)
        with torch.random.fork_rng(enabled=seed is not None):
            if seed is not None:
                torch.manual_seed(seed)
            if isinstance(self.guide, DrawsGuide | EnsembleGuide):
                return self.guide.spread(draws)
            with Mirrored() if antithetic and getattr(self.guide, "symmetric", False) else nullcontext():
                drawn = [traced_values(self.guide) for _ in range(draws)]
        return {name: torch.stack([values[name] for values in drawn]) for name in drawn[0]}

    @local_parameters
    @torch.no_grad()
    def log_prob(self, samples: Mapping[str, Tensor]) -> Tensor:
        """Log density q of draws, in nats, (S,).

        Args:
            samples: what `sample` returned, or values of the same shapes.

        Raises:
            TypeError: the guide has no density that can be evaluated.
        """
        if isinstance(self.guide, LatentGuide):
            if not self.guide.has_density:
                raise TypeError(f"expected a guide with a density, got {type(self.guide).__name__}")
            latents = self.guide.distribution().log_prob(self.model.sites.join(samples))
            extra = self.guide.extra
            return latents if extra is None else latents + stock_log_prob(extra, samples)
        return stock_log_prob(self.guide, samples)

    @local_parameters
    @torch.no_grad()
    def mean(self) -> dict[str, Tensor]:
        """The posterior mean of the latents and the median of every other site (of stored draws, the mean), by site."""
        if isinstance(self.guide, DrawsGuide):
            return self.guide.mean()
        if isinstance(self.guide, LatentGuide):
            values = {} if self.guide.extra is None else self.guide.extra.median()
            with suppress(NotImplementedError):
                return values | self.model.sites.split(self.guide.distribution().mean.detach())
        with suppress(NotImplementedError, AttributeError):
            return self.guide.median()
        # A flow, or a guide of the user's own, has neither; of an ensemble, as many draws from every member.
        draws = 64 * len(self.guide.members) if isinstance(self.guide, EnsembleGuide) else 256
        return {name: values.mean(0) for name, values in self.sample(draws, seed=0).items()}

    @local_parameters
    @torch.no_grad()
    def covariance(self) -> CovarianceFactors | FullCovariance | BlockCovariance:
        """The covariance of the D latents: its `variance`, `times` a vector, and `dense()` where D is small.

        Raises:
            TypeError: the guide is not Gaussian.
        """
        if isinstance(self.guide, DrawsGuide):
            draws = self.model.sites.join(self.guide.spread(self.guide.total))
            return CovarianceFactors(torch.zeros_like(draws[0]), (draws - draws.mean(0)).T / (len(draws) - 1) ** 0.5)
        if isinstance(self.guide, AutoGuide):
            return stock_covariance(self.guide, self.model.sites.shapes)
        if not (isinstance(self.guide, LatentGuide) and self.guide.symmetric):
            raise TypeError(
                f"expected a Gaussian guide for a covariance in closed form, got {type(self.guide).__name__}; use the "
                "sample covariance of posterior.sample(draws)"
            )
        q = self.guide.distribution()
        if hasattr(q, "covariance"):
            return q.covariance()
        return CovarianceFactors(q.variance, q.variance.new_zeros(q.event_shape[0], 0))

    @local_parameters
    def head(self) -> dict[str, Tensor]:
        """The trained or fixed head's parameters by dotted name; empty where the head is Bayesian."""
        return {name: value.detach() for name, value in self.model.head_values().items()}

    def parameter_counts(self) -> dict[str, int]:
        """How many parameters the posterior (of stored draws: the numbers) and the head (of an ensemble: all) have."""
        heads = self.guide.buffers(recurse=False) if isinstance(self.guide, EnsembleGuide) else self.head().values()
        return {
            "posterior": sum(p.numel() for p in self.guide.parameters())
            or sum(b.numel() for b in self.guide.buffers()),
            "head": sum(value.numel() for value in heads),
        }

    def save(self, folder) -> None:
        """Write posterior.json and posterior.safetensors into a folder, A, B and the head included."""
        from .storage import save

        save(self, folder)

    @staticmethod
    def load(folder, network, *, tokenizer=None, prior=None, likelihood=None, guide=None) -> Posterior:
        """A saved posterior on a network with the same base weights; see pyro_lrblora.storage.load."""
        from .storage import load

        return load(folder, network, tokenizer=tokenizer, prior=prior, likelihood=likelihood, guide=guide)

    def save_pretrained(self, folder, **options) -> None:
        """`save`, with a model card beside it as README.md; see pyro_lrblora.sharing.save_pretrained."""
        from .sharing import save_pretrained

        save_pretrained(self, folder, **options)

    @staticmethod
    def from_pretrained(source, network, **options) -> Posterior:
        """`load` from a folder, or from a repository on the hub; see pyro_lrblora.sharing.from_pretrained."""
        from .sharing import from_pretrained

        return from_pretrained(source, network, **options)

    def push_to_hub(self, repo_id: str, **options) -> str:
        """What `save_pretrained` writes, as one commit to the hub; see pyro_lrblora.sharing.push_to_hub."""
        from .sharing import push_to_hub

        return push_to_hub(self, repo_id, **options)

    def export_peft(self, folder, draws: int | None = None, seed: int = 0) -> None:
        """Write the mean, or draws, as ordinary PEFT LoRA adapters; see pyro_lrblora.peft_io.export_peft."""
        from .peft_io import export_peft

        export_peft(self, folder, draws, seed)

    def to_arviz(self, data=None, draws: int | None = None, seed: int = 0):
        """The posterior's draws, prior draws, and predictions on `data` as ArviZ data; see pyro_lrblora.arviz_io."""
        from .arviz_io import to_arviz

        return to_arviz(self, data, draws=draws, seed=seed)


def fixed_from(posterior: Posterior) -> FixedHead:
    """The trained head of a posterior, to be neither trained nor sampled in another model."""
    values = posterior.head() or {
        name: value for name, value in posterior.mean().items() if name in posterior.model.head_start
    }
    return FixedHead(values)
