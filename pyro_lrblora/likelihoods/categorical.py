"""Class labels from logits."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import pyro
import pyro.distributions as dist
import torch
from torch import Tensor


@dataclass(frozen=True)
class Categorical:
    """Labels 0..C-1 with the network's logits (B, C).

    Args:
        class_names: one name per class, used in tables; None takes them from the data set's
            ClassLabel or the network's config.
    """

    class_names: Sequence[str] | None = None

    def __call__(self, outputs, batch: Mapping[str, Tensor]) -> Tensor:
        logits = check_finite(self.logits(outputs, batch))
        return pyro.sample("labels", dist.Categorical(logits=logits), obs=batch.get("labels"))

    @staticmethod
    def logits(outputs, batch: Mapping[str, Tensor]) -> Tensor:
        """The logits (B, C)."""
        return logits_of(outputs)

    def check_labels(self, labels: Tensor, classes: int | None) -> None:
        """Raise a ValueError where labels (N,) are not class indices 0..classes-1; None where C is not known."""
        if labels.is_floating_point() or labels.dim() != 1:
            raise ValueError(
                f"expected integer labels of shape (N,) for Categorical, got {labels.dtype} {tuple(labels.shape)}; "
                "write dataset.cast_column('label', datasets.Value('int64')), or likelihoods.Gaussian() for numbers"
            )
        if classes is None:
            return
        wrong = labels[(labels < 0) | (labels >= classes)]
        if len(wrong):
            cure = "drop those rows or load the network with another num_labels"
            if int(labels.min()) == 1 and int(labels.max()) == classes:
                cure = "subtract 1 from every label"
            elif set(wrong.tolist()) == {-1}:
                cure = "-1 marks rows without a label in many data sets: drop them, or the column of labels"
            raise ValueError(
                f"expected labels 0..{classes - 1} for a network with {classes} classes, got "
                f"{sorted(set(wrong.tolist()))[:5]} in {len(wrong)} of {len(labels)} rows; {cure}"
            )
        if self.class_names is not None and len(self.class_names) != classes:
            raise ValueError(f"expected {classes} class names, got {list(self.class_names)}")


def check_finite(outputs: Tensor) -> Tensor:
    """The same outputs (B, ...); raises a FloatingPointError that names the rows with NaN or infinity."""
    if not outputs.isfinite().all():
        rows = (~outputs.isfinite()).flatten(1).any(-1).nonzero().flatten().tolist()
        raise FloatingPointError(f"expected finite logits, got NaN or infinity in rows {rows[:10]} of the batch")
    return outputs


def logits_of(outputs) -> Tensor:
    """The logits (B, C), float32 whatever the network computed in, of a transformers output or a bare tensor.

    Raises:
        TypeError: outputs without logits, as those of a network without a head.
    """
    logits = outputs if isinstance(outputs, Tensor) else getattr(outputs, "logits", None)
    if logits is None:
        raise TypeError(
            f"expected a network that returns logits, got {type(outputs).__name__}; load it with a head, as "
            "AutoModelForSequenceClassification does"
        )
    return logits if logits.dtype == torch.float64 else logits.float()
