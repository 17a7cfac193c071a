"""Several projections in one basis, each with a share of the rank."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from .basis import Basis, Projection

_SAME = 1e-2  # sine of the angle under which a direction counts as one that is spanned already


@dataclass(frozen=True)
class Hybrid:
    """A and B span what the parts span, such as Hybrid((SVD(), Gradient()), (0.5, 0.5)).

    Every part gives its leading directions, as many as its share of the rank says; together they are made orthonormal,
    part by part. Where parts overlap, their next directions fill up the rank.

    Args:
        parts: projections, each a Projection.
        shares: one positive number per part; the rank is split in their proportion, by largest remainder, and no part
            gets less than one direction.

    Raises:
        ValueError: no parts, another number of shares than parts, a share that is not positive, or parts that need the
            passes "labels" and "model" at once.
    """

    parts: Sequence[Projection]
    shares: Sequence[float]

    def __post_init__(self):
        object.__setattr__(self, "parts", tuple(self.parts))
        object.__setattr__(self, "shares", tuple(self.shares))
        if not self.parts or len(self.parts) != len(self.shares):
            raise ValueError(
                f"expected one share for each part, got {len(self.parts)} parts and shares={self.shares}; "
                "write Hybrid((SVD(), Gradient()), (0.5, 0.5))"
            )
        if not all(0 < share < math.inf for share in self.shares):
            raise ValueError(f"expected positive shares, got {self.shares}; leave out the part that shall get nothing")
        if {"labels", "model"} <= self._passes:
            raise ValueError(
                f"expected gradients under the labels or under the model's own labels, got both in {self.parts}; "
                "write Gradient() or Gradient(label_free=True) in all parts"
            )

    @property
    def statistics(self) -> str | None:
        """The one pass that serves all parts, as a pass for gradients sees the inputs too."""
        return next((name for name in ("labels", "model", "inputs") if name in self._passes), None)

    @property
    def smallest_rank(self) -> int:
        """The rank at which every part has one direction."""
        return sum(self._smallest_ranks)

    def collect(self, inputs: Tensor, gradients: Tensor | None, mask: Tensor) -> dict[str, Tensor]:
        return {
            f"{position}.{key}": value
            for position, part in enumerate(self.parts)
            if part.statistics is not None
            for key, value in part.collect(inputs, gradients, mask).items()
        }

    def summed_gradient(self, statistics: Mapping[str, Tensor]) -> Tensor:
        """The sum over rows of the loss gradient, (m, n), from the first part that has it."""
        position = next(i for i, part in enumerate(self.parts) if part.statistics == "labels")
        return self.parts[position].summed_gradient(_own(statistics, position))

    def __call__(
        self, weight: Tensor, rank: int, statistics: Mapping[str, Tensor], generator: torch.Generator
    ) -> Basis:
        ranks = split_rank(rank, self.shares, self._smallest_ranks)
        bases = lambda ranks: [
            part(weight, own_rank, _own(statistics, position), generator)
            for position, (part, own_rank) in enumerate(zip(self.parts, ranks, strict=True))
        ]
        first = bases(ranks)
        a = _orthonormal(torch.cat([basis.A.to(weight.device) for basis in first]))
        b = _orthonormal(torch.cat([basis.B.to(weight.device).T for basis in first]))
        if min(len(a), len(b)) < rank:
            wider = bases([rank] * len(self.parts))
            # The first direction of every part, then the second of every part, and so on.
            in_turn = lambda factors: torch.stack([factor.to(weight.device) for factor in factors], 1).flatten(0, 1)
            a = _orthonormal(torch.cat([a, in_turn([basis.A for basis in wider])]))[:rank]
            b = _orthonormal(torch.cat([b, in_turn([basis.B.T for basis in wider])]))[:rank]
        return Basis(A=a.float(), B=b.T.float().contiguous())

    @property
    def _smallest_ranks(self) -> list[int]:
        return [getattr(part, "smallest_rank", 1) for part in self.parts]

    @property
    def _passes(self) -> set[str]:
        return {part.statistics for part in self.parts} - {None}


def split_rank(rank: int, shares: Sequence[float], smallest: Sequence[int] | None = None) -> list[int]:
    """Whole ranks in proportion to shares that add up to rank, by largest remainder.

    Args:
        rank: what is split.
        shares: positive, of any sum.
        smallest: no part gets less than this (default 1), at the cost of whichever has most to spare.

    Raises:
        ValueError: rank is too small for every part to get its smallest.
    """
    smallest = [1] * len(shares) if smallest is None else list(smallest)
    if rank < sum(smallest):
        raise ValueError(
            f"expected a rank that gives every part its share, got rank={rank}; write rank={sum(smallest)}"
        )
    quotas = [rank * share / sum(shares) for share in shares]
    ranks = [math.floor(quota) for quota in quotas]
    by_remainder = sorted(range(len(shares)), key=lambda i: ranks[i] - quotas[i])
    for i in by_remainder[: rank - sum(ranks)]:
        ranks[i] += 1
    for i, least in enumerate(smallest):
        while ranks[i] < least:
            richest = max(range(len(shares)), key=lambda j: (ranks[j] - smallest[j], -quotas[j]))
            ranks[i], ranks[richest] = ranks[i] + 1, ranks[richest] - 1
    return ranks


def _own(statistics: Mapping[str, Tensor], position: int) -> dict[str, Tensor]:
    prefix = f"{position}."
    return {key.removeprefix(prefix): value for key, value in statistics.items() if key.startswith(prefix)}


def _orthonormal(rows: Tensor) -> Tensor:
    """Orthonormal rows (k, n) in float64 that span the rows in turn; those that add no direction are left out."""
    kept = rows.new_zeros(0, rows.shape[1], dtype=torch.float64)
    for row in rows.double():
        rest = row
        for _ in range(2):  # once is not orthogonal to rounding, twice is
            rest = rest - kept.T @ (kept @ rest)
        if rest.norm() > _SAME * row.norm():
            kept = torch.cat([kept, (rest / rest.norm()).unsqueeze(0)])
    return kept
