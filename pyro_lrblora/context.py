"""How many tokens a network can read, and a clear error where a row has more."""

from __future__ import annotations

from contextlib import suppress

from torch import nn

from .positions import offset_positions


def context_length(network: nn.Module) -> int | None:
    """The most tokens that a row of a transformers network may have; None where its config sets no such limit.

    Relative positions (T5) and attention biases (ALiBi) end nowhere. Rotary ones do not fail beyond
    `max_position_embeddings`, but were not trained there.
    """
    config = next((c for c in map(_config, (network, getattr(network, "base_model", None))) if c is not None), None)
    if config is None:
        return None
    with suppress(AttributeError, ValueError):  # of a network that reads images too, its language model's
        config = config.get_text_config()
    limit = getattr(config, "max_position_embeddings", None)
    endless = getattr(config, "alibi", False) or not getattr(config, "position_biased_input", True)
    # XLNet says -1.
    if endless or not isinstance(limit, int) or limit < 1:
        return None
    table = offset_positions(network)
    if table is not None and table.num_embeddings == limit:
        return limit - table.padding_idx - 1
    return max(limit, _scaled(config, limit))


def check_context(network: nn.Module, longest: int, role: str) -> None:
    """Raise a ValueError where a row is longer than the network's context.

    Args:
        network: of the model.
        longest: tokens of the longest row.
        role: what the rows are.
    """
    limit = context_length(network)
    if limit is not None and longest > limit:
        raise ValueError(
            f"expected rows of at most {limit} tokens, the context of this {type(network).__name__}, got {longest} in "
            f"the {role}; write max_length={limit} where the batches are made (lb.Batches, lb.data.Texts), drop the "
            "longer rows, or take a network with a longer context"
        )


def _config(network):
    return getattr(network, "config", None)


def _scaled(config, limit: int) -> int:
    """The context after rotary positions were stretched, which some configs leave out of max_position_embeddings."""
    rope = getattr(config, "rope_parameters", None) or getattr(config, "rope_scaling", None) or {}
    factor = rope.get("factor") or 1.0
    return int(factor * (rope.get("original_max_position_embeddings") or limit))
