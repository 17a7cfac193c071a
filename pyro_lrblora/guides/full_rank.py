"""Normal with any covariance: over all latents, or over each module's."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from pyro.nn import PyroParam
from torch import Tensor, nn
from torch.distributions import constraints

from ..distributions import Blocks, FullRankNormal
from .latent_guide import Curvature, LatentGuide

_COPIES = 9  # the factor in float64 at the start, its Cholesky factor and temporaries; Adam needs six in float32


@dataclass(frozen=True)
class FullRank:
    """Covariance T T' with T = diag(s)(I + strictly lower triangular); about D^2 / 2 free parameters, D^2 stored.

    Args:
        per_module: one covariance per module (and site) instead of one over all latents.
        start_scale: start of each s as a share of the prior's, where no warm start sets it.
        most_gigabytes: of memory while fitting, above which it refuses.

    Raises:
        ValueError: when built on a model for which it needs more.
    """

    per_module: bool = False
    start_scale: float = 0.1
    most_gigabytes: float = 4.0
    fisher_rank: ClassVar[int] = 256

    def gigabytes(self, model) -> float:
        """Memory that fitting it takes, in GB: the factor, its gradient, Adam's two moments, and work."""
        sizes = [s.stop - s.start for s in model.sites.modules()] if self.per_module else [model.sites.size]
        return _COPIES * 4 * sum(size**2 for size in sizes) / 1e9

    def check_memory(self, model) -> None:
        """Raise a ValueError where it needs more than most_gigabytes."""
        needed = self.gigabytes(model)
        if needed > self.most_gigabytes:
            blocks = FullRank(per_module=True).gigabytes(model)
            advice = (
                "LowRankPrecision()" if self.per_module else f"FullRank(per_module=True), which needs {blocks:.2g} GB"
            )
            raise ValueError(
                f"expected a full covariance over D={model.sites.size} latents to fit into most_gigabytes="
                f"{self.most_gigabytes:g}, it needs {needed:.2g} GB; write {advice}, or raise most_gigabytes"
            )

    def __call__(self, model) -> FullRankGuide:
        self.check_memory(model)
        return FullRankGuide(model, self.per_module, self.start_scale)


class FullRankGuide(LatentGuide):
    symmetric = True

    def __init__(self, model, per_module: bool, start_scale: float):
        super().__init__(model)
        loc, prior_sd = self.starting_point(model)
        self.loc = nn.Parameter(loc)
        self.scale = PyroParam(start_scale * prior_sd, constraints.positive)
        # (blocks, size) of each run of equal blocks.
        shapes = self.sites.shapes.values()
        self.runs = [(s[0], s[1:].numel()) for s in shapes] if per_module else [(1, len(loc))]
        for number, (count, size) in enumerate(self.runs):
            setattr(self, f"factor_{number}", nn.Parameter(loc.new_zeros(count, size, size)))

    @property
    def joint(self) -> bool:
        """Whether all latents are in one covariance."""
        return len(self.runs) == 1 and self.runs[0][0] == 1

    def distribution(self) -> Blocks:
        sizes = [count * size for count, size in self.runs]
        locs, scales = self.loc.split(sizes), self.scale.split(sizes)
        parts = [
            FullRankNormal(loc.reshape(run), unit_triangular(factor, scale.reshape(run)))
            for loc, scale, factor, run in zip(locs, scales, self._factors(), self.runs, strict=True)
        ]
        return Blocks(parts)

    def begin(self, curvature: Curvature) -> None:
        blocks = [curvature.dense()] if self.joint else None
        blocks = blocks or [block.dense() for _, block in curvature.blocks(self.sites)]
        self.set(curvature.loc, [precision_to_root(block) for block in blocks])

    def set(self, loc: Tensor, roots: list[Tensor]) -> None:
        """Take loc (D,) and the Cholesky factor of every block's covariance, in order."""
        self.loc.data.copy_(loc)
        self.scale = torch.cat([root.diagonal() for root in roots]).to(loc)
        roots = iter(roots)
        for factor in self._factors():
            for block in factor.data:
                root = next(roots)
                block.copy_((root / root.diagonal().unsqueeze(-1)).tril(-1))

    def _factors(self) -> list[Tensor]:
        return [getattr(self, f"factor_{number}") for number in range(len(self.runs))]


def unit_triangular(factor: Tensor, scale: Tensor) -> Tensor:
    """diag(scale)(I + the strictly lower part of factor), (..., D, D): a Cholesky factor whatever the numbers."""
    return scale.unsqueeze(-1) * factor.tril(-1) + torch.diag_embed(scale)


def precision_to_root(precision: Tensor) -> Tensor:
    """The lower Cholesky factor of precision^-1, (..., D, D)."""
    # Cholesky of the reversed matrix: no inverse is formed and factored again.
    flipped = torch.linalg.cholesky(precision.flip(-2, -1)).flip(-2, -1)
    eye = torch.eye(precision.shape[-1], dtype=precision.dtype, device=precision.device)
    return torch.linalg.solve_triangular(flipped.mT, eye, upper=False)
