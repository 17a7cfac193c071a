"""Rows of one text or a pair with a label each, and what every kind of batches has in common."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager

import datasets
import numpy as np
import torch
from torch import Tensor

from ..counts import check_counts
from .columns import check_encodable, encode, label_column, numbers_or_classes, read_labels

Batch = Mapping[str, Tensor]
IGNORED = -100  # the label of a token that is not scored, as everywhere in transformers


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
        check_counts(batch_size=batch_size)
        if isinstance(shuffle, bool):
            raise TypeError(f"expected shuffle to be a seed, or None for no shuffling, got shuffle={shuffle}")
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
        label: the label column; None takes "label" or "labels" where there is one. A column without a label in any row
            counts as none.
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
        encoded = encode(dataset, tokenizer, text, max_length)
        label = label_column(dataset, label)
        labels = None if label is None else read_labels(dataset, label)
        lengths = [len(ids) for ids in encoded["input_ids"]]
        super().__init__(encoded, labels, tokenizer, batch_size, shuffle, by_length, lengths)
        self.class_names = getattr(dataset.features.get(label), "names", None)


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
    expected = f"expected a datasets.Dataset or a re-iterable of batch dicts, got {type(data).__name__}"
    if isinstance(data, str) or (isinstance(data, list | tuple) and any(isinstance(row, str) for row in data)):
        raise TypeError(expected + ' of text; write datasets.Dataset.from_dict({"text": texts})')
    if hasattr(data, "columns"):
        raise TypeError(expected + "; write datasets.Dataset.from_pandas(frame)")
    if isinstance(data, Mapping) or not isinstance(data, Iterable):
        raise TypeError(expected)
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
    """Raise a ValueError where a class of a model has another number in data, which would pass for wrong labels."""
    mapping = {name: number for number, name in enumerate(own or ())}
    names = list(names or ())
    if all(mapping.get(name, number) == number for number, name in enumerate(names)):
        return
    others = [name for name in names if name not in mapping]
    raise ValueError(
        f"expected the classes of the {role} in the model's order, {list(mapping)}, got {names}; write "
        f"dataset.align_labels_with_mapping({mapping}, 'label')"
        + (f" once the rows of {others} are dropped" if others else "")
    )


def _joined(labels: list[Tensor | None]) -> Tensor | None:
    """Labels (B, ...) of all batches as (N, ...), None where one has none; those of texts (B, T) filled up."""
    if not labels or any(label is None for label in labels):
        return None
    labels = [label.cpu() for label in labels]
    if labels[0].dim() == 2 and not labels[0].is_floating_point():
        longest = max(label.shape[1] for label in labels)
        labels = [torch.nn.functional.pad(label, (0, longest - label.shape[1]), value=IGNORED) for label in labels]
    return numbers_or_classes(torch.cat(labels))


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
    if isinstance(batch.get("input_ids"), Tensor) and batch["input_ids"].dim() < 2:
        raise TypeError(
            "expected batches of rows, input_ids (B, T), got a single row; write dataset.batch(8), or a DataLoader"
        )
    if not isinstance(batch.get("labels"), Tensor | None):
        raise TypeError(
            f"expected a batch's labels as a tensor, got a {type(batch['labels']).__name__}; write torch.as_tensor(...)"
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
