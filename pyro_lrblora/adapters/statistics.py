"""The pass over the training data that data-driven projections ask for."""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Mapping

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
        projection: a Projection whose `statistics` is "labels" or "model".
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
            with torch.enable_grad():
                labels, observed = run(batch)
                losses = list(score_losses(labels, observed if projection.statistics == "labels" else None))
            for position, loss in enumerate(losses):
                gradients = torch.autograd.grad(
                    loss, list(outputs.values()), retain_graph=position < len(losses) - 1, allow_unused=True
                )
                for name, gradient in zip(outputs, gradients, strict=True):
                    if gradient is None:
                        continue
                    for key, value in projection.collect(_rows(inputs[name]), _rows(gradient)).items():
                        totals[name][key] = totals[name].get(key, 0) + value
            inputs.clear(), outputs.clear()
    finally:
        for handle in handles:
            handle.remove()
    unread = [name for name, total in totals.items() if not total]
    for name in unread:
        m, n = base_weight(modules[name]).shape
        totals[name] = dict(projection.collect(torch.zeros(1, 1, n), torch.zeros(1, 1, m)))
    if unread:
        warnings.warn(
            f"the logits do not depend on {unread}: their latents will keep the prior; leave them out of targets=",
            stacklevel=3,
        )
    return totals


def _rows(tensor: Tensor) -> Tensor:
    """(B, ..., n) as (B, T, n), float32."""
    return tensor.reshape(tensor.shape[0], -1, tensor.shape[-1]).float()
