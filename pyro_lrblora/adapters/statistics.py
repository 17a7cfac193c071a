"""The pass over the training data that data-driven projections ask for."""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Iterator, Mapping

import torch
from torch import Tensor, nn

from ..scores import score_losses
from .targets import base_weight


def sum_statistics(
    run,
    modules: Mapping[str, nn.Module],
    batches: Iterable[Mapping[str, Tensor]],
    projection,
) -> dict[str, dict[str, Tensor]]:
    """projection.collect summed over all batches, by module name.

    Args:
        run: batch -> (distribution of the labels, observed labels), with the pretrained network and its probed head.
        modules: the adapted modules of that network.
        batches: the training data.
        projection: a Projection whose `statistics` is "inputs", "labels" or "model"; "inputs" is a forward pass alone.
    """
    inputs: dict[str, Tensor] = {}
    outputs: dict[str, Tensor] = {}

    def keep(name):
        def hook(module, args, output):
            # Frozen weights leave no graph to differentiate: the first module's output starts one.
            outputs[name] = output if output.requires_grad else output.detach().requires_grad_()
            inputs[name] = args[0].detach()
            return outputs[name]

        return hook

    totals: dict[str, dict[str, Tensor]] = {name: {} for name in modules}
    handles = [module.register_forward_hook(keep(name)) for name, module in modules.items()]
    try:
        for batch in batches:
            with torch.set_grad_enabled(projection.statistics != "inputs"):
                labels, observed = run(batch)
                for gradients in _gradients(projection.statistics, labels, observed, outputs):
                    for name, gradient in gradients.items():
                        tokens = _rows(inputs[name])
                        mask = _token_mask(tokens, batch.get("attention_mask"))
                        for key, value in projection.collect(tokens, gradient, mask).items():
                            totals[name][key] = totals[name].get(key, 0) + value
            inputs.clear(), outputs.clear()
    finally:
        for handle in handles:
            handle.remove()
    unread = [name for name, total in totals.items() if not total]
    for name in unread:
        weight = base_weight(modules[name])
        m, n = weight.shape
        nothing = (weight.new_zeros(shape, dtype=torch.float32) for shape in ((1, 1, n), (1, 1, m), (1, 1)))
        totals[name] = dict(projection.collect(*nothing))
    if unread:
        warnings.warn(
            f"the logits do not depend on {unread}: their latents will keep the prior; leave them out of targets=",
            stacklevel=3,
        )
    return totals


def _gradients(statistics: str, labels, observed, outputs: Mapping[str, Tensor]) -> Iterator[dict[str, Tensor | None]]:
    """Gradients (B, T, m) of every loss by the modules' outputs; modules that the loss does not read are left out."""
    if statistics == "inputs":
        yield dict.fromkeys(outputs)
        return
    losses = list(score_losses(labels, observed if statistics == "labels" else None))
    for position, loss in enumerate(losses):
        gradients = torch.autograd.grad(
            loss, list(outputs.values()), retain_graph=position < len(losses) - 1, allow_unused=True
        )
        yield {name: _rows(g) for name, g in zip(outputs, gradients, strict=True) if g is not None}


def _rows(tensor: Tensor) -> Tensor:
    """(B, ..., n) as (B, T, n), float32."""
    return tensor.reshape(tensor.shape[0], -1, tensor.shape[-1]).float()


def _token_mask(tokens: Tensor, attention_mask: Tensor | None) -> Tensor:
    """The attention mask as (B, T) of the tokens (B, T, n); all ones where it has another shape."""
    if attention_mask is None or attention_mask.reshape(-1, attention_mask.shape[-1]).shape != tokens.shape[:2]:
        return tokens.new_ones(tokens.shape[:2])
    return attention_mask.reshape(tokens.shape[:2]).to(tokens)
