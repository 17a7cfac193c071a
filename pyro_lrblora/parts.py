"""What a model cannot be made of, told before any work."""

from __future__ import annotations

import sys

from torch import nn
from torch.distributions import Distribution

from .likelihoods import Categorical


def check_parts(adapter, prior, likelihood) -> None:
    """Raise a TypeError for a part that was given as its class, or as something that is none."""
    examples = {"adapter": "LoRAXS()", "prior": "priors.Normal(0.1)", "likelihood": "likelihoods.Categorical()"}
    for role, part in {"adapter": adapter, "prior": prior, "likelihood": likelihood}.items():
        if isinstance(part, type):
            raise TypeError(f"expected {role}={part.__name__}(...), got the class itself; write {part.__name__}()")
        known = hasattr(part, "bind") if role == "adapter" else callable(part) and not isinstance(part, Distribution)
        if not known:
            raise TypeError(f"expected {role}= such as {examples[role]}, got {part!r}")

    if isinstance(likelihood, nn.Module) and any(p.requires_grad for p in likelihood.parameters()):
        raise TypeError(
            f"expected a likelihood without parameters, which a fit would not train, got those of {likelihood!r}; make "
            "them arguments"
        )


def check_network(network: nn.Module, likelihood) -> None:
    """Raise a TypeError or ValueError for a network that the adapter's hooks would not run in, that is adapted already,
    or that returns no logits of the classes a likelihood wants.
    """
    if not isinstance(network, nn.Module):
        raise TypeError(f"expected a network, a torch module, got {network!r}; write AutoModel....from_pretrained(...)")
    if type(network).__name__ == "OptimizedModule":
        raise ValueError("expected a network that is not compiled, got one of torch.compile; give network._orig_mod")
    if any(getattr(module, "_compiled_call_impl", None) is not None for module in network.modules()):
        raise ValueError("expected a network that is not compiled, got one after .compile(); load it again")
    if "peft" in sys.modules:
        from .peft_io import check_without_peft

        check_without_peft(network)
    if output_embedding(network) is not None and isinstance(likelihood, Categorical):
        raise ValueError(
            f"expected a classifier for {likelihood!r}, got the language model {type(network).__name__}; write "
            "likelihoods.NextToken(), or load it as AutoModelForSequenceClassification"
        )


def check_padding(network: nn.Module, tokenizer) -> None:
    """Raise a ValueError for a classifier of transformers and a tokenizer that mean another token by padding.

    Decoders take the last token that is not padding for the row's, and RoBERTa counts positions by it: both would
    silently read the wrong tokens.
    """
    own = getattr(getattr(network, "config", None), "pad_token_id", None)
    pads = getattr(tokenizer, "pad_token_id", None)
    if type(network).__name__.endswith("ForSequenceClassification") and None not in (own, pads) and own != pads:
        raise ValueError(
            f"expected the network and the tokenizer to pad with the same token, got {own} in network.config and "
            f"{pads} ({tokenizer.pad_token!r}) in the tokenizer; write network.config.pad_token_id = "
            "tokenizer.pad_token_id, or tokenizer.pad_token = the network's"
        )


def output_embedding(network: nn.Module) -> nn.Module | None:
    """A language model's last layer; None of any other network."""
    return network.get_output_embeddings() if hasattr(network, "get_output_embeddings") else None
