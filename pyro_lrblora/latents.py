"""The one flat latent vector and its named sites."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class LatentSites:
    """The adapter's Pyro sites, in order, as views of one flat vector of D entries.

    Args:
        shapes: site name -> event shape; the first axis runs over adapted modules.
    """

    shapes: Mapping[str, torch.Size]

    @property
    def size(self) -> int:
        """D, the number of latent dimensions."""
        return sum(math.prod(shape) for shape in self.shapes.values())

    def modules(self) -> Iterator[slice]:
        """Where each module's latents of each site lie in the flat vector, site by site."""
        start = 0
        for shape in self.shapes.values():
            step = math.prod(shape[1:])
            for _ in range(shape[0]):
                yield slice(start, start + step)
                start += step

    def split(self, flat: Tensor) -> dict[str, Tensor]:
        """Views of flat (..., D), one per site, each (..., site shape)."""
        parts = flat.split([math.prod(shape) for shape in self.shapes.values()], dim=-1)
        return {
            name: part.reshape(*flat.shape[:-1], *shape)
            for (name, shape), part in zip(self.shapes.items(), parts, strict=True)
        }

    def join(self, values: Mapping[str, Tensor]) -> Tensor:
        """The flat (..., D) vector of values, the inverse of split; other sites in values are left out."""
        missing = [name for name in self.shapes if name not in values]
        if missing:
            raise KeyError(f"expected a value for every latent site {list(self.shapes)}, missing {missing}")
        return torch.cat([values[name].flatten(start_dim=-len(shape)) for name, shape in self.shapes.items()], dim=-1)
