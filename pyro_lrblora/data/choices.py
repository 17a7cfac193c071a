"""Items with a question, several choices and one right answer."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

import datasets
import torch
from torch import Tensor

from .batches import Batches, EncodedBatches
from .columns import check_columns, check_encodable, read_labels, read_rows, read_texts, token_limit
from .texts import without_end

LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"


class Choices(EncodedBatches):
    """A row of tokens for every choice of an item: input_ids (B, C, T), the question followed by that choice.

    For networks that score a choice by its text: AutoModelForMultipleChoice, networks.AnswerScorer, a
    MeanPoolClassifier with one label.

    Args:
        dataset: a column of questions, one of lists of choices, and the index of the right one.
        tokenizer: of the network; needs a padding token.
        question, choices, label: the columns' names. Without a label column, or a label in any row of it, there are
            no labels.
        pair: encode question and choice as a pair of segments (encoders). False: as one text, with "answer_mask" (B,
            C, T) for the choice's tokens (language models).
        batch_size: items per batch.
        max_length: tokens of the longest row; None is the tokenizer's own limit, at most 512.
        shuffle: a seed for a new order in every epoch; None keeps the order.
        by_length: batches of items of similar length; `order` tells which items they hold.

    Raises:
        ValueError, KeyError: empty data, a missing column, items with unequal numbers of choices, an empty choice, a
            row longer than max_length (it is not cut: what is cut could be the answer).
    """

    def __init__(
        self,
        dataset: datasets.Dataset,
        tokenizer,
        *,
        question: str = "question",
        choices: str = "choices",
        label: str = "label",
        pair: bool = True,
        batch_size: int = 8,
        max_length: int | None = None,
        shuffle: int | None = None,
        by_length: bool = False,
    ):
        questions, options, labels = _items(dataset, tokenizer, question, choices, label)
        flat = [(text, choice) for text, row in zip(questions, options, strict=True) for choice in row]
        if pair:
            encoded = dict(tokenizer([text for text, _ in flat], [choice for _, choice in flat]))
        else:
            encoded = _continued(tokenizer, flat)
        self._choices = len(options[0])
        lengths = [len(ids) for ids in encoded["input_ids"]]
        _check_lengths(lengths, tokenizer, max_length, self._choices)
        group = lambda values: [values[i : i + self._choices] for i in range(0, len(values), self._choices)]
        encoded = {name: group(values) for name, values in encoded.items()}
        longest = [max(row) for row in group(lengths)]
        super().__init__(encoded, labels, tokenizer, batch_size, shuffle, by_length, longest)

    def _padded(self, columns: dict[str, list]) -> dict[str, Tensor]:
        flat = {name: [row for item in values for row in item] for name, values in columns.items()}
        mask = flat.pop("answer_mask", None)
        batch = super()._padded(flat)
        if mask is not None:
            width, left = batch["input_ids"].shape[1], self._tokenizer.padding_side == "left"
            fill = lambda row: [0] * (width - len(row))
            batch["answer_mask"] = torch.tensor([fill(row) + row if left else row + fill(row) for row in mask])
        return {name: value.unflatten(0, (-1, self._choices)) for name, value in batch.items()}


class Letters(Batches):
    """A prompt per item that lists its choices by letter and ends where the letter of the answer follows.

    For a causal language model with likelihoods.MultipleChoice(letters=letter_tokens(tokenizer, C)).

    Args:
        dataset, tokenizer, question, choices, label: as for Choices.
        template: of the prompt, with {question} and {choices}.
        max_length: as for Choices.
        options: batch_size, shuffle, by_length, of Batches.

    Raises:
        ValueError, KeyError: as for Choices; more choices than letters.
    """

    def __init__(
        self,
        dataset: datasets.Dataset,
        tokenizer,
        *,
        question: str = "question",
        choices: str = "choices",
        label: str = "label",
        template: str = "Question: {question}\n{choices}\nAnswer:",
        max_length: int | None = None,
        **options,
    ):
        questions, rows, labels = _items(dataset, tokenizer, question, choices, label)
        if len(rows[0]) > len(LETTERS):
            raise ValueError(f"expected at most {len(LETTERS)} choices, a letter each, got {len(rows[0])}")
        encoded = tokenizer(list(_prompts(questions, rows, template)))
        lengths = [len(without_end(ids, tokenizer)) for ids in encoded["input_ids"]]
        _check_lengths(lengths, tokenizer, max_length, 1)
        cut = lambda column: [row[:length] for row, length in zip(column, lengths, strict=True)]
        columns = {name: cut(column) for name, column in encoded.items()}
        columns |= {} if labels is None else {"label": labels.tolist()}
        super().__init__(datasets.Dataset.from_dict(columns), tokenizer, **options)


def _prompts(questions: Sequence[str], rows: Sequence[Sequence[str]], template: str) -> Iterator[str]:
    for text, row in zip(questions, rows, strict=True):
        listed = "\n".join(f"{letter}. {choice}" for letter, choice in zip(LETTERS, row, strict=False))
        yield template.format(question=text, choices=listed)


def _items(dataset, tokenizer, question: str, choices: str, label: str):
    """Questions, lists of choices and labels, checked."""
    check_encodable(dataset, tokenizer)
    check_columns(dataset, question, choices)
    listed = read_rows(dataset, choices)
    nested = next((row for row in listed if isinstance(row, Mapping | str)), None)
    if nested is not None:
        raise ValueError(
            f"expected lists of texts in column {choices!r}, got {nested!r}; write dataset.map(lambda row: "
            f"{{{choices!r}: row[{choices!r}]['text']}}) where the texts lie under 'text'"
        )
    options = [["" if choice is None else str(choice) for choice in row] for row in listed]
    counts = [len(row) for row in options]
    if len(set(counts)) > 1 or counts[0] < 2:
        usual = max(set(counts), key=counts.count)
        odd = [number for number, count in enumerate(counts) if count != usual]
        raise ValueError(
            f"expected the same number of choices, at least 2, in every item, got {usual} but for {len(odd)} items "
            f"with another number, such as item {odd[0] if odd else 0}; write dataset.filter(lambda row: "
            f"len(row[{choices!r}]) == {usual})"
        )
    empty = [number for number, row in enumerate(options) if not all(choice.strip() for choice in row)]
    if empty:
        raise ValueError(f"expected a text for every choice, got an empty one in item(s) {empty[:5]}; drop those items")
    labels = read_labels(dataset, label) if label in dataset.column_names else None
    if labels is not None and not 0 <= int(labels.min()) <= int(labels.max()) < counts[0]:
        raise ValueError(f"expected labels 0..{counts[0] - 1}, got {int(labels.min())}..{int(labels.max())}")
    return read_texts(dataset, question), options, labels


def _continued(tokenizer, flat: Sequence[tuple[str, str]]) -> dict[str, list]:
    """Question and choice as one text, tokenised apart so that it is known which tokens are the choice's."""
    prompts = tokenizer([text for text, _ in flat])["input_ids"]
    answers = tokenizer([" " + choice for _, choice in flat], add_special_tokens=False)["input_ids"]
    joined = [(without_end(ids, tokenizer), answer) for ids, answer in zip(prompts, answers, strict=True)]
    return {
        "input_ids": [prompt + answer for prompt, answer in joined],
        "attention_mask": [[1] * (len(prompt) + len(answer)) for prompt, answer in joined],
        "answer_mask": [[0] * len(prompt) + [1] * len(answer) for prompt, answer in joined],
    }


def _check_lengths(lengths: Sequence[int], tokenizer, max_length: int | None, choices: int) -> None:
    limit = token_limit(tokenizer, max_length)
    long = sorted({number // choices for number, length in enumerate(lengths) if length > limit})
    if long:
        raise ValueError(
            f"expected items of at most {limit} tokens, got {max(lengths)} and {len(long)} items above it, such as "
            f"item {long[0]}; drop them, or write max_length={max(lengths)} if the network's context allows it"
        )
