"""The pass over the training data that data-driven projections ask for."""

from __future__ import annotations

import re
import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence

import torch
from torch import Tensor

from ..data import batch_rows
from ..data.batches import IGNORED
from ..scores import score_losses
from .rows import rows_apart
from .targets import device_of, weight_shape

# What reads the encoder in a decoder: T5, BART and its like, BERT.
_CROSS = re.compile(r"(EncDecAttention|encoder_attn|crossattention)\..*?(k|v|k_proj|v_proj|key|value)$")


def bind(model, batches: Iterable[Mapping[str, Tensor]], seed: int):
    """The adapter of a model bound to its network, after the pass over the data where its projection asks for one.

    Args:
        model: a BayesianLoRA with its head at the start.
        batches: the training data.
        seed: of the projection's random choices.
    """
    statistics = {}
    if model.adapter.statistics is not None:
        with torch.random.fork_rng():  # labels may be drawn, see score_losses
            torch.manual_seed(seed)
            statistics = sum_statistics(model, batches)
    return model.adapter.bind(model.modules, statistics, torch.Generator().manual_seed(seed))


def sum_statistics(model, batches: Iterable[Mapping[str, Tensor]]) -> dict[str, dict[str, Tensor]]:
    """projection.collect summed over all batches, by module name, at the pretrained network with its probed head.

    Args:
        model: a BayesianLoRA whose projection's `statistics` is "inputs", "labels" or "model"; "inputs" is a forward
            pass alone.
        batches: the training data.
    """
    modules, projection = model.modules, model.adapter.projection
    if projection.statistics != "labels":
        # All but the summed gradient need to know what is a row's own.
        batches = rows_apart(model, batches)
    # A module may be called several times in one forward: ALBERT's layers share it, DeBERTa sends positions through it.
    inputs: dict[str, list[Tensor]] = {}
    outputs: dict[str, list[Tensor]] = {}

    def keep(name):
        def hook(module, args, output):
            # Frozen weights leave no graph to differentiate: the first module's output starts one.
            output = output if output.requires_grad else output.detach().requires_grad_()
            outputs.setdefault(name, []).append(output)
            # accelerate moves a module's inputs to it where this hook does not see it.
            inputs.setdefault(name, []).append(args[0].detach().to(output.device))
            return output

        return hook

    totals: dict[str, dict[str, Tensor]] = {name: {} for name in modules}
    handles = [module.register_forward_hook(keep(name)) for name, module in modules.items()]
    try:
        for batch in batches:
            # Also of what rows_apart has run.
            inputs.clear(), outputs.clear()
            with torch.set_grad_enabled(projection.statistics != "inputs"):
                labels, observed = model.pretrained_labels(batch)
                for gradients in _gradients(projection.statistics, labels, observed, outputs):
                    for name, calls in gradients.items():
                        for seen in _calls(inputs[name], calls, batch, _mask_of(name, batch)):
                            for key, value in projection.collect(*seen).items():
                                if key in totals[name]:
                                    totals[name][key] += value
                                else:
                                    totals[name][key] = value
    finally:
        for handle in handles:
            handle.remove()
    unread = [name for name, total in totals.items() if not total]
    for name in unread:
        m, n = weight_shape(modules[name])
        nothing = (torch.zeros(shape, device=device_of(modules[name])) for shape in ((1, 1, n), (1, 1, m), (1, 1)))
        totals[name] = dict(projection.collect(*nothing))
    if unread:
        warnings.warn(
            f"the logits do not depend on {unread}: their latents will keep the prior; leave them out of targets=",
            stacklevel=3,
        )
    return totals


def _gradients(
    statistics: str, labels, observed, outputs: Mapping[str, list[Tensor]]
) -> Iterator[dict[str, list[Tensor] | None]]:
    """Gradients of every loss by the modules' outputs, call by call; modules the loss does not read are left out."""
    if statistics == "inputs":
        yield dict.fromkeys(outputs)
        return
    flat = [output for calls in outputs.values() for output in calls]
    losses = list(score_losses(labels, observed if statistics == "labels" else None))
    for position, loss in enumerate(losses):
        found = torch.autograd.grad(loss, flat, retain_graph=position < len(losses) - 1, allow_unused=True)
        gradients = iter(zip(flat, found, strict=True))
        by_module = {name: [next(gradients) for _ in calls] for name, calls in outputs.items()}
        yield {
            name: [torch.zeros_like(output) if g is None else g for output, g in calls]
            for name, calls in by_module.items()
            if any(g is not None for _, g in calls)
        }


def _calls(
    inputs: Sequence[Tensor], gradients: Sequence[Tensor] | None, batch: Mapping[str, Tensor], shown: Tensor | None
) -> Iterator[tuple[Tensor, Tensor | None, Tensor]]:
    """A module's inputs (B, T, n), gradients (B, T, m) and mask (B, T); its calls on the batch's rows as one.

    `shown` (B, T) are the tokens that are no padding, in calls on as many.
    """
    rows = batch_rows(batch)
    seen = [_rows(tokens, rows) for tokens in inputs]
    masks = [_token_mask(tokens, shown) for tokens in seen]
    found = [None] * len(seen) if gradients is None else [_rows(gradient, rows) for gradient in gradients]
    groups: dict[int, list] = {}
    for call in zip(seen, found, masks, strict=True):
        groups.setdefault(len(call[0]), []).append(call)
    for group in groups.values():
        tokens, gradient, mask = zip(*group, strict=True)
        yield torch.cat(tokens, 1), None if gradients is None else torch.cat(gradient, 1), torch.cat(mask, 1)


def _mask_of(name: str, batch: Mapping[str, Tensor]) -> Tensor | None:
    """Which of the tokens that a module reads are no padding, (B, T): the decoder's are other ones."""
    if "decoder_input_ids" not in batch or "decoder" not in name.split(".") or _CROSS.search(name):
        return batch.get("attention_mask")
    own = batch.get("decoder_attention_mask")
    return batch["labels"] != IGNORED if own is None else own


def _rows(tensor: Tensor, rows: int) -> Tensor:
    """What belongs to the batch's rows as (B, T, n), float32; anything else, such as positions, as one row's."""
    return tensor.reshape(1 if len(tensor) % rows else rows, -1, tensor.shape[-1]).float()


def _token_mask(tokens: Tensor, attention_mask: Tensor | None) -> Tensor:
    """The attention mask as (B, T) of the tokens (B, T, n); all ones where there are not as many."""
    if attention_mask is None or attention_mask.numel() != tokens.shape[:2].numel():
        return tokens.new_ones(tokens.shape[:2])
    return attention_mask.reshape(tokens.shape[:2]).to(tokens)
