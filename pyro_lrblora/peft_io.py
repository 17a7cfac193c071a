"""A posterior as PEFT LoRA adapters, and a trained PEFT LoRA as the point where a fit starts; both through peft."""

from __future__ import annotations

import copy
import re
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import pandas as pd
import torch
from safetensors import SafetensorError
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from .guides import Delta
from .guides.ensemble import EnsembleGuide
from .guides.mixture import MixtureGuide
from .model import BayesianLoRA
from .posterior import Posterior, local_parameters

_TASKS = {
    "ForSequenceClassification": "SEQ_CLS",
    "ForTokenClassification": "TOKEN_CLS",
    "ForCausalLM": "CAUSAL_LM",
    "LMHeadModel": "CAUSAL_LM",
    "ForConditionalGeneration": "SEQ_2_SEQ_LM",
}
# What an update B A cannot say, by the name of the setting in LoraConfig.
_BEYOND_LOW_RANK = (
    "use_dora", "lora_bias", "layer_replication", "target_parameters", "trainable_token_indices",
    "alora_invocation_tokens",
)  # fmt: skip
# PiSSA, OLoRA, CorDA, LoftQ and their like change the base's weights when they are loaded.
_STARTS_THAT_KEEP_THE_BASE = (True, False, "gaussian", "eva", "orthogonal")


@local_parameters
@torch.no_grad()
def export_peft(posterior: Posterior, folder, draws: int | None = None, seed: int = 0) -> None:
    """Write the posterior mean, or draws, as ordinary PEFT LoRA adapters with the same logits.

    `peft.PeftModel.from_pretrained(base, folder)` loads them, and so does every server that takes LoRA. The head goes
    along as modules_to_save; any scaling is inside lora_B, so that lora_alpha / r is 1 in every module.

    Args:
        posterior: what a fit returned.
        folder: of the mean; with draws, each is a folder draw_000, draw_001, ... in it.
        draws: S, the same draws as posterior.sample(S, seed=seed); None writes the mean.
        seed: of the draws.

    Raises:
        ModuleNotFoundError: peft is not installed.
        ValueError: the mean of several modes, a network that carries peft layers, or other draws in the folder.
    """
    model, folder, head = posterior.model, Path(folder), posterior.head()
    check_without_peft(model.network)
    if draws is None:
        if isinstance(posterior.guide, EnsembleGuide | MixtureGuide):
            raise ValueError(
                f"expected draws= for {posterior.guide_spec!r}: the mean of several modes lies between them; write "
                "export_peft(folder, draws=10)"
            )
        points = {folder: posterior.mean()}
    else:
        samples = posterior.sample(draws, seed=seed)
        points = {folder / f"draw_{n:03d}": {k: v[n] for k, v in samples.items()} for n in range(draws)}
    others = sorted(path.name for path in set(folder.glob("draw_*")) - set(points))
    if others:
        raise ValueError(f"expected a folder without other draws, got {others[:3]} in {folder}; remove them first")
    with _copy_without_weights(model.network) as network:
        adapted = _inject(model, network)
        for where, values in points.items():
            own = {name: values[name] for name in model.head_start if name in values}
            _fill(adapted, model, values, head | own)
            # Not "auto", which asks the hub for the base's vocabulary.
            adapted.save_pretrained(str(where), save_embedding_layers=False)


@local_parameters
@torch.no_grad()
def import_peft(model: BayesianLoRA, source) -> tuple[Posterior, pd.DataFrame]:
    """A trained PEFT LoRA in a model's subspace: a point posterior for `init=` of a fit, and what was lost.

    Every update scaling * B_l A_l is replaced by the closest one that the adapter can make: least squares for LoRAXS,
    a truncated SVD for LoRA, which is exact where its rank is at least PEFT's. A head that the adapter brings along
    becomes the model's.

    Args:
        model: prepared, where its projection looks at data; over a network without peft layers.
        source: a folder with adapter_config.json and adapter_model.safetensors, or a peft.PeftModel over a network of
            its own.

    Returns:
        The posterior, and a row per module of norm, the Frobenius norm of the update; error, that of what is missing
        as a share of it; kept, the share of the squared norm that is left. A module that the model does not adapt has
        kept 0, one that the adapter does not update NaN.

    Raises:
        ModuleNotFoundError: peft is not installed.
        ValueError: pickled, missing or corrupt files; an adapter that is more than B A; one made for another network; a
            head that the model cannot take.
    """
    peft = _peft()
    check_without_peft(model.network)
    if isinstance(source, peft.PeftModel):
        updates, head = _read(source)
    else:
        folder = Path(source)
        config = _check_files(peft, folder)
        _check_config(config)
        with _copy_without_weights(model.network) as network:
            try:
                adapted = peft.PeftModel.from_pretrained(network, str(folder))
            except (ValueError, RuntimeError, KeyError, SafetensorError) as error:
                raise ValueError(
                    f"expected an adapter for {type(model.network).__name__} in {folder}, got: {error}"
                ) from None
            updates, head = _read(adapted)
    _check_head(model, head)
    model = model.in_subspace_of(model)
    model._set_head(model.head, model.head_start | head)  # a prior around it: the adapter's head is a pretrained one
    closest = model.adapted.closest({name: update for name, update in updates.items() if name in model.modules})
    guide = Delta()(model)
    guide.begin_at(model.sites.join(closest).to(model.device))
    settings = {"method": "peft", "source": str(source) if isinstance(source, str | Path) else type(source).__name__}
    return Posterior(model, guide, Delta(), [], settings), _lost(model, updates, closest)


def check_without_peft(network: nn.Module) -> None:
    """Raise a ValueError if peft has changed the network."""
    _peft()
    from peft.tuners.tuners_utils import BaseTunerLayer

    if any(isinstance(module, BaseTunerLayer) for module in network.modules()):
        raise ValueError(
            "expected a network without peft layers, got one that peft has changed in place; write "
            "peft_model.unload(), or load the base again"
        )


def _peft():
    try:
        import peft
    except ModuleNotFoundError:
        raise ModuleNotFoundError("peft is not installed; write pip install 'pyro_lrblora[peft]'") from None
    return peft


@contextmanager
def _copy_without_weights(network: nn.Module) -> Iterator[nn.Module]:
    """The network's modules copied over the very same tensors, for peft to change while the block lasts."""
    flags = [(parameter, parameter.requires_grad) for parameter in network.parameters()]
    shared = {id(tensor): tensor for tensor in [*network.parameters(), *network.buffers()]}
    try:
        with torch.random.fork_rng():
            yield copy.deepcopy(network, shared)
    finally:
        for parameter, flag in flags:
            parameter.requires_grad_(flag)


def _inject(model: BayesianLoRA, network: nn.Module):
    """A PeftModel over the network with one LoRA of each module's own rank, and the head's modules to be saved."""
    peft = _peft()
    from peft.tuners.lora import LoraLayer

    latents = model.adapted.per_module(model.adapted.start())
    ranks = {name: len(model.adapted.low_rank_factors(name, latents[name])[1]) for name in model.modules}
    rank = max(ranks.values())
    # "^" because peft takes a pattern for the end of a name.
    others = {f"^{re.escape(name)}": own for name, own in ranks.items() if own != rank}
    owners = _owners(network, model.head_start)
    config = peft.LoraConfig(
        r=rank,
        lora_alpha=rank,
        rank_pattern=others,
        alpha_pattern=dict(others),
        target_modules=_exact_targets(model),
        modules_to_save=owners or None,
        fan_in_fan_out=any(isinstance(module, Conv1D) for module in model.modules.values()),
        task_type=_task(model.network, [*model.modules, *owners]),
    )
    adapted = peft.get_peft_model(network, config)
    found = {name for name, m in adapted.get_base_model().named_modules() if isinstance(m, LoraLayer)}
    if found != set(model.modules):
        raise ValueError(f"expected peft to adapt the same modules, got a difference in {found ^ set(model.modules)}")
    return adapted


def _task(network: nn.Module, touched: Iterable[str]) -> str | None:
    kind = type(network).__name__
    task = next((task for ending, task in _TASKS.items() if kind.endswith(ending)), None)
    # For these two peft keeps a whole "classifier" or "score", which then cannot be changed in part.
    if task in ("SEQ_CLS", "TOKEN_CLS") and any(name.startswith(("classifier.", "score.")) for name in touched):
        return None
    return task


def _exact_targets(model: BayesianLoRA) -> list[str] | str:
    """The adapted modules' names for peft, which takes a name in a list for the end of others too."""
    every = [name for name, _ in model.network.named_modules() if name not in model.modules]
    if any(name.endswith(f".{target}") for name in every for target in model.modules):
        return "|".join(re.escape(name) for name in model.modules)
    return list(model.modules)


def _owners(network: nn.Module, head: Iterable[str]) -> list[str]:
    """The outermost modules that hold the head's parameters and nothing else."""
    found = []
    for name in head:
        owner = name.rpartition(".")[0]
        if not owner:
            raise ValueError(f"expected the head's parameters in a module of their own, got {name!r} in the network's")
        parts = owner.split(".")
        paths = [".".join(parts[:end]) for end in range(1, len(parts) + 1)]
        whole = lambda path: all(f"{path}.{n}" in head for n, _ in network.get_submodule(path).named_parameters())
        found.append(next(filter(whole, paths), owner))
    return list(dict.fromkeys(found))


def _fill(adapted, model: BayesianLoRA, values: Mapping[str, Tensor], head: Mapping[str, Tensor]) -> None:
    network = adapted.get_base_model()
    for name, latent in model.adapted.per_module(values).items():
        left, right = model.adapted.low_rank_factors(name, latent)
        layer = network.get_submodule(name)
        layer.lora_A["default"].weight.copy_(right)
        layer.lora_B["default"].weight.copy_(left)
    saved = _saved_parameters(network, "default")
    for name, value in head.items():
        saved[name].copy_(value)


def _saved_parameters(network: nn.Module, adapter: str) -> dict[str, nn.Parameter]:
    """The parameters that an adapter keeps whole, by their dotted name in the base."""
    from peft.utils import ModulesToSaveWrapper

    return {
        f"{path}.{name}": parameter
        for path, module in network.named_modules()
        if isinstance(module, ModulesToSaveWrapper) and adapter in module.modules_to_save
        for name, parameter in module.modules_to_save[adapter].named_parameters()
    }


def _read(adapted) -> tuple[dict[str, tuple[Tensor, Tensor]], dict[str, Tensor]]:
    """The factors (m, k) and (k, n) of every module's update, and the parameters kept whole."""
    from peft.tuners.lora import LoraLayer

    if len(adapted.active_adapters) != 1:
        raise ValueError(f"expected one active adapter, got {adapted.active_adapters}; write set_adapter(name) first")
    (adapter,) = adapted.active_adapters
    _check_config(adapted.peft_config[adapter])
    updates = {}
    for name, layer in adapted.get_base_model().named_modules():
        if not isinstance(layer, LoraLayer):
            continue
        if adapter not in layer.lora_A:
            if adapter in layer.lora_embedding_A:
                raise ValueError(f"expected LoRA on linear modules only, got one on the embedding {name!r}")
            continue
        left, right = layer.lora_B[adapter].weight, layer.lora_A[adapter].weight
        if left.dim() != 2 or getattr(layer, "lora_variant", None):
            raise ValueError(f"expected a plain LoRA on a linear module, got {layer} on {name!r}")
        updates[name] = (layer.scaling[adapter] * left.detach().double().cpu(), right.detach().double().cpu())
    head = _saved_parameters(adapted.get_base_model(), adapter)
    return updates, {name: parameter.detach().float().clone() for name, parameter in head.items()}


def _check_files(peft, folder: Path):
    """The adapter's settings; a ValueError unless both files are there, and neither is a pickle."""
    tensors, settings = folder / "adapter_model.safetensors", folder / "adapter_config.json"
    pickled = folder / "adapter_model.bin"
    if pickled.exists() and not tensors.exists():
        raise ValueError(
            f"expected {tensors.name} in {folder}, got {pickled.name}, a pickle, which can run any code when it is "
            "read; where you trust it, load it with peft and write save_pretrained(folder)"
        )
    for path in (settings, tensors):
        if not path.is_file():
            raise ValueError(
                f"expected a folder with a PEFT adapter, got {folder} without {path.name}; of an adapter on the hub, "
                "give the PeftModel"
            )
    try:
        return peft.PeftConfig.from_pretrained(str(folder))
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise ValueError(f"expected the settings of a PEFT adapter in {settings}, got: {error}") from None


def _check_config(config) -> None:
    kind = getattr(config.peft_type, "value", config.peft_type)
    if kind != "LORA":
        raise ValueError(f"expected a LoRA adapter, got one of type {kind}")
    beyond = [name for name in _BEYOND_LOW_RANK if getattr(config, name, None)]
    beyond += ["bias"] if config.bias != "none" else []
    if beyond:
        raise ValueError(f"expected an adapter that adds B A and no more, got one with {', '.join(beyond)}")
    if config.init_lora_weights not in _STARTS_THAT_KEEP_THE_BASE:
        raise ValueError(
            f"expected an adapter of the base itself, got init_lora_weights={config.init_lora_weights!r}, which "
            "changes the base; write it with peft's save_pretrained(..., path_initial_model_for_weight_conversion=...)"
        )


def _check_head(model: BayesianLoRA, head: Mapping[str, Tensor]) -> None:
    foreign = sorted(set(head) - set(model.head_start))
    if foreign:
        raise ValueError(
            f"expected an adapter that replaces the head {list(model.head_start)} at most, got {foreign[:3]}; load "
            "them into the network first, and the adapter without them"
        )
    wrong = [name for name, value in head.items() if value.shape != model.head_start[name].shape]
    if wrong:
        raise ValueError(f"expected a head of the network's shapes, got others for {wrong}")
    if head and model.head == "frozen":
        raise ValueError("expected a head that can change, since the adapter brings its own; write head='point'")


def _lost(model: BayesianLoRA, updates: Mapping[str, tuple], values: Mapping[str, Tensor]) -> pd.DataFrame:
    latents, rows = model.adapted.per_module(values), {}
    for name in [*model.modules, *(name for name in updates if name not in model.modules)]:
        if name not in updates:
            rows[name] = {"norm": 0.0, "kept": float("nan"), "error": float("nan")}
            continue
        left, right = updates[name]
        norm, error = _norm(left, right), 1.0
        if name in model.modules:
            found = [factor.cpu().double() for factor in model.adapted.low_rank_factors(name, latents[name])]
            missing = _norm(torch.cat([left, -found[0]], 1), torch.cat([right, found[1]]))
            error = missing / norm if norm else float("nan")
        rows[name] = {"norm": norm, "kept": 1 - error**2, "error": error}
    return pd.DataFrame.from_dict(rows, orient="index").rename_axis("module")


def _norm(left: Tensor, right: Tensor) -> float:
    """The Frobenius norm of a product, without the product."""
    return float((torch.linalg.qr(left)[1] @ torch.linalg.qr(right.T)[1].T).norm())
