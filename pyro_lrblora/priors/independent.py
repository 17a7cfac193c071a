"""Independent latents of one family: Normal, Laplace, Student t."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import pyro.distributions as dist
from torch import Tensor

from .sites import Shapes, by_module, check_positive, sample_sites


@dataclass(frozen=True)
class Normal:
    """Independent Normal(0, scale) on every latent.

    Args:
        scale: standard deviation, positive; at 0.1 with r = 8 an update's Frobenius norm has prior mean about 0.8. Or
            one per module, along the first axis of every site.
    """

    scale: float | Sequence[float] = 0.1

    def __post_init__(self):
        scale = self.scale.tolist() if hasattr(self.scale, "tolist") else self.scale
        object.__setattr__(self, "scale", tuple(scale) if isinstance(scale, list) else scale)
        check_positive(scale=self.scale)

    def __call__(self, shapes: Shapes) -> dict[str, Tensor]:
        # Every site's length is checked before the first is sampled.
        scales = {name: by_module(self.scale, shape, name) for name, shape in shapes.items()}
        return sample_sites(shapes, lambda name: dist.Normal(0.0, scales[name]))


@dataclass(frozen=True)
class Laplace:
    """Independent Laplace(0, scale) on every latent.

    Args:
        scale: positive; the standard deviation is sqrt(2) times it.
    """

    scale: float = 0.1

    def __post_init__(self):
        check_positive(scale=self.scale)

    def __call__(self, shapes: Shapes) -> dict[str, Tensor]:
        return sample_sites(shapes, lambda name: dist.Laplace(0.0, by_module(self.scale, shapes[name], name)))


@dataclass(frozen=True)
class StudentT:
    """Independent Student t times a scale on every latent.

    Args:
        scale: positive; for df > 2 the standard deviation is sqrt(df / (df - 2)) times it.
        df: degrees of freedom, positive.
    """

    scale: float = 0.1
    df: float = 4.0

    def __post_init__(self):
        check_positive(scale=self.scale, df=self.df)

    def __call__(self, shapes: Shapes) -> dict[str, Tensor]:
        return sample_sites(shapes, lambda name: dist.StudentT(self.df, 0.0, by_module(self.scale, shapes[name], name)))
