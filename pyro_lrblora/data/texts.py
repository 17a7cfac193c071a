"""Texts for language models: every token is a label, but for padding and prompts."""

from __future__ import annotations

from collections.abc import Sequence

import datasets
import torch
from torch import Tensor

from .batches import IGNORED, EncodedBatches
from .columns import check_columns, check_encodable, read_texts, token_limit


class Texts(EncodedBatches):
    """Tokenised texts whose "labels" are their own tokens, for likelihoods.NextToken.

    Args:
        dataset: a column of texts, and one of prompts where there are any.
        tokenizer: of the network; needs a padding token.
        text: the column of texts; with `prompt`, of what follows the prompt.
        prompt: the column of prompts, whose tokens are read but not scored. For a sequence-to-sequence network it is
            the encoder's input.
        decoder: for a sequence-to-sequence network, the network itself: its decoder_start_token_id starts the targets.
        end: add the tokenizer's end-of-text token to every text, where it has one.
        packed: lay the texts end to end, an end-of-text token between them, and cut rows of max_length tokens. A row
            is then one observation, and texts in it see each other. False: a row per text.
        batch_size: rows per batch.
        max_length: tokens per row, longer texts are cut; None is the tokenizer's own limit, at most 512.
        shuffle: a seed for a new order in every epoch; None keeps the order.
        by_length: batches of rows of similar length; `order` tells which rows they hold.

    Raises:
        ValueError, KeyError: empty data, a missing column, a prompt that leaves no room for a token to score, prompts
            or a decoder with packing.
    """

    def __init__(
        self,
        dataset: datasets.Dataset,
        tokenizer,
        *,
        text: str = "text",
        prompt: str | None = None,
        decoder=None,
        end: bool = True,
        packed: bool = False,
        batch_size: int = 8,
        max_length: int | None = None,
        shuffle: int | None = None,
        by_length: bool = False,
    ):
        check_encodable(dataset, tokenizer)
        check_columns(dataset, text, *([] if prompt is None else [prompt]))
        if decoder is not None and prompt is None:
            raise ValueError("expected prompt= with decoder=: the encoder of a sequence-to-sequence network reads it")
        if packed and prompt is not None:
            raise ValueError("expected packed=False with prompt=: packing would cut prompts from their answers")
        limit = token_limit(tokenizer, max_length)
        last = [tokenizer.eos_token_id] if end and tokenizer.eos_token_id is not None else []
        encode = lambda column, **how: tokenizer(read_texts(dataset, column), **how)["input_ids"]
        bare = lambda ids: without_end(ids, tokenizer)
        self._start, self.for_decoder = None, decoder is not None
        sources = []
        if decoder is not None:
            self._start = decoder.config.decoder_start_token_id
            sources = encode(prompt, truncation=True, max_length=limit)
            targets = [(bare(ids) + last)[:limit] for ids in encode(text)]
            encoded = {"input_ids": sources, "attention_mask": [[1] * len(ids) for ids in sources]}
            rows = targets
        else:
            special = prompt is None  # a text that follows a prompt has no beginning-of-text token of its own
            texts = [bare(ids) + last for ids in encode(text, add_special_tokens=special)]
            if packed:
                texts = _packed(texts, limit)
            prompts = [[]] * len(texts) if prompt is None else [bare(ids) for ids in encode(prompt)]
            _check_room(prompts, limit)
            rows = [(before + after)[:limit] for before, after in zip(prompts, texts, strict=True)]
            encoded = {"input_ids": rows, "attention_mask": [[1] * len(ids) for ids in rows]}
            targets = [[IGNORED] * len(before) + ids[len(before) :] for before, ids in zip(prompts, rows, strict=True)]
        labels = _filled(targets, IGNORED)
        super().__init__(encoded, labels, tokenizer, batch_size, shuffle, by_length, [len(ids) for ids in rows])
        self.longest = max([self.longest, *(len(ids) for ids in sources)])

    def _collate(self, rows: Sequence[int]) -> dict[str, Tensor]:
        batch = super()._collate(rows)
        labels = batch["labels"]
        if self._start is not None:
            labels = labels[:, : int((labels != IGNORED).sum(1).max())]
            started = torch.cat([torch.full_like(labels[:, :1], self._start), labels[:, :-1]], dim=1)
            batch["decoder_input_ids"] = started.where(started != IGNORED, self._tokenizer.pad_token_id)
        else:
            # As wide as the inputs, and padded on the same side.
            width, lengths = batch["input_ids"].shape[1], batch["attention_mask"].sum(1)
            labels = labels[:, :width]
            if self._tokenizer.padding_side == "left":
                places = (torch.arange(width) - (width - lengths).unsqueeze(1)) % width
                labels = labels.gather(1, places)
        batch["labels"] = labels
        return batch


def without_end(ids: list[int], tokenizer) -> list[int]:
    """Tokens without the end-of-text token that a tokenizer may have put after them."""
    return ids[:-1] if ids and ids[-1] == tokenizer.eos_token_id else ids


def _packed(texts: Sequence[list[int]], length: int) -> list[list[int]]:
    """Rows of `length` tokens of all texts end to end; what is left at the end is a shorter row."""
    stream = [token for ids in texts for token in ids]
    rows = [stream[start : start + length] for start in range(0, len(stream), length)]
    return [row for row in rows if len(row) > 1]


def _check_room(prompts: Sequence[list[int]], limit: int) -> None:
    long = [number for number, ids in enumerate(prompts) if len(ids) >= limit]
    if long:
        raise ValueError(
            f"expected prompts shorter than {limit} tokens, got {len(long)} that leave no room for a token to score, "
            f"such as row {long[0]} with {len(prompts[long[0]])}; shorten them, or write max_length= if the context "
            f"allows it"
        )


def _filled(rows: Sequence[list[int]], value: int) -> Tensor:
    """Rows of numbers as one tensor (N, T)."""
    parts = [torch.tensor(row, dtype=torch.long) for row in rows]
    return torch.nn.utils.rnn.pad_sequence(parts, batch_first=True, padding_value=value)
