"""An adapter in place on a network, for as long as a `with` block lasts."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import ExitStack
from functools import partial

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from .checkpointing import check_checkpointing, checkpointing_modules, checkpointing_without_dropout
from .targets import check_differentiable, weight_shape


class Attachment:
    """Puts the adapter's updates and a head's parameters into a network, and takes them out again.

    Nothing of the network is replaced or moved: forward hooks add the updates (or, where that is cheaper, hold the
    whole weight W0 + B R A in its place while the module runs), the head's parameters are slotted into their modules,
    base weights stop requiring gradients, and leaving the block restores all of it, so the network is bit-identical
    afterwards. The block must reach through `backward` where gradient checkpointing, which works with and without
    dropout here, runs the layers again.

    Args:
        network: the transformer.
        bound: an adapter bound to the network's modules (BoundLoRAXS, BoundLoRA); None for the head alone.
        dropout: run the network in training mode, but for batch norms, which would change.

    Raises:
        RuntimeError: a module already carries an adapter.
        ValueError: gradient checkpointing, or weights packed for inference, that would lose the latents' gradients.
    """

    def __init__(self, network: nn.Module, bound, dropout: bool = False):
        self._network, self._bound, self._dropout = network, bound, dropout
        self._latents: Mapping[str, tuple[Tensor, ...]] = {}

    def __enter__(self) -> Attachment:
        modules = dict(self._network.named_modules())
        members = self._bound.members.values() if self._bound is not None else ()
        targets = {name: modules[name] for names in members for name in names}
        for name, module in targets.items():
            if any(isinstance(hook, _Hook) for hook in module._forward_hooks.values()):
                raise RuntimeError(
                    f"module {name!r} already carries an adapter: expected one attached model at a time, leave the "
                    "surrounding `with model.attached():` first"
                )
        for module in modules.values():
            check_differentiable(module)
        # Without gradients there is nothing to save, and checkpointing would cost a generation its key-value cache.
        gradients = torch.is_grad_enabled()
        checkpointing = checkpointing_modules(modules.values()) if self._bound is not None and gradients else []
        check_checkpointing(checkpointing)
        self._modes = [(m, m.training) for m in modules.values() if m.training != (self._dropout and not _is_norm(m))]
        # By place: an offloaded parameter is another tensor after every forward.
        self._trainable = [
            (module, leaf) for module in modules.values() for leaf, p in module._parameters.items() if _trainable(p)
        ]
        # bitsandbytes would pack 4 bit weights for inference, in place and not to be undone exactly.
        self._packing = [m for m in modules.values() if getattr(m, "support_avx512bf16_for_cpu", False)]
        self._slots: dict[tuple[nn.Module, str], Tensor] = {}
        self._frozen: dict[tuple[str, torch.device, torch.dtype], tuple] = {}
        self._merged: nn.Module | None = None  # the one that runs with its whole weight
        self._handles = [module.register_forward_hook(_Hook(self._hook, name)) for name, module in targets.items()]
        if not gradients:
            self._handles += [m.register_forward_pre_hook(partial(self._merge, name)) for name, m in targets.items()]
        for module in self._packing:
            module.support_avx512bf16_for_cpu = False
        for module, leaf in self._trainable:
            module._parameters[leaf].requires_grad_(False)
        if self._modes:
            self._network.train(self._dropout)
            for module in filter(_is_norm, modules.values()):
                module.eval()
        self._checkpointing = ExitStack()
        if checkpointing and not self._dropout:
            self._checkpointing.enter_context(checkpointing_without_dropout(self._network, checkpointing))
        return self

    def __exit__(self, *exception) -> None:
        self._checkpointing.close()
        for handle in self._handles:
            handle.remove()
        for (module, leaf), parameter in self._slots.items():
            module._parameters[leaf] = parameter
        for module, leaf in self._trainable:
            module._parameters[leaf].requires_grad_(True)
        for module in self._packing:
            module.support_avx512bf16_for_cpu = True
        for module, training in self._modes:
            module.training = training
        self._latents, self._frozen = {}, {}

    def set(self, latents: Mapping[str, Tensor], head: Mapping[str, Tensor]) -> None:
        """Use these latents (sites, one draw or one per row) and head parameters (dotted name -> value) from now on."""
        self._latents = self._bound.per_module(latents) if latents else {}
        for name, value in head.items():
            path, _, leaf = name.rpartition(".")
            module = self._network.get_submodule(path)
            own = self._slots.setdefault((module, leaf), module._parameters[leaf])
            module._parameters[leaf] = value.to(own.device, own.dtype)

    def _merge(self, name, module, args):
        if name not in self._latents or not merging_pays(module, args[0], self._latents[name]):
            return
        own = module.weight
        left, right = (f.to(own.device, own.dtype) for f in self._bound.low_rank_factors(name, self._latents[name]))
        if isinstance(module, Conv1D):
            left, right = right.T, left.T
        # One module's at a time: together they would be a second network.
        self._merged = module
        self._slots.setdefault((module, "weight"), own)
        module._parameters["weight"] = torch.addmm(own, left, right)

    def _hook(self, name, module, args, output):
        if name not in self._latents:
            return output
        if self._merged is module:
            self._merged = None
            module._parameters["weight"] = self._slots[module, "weight"]
            return output
        # The output says where the module runs and in what: accelerate moves inputs behind the hook's back.
        key = (name, output.device, output.dtype)
        if key not in self._frozen:
            self._frozen[key] = self._bound.factors(name, output)
        inputs = args[0].to(output.device, output.dtype)
        return self._bound.add(output, inputs, self._frozen[key], self._latents[name])


def merging_pays(module: nn.Module, inputs: Tensor, latent: tuple[Tensor, ...]) -> bool:
    """Whether computing W0 + B R A first is possible, exact and cheaper than adding B R A x to what W0 x is.

    Not with gradients or draws of the rows' own, for weights that are packed or fetched, or where the sum would be
    rounded to half precision. Forming it touches m n numbers, adding its product m + n for every token.

    Args:
        module: an adapted module.
        inputs: (..., n).
        latent: the module's own.
    """
    if torch.is_grad_enabled() or any(part.dim() > 2 for part in latent):
        return False
    plain = type(module) in (nn.Linear, Conv1D) and type(module.weight) is nn.Parameter
    if not plain or hasattr(module, "_hf_hook") or torch.is_autocast_enabled(module.weight.device.type):
        return False
    m, n = weight_shape(module)
    return module.weight.dtype in (torch.float32, torch.float64) and inputs.numel() // n * (m + n) > m * n


def _is_norm(module: nn.Module) -> bool:
    """Whether it would write a batch's moments into its buffers while it is in training mode."""
    return isinstance(module, nn.modules.batchnorm._BatchNorm)


def _trainable(parameter: Tensor | None) -> bool:
    return parameter is not None and parameter.requires_grad


class _Hook(partial):
    """A partial by another name, so that an attachment recognises its own kind."""
