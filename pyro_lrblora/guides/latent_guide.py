"""The contract of a variational family over the flat latent vector."""

from __future__ import annotations

import uuid
from collections.abc import Iterator, Mapping
from contextlib import nullcontext
from dataclasses import dataclass

import pyro
import pyro.distributions as dist
import torch
from pyro import poutine
from pyro.infer.autoguide import AutoNormal
from pyro.infer.autoguide.initialization import init_to_value
from pyro.infer.autoguide.utils import deep_setattr
from pyro.nn import PyroModule, PyroParam
from torch import Tensor, nn

from ..distributions import LowRankPrecisionNormal
from ..fisher import Fisher
from ..priors import prior_variance
from ..priors.median import init_to_prior_median


@dataclass(frozen=True)
class Curvature:
    """What a warm start knows: where to begin and how sharply the log joint bends there.

    Args:
        loc: (D,).
        prior_precision: (D,).
        fisher: of the log likelihood at loc.
    """

    loc: Tensor  # (D,)
    prior_precision: Tensor  # (D,)
    fisher: Fisher

    @property
    def diagonal(self) -> Tensor:
        """The diagonal of the log joint's Gauss-Newton matrix, (D,)."""
        return self.prior_precision + self.fisher.diagonal

    def dense(self) -> Tensor:
        """The log joint's Gauss-Newton matrix, (D, D): diagonal and the Fisher's leading eigenvectors, float64."""
        vectors = self.fisher.vectors.double()
        rest = (self.prior_precision + self.fisher.residual).double()
        return torch.diag(rest) + (vectors * self.fisher.values) @ vectors.T

    def blocks(self, sites) -> Iterator[tuple[slice, Curvature]]:
        """The part of every module of every site, with its own leading eigenvectors.

        Args:
            sites: the model's LatentSites.
        """
        for where in sites.modules():
            weighted = self.fisher.vectors[where] * self.fisher.values.sqrt()
            vectors, singular, _ = torch.linalg.svd(weighted, full_matrices=False)
            part = Fisher(self.fisher.diagonal[where], vectors, singular.square())
            yield where, Curvature(self.loc[where], self.prior_precision[where], part)

    @classmethod
    def of(cls, q, prior_precision: Tensor) -> Curvature:
        """What a fitted distribution says about the curvature: its own precision, or the inverse of its variances.

        Args:
            q: over the flat latents, with mean and variance.
            prior_precision: (D,).
        """
        here = lambda value: value.to(prior_precision.device)  # q may have been fitted on another
        if isinstance(q, LowRankPrecisionNormal):
            vectors, singular, _ = torch.linalg.svd(here(q.precision_factor), full_matrices=False)
            values, rest = singular.square(), here(q.precision_diag)
        else:
            rest = here(q.variance).reciprocal()
            vectors, values = rest.new_zeros(len(rest), 0), rest.new_zeros(0)
        # Where q is wider than the prior, the "prior" part shrinks so that the sum is q's.
        prior_precision = prior_precision.minimum(rest)
        diagonal = rest - prior_precision + (vectors.square() * values).sum(-1)
        return cls(here(q.mean), prior_precision, Fisher(diagonal, vectors, values))


class LatentGuide(PyroModule):
    """A Pyro guide with one joint distribution over the D latents and a factor of its own for every other site.

    A family is a subclass that makes its parameters in __init__, returns a distribution over (D,) from `distribution`
    and sets the parameters from a `Curvature` in `begin`. Everything else is here: draws shared or per row, sites as
    views of the vector, and an independent Normal (in unconstrained space) for a prior's scales and a Bayesian
    head. Parameters with "scale" or "factor" in their names get the learning rates of that name. A spec may have a
    `fisher_rank`: how many leading eigenvectors its warm start wants, 0 for no pass over the data. A family of normals
    says `symmetric = True`, for mirrored draws and the linearised predictive.

    Args:
        model: a BayesianLoRA.
    """

    extra_family = AutoNormal
    has_density = True  # False: draws only, such as a point; nothing then has an evidence bound
    random: slice | Tensor = slice(None)  # which latents are not points
    symmetric = False  # True of a normal: draws mirrored at its mean are draws, and its covariance says all

    def __init__(self, model):
        # Pyro's param store goes by name: without one of its own, two guides in a process would share parameters.
        super().__init__(f"{type(self).__name__}_{uuid.uuid4().hex[:8]}")
        self._model = (model,)  # in a tuple, so that the network never becomes a submodule
        self.sites = model.sites
        self.extra = self._extra_guide(model, model.start())

    def distribution(self):
        """q over the flat latent vector: event shape (D,), reparameterised."""
        raise NotImplementedError(f"{type(self).__name__} must define distribution()")

    def begin(self, curvature: Curvature) -> None:
        """Set the parameters from a curvature at the start."""
        raise NotImplementedError(f"{type(self).__name__} must define begin(curvature)")

    def begin_at(self, loc: Tensor) -> None:
        """Move to loc (D,) and keep everything else."""
        self.loc.data.copy_(loc)

    def begin_others_at(self, values: Mapping[str, Tensor], other: nn.Module | None = None) -> None:
        """Move the factors of all sites beside the latents, a prior's scales and a Bayesian head.

        Args:
            values: by site; one that is missing starts at the prior's median.
            other: the same factors of another guide, whose widths are taken too where both have them.
        """
        if self.extra is None:
            return
        self.extra = self._extra_guide(self._model[0], values)
        shapes = lambda module: {name: value.shape for name, value in module.state_dict().items()}
        if type(other) is type(self.extra) and shapes(other) == shapes(self.extra):
            self.extra.load_state_dict(other.state_dict())

    def forward(self, batch=None, per_row: bool = False) -> dict[str, Tensor]:
        values = {} if self.extra is None else self.extra()
        with self._model[0].data_plate(batch).latents() if per_row else nullcontext():
            flat = pyro.sample("_latents", self.distribution(), infer={"is_auxiliary": True})
            for name, value in self.sites.split(flat).items():
                values[name] = pyro.sample(name, dist.Delta(value, event_dim=len(self.sites.shapes[name])))
        return values

    def rowwise(self, batch) -> dict[str, Tensor]:
        """The guide with a draw per row of the batch, for BayesianLoRA.rowwise."""
        return self(batch, per_row=True)

    def starting_point(self, model) -> tuple[Tensor, Tensor]:
        """Where parameters begin without a warm start: the pretrained network's latents, the prior's sd; both (D,)."""
        variance = prior_variance(model.sample_prior, self.sites.shapes)
        return self.sites.join(model.start()), self.sites.join(variance).sqrt()

    def _extra_guide(self, model, values: Mapping[str, Tensor]):
        program = poutine.block(lambda *_: model.sample_prior(), hide=list(self.sites.shapes))
        with torch.random.fork_rng():
            torch.manual_seed(0)
            if not poutine.trace(program).get_trace().stochastic_nodes:
                return None
            start = init_to_value(values=dict(values), fallback=init_to_prior_median)
            guide = self.extra_family(program, init_loc_fn=start)
            guide._setup_prototype()
        if isinstance(guide, AutoNormal):
            spread_head(guide, model)
        return guide


def spread_head(guide: AutoNormal, model) -> None:
    """Start a Bayesian head at a tenth of its prior's standard deviation.

    An absolute start, which is Pyro's, would be wide or narrow as the features the head reads are small or large.
    """
    if model.head == "bayesian":
        for name, prior in model.head_prior().items():
            deep_setattr(guide.scales, name, PyroParam(0.1 * prior.scale, guide.scale_constraint, prior.scale.dim()))
