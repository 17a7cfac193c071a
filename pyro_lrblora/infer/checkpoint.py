"""A fit on disk between two epochs: one safetensors file, its numbers as JSON inside, and which fit it is of."""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from types import CodeType, FunctionType

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from ..data import EncodedBatches
from ..model import BayesianLoRA
from ..posterior import Posterior
from ..provenance import tensor_hash
from .progress import states, under
from .start import in_same_subspace, same_tensors, subspace_of

_FORMAT = "pyro_lrblora fit, version 1"
_PROBES = 16  # values of every base parameter that tell one base from another


class Checkpoint:
    """The file fit.safetensors in a folder: what it holds now, and how it is replaced, whole or not at all.

    Args:
        folder: made if it is not there.
        identity: digests of the fit that may be kept there, see `identity_of`.
        required: whether there must be a fit already.

    Raises:
        ValueError: a file that cannot be read or is of another fit, or none where one is required.
    """

    def __init__(self, folder: str | Path, identity: Mapping[str, str], required: bool):
        self.path, self.identity = Path(folder) / "fit.safetensors", dict(identity)
        self.tensors: dict[str, Tensor] = {}
        self.values: dict | None = None  # None where there is no fit yet
        if self.path.exists():
            self._read()
        elif required:
            raise ValueError(
                f"expected a fit to resume in {folder}, got no {self.path.name}; write checkpoint= to begin one"
            )
        elif self.path.parent.exists() and not self.path.parent.is_dir():
            raise ValueError(f"expected a folder for checkpoint=, got the file {folder}")

    def model(self, model: BayesianLoRA, train, tokenizer) -> BayesianLoRA:
        """The model of the saved fit, in its subspace and with its head's start.

        Args:
            model, tokenizer: as given to the fit.
            train: what as_batches returned.

        Raises:
            ValueError: the model was prepared in another subspace, or with another start or scale of the head.
        """
        new = in_same_subspace(model, under("subspace.", self.tensors), self.values["subspace"], train.rows, tokenizer)
        if model.head_scale not in (None, new.head_scale):
            raise ValueError(
                f"expected head_scale={new.head_scale} as in {self.path}, got head_scale={model.head_scale}; write "
                "another folder"
            )
        if model.prepared and not same_tensors(subspace_of(model)[0], subspace_of(new)[0]):
            raise ValueError(
                f"expected a model in the subspace of {self.path} and with its head's start, got one prepared in "
                "another or with another; give the model as it was before prepare()"
            )
        return new

    def write(self, tensors: Mapping[str, Tensor], values: Mapping) -> None:
        """Replace what is saved, in one move: a crash leaves the file before.

        Args:
            tensors: by name.
            values: anything JSON can hold.
        """
        self.path.parent.mkdir(parents=True, exist_ok=True)
        partial = self.path.with_name(self.path.name + ".partial")
        plain = {name: value.detach().cpu().contiguous().clone() for name, value in tensors.items()}
        card = {"format": _FORMAT, "identity": json.dumps(self.identity), "values": json.dumps(values)}
        save_file(plain, partial, card)
        os.replace(partial, self.path)

    def _read(self) -> None:
        try:
            with safe_open(self.path, "pt") as file:
                card = file.metadata() or {}
                self.tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        except SafetensorError as error:
            raise ValueError(f"expected a saved fit, got a file that cannot be read: {self.path}: {error}") from error
        if card.get("format") != _FORMAT:
            raise ValueError(f"expected a file of format {_FORMAT!r}, got {card.get('format')!r} in {self.path}")
        saved = json.loads(card["identity"])
        different = [name for name, digest in self.identity.items() if saved.get(name) != digest]
        if different:
            raise ValueError(
                f"expected {self.path} to hold this very fit, got one with other {different}; write the same call to "
                "resume it, or another folder"
            )
        self.values = json.loads(card["values"])


def identity_of(
    model: BayesianLoRA, guide, train, validation, init: Posterior | None, arguments: Mapping
) -> dict[str, str]:
    """What makes a fit this one and no other: digests by what they are of.

    Args:
        model: as given to the fit.
        guide: the spec.
        train, validation: what as_batches returned.
        init: the posterior it starts at.
        arguments: everything else that changes the result, by name.
    """
    start = {} if init is None else states({"guide": init.guide}) | init.head()
    described = {"adapter": model.adapter, "prior": model.prior, "likelihood": model.likelihood, "guide": guide}
    described |= {"head": model.head, "dropout": model.dropout} | dict(arguments)
    # How the rows are batched and shuffled, of data whose order is known.
    described["batches"] = (len(train), train.rows, train.longest, getattr(train, "_shuffle", None))
    digests = {
        "network": tensor_hash(_base_values(model)),
        "fixed head": tensor_hash(model._fixed_head.items()),
        "training data": _data_digest(train),
        "validation data": tensor_hash(()) if validation is None else _data_digest(validation),
        "init": tensor_hash(start.items()),
    }
    return digests | {name: hashlib.sha256(_told(value).encode()).hexdigest() for name, value in described.items()}


def _told(value) -> str:
    """The repr of a part; a user's own tells its address, which is another one in every process, and hides its code."""
    text = repr(value)
    told = lambda text: re.sub(r" at 0x[0-9a-f]+", "", text)
    function = value if isinstance(value, FunctionType) else getattr(type(value), "__call__", None)  # noqa: B004
    if told(text) == text or not isinstance(function, FunctionType):
        return told(text)
    held = (
        [cell.cell_contents for cell in function.__closure__ or ()],
        function.__defaults__,
        getattr(value, "__dict__", {}),
    )
    return told(f"{text} {_program(function.__code__)} {held!r}")


def _program(code: CodeType) -> str:
    """What a function does, wherever it is written."""

    def constant(value):
        if isinstance(value, CodeType):
            return _program(value)
        # A set has another order in every process.
        return repr(sorted(map(repr, value)) if isinstance(value, frozenset) else value)

    return f"{code.co_code.hex()} {code.co_names} {[constant(value) for value in code.co_consts]}"


def _base_values(model: BayesianLoRA) -> Iterator[tuple[str, Tensor]]:
    """A few values of every parameter outside the head, which may be drawn anew whenever the network is loaded."""
    for name, parameter in model.network.named_parameters():
        if name not in model.head_start and not parameter.is_meta:
            flat = parameter.detach().flatten()
            yield name, flat[:: max(1, len(flat) // _PROBES)][:_PROBES]


def _data_digest(batches) -> str:
    """Of every row in the data's order; of a user's own loader, whose order may be random, of the sorted labels."""
    if isinstance(batches, EncodedBatches):
        batches = batches.in_order()
    elif not isinstance(batches.source, Sequence):
        return tensor_hash([("labels", batches.labels.flatten().sort().values)])
    return tensor_hash((name, v) for batch in batches for name, v in batch.items() if isinstance(v, Tensor))
