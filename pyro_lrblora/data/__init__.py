"""From a datasets.Dataset, or batches already made, to the batches a model takes: one file per kind of task."""

from .batches import (
    Batch,
    Batches,
    EncodedBatches,
    as_batches,
    batch_rows,
    check_class_order,
    endless,
    in_one_order,
    naming_the_batch,
    row_weight,
    some_rows,
)
from .choices import Choices, Letters
from .texts import Texts

__all__ = [
    "Batch",
    "Batches",
    "Choices",
    "EncodedBatches",
    "Letters",
    "Texts",
    "as_batches",
    "batch_rows",
    "check_class_order",
    "endless",
    "in_one_order",
    "naming_the_batch",
    "row_weight",
    "some_rows",
]
