"""Text from a causal or sequence-to-sequence language model, token by token."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import pyro
import pyro.distributions as dist
from torch import Tensor

from ..data.batches import IGNORED
from ..predictions import TokenPrediction
from .categorical import check_finite, logits_of


@dataclass(frozen=True)
class NextToken:
    """A row's labels (T,) are one observation: the tokens of a text, each given those before it.

    Labels are aligned with input_ids, as in transformers; -100 marks tokens that are not scored (padding, a prompt).
    The shift by one is made here, except where the batch has decoder_input_ids (sequence to sequence), which are
    shifted already. A row's first token, behind padding on the left, is not scored: nothing comes before it.
    """

    def __call__(self, outputs, batch: Mapping[str, Tensor]) -> Tensor:
        logits, labels = self._aligned(outputs, batch)
        if labels is None:
            return pyro.sample("labels", dist.Categorical(logits=logits).to_event(1))
        scored = labels != IGNORED
        tokens = dist.Categorical(logits=logits).mask(scored).to_event(1)
        return pyro.sample("labels", tokens, obs=labels.clamp(min=0))

    @staticmethod
    def check_labels(labels: Tensor, classes: int | None) -> None:
        """Raise a ValueError where labels are not token ids (N, T) with something to score in every row."""
        if labels.is_floating_point() or labels.dim() != 2:
            raise ValueError(
                f"expected token ids of shape (N, T) as labels for NextToken, got {labels.dtype} "
                f"{tuple(labels.shape)}; write lb.data.Texts(dataset, tokenizer)"
            )
        empty = (labels[:, 1:] == IGNORED).all(-1).nonzero().flatten().tolist()
        if empty:
            raise ValueError(
                f"expected at least one token to score in every row beyond its first, got none in rows {empty[:5]}; "
                f"drop those rows"
            )

    def summary(self, outputs, batch: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Log probability of each token and entropy of its distribution, nats, 0 where it is not scored; (B, T)."""
        logits, labels = self._aligned(outputs, batch)
        if labels is None:
            raise ValueError("expected labels: the log probability of a text needs the text; to write one, lb.generate")
        log_probs = logits.log_softmax(-1)
        scored = labels != IGNORED
        observed = log_probs.gather(-1, labels.clamp(min=0).unsqueeze(-1)).squeeze(-1)
        entropy = -(log_probs.exp() * log_probs).sum(-1)
        return {"log_probs": observed * scored, "entropy": entropy * scored, "scored": scored}

    @staticmethod
    def prediction(summaries: Mapping[str, Tensor], labels: Tensor | None, class_names) -> TokenPrediction:
        """The prediction for N rows from S draws."""
        return TokenPrediction(summaries["log_probs"], summaries["entropy"], summaries["scored"][0])

    @staticmethod
    def _aligned(outputs, batch: Mapping[str, Tensor]) -> tuple[Tensor, Tensor | None]:
        """Logits (B, T, V) and the tokens (B, T) they predict."""
        logits, labels = check_finite(logits_of(outputs)), batch.get("labels")
        if "decoder_input_ids" in batch:
            return logits, labels
        if getattr(outputs, "encoder_last_hidden_state", None) is not None:
            raise ValueError(
                "expected decoder_input_ids in the batches of a sequence-to-sequence network, got "
                f"{sorted(batch)}; write lb.data.Texts(..., prompt=..., decoder=network)"
            )
        if labels is None:
            return logits[:, :-1], None
        targets, mask = labels[:, 1:].to(logits.device), batch.get("attention_mask")
        if mask is not None and mask.shape == labels.shape:
            targets = targets.masked_fill(mask[:, :-1].to(logits.device) == 0, IGNORED)
        return logits[:, :-1], targets
