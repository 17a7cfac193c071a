"""Rows of two texts that are encoded apart, for a network that compares their representations."""

from __future__ import annotations

from collections.abc import Mapping

import datasets
import numpy as np
import torch
from torch import Tensor

from pyro_lrblora.data import EncodedBatches
from pyro_lrblora.data.columns import text_columns


class Pairs(EncodedBatches):
    """input_ids (B, 2, T): the two texts of every row, each on its own.

    Args:
        dataset: with two text columns of the usual names and a column "label".
        tokenizer: of the network.
        max_length: tokens per text, longer ones are cut.
        batch_size: rows per batch.
    """

    def __init__(self, dataset: datasets.Dataset, tokenizer, max_length: int, batch_size: int = 32):
        first, second = text_columns(dataset, None)
        texts = [text for row in zip(dataset[first], dataset[second], strict=True) for text in row]
        encoded = tokenizer(texts, truncation=True, max_length=max_length)
        columns = {name: [values[i : i + 2] for i in range(0, len(values), 2)] for name, values in encoded.items()}
        labels = torch.as_tensor(np.asarray(dataset["label"]))
        lengths = [max(map(len, row)) for row in columns["input_ids"]]
        super().__init__(columns, labels, tokenizer, batch_size, None, False, lengths)

    def _padded(self, columns: Mapping[str, list]) -> dict[str, Tensor]:
        batch = super()._padded({name: [text for row in rows for text in row] for name, rows in columns.items()})
        return {name: value.unflatten(0, (-1, 2)) for name, value in batch.items()}
