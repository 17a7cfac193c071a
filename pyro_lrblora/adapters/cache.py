"""Subspaces on disk, found again by everything they were computed from."""

from __future__ import annotations

import hashlib
import os
import warnings
from collections.abc import Iterable, Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from ..provenance import tensor_hash
from .statistics import bind
from .targets import base_weight, device_of, stored_parameters, weight_shape


def check_cache(model) -> None:
    """Raise a ValueError where the words that a subspace is found by change from one process to the next."""
    for word in _words(model):
        if " at 0x" in word:
            raise ValueError(f"expected a repr that tells it from others with cache=, got {word}; write cache=None")


def bind_cached(folder, model, batches: Iterable[Mapping[str, Tensor]], seed: int):
    """What `bind` returns, from a file where one was computed from the same before.

    Args:
        folder: made if it is not there.
        model: a BayesianLoRA with its head at the start.
        batches: hashed only where the projection looks at data; then the whole network and the head are too.
        seed: of the random choices.

    Warns:
        UserWarning: a file that cannot be read, or was changed; it is computed and written again.
    """
    file = Path(folder) / f"subspace-{_key(model, batches, seed)}.safetensors"
    if file.exists():
        try:
            return model.adapter.restore(_read(file, model.modules), _shapes(model))
        except (SafetensorError, OSError, KeyError, ValueError) as error:
            warnings.warn(f"{file} cannot be used and is written again: {error!r}", stacklevel=3)
    bound = bind(model, batches, seed)
    tensors = {name: value.detach().cpu().contiguous() for name, value in bound.tensors().items()}
    file.parent.mkdir(parents=True, exist_ok=True)
    # Moved into place when it is whole; several processes may write the same.
    partial = file.with_name(f"{file.name}.{os.getpid()}")
    save_file(tensors, partial, metadata={"sha256": tensor_hash(sorted(tensors.items()))})
    os.replace(partial, file)
    return bound


def _read(file: Path, modules: Mapping[str, torch.nn.Module]) -> dict[str, Tensor]:
    with safe_open(file, "pt") as held:
        tensors = {name: held.get_tensor(name) for name in held.keys()}  # noqa: SIM118, it is no mapping
        digest = (held.metadata() or {}).get("sha256")
    if digest != tensor_hash(sorted(tensors.items())):
        raise ValueError("its values are not those that were written")
    # Where bind leaves them: beside the weights.
    owner = lambda name: modules.get(name.rpartition(".")[0])
    return {name: t.to(device_of(owner(name))) if owner(name) is not None else t for name, t in tensors.items()}


def _key(model, batches, seed: int) -> str:
    words = [*_words(model), str(seed), repr(_shapes(model))]
    tensors = [((name, base_weight(module)) for name, module in model.modules.items())]
    if model.adapter.statistics is not None:
        tensors += [stored_parameters(model.network), model.head_start.items(), model.head_values().items()]
        tensors += [[(n, v) for n, v in sorted(batch.items()) if isinstance(v, Tensor)] for batch in batches]
    digests = [tensor_hash(named) for named in tensors]
    return hashlib.sha256("\n".join(words + digests).encode()).hexdigest()[:32]


def _words(model) -> list[str]:
    return [repr(model.adapter)] + ([repr(model.likelihood)] if model.adapter.statistics is not None else [])


def _shapes(model) -> dict[str, tuple[int, int]]:
    return {name: weight_shape(module) for name, module in model.modules.items()}
