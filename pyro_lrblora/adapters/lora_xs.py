"""LoRA-XS: W0 + B R A with A and B frozen and a tiny latent R (Balazy et al. 2024, arXiv 2405.17604)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from ..latents import LatentSites
from ..projections import SVD, Basis, Projection, allocate_ranks
from ..projections.svd import leading_singular_vectors
from .targets import base_weight


@dataclass(frozen=True)
class LoRAXS:
    """Adapt each targeted linear module by B R A; the latent is R, (r, r) per module.

    Args:
        rank: r, at most min(m, n) of every targeted module; with a budget, the largest rank of any module.
        projection: how A and B are chosen, see pyro_lrblora.projections.
        targets: "attention", "mlp", "all-linear", a list of names, or a regular expression for the whole name.
        layers: only modules in layers with these numbers.
        budget: the most latents in all, sum of r^2 over modules. Modules then differ in rank, as the spectra of their
            summed loss gradients say, see allocate_ranks. None gives every module the same rank.

    Raises:
        TypeError: a projection without `statistics`.
        ValueError: a rank too small for the projection, or a budget without a projection that sums gradients.
    """

    rank: int = 8
    projection: Projection = field(default_factory=SVD)
    targets: str | Sequence[str] = "attention"
    layers: Sequence[int] | None = None
    budget: int | None = None

    def __post_init__(self):
        if isinstance(self.projection, type) or not hasattr(self.projection, "statistics"):
            raise TypeError(
                f"expected a projection with `statistics`, such as projections.SVD(), got {self.projection!r}; see "
                "pyro_lrblora.projections.Projection"
            )
        if 1 <= self.rank < self.smallest_rank:
            raise ValueError(f"expected rank >= {self.smallest_rank} for {self.projection}, got rank={self.rank}")
        sums_gradients = hasattr(self.projection, "summed_gradient") and self.projection.statistics == "labels"
        if self.budget is not None and not sums_gradients:
            raise ValueError(
                f"expected a projection that sums gradients under the labels for budget={self.budget}, "
                f"got {self.projection}; write projection=Gradient(), or a Hybrid with it"
            )

    @property
    def statistics(self) -> str | None:
        """What a pass over the training data must sum, see Projection."""
        return self.projection.statistics

    def bind(
        self,
        modules: Mapping[str, nn.Module],
        statistics: Mapping[str, Mapping[str, Tensor]],
        generator: torch.Generator,
    ) -> BoundLoRAXS:
        """The adapter on the modules of one network, its bases computed.

        Raises:
            ValueError: the budget does not cover the smallest rank in every module.
        """
        ranks = dict.fromkeys(modules, self.rank)
        if self.budget is not None:
            gradients = {name: self.projection.summed_gradient(statistics[name]) for name in modules}
            spectra = {name: leading_singular_vectors(g, self.rank, generator)[1] for name, g in gradients.items()}
            ranks = allocate_ranks({k: s.tolist() for k, s in spectra.items()}, self.budget, self.smallest_rank)
        bases = {}
        for name, module in modules.items():
            weight = base_weight(module)
            bases[name] = self.projection(weight, ranks[name], statistics.get(name, {}), generator)
            _check_basis(bases[name], self.projection, ranks[name], weight.shape)
        return BoundLoRAXS(bases)

    @property
    def smallest_rank(self) -> int:
        """The least rank its projection can give a module."""
        return getattr(self.projection, "smallest_rank", 1)

    @staticmethod
    def restore(tensors: Mapping[str, Tensor], shapes: Mapping[str, tuple[int, int]]) -> BoundLoRAXS:
        """The adapter from what BoundLoRAXS.tensors returned.

        Raises:
            KeyError: a factor is missing.
            ValueError: factors that do not fit the modules' weights.
        """
        bases = {name: Basis(tensors[f"{name}.A"], tensors[f"{name}.B"]) for name in shapes}
        for name, shape in shapes.items():
            _check_shapes(bases[name], len(bases[name].A), shape, repr(name))
        return BoundLoRAXS(bases)


def _check_basis(basis, projection, rank: int, shape: torch.Size) -> None:
    """Raise a TypeError or ValueError where a projection did not return A (r, n) and B (m, r), finite."""
    if not isinstance(basis, Basis):
        raise TypeError(f"expected {projection!r} to return a projections.Basis, got {type(basis).__name__}")
    _check_shapes(basis, rank, shape, repr(projection))
    if not basis.A.is_meta and not (basis.A.isfinite().all() and basis.B.isfinite().all()):
        raise ValueError(f"expected finite A and B from {projection!r}, got NaN or infinity")


def _check_shapes(basis: Basis, rank: int, shape: tuple[int, int], whose: str) -> None:
    (m, n), a, b = shape, tuple(basis.A.shape), tuple(basis.B.shape)
    if (a, b) != ((rank, n), (m, rank)):
        raise ValueError(f"expected A ({rank}, {n}) and B ({m}, {rank}) of {whose}, got {a} and {b}")


class BoundLoRAXS:
    """LoRA-XS on given modules: one site per rank, "R" of shape (L, r, r) where all ranks are equal."""

    def __init__(self, bases: Mapping[str, Basis]):
        self.bases = dict(bases)
        ranks = {name: basis.A.shape[0] for name, basis in self.bases.items()}
        site = lambda rank: "R" if len(set(ranks.values())) == 1 else f"R_{rank}"
        self.members: dict[str, list[str]] = {}  # site -> the modules along its first axis
        for name, rank in ranks.items():
            self.members.setdefault(site(rank), []).append(name)
        shape = lambda names: torch.Size([len(names), ranks[names[0]], ranks[names[0]]])
        self.sites = LatentSites({name: shape(names) for name, names in self.members.items()})

    def start(self) -> dict[str, Tensor]:
        """The latents of the pretrained network: all zero."""
        return {name: torch.zeros(shape) for name, shape in self.sites.shapes.items()}

    def per_module(self, latents: Mapping[str, Tensor]) -> dict[str, tuple[Tensor, ...]]:
        """Each module's own R, (r, r) or (B, r, r), from the sites' values."""
        return {
            module: (core,)
            for site, modules in self.members.items()
            # unbind, not indexing: its backward is one stack instead of L full-size scatters.
            for module, core in zip(modules, latents[site].unbind(-3), strict=True)
        }

    def factors(self, module: str, like: Tensor) -> tuple[Tensor, Tensor]:
        """A and B of a module on the device and in the dtype of a tensor, its output."""
        basis = self.bases[module]
        return basis.A.to(like.device, like.dtype), basis.B.to(like.device, like.dtype)

    @staticmethod
    def add(output: Tensor, inputs: Tensor, frozen: tuple[Tensor, Tensor], latent: tuple[Tensor, ...]) -> Tensor:
        """The module's output with what the adapter adds to it.

        Args:
            output: (B, ..., m).
            inputs: (B, ..., n).
            frozen: A (r, n) and B (m, r).
            latent: R, (r, r), or (B, r, r) for a draw per row.
        """
        (a, b), (core,) = frozen, latent
        inner = rowwise_linear(nn.functional.linear(inputs, a), core)
        # One pass over the output: product and sum apart would write and read a second tensor of its size.
        return torch.addmm(output.flatten(0, -2), inner.flatten(0, -2), b.T).view(output.shape)

    def low_rank_factors(self, module: str, latent: tuple[Tensor, ...]) -> tuple[Tensor, Tensor]:
        """The update W - W0 as a product (m, r) @ (r, n), float32."""
        basis = self.bases[module]
        return basis.B @ latent[0].to(basis.B), basis.A

    def closest(self, updates: Mapping[str, tuple[Tensor, Tensor]]) -> dict[str, Tensor]:
        """The latents whose updates are closest to given ones in Frobenius norm, by site; zero where none is.

        Args:
            updates: by module, factors (m, k) and (k, n) of W - W0.
        """
        values = self.start()
        cores = self.per_module(values)
        for module, (left, right) in updates.items():
            a, b = self.bases[module].A.cpu().double(), self.bases[module].B.cpu().double()
            core = (torch.linalg.pinv(b) @ left.cpu().double()) @ (right.cpu().double() @ torch.linalg.pinv(a))
            cores[module][0].copy_(core)
        return values

    def tensors(self) -> dict[str, Tensor]:
        """The frozen factors, to be saved with a posterior: R means nothing without them."""
        named = {}
        for name, basis in self.bases.items():
            named[f"{name}.A"], named[f"{name}.B"] = basis.A, basis.B
        return named


def rowwise_linear(inputs: Tensor, weight: Tensor) -> Tensor:
    """inputs @ weight.T with one weight for all rows, or one for each.

    Args:
        inputs: (B * k, ..., n); where k > 1 the k inputs of a row stand together (choices, flattened tokens).
        weight: (m, n), or (B, m, n).

    Raises:
        ValueError: the inputs cannot be divided among the B rows.
    """
    weight = weight.to(inputs.device, inputs.dtype)
    if weight.dim() == 2:
        return nn.functional.linear(inputs, weight)
    rows = weight.shape[0]
    if inputs.shape[0] % rows:
        raise ValueError(
            f"expected the module's inputs to hold a multiple of the {rows} rows of the batch in their first axis, got "
            f"{tuple(inputs.shape)}; fit with draws='shared'"
        )
    folded = inputs.reshape(rows, -1, inputs.shape[-1])
    return torch.bmm(folded, weight.mT).reshape(*inputs.shape[:-1], weight.shape[-2])
