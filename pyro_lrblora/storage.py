"""A posterior on disk: posterior.json and posterior.safetensors, never pickle."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
from pathlib import Path
from typing import ClassVar

import pyro
import torch
from pyro.infer.autoguide import AutoGuide
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from . import adapters, guides, likelihoods, priors, projections
from .adapters.targets import stored_parameters, weight_shape
from .guides.stock import build_guide
from .head import FixedHead
from .model import BayesianLoRA
from .posterior import Posterior, local_parameters
from .provenance import versions

_FORMAT = "pyro_lrblora posterior, version 5"
FILES = ("posterior.safetensors", "posterior.json")  # the second is what makes a folder a posterior
_TEXT = "A tokenizer's own words: 1,000 naïve films!"
_PROBES = 16  # values kept of every base parameter, to recognise the base


@local_parameters
def save(posterior: Posterior, folder) -> None:
    """Write a posterior, its frozen A and B and its head into a folder; an older one there is replaced whole.

    Args:
        posterior: what a fit returned.
        folder: made if it is not there.
    """
    model = posterior.model
    head = {} if model.head == "bayesian" else posterior.head()
    tensors = {f"guide.{k}": v for k, v in posterior.guide.state_dict().items()}
    tensors |= {f"adapter.{k}": v for k, v in model.adapted.tensors().items()}
    tensors |= {f"head.{k}": v for k, v in (head or model.head_start).items()}
    tensors |= {f"head_centre.{k}": v for k, v in model.head_centre.items()}
    if model.learned_scale is not None:
        tensors |= {f"prior.{k}": v for k, v in model.learned_scale.state_dict().items()}
    names, tensors["base"] = _base_probe(model.network, set(model.head_start))
    card = {
        "format": _FORMAT,
        "pyro_lrblora": versions(model.device)["pyro_lrblora"],
        "network": type(model.network).__name__,
        "base": names,
        "adapter": describe(model.adapter),
        "modules": {name: list(weight_shape(module)) for name, module in model.modules.items()},
        "prior": describe(model.prior),
        "likelihood": describe(model.likelihood),
        "guide": describe(posterior.guide_spec),
        "head": "fixed" if isinstance(model.head, FixedHead) else model.head,
        "head_modules": model.head_modules,
        "head_scale": model.head_scale,
        "class_names": model.class_names,
        "size": model.size,
        "dropout": model.dropout,
        "tokens": _tokens(model.tokenizer),
        "history": posterior.history,
        "settings": posterior.settings,
    }
    # First, so that a value that JSON does not have leaves no file behind.
    card = json.loads(json.dumps(card, default=_plain_number))
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    partial = [folder / f"{name}.partial" for name in FILES]
    save_file(_plain(tensors), partial[0])
    partial[1].write_text(json.dumps(card | {"sha256": _sha256(partial[0])}, indent=1))
    # Both are whole before either takes the old one's place; a crash between the two moves shows in the hash.
    for path, name in zip(partial, FILES, strict=True):
        os.replace(path, folder / name)


@local_parameters
def load(folder, network: nn.Module, *, tokenizer=None, prior=None, likelihood=None, guide=None) -> Posterior:
    """A saved posterior on a network with the same base weights.

    Args:
        folder: what `save` wrote.
        network: freshly loaded; its head does not matter, the saved one is used.
        tokenizer: for predictions on a datasets.Dataset.
        prior, likelihood, guide: only where the saved one was your own function, which a file cannot hold.

    Raises:
        ValueError: the files are missing, corrupt or not a posterior, or belong to another base or tokenizer; a prior,
            likelihood or guide other than the saved one.
    """
    if not isinstance(network, nn.Module):
        raise TypeError(f"expected the network itself, a torch module, got {network!r}; load the base first")
    card, tensors = _read(Path(folder))
    part = lambda prefix: {k[len(prefix) :]: v for k, v in tensors.items() if k.startswith(prefix)}
    try:
        specs = {
            "adapter": _restore(card["adapter"], adapters, None, "adapter"),
            "prior": _restore(card["prior"], priors, prior, "prior"),
            "likelihood": _restore(card["likelihood"], likelihoods, likelihood, "likelihood"),
        }
        spec = _restore(card["guide"], guides, guide, "guide")
        shapes = {name: tuple(shape) for name, shape in card["modules"].items()}
        options = {
            "head_modules": _typed(card, "head_modules", list, None),
            "head_scale": _typed(card, "head_scale", float, int, None),
            "size": _typed(card, "size", int, None),
            "dropout": _typed(card, "dropout", bool),
        }
        class_names, tokens = _typed(card, "class_names", list, None), _typed(card, "tokens", list, None)
        history, settings = _typed(card, "history", list), _typed(card, "settings", dict)
        names, head, base = _typed(card, "base", list), card["head"], tensors["base"]
    except (KeyError, TypeError, AttributeError) as error:
        raise ValueError(
            f"expected a posterior in {folder}, got one with a missing or strange entry: {error!r}"
        ) from error
    _check_base(network, set(part("head.")), names, base)
    if tokenizer is not None and tokens is not None and _tokens(tokenizer) != tokens:
        raise ValueError(
            f"expected the tokenizer that the posterior in {folder} was fitted with, got a {type(tokenizer).__name__} "
            "that makes other tokens of the same text; load the base's own"
        )
    model = BayesianLoRA(network, **specs, **options, head="frozen", tokenizer=tokenizer)  # until the saved one is in
    model._class_names = class_names
    here = {name: tuple(weight_shape(module)) for name, module in model.modules.items()}
    if shapes != here:
        raise ValueError(f"expected a posterior of the modules {here}, got one of {shapes} in {folder}")
    try:
        model._adapted = model.adapter.restore(part("adapter."), shapes)
    except (KeyError, ValueError) as error:
        raise ValueError(f"expected A and B of every module in {folder}, got others: {error!r}") from error
    # In the network's order, which is the order draws are made in; the file's is alphabetical.
    saved, centre = part("head."), part("head_centre.")
    if centre.keys() != saved.keys():
        raise ValueError(f"expected the prior's centre for {list(saved)} in {folder}, got {list(centre)}")
    values = {name: saved[name] for name in model.head_start}
    for name, start in model.head_start.items():
        if saved[name].shape != start.shape:
            raise ValueError(
                f"expected a network with {name} {tuple(saved[name].shape)}, got {tuple(start.shape)}; load it with "
                "the posterior's num_labels"
            )
    model._set_head(FixedHead(values) if head in ("fixed", "frozen") else head, values, centre)
    try:
        with torch.random.fork_rng():
            torch.manual_seed(0)
            fitted = build_guide(spec, model)
        fitted.load_state_dict(part("guide."))
        if model.learned_scale is not None:
            model.learned_scale.load_state_dict(part("prior."))
    except RuntimeError as error:
        raise ValueError(f"expected the parameters of {spec!r} in {folder}, got others: {error}") from error
    return Posterior(model, fitted.to(model.device), spec, history, settings)


def _read(folder: Path) -> tuple[dict, dict[str, Tensor]]:
    missing = [name for name in FILES if not (folder / name).is_file()]
    if missing:
        raise ValueError(f"expected {' and '.join(FILES)} in {folder}, missing {' and '.join(missing)}")
    try:
        card = json.loads((folder / FILES[1]).read_text())
    except ValueError as error:
        raise ValueError(f"expected a posterior in {folder}, got a file that cannot be read: {error}") from error
    if not isinstance(card, dict) or card.get("format") != _FORMAT:
        raise ValueError(f"expected a file of format {_FORMAT!r} in {folder}, got {str(card)[:80]!r}")
    if card.get("sha256") != _sha256(folder / FILES[0]):
        raise ValueError(
            f"expected the {FILES[0]} that {FILES[1]} in {folder} was saved with, got a damaged one or one of another "
            "save; copy both files of one save, or save again"
        )
    return card, load_file(folder / FILES[0])


def _typed(card: dict, name: str, *types: type | None):
    """An entry of one of these types."""
    value = card[name]
    if not any(value is None if each is None else isinstance(value, each) for each in types):
        raise TypeError(f"{name!r} is {str(value)[:80]!r}")
    return value


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _tokens(tokenizer) -> list[int] | None:
    """What a tokenizer makes of one text, by which another is told from it."""
    return None if tokenizer is None else [int(token) for token in tokenizer(_TEXT)["input_ids"]]


def _base_probe(network: nn.Module, head: set[str]) -> tuple[list[str], Tensor]:
    """A few values of every parameter outside the head: (names, (P, 16))."""
    rows = {}
    for name, parameter in stored_parameters(network):
        if name not in head:
            flat = parameter.flatten()
            # In integers: a float32 cannot tell the last places of an embedding from its length.
            places = torch.arange(_PROBES, device=flat.device) * (len(flat) - 1) // (_PROBES - 1)
            rows[name] = flat[places].float().cpu()
    return list(rows), torch.stack(list(rows.values()))


def _check_base(network: nn.Module, head: set[str], names: list[str], saved: Tensor) -> None:
    found, here = _base_probe(network, head)
    if found != names:
        different = sorted(set(found) ^ set(names))[:3]
        raise ValueError(
            f"expected the base this posterior was fitted on, got a {type(network).__name__} with other parameters, "
            f"such as {different}"
        )
    # Looser than bit for bit, so that the same base in bf16 is the same base.
    wrong = [n for n, a, b in zip(names, here, saved, strict=True) if (a - b).norm() > 0.02 * b.norm() + 1e-6]
    if wrong:
        raise ValueError(
            f"expected the base this posterior was fitted on, got other weights in {len(wrong)} of {len(names)} "
            f"parameters, such as {wrong[0]!r}"
        )


@dataclasses.dataclass(frozen=True)
class _OwnProjection:
    """A projection of the user's own, which a file can only name: A and B, which it chose, are in the file."""

    name: str
    statistics: ClassVar[None] = None

    def __repr__(self) -> str:
        return self.name

    def __call__(self, *args):
        raise TypeError(f"expected no new subspace of a loaded posterior, whose projection was your own {self.name}")


def describe(spec) -> dict:
    """A spec as JSON: its class and fields; a user's own function by its repr only."""
    if isinstance(spec, _OwnProjection):
        return {"own": spec.name}
    if dataclasses.is_dataclass(spec) and type(spec).__module__.startswith(__package__):

        def nested(value):
            if hasattr(value, "tolist"):  # a number or an array of numpy or torch
                value = value.tolist()
            if isinstance(value, list | tuple | range | set | frozenset):
                return [nested(v) for v in (sorted(value) if isinstance(value, set | frozenset) else value)]
            plain = value is None or isinstance(value, bool | int | float | str)
            return value if plain else describe(value)

        fields = {f.name: nested(getattr(spec, f.name)) for f in dataclasses.fields(spec)}
        return {"type": type(spec).__name__, "fields": fields}
    if isinstance(spec, type) and issubclass(spec, AutoGuide) and _autoguide(spec.__name__) is spec:
        return {"autoguide": spec.__name__}
    return {"own": repr(spec)}


def _restore(card: dict, namespace, given, role: str):
    if given is not None:
        if '"own"' not in json.dumps(card) and describe(given) != card:
            raise ValueError(
                f"expected no {role}=, because this posterior was fitted with {card}, got {given!r}; leave it out"
            )
        return given
    if "own" in card:
        raise ValueError(f"expected {role}= because this posterior was fitted with your own {card['own']}")
    if "autoguide" in card:
        return _autoguide(card["autoguide"])
    if card["type"] == "Ensemble" and "own" in card["fields"]["guide"]:
        fields = card["fields"]
        raise ValueError(
            f"expected guide= because this posterior is an ensemble of your own {fields['guide']['own']}; write "
            f"guide=lb.guides.Ensemble(your guide, {fields['members']})"
        )
    if card["type"] not in namespace.__all__:
        raise ValueError(f"expected a {role} of {namespace.__name__}, got {card['type']!r}")

    def nested(value):
        if isinstance(value, list):
            return [nested(v) for v in value]
        if namespace is adapters and isinstance(value, dict) and "own" in value:
            return _OwnProjection(value["own"])
        inner = projections if namespace is adapters else namespace
        return _restore(value, inner, None, role) if isinstance(value, dict) else value

    return getattr(namespace, card["type"])(**{k: nested(v) for k, v in card["fields"].items()})


def _autoguide(name: str) -> type[AutoGuide]:
    found = getattr(pyro.infer.autoguide, name, None)
    if not (isinstance(found, type) and issubclass(found, AutoGuide)):
        raise KeyError(f"no autoguide {name!r} in Pyro")
    return found


def _plain_number(value):
    """A number, or a list of them, of numpy's types, which JSON does not know."""
    if hasattr(value, "tolist"):
        return value.tolist()
    raise TypeError(f"expected values that JSON has, got {value!r}")


def _plain(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: value.detach().cpu().contiguous().clone() for name, value in tensors.items()}
