"""What a fit was made with: versions, hardware, and which rows; hashes that tell rows and tensors apart."""

from __future__ import annotations

import hashlib
import json
import platform
from collections.abc import Iterable, Mapping
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import datasets
import torch
from torch import Tensor

from .data import EncodedBatches

LIBRARIES = ("pyro_lrblora", "torch", "pyro-ppl", "transformers", "numpy")
ROWS, LABELS = "training rows, sha256", "training labels, sha256"


def fitted_with(device: torch.device, train, batches) -> dict[str, dict[str, str]]:
    """The entry of a posterior's settings that says where it comes from; plain text, so that it is saved with it.

    Args:
        device: the network's.
        train: the training rows as they were given.
        batches: what as_batches made of them.
    """
    return {"fitted_with": versions(device) | data_identity(train, batches)}


def versions(device: torch.device) -> dict[str, str]:
    """Of Python and the libraries that numbers come from, with the device and the threads, in this process."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else _processor()
    machine = {"Python": platform.python_version(), "device": f"{device} {name}".strip()}
    return machine | {"threads": str(torch.get_num_threads())} | {name: _version(name) for name in LIBRARIES}


def data_identity(train, batches) -> dict[str, str]:
    """Hashes of the labels in their order and, of a datasets.Dataset, of all that its rows hold.

    Batches are known by their labels only: another pass over them could be of another order, and change a fit's own.

    Args:
        train, batches: as for fitted_with; without batches there is no hash of the labels.
    """
    found = {} if batches is None or batches.labels is None else {LABELS: data_hash([{"labels": batches.labels}])}
    return found | ({ROWS: data_hash(train)} if isinstance(train, datasets.Dataset) else {})


def unlike(record: Mapping[str, str], identity: Mapping[str, str]) -> list[str]:
    """Names of the hashes that a fit recorded and that those of other rows differ from."""
    return [name for name, value in identity.items() if record.get(name, value) != value]


def other_rows(settings: Mapping, train, batches) -> bool:
    """Whether training rows are, by their hashes, not those that were fitted, or in another order.

    False where that is not known: batches that are made anew at every pass may come in another order each time.

    Args:
        settings: of the posterior.
        train, batches: as for fitted_with.
    """
    if not isinstance(train, datasets.Dataset | list | EncodedBatches):
        return False
    return bool(unlike(settings.get("fitted_with", {}), data_identity(train, batches)))


def data_hash(data) -> str:
    """The sha256 of rows in their order, the same on every machine.

    Args:
        data: a datasets.Dataset, hashed as it is stored, whatever its cache; or batch dicts.
    """
    if not isinstance(data, datasets.Dataset):
        return tensor_hash((n, v) for batch in data for n, v in sorted(batch.items()) if isinstance(v, Tensor))
    digest = hashlib.sha256()
    readable = lambda value: value.hex() if isinstance(value, bytes) else str(value)
    for table in data.with_format("arrow").iter(1000):
        for row in table.to_pylist():
            digest.update(json.dumps(row, sort_keys=True, default=readable).encode())
    return digest.hexdigest()


def tensor_hash(tensors: Iterable[tuple[str, Tensor]]) -> str:
    """The sha256 of named tensors in their order: names, dtypes, shapes and values."""
    digest = hashlib.sha256()
    for name, value in tensors:
        digest.update(f"{name} {value.dtype} {tuple(value.shape)} ".encode())
        digest.update(value.detach().cpu().flatten().contiguous().view(torch.uint8).numpy())
    return digest.hexdigest()


def _version(name: str) -> str:
    try:
        return version(name)
    except PackageNotFoundError:  # a copy on the path, or a wheel under another name
        return "unknown"


def _processor() -> str:
    """The model's name where the system tells it, else the architecture; asks no other program."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), platform.machine())
