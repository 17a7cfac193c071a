"""Which linear modules of a network an adapter is attached to."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence

from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

_ATTENTION = re.compile(r"(?i)attn|attention")
_LAYER = re.compile(r"(?:^|\.)(\d+)(?:\.|$)")


def base_weight(module: nn.Module) -> Tensor:
    """The weight as (m out, n in), whichever way the module stores it."""
    return module.weight.T if isinstance(module, Conv1D) else module.weight


def find_targets(
    network: nn.Module,
    targets: str | Sequence[str],
    layers: Sequence[int] | None = None,
    exclude: Sequence[str] = (),
) -> dict[str, nn.Module]:
    """The adapted modules by dotted name, in the network's order.

    Args:
        network: any module holding nn.Linear or GPT-2 style Conv1D.
        targets: "attention", "mlp" or "all-linear"; or names matched at the end of the dotted name, such as
            ["query", "value"]; or any other string as a regular expression for the whole dotted name.
        layers: keep only modules whose first number in the dotted name is one of these.
        exclude: dotted names never adapted: the head, the output embedding.

    Raises:
        ValueError: nothing matched; the message lists what could have been.
    """
    candidates = {
        name: module
        for name, module in network.named_modules()
        if isinstance(module, nn.Linear | Conv1D) and name not in exclude
    }
    found = {
        name: module
        for name, module in candidates.items()
        if _matches(name, targets) and (layers is None or _layer(name) in layers)
    }
    if not found:
        endings = sorted({_LAYER.split(name)[-1] for name in candidates})
        numbers = sorted({_layer(name) for name in candidates} - {None})
        raise ValueError(
            f"expected targets that match a linear module, got targets={targets!r}, layers={layers!r}; "
            f"names that can be matched here: {endings}, in layers {numbers}"
        )
    return found


def check_rank(adapter, modules: Mapping[str, nn.Module]) -> None:
    """Raise a ValueError unless the adapter's rank fits every module's weight (m, n), and its budget all of them."""
    rank, budget = adapter.rank, getattr(adapter, "budget", None)
    needed = 0 if budget is None else len(modules) * adapter.smallest_rank**2
    if budget is not None and budget < needed:
        raise ValueError(
            f"expected a budget that gives each of {len(modules)} modules rank {adapter.smallest_rank}, got "
            f"budget={budget}; write budget={needed} or more"
        )
    for name, module in modules.items():
        m, n = base_weight(module).shape
        if not 1 <= rank <= min(m, n):
            raise ValueError(
                f"expected 1 <= rank <= {min(m, n)} for module {name!r} with weight ({m}, {n}), got rank={rank}"
            )


def _matches(name: str, targets: str | Sequence[str]) -> bool:
    if not isinstance(targets, str):
        return any(name == target or name.endswith("." + target) for target in targets)
    if targets == "all-linear":
        return True
    if targets in ("attention", "mlp"):
        in_attention = _ATTENTION.search(name) is not None
        return in_attention if targets == "attention" else (_layer(name) is not None and not in_attention)
    try:
        return re.fullmatch(targets, name) is not None
    except re.error as error:
        raise ValueError(
            f"expected targets to be 'attention', 'mlp', 'all-linear', a list of names or a regular expression, "
            f"got {targets!r} ({error})"
        ) from None


def _layer(name: str) -> int | None:
    number = _LAYER.search(name)
    return int(number.group(1)) if number else None
