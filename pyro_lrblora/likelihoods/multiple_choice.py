"""One right answer among the choices of an item."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar

import pyro
import pyro.distributions as dist
import torch
from torch import Tensor

from ..data.choices import LETTERS
from .categorical import check_finite, logits_of


@dataclass(frozen=True)
class MultipleChoice:
    """The index of the right choice, from the network's score of each.

    Three networks give scores: one made for it (AutoModelForMultipleChoice, or a MeanPoolClassifier with one label) on
    inputs (B, C, T); networks.AnswerScorer, the log probability of each answer's tokens under a language model; and any
    causal language model that is asked for a letter, with `letters`.

    Args:
        letters: token ids of the choices' letters, C of them; the scores are then the logits of these tokens after the
            last token of a prompt (B, T). `letter_tokens(tokenizer, C)` finds them. None: the network gives
            scores (B, C).
    """

    letters: Sequence[int] | None = None
    class_names: ClassVar[tuple] = ()  # a choice is another answer in every item

    def __call__(self, outputs, batch: Mapping[str, Tensor]) -> Tensor:
        logits = check_finite(self.logits(outputs, batch))
        return pyro.sample("labels", dist.Categorical(logits=logits), obs=batch.get("labels"))

    def logits(self, outputs, batch: Mapping[str, Tensor]) -> Tensor:
        """The scores (B, C)."""
        scores = logits_of(outputs)
        if self.letters is None:
            if scores.shape[-1] < 2:
                raise ValueError(
                    f"expected scores of two choices or more, got {tuple(scores.shape)}; write "
                    "lb.data.Choices(dataset, tokenizer) for the rows"
                )
            return scores
        mask = batch.get("attention_mask")
        if mask is None:
            last = scores[:, -1]
        else:
            # The last attended position, whichever side is padded.
            positions = torch.arange(mask.shape[1], device=mask.device) * (mask > 0)
            last = scores[torch.arange(len(scores), device=scores.device), positions.argmax(-1).to(scores.device)]
        return last[:, list(self.letters)]

    def check_labels(self, labels: Tensor, classes: int | None) -> None:
        """Raise a ValueError where labels (N,) are not choice indices."""
        if labels.is_floating_point() or labels.dim() != 1 or int(labels.min()) < 0:
            raise ValueError(
                f"expected the indices of the right choices, integers >= 0 of shape (N,), got {labels.dtype} "
                f"{tuple(labels.shape)} from {labels.min()}"
            )
        if self.letters is not None and int(labels.max()) >= len(self.letters):
            raise ValueError(
                f"expected labels 0..{len(self.letters) - 1} for {len(self.letters)} letters, got {labels.max()}"
            )


def letter_tokens(tokenizer, choices: int, prefix: str = " ") -> tuple[int, ...]:
    """The token ids of the letters A, B, ... as they follow a prompt.

    Args:
        tokenizer: of the language model.
        choices: C, at most 26.
        prefix: what stands between the prompt and the letter.

    Raises:
        ValueError: more choices than letters, a letter that is not one token of its own.
    """
    if choices > len(LETTERS):
        raise ValueError(f"expected at most {len(LETTERS)} choices, a letter each, got {choices}")
    ids = []
    for letter in LETTERS[:choices]:
        # After another token, since tokenizers treat the start of a text as a case of its own.
        whole = tokenizer(f":{prefix}{letter}", add_special_tokens=False)["input_ids"]
        before = tokenizer(":", add_special_tokens=False)["input_ids"]
        rest = whole[len(before) :]
        if len(rest) != 1 or rest[0] == tokenizer.unk_token_id or rest[0] in ids:
            raise ValueError(
                f"expected the letter {letter!r} to be one token after {prefix!r}, got "
                f"{tokenizer.convert_ids_to_tokens(rest)}; write prefix='' or score the answers themselves "
                f"(networks.AnswerScorer)"
            )
        ids.append(int(rest[0]))
    return tuple(ids)
