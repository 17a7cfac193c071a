"""A Normal whose scale follows how strongly the pretrained weight acts along each direction."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import pyro.distributions as dist
import torch
from torch import Tensor

from ..adapters.lora_xs import BoundLoRAXS
from ..adapters.targets import base_weight
from .sites import Shapes, by_module, check_positive, sample_sites


@dataclass(frozen=True)
class SingularValues:
    """Independent Normals on R whose sd follows the pretrained weight W0 in the subspace; made by `of`.

    The sd of R_ij is scale * sqrt(row_i column_j) over its root mean square in the module, so that `scale` means what
    it does in Normal. row_i is the norm of b_i' W0 and column_j that of W0 a_j, where b_i and a_j are B's columns and
    A's rows at unit length; for the SVD projection both are W0's singular values.

    Args:
        scale: root mean square of the standard deviations of each module, positive.
        profile: for each site (name, modules), for each of its modules the pair (rows, columns) of r positive numbers.
    """

    scale: float = 0.1
    profile: Sequence = field(default=(), repr=False)

    def __post_init__(self):
        check_positive(scale=self.scale)
        object.__setattr__(self, "profile", _as_tuples(self.profile))
        if not self.profile:
            raise ValueError("expected a profile of the pretrained weights, got none; write SingularValues.of(model)")
        for name, modules in self.profile:
            for module in modules:
                if not all(length > 0 for lengths in module for length in lengths):
                    raise ValueError(
                        f"expected positive lengths in the profile of site {name!r}, got {module}: a direction of the "
                        "subspace on which the pretrained weight is zero; lower the rank"
                    )

    @classmethod
    def of(cls, model, scale: float = 0.1) -> SingularValues:
        """The prior for the subspace of one model.

        Args:
            model: a BayesianLoRA with the adapter LoRAXS; prepared, where its projection looks at data.
            scale: see above.

        Raises:
            ValueError: another adapter.
        """
        adapted = model.adapted
        if not isinstance(adapted, BoundLoRAXS):
            raise ValueError(
                f"expected a model with LoRAXS(...), whose directions are frozen, got {model.adapter}; write Normal()"
            )
        profile = []
        for site, names in adapted.members.items():
            pairs = []
            for name in names:
                weight = base_weight(model.modules[name]).detach().float()
                a, b = adapted.factors(name, weight)
                unit = torch.nn.functional.normalize
                pairs.append(((unit(b.T) @ weight).norm(dim=1).tolist(), (unit(a) @ weight.T).norm(dim=1).tolist()))
            profile.append((site, pairs))
        return cls(scale, profile)

    def __call__(self, shapes: Shapes) -> dict[str, Tensor]:
        relative = {name: self._relative_sd(name, shape) for name, shape in shapes.items()}
        sd = lambda name: by_module(self.scale, shapes[name], name) * relative[name]
        return sample_sites(shapes, lambda name: dist.Normal(0.0, sd(name)))

    def _relative_sd(self, name: str, shape: torch.Size) -> Tensor:
        """(L, r, r), of root mean square 1 in each module."""
        modules = dict(self.profile).get(name, ())
        if [(len(rows), len(columns)) for rows, columns in modules] != [tuple(shape[1:])] * shape[0]:
            raise ValueError(
                f"expected the profile of a site {name!r} of shape {tuple(shape)}, got one of another subspace; write "
                "SingularValues.of(model)"
            )
        rows = torch.tensor([rows for rows, _ in modules])
        columns = torch.tensor([columns for _, columns in modules])
        normalised = lambda lengths: lengths / lengths.mean(-1, keepdim=True)
        return (normalised(rows)[:, :, None] * normalised(columns)[:, None, :]).sqrt()


def _as_tuples(value):
    """Nested lists, which is what a file holds, as nested tuples."""
    return tuple(_as_tuples(item) for item in value) if isinstance(value, list | tuple) else value
