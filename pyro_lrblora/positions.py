"""Where the tokens of a row stand, whatever padding is before them."""

from __future__ import annotations

import inspect
from collections.abc import Mapping

from torch import Tensor, nn


def takes_positions(network: nn.Module) -> bool:
    """Whether it is causal and can be told positions that count from 0."""
    causal = [module.is_causal for module in network.modules() if hasattr(module, "is_causal")]
    told = bool(causal) and all(causal) and "position_ids" in inspect.signature(network.forward).parameters
    return told and offset_positions(network) is None


def offset_positions(network: nn.Module) -> nn.Embedding | None:
    """The embedding of positions that RoBERTa and its like count, by themselves, from the padding token's place on."""
    for name, module in network.named_modules():
        table = name.endswith("position_embeddings") and isinstance(module, nn.Embedding)
        if table and module.padding_idx is not None:
            return module
    return None


def positions(inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """position_ids (B, T) from the attention mask, 0 at the first token that is not padding, as in `generate`.

    GPT-2 would count padding on the left, and a row's likelihood would depend on the longest row of its batch.
    """
    mask = inputs.get("attention_mask")
    if mask is None or mask.dim() != 2 or "position_ids" in inputs:
        return {}
    return {"position_ids": (mask.long().cumsum(-1) - 1).clamp(min=0)}
