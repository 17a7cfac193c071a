"""From the columns of a datasets.Dataset to tokens and labels."""

from __future__ import annotations

from collections.abc import Sequence

import datasets
import numpy as np
import torch
from torch import Tensor

# Pairs first: a pair's second text must not pass for all there is.
_TEXT_COLUMNS = (
    ("sentence1", "sentence2"),
    ("question1", "question2"),
    ("premise", "hypothesis"),
    ("question", "passage"),
    ("question", "sentence"),
    ("text", "text_pair"),
    ("text",),
    ("sentence",),
)


def check_encodable(dataset: datasets.Dataset, tokenizer) -> None:
    """Raise a ValueError for an empty dataset, one with a transform, or a tokenizer that is missing or cannot pad."""
    if dataset.format["type"] == "custom":
        raise ValueError(
            "expected columns as they are stored, got a dataset with a transform, which is applied on the fly; write "
            "dataset.map(...) in place of with_transform, or batches of a DataLoader"
        )
    if len(dataset) == 0:
        raise ValueError("expected at least one row of data, got an empty dataset")
    if tokenizer is None:
        raise ValueError("expected a tokenizer for a datasets.Dataset; give tokenizer= to the model or to this call")
    if tokenizer.pad_token is None:
        raise ValueError(
            "expected a tokenizer with a padding token, got none; write tokenizer.pad_token = tokenizer.eos_token "
            "and network.config.pad_token_id = tokenizer.pad_token_id"
        )


def token_limit(tokenizer, max_length: int | None) -> int:
    """The most tokens of a row: as asked, or what the tokenizer allows, at most 512."""
    return max_length or min(tokenizer.model_max_length, 512)


def check_columns(dataset: datasets.Dataset, *names: str) -> None:
    """Raise a KeyError unless the dataset has all these columns."""
    missing = [name for name in names if name not in dataset.column_names]
    if missing:
        raise KeyError(f"expected column(s) {missing} in the data, got columns {dataset.column_names}")


def read_rows(dataset: datasets.Dataset, name: str) -> Sequence:
    """A column as it is stored: a format may leave it out, or make numbers of it that no tokenizer pads."""
    return dataset.with_format(None)[name]


def encode(
    dataset: datasets.Dataset, tokenizer, text: str | Sequence[str] | None, max_length: int | None
) -> dict[str, list]:
    """What a tokenizer makes of the text columns, or the token columns that are there already: a list per row."""
    columns = dataset.column_names
    if text is None and "input_ids" in columns:
        if max_length is not None:
            raise ValueError(
                f"expected max_length= where texts are tokenised here, got {max_length} for a dataset of tokens; "
                "tokenise it with truncation=True, max_length=..."
            )
        return _tokens(dataset, tokenizer)
    names = text_columns(dataset, text)
    limit = token_limit(tokenizer, max_length)
    encoded = tokenizer(*(read_texts(dataset, name) for name in names), truncation=True, max_length=limit)
    return {name: encoded[name] for name in encoded}


def _tokens(dataset: datasets.Dataset, tokenizer) -> dict[str, list]:
    """The columns that the tokenizer pads; a ValueError for others with a number per token, which it would lose."""
    kept = [name for name in tokenizer.model_input_names if name in dataset.column_names]
    tokens = {name: [list(row) for row in read_rows(dataset, name)] for name in kept}
    lengths = [len(row) for row in tokens["input_ids"]]
    for name in set(dataset.column_names) - {*kept, "label", "labels", "special_tokens_mask"}:
        # Lazily: most columns are told from tokens by their first row.
        rows = zip(read_rows(dataset, name), lengths, strict=True)
        if all(_is_numbers(row) and len(row) == length for row, length in rows):
            raise ValueError(
                f"expected the token columns {kept}, which the tokenizer pads, got {name!r} too; write "
                f"dataset.remove_columns({name!r}), or batches of a DataLoader if the network reads it"
            )
    return tokens


def _is_numbers(row) -> bool:
    return isinstance(row, list) and all(isinstance(value, int | float) for value in row)


def text_columns(dataset: datasets.Dataset, text: str | Sequence[str] | None) -> Sequence[str]:
    """The column, or the pair of columns, that a row's text is in; a KeyError where that cannot be told."""
    columns = dataset.column_names
    if text is not None:
        names = (text,) if isinstance(text, str) else tuple(text)
        check_columns(dataset, *names)
        return names
    for names in _TEXT_COLUMNS:
        if all(name in columns for name in names):
            return names
    kinds = {name: getattr(feature, "dtype", None) for name, feature in dataset.features.items()}
    strings = [name for name, kind in kinds.items() if kind in ("string", "large_string")]
    if len(strings) == 1:
        return strings
    cure = f"dataset.rename_column({(strings or columns)[0]!r}, 'text')"
    if len(strings) == 2:
        cure += f", or lb.Batches(dataset, tokenizer, text={tuple(strings)}) where a row is a pair of texts"
    raise KeyError(
        f"expected one of the text columns {[list(names) for names in _TEXT_COLUMNS]}, got columns {columns}; "
        f"write {cure}"
    )


def read_texts(dataset: datasets.Dataset, name: str) -> list[str]:
    """A column of texts; a ValueError where a row has none."""
    texts = list(read_rows(dataset, name))
    wrong = next((row for row, value in enumerate(texts) if not isinstance(value, str)), None)
    if wrong is not None:
        raise ValueError(
            f"expected texts in column {name!r}, got {texts[wrong]!r} in row {wrong}; drop those rows with "
            f"dataset.filter(lambda row: isinstance(row[{name!r}], str))"
        )
    return texts


def read_labels(dataset: datasets.Dataset, label: str) -> Tensor | None:
    """The label column, (N, ...); None where no row has a label."""
    rows = list(read_rows(dataset, label))
    if len({len(row) if isinstance(row, list) else None for row in rows}) > 1:
        raise ValueError(
            f"expected one label per row, or equally many, in column {label!r}, got lists of several lengths; write "
            "lb.data.Texts(dataset, tokenizer) for labels that are a text's own tokens"
        )
    values = np.asarray(rows)
    if all(value is None for value in values.flat):
        return None
    if values.dtype.kind not in "iufb":
        found = values.tolist()
        row = next(row for row, value in enumerate(found) if not isinstance(value, int | float))
        cure = f"dataset.class_encode_column({label!r}), and drop rows without a label first"
        if found[row] is None and any(isinstance(value, int | float) for value in found):
            cure = f"dataset.filter(lambda row: row[{label!r}] is not None)"
        raise ValueError(
            f"expected numbers in the label column {label!r}, got {found[row]!r} in row {row}; write {cure}"
        )
    return numbers_or_classes(torch.as_tensor(values))


def label_column(dataset: datasets.Dataset, label: str | None) -> str | None:
    """The column named, or what data sets call it; None where there is none."""
    if label is not None:
        check_columns(dataset, label)
        return label
    return next((name for name in ("label", "labels") if name in dataset.column_names), None)


def numbers_or_classes(labels: Tensor) -> Tensor:
    """Labels as they are where they are numbers, else as int64, whatever integers or booleans they came in."""
    return labels if labels.is_floating_point() else labels.long()
