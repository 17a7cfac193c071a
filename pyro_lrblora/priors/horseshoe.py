"""Horseshoe priors: most latents near zero, a few free."""

from __future__ import annotations

from dataclasses import dataclass

import pyro
import pyro.distributions as dist
import torch
from torch import Tensor

from .sites import Shapes, check_positive, sample_sites


@dataclass(frozen=True)
class Horseshoe:
    """Normal with a half-Cauchy scale per latent times a global half-Cauchy scale (Carvalho et al. 2010).

    Adds the sites "global_scale" and, for each latent site, "<site>_local_scale" of the same shape.

    Args:
        scale: scale of the half-Cauchy on the global scale, positive.
    """

    scale: float = 0.1

    def __post_init__(self):
        check_positive(scale=self.scale)

    def __call__(self, shapes: Shapes) -> dict[str, Tensor]:
        shared, local = _half_cauchy_scales(shapes, self.scale)
        return sample_sites(shapes, lambda name: dist.Normal(0.0, shared * local[name]))


@dataclass(frozen=True)
class RegularisedHorseshoe:
    """A horseshoe whose largest latents still see a wide Normal, the slab (Piironen & Vehtari 2017, arXiv 1707.01694).

    The variance of a latent is c^2 t^2 / (c^2 + t^2), t being the horseshoe's global times local scale (equation 2.8).
    Adds the horseshoe's sites and "slab_variance", c^2 ~ InverseGamma(df / 2, df slab^2 / 2).

    Args:
        scale: scale of the half-Cauchy on the global scale, positive.
        slab: scale of the slab, positive: the largest latents are Student t with this scale.
        df: degrees of freedom of that Student t, positive.
    """

    scale: float = 0.1
    slab: float = 1.0
    df: float = 4.0

    def __post_init__(self):
        check_positive(scale=self.scale, slab=self.slab, df=self.df)

    def __call__(self, shapes: Shapes) -> dict[str, Tensor]:
        shared, local = _half_cauchy_scales(shapes, self.scale)
        half = torch.tensor(0.5 * self.df)
        slab = pyro.sample("slab_variance", dist.InverseGamma(half, half * self.slab**2))

        def family(name: str) -> dist.Normal:
            wide = (shared * local[name]).square()
            # wide * slab / (slab + wide), without overflow where a half-Cauchy's tail is squared.
            return dist.Normal(0.0, (slab / (1 + slab / wide.clamp(min=1e-30))).sqrt())

        return sample_sites(shapes, family)


def _half_cauchy_scales(shapes: Shapes, scale) -> tuple[Tensor, dict[str, Tensor]]:
    shared = pyro.sample("global_scale", dist.HalfCauchy(torch.as_tensor(scale)))
    local = {
        name: pyro.sample(f"{name}_local_scale", dist.HalfCauchy(1.0).expand(shape).to_event())
        for name, shape in shapes.items()
    }
    return shared, local
