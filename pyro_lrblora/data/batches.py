"""Rows of one text or a pair with a label each, and what every kind of batches has in common."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager

import datasets
import numpy as np
import torch
from torch import Tensor

Batch = Mapping[str, Tensor]
IGNORED = -100  # the label of a token that is not scored, as everywhere in transformers

# Pairs first: a pair's second text must not pass for all there is.
_TEXT_COLUMNS = (
    ("sentence1", "sentence2"),
    ("premise", "hypothesis"),
    ("question", "passage"),
    ("question", "sentence"),
    ("text",),
    ("sentence",),
)


class EncodedBatches:
    """Encoded rows as batch dicts, in order, shuffled, or by length; what every kind of batches has in common.

    Args:
        encoded: column -> one list of numbers per row.
        labels: (N, ...), or None.
        tokenizer: pads the columns it knows; needs a padding token.
        batch_size: rows per batch.
        shuffle: a seed for a new order in every epoch; None keeps the order.
        by_length: batches of rows of similar length, for less padding; `order` tells which rows they hold.
        lengths: tokens of each row.

    Raises:
        ValueError: no rows, a tokenizer without padding token.
    """

    class_names: list[str] | None = None
    for_decoder = False  # whether the labels are a decoder's targets, with inputs of its own

    def __init__(
        self,
        encoded: Mapping[str, list],
        labels: Tensor | None,
        tokenizer,
        batch_size: int,
        shuffle: int | None,
        by_length: bool,
        lengths: Sequence[int],
    ):
        self._encoded, self.labels, self._tokenizer = encoded, labels, tokenizer
        self._batch_size, self.rows, self._shuffle = batch_size, len(lengths), shuffle
        self.longest = max(lengths, default=0)  # tokens
        self.generator = None if shuffle is None else torch.Generator().manual_seed(shuffle)
        self.order = np.argsort(lengths, kind="stable") if by_length else np.arange(self.rows)

    def __len__(self) -> int:
        return -(-self.rows // self._batch_size)

    def __iter__(self) -> Iterator[Batch]:
        order = self.order
        if self.generator is not None:
            # Kept, so that whoever reads `order` after a pass knows which row was where in it.
            order = self.order = torch.randperm(self.rows, generator=self.generator).numpy()
        for start in range(0, self.rows, self._batch_size):
            yield self._collate(order[start : start + self._batch_size])

    def restarted(self, seed: int | None = None) -> EncodedBatches:
        """The same batches with the order of their first pass ahead, so that a fit depends on no earlier one.

        Args:
            seed: another one for the order of batches that are shuffled.
        """
        new = copy.copy(self)
        if self._shuffle is not None:
            new._shuffle = self._shuffle if seed is None else seed
            new.generator = torch.Generator().manual_seed(new._shuffle)
        return new

    def in_order(self) -> EncodedBatches:
        """The same rows in the dataset's own order."""
        new = copy.copy(self)
        new.generator, new.order = None, np.arange(self.rows)
        return new

    def _collate(self, rows: Sequence[int]) -> dict[str, Tensor]:
        batch = self._padded({name: [values[row] for row in rows] for name, values in self._encoded.items()})
        if self.labels is not None:
            batch["labels"] = self.labels[torch.as_tensor(rows)]
        return batch

    def _padded(self, columns: Mapping[str, list]) -> dict[str, Tensor]:
        return dict(self._tokenizer.pad(columns, padding=True, return_tensors="pt"))


class Batches(EncodedBatches):
    """Tokenised rows of a dataset as batch dicts with "labels", padded to the longest row of each batch.

    Args:
        dataset: with one or two text columns and, for training and scoring, a label column; or with "input_ids".
        tokenizer: of the network; needs a padding token.
        text: the text column or the pair of them; None looks for the usual names.
        label: the label column; None takes "label" or "labels" where there is one.
        batch_size: rows per batch.
        max_length: tokens per row, longer ones are cut; None is the tokenizer's own limit, at most 512.
        shuffle: a seed for a new order in every epoch; None keeps the order.
        by_length: batches of rows of similar length, for less padding; `order` tells which rows they hold.

    Raises:
        ValueError, KeyError: empty data, a missing column, a tokenizer without padding token.
    """

    def __init__(
        self,
        dataset: datasets.Dataset,
        tokenizer,
        *,
        text: str | Sequence[str] | None = None,
        label: str | None = None,
        batch_size: int = 32,
        max_length: int | None = None,
        shuffle: int | None = None,
        by_length: bool = False,
    ):
        check_encodable(dataset, tokenizer)
        encoded = _encode(dataset, tokenizer, text, max_length)
        label = _label_column(dataset, label)
        labels = None if label is None else _labels(dataset, label)
        lengths = [len(ids) for ids in encoded["input_ids"]]
        super().__init__(encoded, labels, tokenizer, batch_size, shuffle, by_length, lengths)
        self.class_names = getattr(dataset.features.get(label), "names", None)


def check_encodable(dataset: datasets.Dataset, tokenizer) -> None:
    """Raise a ValueError for an empty dataset, or a tokenizer that is missing or cannot pad."""
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


class _GivenBatches:
    """A user's own re-iterable of batch dicts, looked through once for its rows and labels."""

    class_names = None

    def __init__(self, batches: Iterable[Batch]):
        if iter(batches) is batches:
            raise TypeError(
                "expected batches that can be iterated more than once (a list, a DataLoader), got an iterator; write "
                "list(...) around it"
            )
        self.source = batches
        self.generator = getattr(batches, "generator", None)  # of a shuffling DataLoader that was given one
        sizes = []
        self.longest, self.for_decoder = 0, False
        for batch in self:  # which leaves the labels
            sizes.append(batch_rows(batch))
            tokens = [batch.get(name) for name in ("input_ids", "decoder_input_ids")]
            self.longest = max([self.longest, *(ids.shape[-1] for ids in tokens if isinstance(ids, Tensor))])
            self.for_decoder |= "decoder_input_ids" in batch
        if not sizes:
            raise ValueError("expected at least one batch of data, got none")
        self.rows = sum(sizes)
        self.order = np.arange(self.rows)
        self._length = len(sizes)

    def __len__(self) -> int:
        return self._length

    def __iter__(self) -> Iterator[Batch]:
        labels = []
        for batch in self.source:
            _check_batch(batch)
            labels.append(batch.get("labels"))
            yield batch
        # A DataLoader may shuffle: whoever reads them after a pass finds them in its order.
        self.labels = _joined(labels)

    def restarted(self, seed: int | None = None) -> _GivenBatches:
        """Itself: where its order comes from is the user's affair."""
        return self


def as_batches(data, tokenizer=None, **options) -> EncodedBatches | _GivenBatches:
    """Batches of `data` whatever form it has: batches, a datasets.Dataset, or a re-iterable of batch dicts.

    Args:
        data: see above.
        tokenizer: needed for a datasets.Dataset only.
        options: of Batches, used for a datasets.Dataset only.
    """
    if isinstance(data, EncodedBatches | _GivenBatches):
        return data
    if isinstance(data, datasets.Dataset):
        return Batches(data, tokenizer, **options)
    if isinstance(data, datasets.DatasetDict):
        raise TypeError(f"expected one split, got a DatasetDict; pick one of {list(data)}")
    texts = isinstance(data, str) or (isinstance(data, list | tuple) and any(isinstance(row, str) for row in data))
    if texts or isinstance(data, Mapping) or not isinstance(data, Iterable) or hasattr(data, "columns"):
        advice = {True: 'datasets.Dataset.from_dict({"text": texts})', False: "datasets.Dataset.from_pandas(frame)"}
        write = f"; write {advice[texts]}" if texts or hasattr(data, "columns") else ""
        raise TypeError(
            f"expected a datasets.Dataset or a re-iterable of batch dicts, got {type(data).__name__}{write}"
        )
    return _GivenBatches(data)


def in_one_order(data):
    """Data that come in the same order at every pass, for predictions that are compared row by row.

    What others iterate may be shuffled, as a DataLoader is: its batches are kept, as its first pass gave them.

    Args:
        data: what as_batches takes or returned.
    """
    source = data.source if isinstance(data, _GivenBatches) else data
    if isinstance(source, EncodedBatches | datasets.Dataset | list | tuple):
        return data
    return as_batches(list(as_batches(source)))


def check_class_order(own: Sequence[str] | None, names: Sequence[str] | None, role: str) -> None:
    """Raise a ValueError where data have the classes of a model in another order, which would pass for wrong labels."""
    if own is None or names is None or list(own) == list(names) or sorted(own) != sorted(names):
        return
    mapping = {name: number for number, name in enumerate(own)}
    raise ValueError(
        f"expected the classes of the {role} in the model's order, {list(own)}, got {list(names)}; write "
        f"dataset.align_labels_with_mapping({mapping}, 'label')"
    )


def _joined(labels: list[Tensor | None]) -> Tensor | None:
    """Labels (B, ...) of all batches as (N, ...), None where one has none; those of texts (B, T) filled up."""
    if not labels or any(label is None for label in labels):
        return None
    labels = [label.cpu() for label in labels]
    if labels[0].dim() == 2 and not labels[0].is_floating_point():
        longest = max(label.shape[1] for label in labels)
        labels = [torch.nn.functional.pad(label, (0, longest - label.shape[1]), value=IGNORED) for label in labels]
    return _numbers_or_classes(torch.cat(labels))


def _numbers_or_classes(labels: Tensor) -> Tensor:
    """Labels as they are where they are numbers, else as int64, whatever integers or booleans they came in."""
    return labels if labels.is_floating_point() else labels.long()


def batch_rows(batch: Batch) -> int:
    """B, the number of rows of a batch."""
    return next(len(value) for value in batch.values() if isinstance(value, Tensor) and value.dim())


def some_rows(batch: Batch, rows: slice) -> Batch:
    """These rows of a batch; what belongs to no row, such as a number, stays as it is."""
    of_rows = lambda value: isinstance(value, Tensor) and value.dim()
    return {name: value[rows] if of_rows(value) else value for name, value in batch.items()}


def row_weight(batch: Batch, batches: EncodedBatches | _GivenBatches) -> float:
    """What makes N / B times a batch's log likelihood right on average over a pass: 1 for batches of one size.

    By itself N / B counts every batch alike, and so a row of a smaller one for more.

    Args:
        batch: B rows.
        batches: all of a pass, N rows.
    """
    return batch_rows(batch) * len(batches) / batches.rows


def _check_batch(batch: Batch) -> None:
    if not isinstance(batch, Mapping):
        raise TypeError(f"expected batches to be dicts of tensors, got {type(batch).__name__}")
    if not any(isinstance(value, Tensor) and value.dim() for value in batch.values()):
        kinds = {name: type(value).__name__ for name, value in batch.items()}
        raise TypeError(
            f"expected batches to be dicts of tensors, got {kinds}; rows that are not tokenised are "
            "datasets.Dataset.from_list(rows)"
        )
    if "label" in batch and "labels" not in batch:
        raise KeyError("expected a batch's labels under 'labels', got 'label'; write rename_column('label', 'labels')")


def endless(batches: Iterable[Batch]) -> Iterator[tuple[int, Batch]]:
    """Batches with their positions, pass after pass without an end."""
    while True:
        yield from enumerate(batches)


@contextmanager
def naming_the_batch(position: int, epoch: int | None = None):
    """Say in which batch a FloatingPointError (NaN, infinity) happened."""
    try:
        yield
    except FloatingPointError as error:
        when = "" if epoch is None else f" of epoch {epoch}"
        raise FloatingPointError(
            f"in batch {position}{when}: {error}; look at those rows, or lower the rates"
        ) from error


def _encode(dataset, tokenizer, text, max_length) -> dict[str, list]:
    columns = dataset.column_names
    if text is None and "input_ids" in columns:
        kept = [name for name in tokenizer.model_input_names if name in columns]
        return {name: [list(row) for row in dataset[name]] for name in kept}
    names = text_columns(dataset, text)
    limit = token_limit(tokenizer, max_length)
    texts = [list(dataset[name]) for name in names]
    for name, column in zip(names, texts, strict=True):
        wrong = next((row for row, value in enumerate(column) if not isinstance(value, str)), None)
        if wrong is not None:
            raise ValueError(
                f"expected texts in column {name!r}, got {column[wrong]!r} in row {wrong}; drop those rows with "
                f"dataset.filter(lambda row: isinstance(row[{name!r}], str))"
            )
    encoded = tokenizer(*texts, truncation=True, max_length=limit)
    return {name: encoded[name] for name in encoded}


def text_columns(dataset, text: str | Sequence[str] | None) -> Sequence[str]:
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
    raise KeyError(
        f"expected one of the text columns {[list(names) for names in _TEXT_COLUMNS]}, got columns {columns}; "
        f"write dataset.rename_column({(strings or columns)[0]!r}, 'text')"
    )


def _labels(dataset, label: str) -> Tensor:
    values = np.asarray(dataset[label])
    if values.dtype.kind not in "iufb":
        row = next(row for row, value in enumerate(values.tolist()) if not isinstance(value, int | float))
        raise ValueError(
            f"expected numbers in the label column {label!r}, got {values.tolist()[row]!r} in row {row}; write "
            f"dataset.class_encode_column({label!r}), and drop rows without a label first"
        )
    return _numbers_or_classes(torch.as_tensor(values))


def _label_column(dataset, label: str | None) -> str | None:
    if label is not None:
        check_columns(dataset, label)
        return label
    return next((name for name in ("label", "labels") if name in dataset.column_names), None)
