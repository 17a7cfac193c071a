"""Empirical Bayes: a prior whose scale is trained with the guide."""

from __future__ import annotations

import copy
import dataclasses
import uuid
from collections.abc import Callable
from dataclasses import dataclass

import torch
from pyro.nn import PyroModule
from torch import Tensor, nn

from .horseshoe import Horseshoe, RegularisedHorseshoe
from .sites import Shapes


@dataclass(frozen=True)
class Learned:
    """A prior whose `scale` is a point estimate that maximises the ELBO: type-II maximum likelihood (MacKay 1992).

    `fit` trains the scale's logarithm at rates.scale beside the guide. The posterior's model holds the result in
    `learned_scale`; the spec only says where it starts. With a guide that is a point (Delta) the scale stays there: the
    log joint grows without bound as scale and latents go to zero. Other inference methods leave it there too.

    Args:
        prior: any prior with a field `scale`, the start; called with it as a tensor, () or (L,).
        per_module: one scale for each module of each site, not one in all.

    Raises:
        TypeError: a prior without `scale`, or one that is learned already.
        ValueError: per_module for a horseshoe, whose `scale` is one number; a scale per module without per_module.
    """

    prior: Callable
    per_module: bool = False

    def __post_init__(self):
        prior = self.prior
        if isinstance(prior, Learned):
            raise TypeError(f"expected a prior to learn the scale of, got {prior!r}, which is learned; write it once")
        fields = dataclasses.fields(prior) if dataclasses.is_dataclass(prior) and not isinstance(prior, type) else ()
        if "scale" not in {field.name for field in fields}:
            raise TypeError(
                f"expected a prior that is a dataclass with a field `scale`, such as Normal(scale=0.1), got {prior!r}"
            )
        if self.per_module and isinstance(prior, Horseshoe | RegularisedHorseshoe):
            raise ValueError(
                f"expected per_module=False, because {prior!r} has one global scale; write LayerScale(...)"
            )
        if isinstance(prior.scale, tuple) and not self.per_module:
            raise ValueError(f"expected one scale to learn, got {prior!r}; write per_module=True")

    def __call__(self, shapes: Shapes, scale: Tensor | None = None) -> dict[str, Tensor]:
        """Sample the sites.

        Args:
            shapes: by site.
            scale: what LearnedScale holds, () or the modules of all sites in turn; None is the start.
        """
        if scale is None:
            return self.prior(shapes)
        if not self.per_module:
            return self._at(scale)(shapes)
        parts = scale.split([shape[0] for shape in shapes.values()])
        return {
            site: value
            for (name, shape), part in zip(shapes.items(), parts, strict=True)
            for site, value in self._at(part)({name: shape}).items()
        }

    def _at(self, scale: Tensor) -> Callable:
        # Not dataclasses.replace: the checks of a prior's arguments would wait for the GPU at every step.
        prior = copy.copy(self.prior)
        object.__setattr__(prior, "scale", scale)
        return prior


class LearnedScale(PyroModule):
    """The trained scale of one model's Learned prior; calling it returns it (and shows it to Pyro as a param).

    Args:
        learned: the spec.
        shapes: of the latent sites.
        device: where they live.

    Raises:
        ValueError: a start per module whose length is not that of every site.
    """

    def __init__(self, learned: Learned, shapes: Shapes, device: torch.device):
        # A name of its own, so that two of them never meet in Pyro's param store.
        super().__init__(f"prior_{uuid.uuid4().hex[:8]}")
        # What reading it locally needs, which Pyro gives only to modules built locally.
        self._pyro_context.param_state = {"params": {}, "constraints": {}}
        start = torch.tensor(learned.prior.scale, dtype=torch.float32, device=device).log()
        if learned.per_module:
            start = torch.cat([self._per_module(start, shape, name) for name, shape in shapes.items()])
        self.log_scale = nn.Parameter(start)

    def forward(self) -> Tensor:
        return self.log_scale.exp()

    @property
    def current(self) -> Tensor:
        """The scale as it is now, () or the modules of all sites in turn, without a gradient."""
        return self.log_scale.detach().exp()

    @staticmethod
    def _per_module(start: Tensor, shape: torch.Size, name: str) -> Tensor:
        if start.dim() and len(start) != shape[0]:
            raise ValueError(f"expected a scale for each of the {shape[0]} modules of site {name!r}, got {len(start)}")
        return start.expand(shape[0]).clone()
