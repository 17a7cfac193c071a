"""transformers' gradient checkpointing under an adapter."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager

from torch import nn


def checkpointing_modules(modules: Iterable[nn.Module]) -> list[nn.Module]:
    """Those of a network's modules that are set to checkpoint."""
    return [module for module in modules if getattr(module, "gradient_checkpointing", False)]


def check_checkpointing(modules: Iterable[nn.Module]) -> None:
    """Raise a ValueError if a module checkpoints in the reentrant way, which gives gradients to inputs alone."""
    for module in modules:
        if getattr(getattr(module, "_gradient_checkpointing_func", None), "keywords", {}).get("use_reentrant"):
            raise ValueError(
                "expected gradient checkpointing with use_reentrant=False, which gives the latents their gradients, "
                "got use_reentrant=True; write network.gradient_checkpointing_enable(gradient_checkpointing_kwargs="
                "{'use_reentrant': False})"
            )


@contextmanager
def checkpointing_without_dropout(network: nn.Module, modules: Iterable[nn.Module]) -> Iterator[None]:
    """A `with` block in which a network in evaluation mode checkpoints in the modules that are set to.

    transformers checkpoints in training mode only, where dropout is active too. Here a layer is in training mode when
    it is asked whether to checkpoint, and is not when it runs, in backward neither.
    """
    # A stack of layers has the same flag, and dropout of its own.
    layers = [module for module in modules if isinstance(module, _layer_class())]
    functions = {layer: layer._gradient_checkpointing_func for layer in layers}
    # A layer run twice would add to a key-value cache twice.
    owners = [module for module in network.modules() if layers and hasattr(module, "config")]
    configs = {id(owner.config): owner.config for owner in owners if getattr(owner.config, "use_cache", False)}
    try:
        for layer, function in functions.items():
            layer._gradient_checkpointing_func, layer.training = _in_evaluation_mode(layer, function), True
        for config in configs.values():
            config.use_cache = False
        yield
    finally:
        for layer, function in functions.items():
            layer._gradient_checkpointing_func, layer.training = function, False
        for config in configs.values():
            config.use_cache = True


@contextmanager
def without_checkpointing(network: nn.Module) -> Iterator[None]:
    """A `with` block in which no layer checkpoints."""
    modules = checkpointing_modules(network.modules())
    for module in modules:
        module.gradient_checkpointing = False
    try:
        yield
    finally:
        for module in modules:
            module.gradient_checkpointing = True


def _in_evaluation_mode(layer: nn.Module, checkpoint: Callable) -> Callable:
    """The checkpoint function, running the layer in evaluation mode."""

    def run(function, *args, **options):
        def evaluated(*args, **options):
            mode, layer.training = layer.training, False
            try:
                return function(*args, **options)
            finally:
                layer.training = mode

        return checkpoint(evaluated, *args, **options)

    return run


def _layer_class() -> type:
    # Not at the top: it imports accelerate where that is installed.
    from transformers.modeling_layers import GradientCheckpointingLayer

    return GradientCheckpointingLayer
