"""LoRA with both factors latent: W0 + B A (Hu et al. 2021, arXiv 2106.09685)."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn

from ..latents import LatentSites
from .lora_xs import rowwise_linear
from .targets import weight_shape


def lora_parameters(shapes: Iterable[tuple[int, int]], rank: int = 8) -> int:
    """How many parameters LoRA has on modules with weights (m, n), r (m + n) each: what others are counted against."""
    return sum(rank * (m + n) for m, n in shapes)


@dataclass(frozen=True)
class LoRA:
    """Adapt each targeted linear module by B A, both latent: A (r, n) and B (m, r) per module.

    Args:
        rank: r.
        targets: "attention", "mlp", "all-linear", a list of names, or a regular expression for the whole name.
        layers: only modules in layers with these numbers.
        alpha: the update is scaled by alpha / rank, as in PEFT; None means no scaling.

    Raises:
        ValueError: alpha <= 0.
    """

    rank: int = 8
    targets: str | Sequence[str] = "attention"
    layers: Sequence[int] | None = None
    alpha: float | None = None
    statistics: ClassVar[None] = None

    def __post_init__(self):
        if self.alpha is not None and not self.alpha > 0:
            raise ValueError(f"expected alpha > 0, or None for no scaling, got alpha={self.alpha!r}")

    @property
    def scaling(self) -> float:
        return 1.0 if self.alpha is None else self.alpha / self.rank

    def bind(
        self,
        modules: Mapping[str, nn.Module],
        statistics: Mapping[str, Mapping[str, Tensor]],
        generator: torch.Generator,
    ) -> BoundLoRA:
        """The adapter on the modules of one network, A drawn as in PEFT (Kaiming uniform), B zero."""
        shapes = {name: weight_shape(module) for name, module in modules.items()}
        bound = BoundLoRA(shapes, self.rank, self.scaling, {})
        # Both zero would be a saddle that a point fit never leaves.
        bound.initial_a = {
            site: (2 * torch.rand(shape, generator=generator) - 1) / math.sqrt(shape[-1])
            for site, shape in bound.sites.shapes.items()
            if site.startswith("A")
        }
        return bound

    def restore(self, tensors: Mapping[str, Tensor], shapes: Mapping[str, tuple[int, int]]) -> BoundLoRA:
        """The adapter from what BoundLoRA.tensors returned."""
        return BoundLoRA(shapes, self.rank, self.scaling, dict(tensors))


class BoundLoRA:
    """LoRA on given modules: one site per shape, "A" (L, r, n) and "B" (L, m, r) where all shapes are equal."""

    def __init__(
        self,
        shapes: Mapping[str, tuple[int, int]],  # module -> (m, n)
        rank: int,
        scaling: float,
        initial_a: dict[str, Tensor],
    ):
        self.scaling, self.initial_a = scaling, initial_a
        inputs, outputs = {n for _, n in shapes.values()}, {m for m, _ in shapes.values()}
        site_a = lambda n: "A" if len(inputs) == 1 else f"A_{n}"
        site_b = lambda m: "B" if len(outputs) == 1 else f"B_{m}"
        self.members: dict[str, list[str]] = {}
        event: dict[str, tuple[int, int]] = {}
        for name, (m, n) in shapes.items():
            for site, shape in ((site_a(n), (rank, n)), (site_b(m), (m, rank))):
                self.members.setdefault(site, []).append(name)
                event[site] = shape
        self.sites = LatentSites({site: torch.Size([len(names), *event[site]]) for site, names in self.members.items()})

    def start(self) -> dict[str, Tensor]:
        """The latents of the pretrained network: A as drawn, B zero."""
        return {
            name: self.initial_a[name].clone() if name in self.initial_a else torch.zeros(shape)
            for name, shape in self.sites.shapes.items()
        }

    def per_module(self, latents: Mapping[str, Tensor]) -> dict[str, tuple[Tensor, ...]]:
        """Each module's own (A, B) from the sites' values, with a leading axis B for a draw per row."""
        pairs: dict[str, dict[str, Tensor]] = {}
        for site, modules in self.members.items():
            for module, value in zip(modules, latents[site].unbind(-3), strict=True):
                pairs.setdefault(module, {})[site[0]] = value
        return {module: (pair["A"], pair["B"]) for module, pair in pairs.items()}

    def factors(self, module: str, like: Tensor) -> tuple[float]:
        """What is frozen of a module: only the scaling."""
        return (self.scaling,)

    @staticmethod
    def add(output: Tensor, inputs: Tensor, frozen: tuple[float], latent: tuple[Tensor, ...]) -> Tensor:
        """The module's output (B, ..., m) with what the adapter adds to it, inputs being (B, ..., n)."""
        a, b = latent
        return torch.add(output, rowwise_linear(rowwise_linear(inputs, a), b), alpha=frozen[0])

    def low_rank_factors(self, module: str, latent: tuple[Tensor, ...]) -> tuple[Tensor, Tensor]:
        """The update W - W0 as a product (m, r) @ (r, n), float32."""
        return latent[1] * self.scaling, latent[0]

    def closest(self, updates: Mapping[str, tuple[Tensor, Tensor]]) -> dict[str, Tensor]:
        """The latents whose updates are closest to given ones in Frobenius norm, by site; the start where none is.

        Of all pairs with the same product, A and B have the smallest norms (a truncated SVD, shared equally). Rows of A
        that the update leaves over stay at their start, or they and their zero columns of B would never move.

        Args:
            updates: by module, factors (m, k) and (k, n) of W - W0.
        """
        values = self.start()
        pairs = self.per_module(values)
        for module, (left, right) in updates.items():
            a, b = pairs[module]
            q_left, t_left = torch.linalg.qr(left.cpu().double())
            q_right, t_right = torch.linalg.qr(right.cpu().double().T)
            u, s, vh = torch.linalg.svd(t_left @ t_right.T)
            kept = min(int((s > 1e-12 * s[0]).sum()), len(a))
            root = (s[:kept] / self.scaling).sqrt()
            a[:kept] = root[:, None] * (vh[:kept] @ q_right.T)
            b[:, :kept] = (q_left @ u[:, :kept]) * root
        return values

    def tensors(self) -> dict[str, Tensor]:
        """The start of A, to be saved with a posterior."""
        return dict(self.initial_a)
