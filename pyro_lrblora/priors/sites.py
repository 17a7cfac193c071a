"""What every prior needs to sample the latent sites: the statement, its scale, its checks."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import pyro
import torch
from torch import Tensor

Shapes = Mapping[str, torch.Size]


def sample_sites(shapes: Shapes, family: Callable[[str], object]) -> dict[str, Tensor]:
    """Sample every site from a distribution whose entries are independent.

    Args:
        shapes: by site.
        family: from a site's name to a distribution whose batch shape broadcasts to the site's.
    """
    return {name: pyro.sample(name, family(name).expand(shape).to_event()) for name, shape in shapes.items()}


def by_module(scale: float | tuple[float, ...] | Tensor, shape: torch.Size, name: str) -> float | Tensor:
    """A scale that broadcasts over a site: one number, or one per module, (L, 1, ..., 1).

    Args:
        scale: a number, a tensor of shape () or (L,), or a tuple of length L.
        shape: of the site, its first axis L modules.
        name: of the site.

    Raises:
        ValueError: a length that is not L.
    """
    if isinstance(scale, int | float):
        return scale
    scale = torch.as_tensor(scale)
    if scale.dim() == 0:
        return scale
    if len(scale) != shape[0]:
        raise ValueError(
            f"expected one scale for each of the {shape[0]} modules of site {name!r}, got {len(scale)}; write one "
            "number, or LayerScale(...) or Learned(..., per_module=True), which find the modules themselves"
        )
    return scale.reshape(-1, *[1] * (len(shape) - 1))


def check_positive(**values: float | tuple[float, ...]) -> None:
    """Raise a ValueError unless every number, or every entry of a tuple, is above 0."""
    for name, value in values.items():
        entries = value if isinstance(value, tuple) else (value,)
        if not entries or not all(entry > 0 for entry in entries):
            raise ValueError(f"expected {name} > 0, got {name}={value!r}")
