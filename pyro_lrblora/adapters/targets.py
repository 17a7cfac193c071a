"""Which linear modules of a network an adapter is attached to, and where and how each stores its weight."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from numbers import Integral

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

_ATTENTION = re.compile(r"(?i)attn|attention")
_LAYER = re.compile(r"(?:^|\.)(\d+)(?:\.|$)")


def base_weight(module: nn.Module) -> Tensor:
    """The weight as (m out, n in), whichever way the module stores it.

    Quantised weights (bitsandbytes' 4 and 8 bit, torchao's) are dequantised, offloaded ones fetched: either is a copy
    that lives as long as the caller keeps it. Plain weights are no copy.
    """
    with in_memory(module):
        weight = module.weight
        if type(weight).__module__.startswith("bitsandbytes"):
            weight = _from_bitsandbytes(module)
        return plain_tensor(weight).T if isinstance(module, Conv1D) else plain_tensor(weight)


def plain_tensor(weight: Tensor) -> Tensor:
    """The weight itself, dequantised where it is one of torchao's tensors."""
    return weight.dequantize() if type(weight).__module__.startswith("torchao") else weight


def weight_shape(module: nn.Module) -> tuple[int, int]:
    """(m out, n in); of a quantised weight not the shape it is packed in."""
    if isinstance(module, Conv1D):
        n, m = module.weight.shape
        return m, n
    return module.out_features, module.in_features


def check_differentiable(module: nn.Module) -> None:
    """Raise a ValueError for 4 bit weights that bitsandbytes has packed for inference on a CPU with AVX-512."""
    if getattr(getattr(module, "quant_state", None), "packing_format_for_cpu", False):
        raise ValueError(
            "expected 4 bit weights through which gradients can flow, got some that bitsandbytes has packed for "
            "inference, which it does in place when the network runs in eval mode on this CPU; load the network again, "
            "and fit before anything else is run with it"
        )


def device_of(module: nn.Module) -> torch.device:
    """Where a module runs: the device of its weight, or the one that accelerate fetches an offloaded weight to."""
    if not module.weight.is_meta or not hasattr(module, "_hf_hook"):
        return module.weight.device
    return torch.device(module._hf_hook.execution_device)


def in_memory(module: nn.Module) -> AbstractContextManager:
    """A `with` block in which the weights of a module that accelerate has offloaded are there."""
    if not (hasattr(module, "_hf_hook") and any(p.is_meta for p in module.parameters(recurse=False))):
        return nullcontext()
    from accelerate.utils import align_module_device

    return align_module_device(module)


def stored_parameters(network: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Every parameter by dotted name, torchao's dequantised, offloaded ones fetched one at a time."""
    for name in dict(network.named_parameters()):
        path, _, leaf = name.rpartition(".")
        module = network.get_submodule(path)
        with in_memory(module):
            yield name, plain_tensor(module._parameters[leaf]).detach()


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
        ValueError: nothing matched, or nothing did for one of the names or layers; the message lists what could have.
    """
    if targets is None:
        raise TypeError("expected targets such as 'attention' or a list of names, got None; write 'all-linear' for all")
    if isinstance(layers, int):
        raise TypeError(f"expected layers in a list, or None for all, got {layers!r}; write layers=[{layers!r}]")
    candidates = {
        name: module
        for name, module in network.named_modules()
        if isinstance(module, nn.Linear | Conv1D) and name not in exclude and not _only_read(module)
    }
    found = {
        name: module
        for name, module in candidates.items()
        if _matches(name, targets) and (layers is None or _layer(name) in layers)
    }
    listed = [] if isinstance(targets, str) else targets
    idle = [target for target in listed if not any(_matches(name, [target]) for name in found)]
    idle += sorted(set(() if layers is None else layers) - {_layer(name) for name in found})
    if idle or not found:
        endings = sorted({_LAYER.split(name)[-1] for name in candidates})
        numbers = sorted({_layer(name) for name in candidates} - {None})
        one_name = isinstance(targets, str) and not found and any(_matches(name, [targets]) for name in candidates)
        raise ValueError(
            f"expected targets that match a linear module, got targets={targets!r}, layers={layers!r}"
            + (f", of which {idle} match none" if idle and found else "")
            + f"; names that can be matched here: {endings}, in layers {numbers}"
            + (f"; write targets=[{targets!r}]" if one_name else "")
        )
    return found


def check_rank(adapter, modules: Mapping[str, nn.Module]) -> None:
    """Raise a ValueError unless the adapter's rank fits every module's weight (m, n), and its budget all of them."""
    rank, budget = adapter.rank, getattr(adapter, "budget", None)
    if not isinstance(rank, Integral):
        raise TypeError(f"expected rank to be an integer, got {rank!r}")
    needed = 0 if budget is None else len(modules) * adapter.smallest_rank**2
    if budget is not None and budget < needed:
        raise ValueError(
            f"expected a budget that gives each of {len(modules)} modules rank {adapter.smallest_rank}, got "
            f"budget={budget}; write budget={needed} or more"
        )
    for name, module in modules.items():
        m, n = weight_shape(module)
        if not 1 <= rank <= min(m, n):
            raise ValueError(
                f"expected 1 <= rank <= {min(m, n)} for module {name!r} with weight ({m}, {n}), got rank={rank}"
            )


def _only_read(module: nn.Module) -> bool:
    """Whether it is never called: nn.MultiheadAttention reads the weight of its out_proj, past any hook."""
    return isinstance(module, nn.modules.linear.NonDynamicallyQuantizableLinear)


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


def _from_bitsandbytes(module: nn.Module) -> Tensor:
    import bitsandbytes

    weight = module.weight
    if hasattr(weight, "quant_state"):
        if weight.quant_state is None:  # not packed yet: that happens when the module is first moved
            return weight.data
        check_differentiable(module)
        return bitsandbytes.functional.dequantize_4bit(weight.data, weight.quant_state)
    # The first forward moves the rows' scales from the weight to the module's state.
    scales = module.state.SCB if weight.SCB is None else weight.SCB
    return weight.data if scales is None else bitsandbytes.functional.int8_vectorwise_dequant(weight.data, scales)
