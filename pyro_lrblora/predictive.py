"""The posterior predictive distribution by Monte Carlo."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from .data import as_batches, batch_rows
from .likelihoods import logits_of
from .posterior import Posterior, local_parameters

_FOLDED_ROWS = 512


@dataclass(frozen=True)
class Prediction:
    """Predictions for N rows from S draws, on the host, in the data's own order.

    Args:
        logits: (S, N, C).
        labels: (N,) where the data have them.
        class_names: C names.
    """

    logits: Tensor  # (S, N, C)
    labels: Tensor | None  # (N,)
    class_names: Sequence[str] | None = None

    @property
    def log_probs(self) -> Tensor:
        """Log of the posterior predictive probabilities, (N, C)."""
        return self.logits.log_softmax(-1).logsumexp(0) - torch.tensor(len(self.logits)).log()

    @property
    def probs(self) -> Tensor:
        """Posterior predictive probabilities, (N, C): the mean over draws."""
        return self.log_probs.exp()

    @property
    def predicted(self) -> Tensor:
        """The most probable class of each row, (N,)."""
        return self.log_probs.argmax(-1)


@local_parameters
@torch.no_grad()
def predict(
    posterior: Posterior,
    data,
    *,
    draws: int = 32,
    at: str | None = None,
    seed: int = 0,
    batch_size: int = 64,
    precision: str = "fp32",
    fold: int | None = None,
    tokenizer=None,
) -> Prediction:
    """Predict with S draws from the posterior, or at its mean.

    The same S draws serve every row and every batch: each is one function.

    Args:
        posterior: what a fit returned.
        data: a datasets.Dataset, Batches, or a re-iterable of batch dicts; labels are optional.
        draws: S, at least 1.
        at: "mean" predicts once, at the posterior mean.
        seed: of the draws; the same seed gives the same predictions.
        batch_size: rows per forward, for a datasets.Dataset.
        precision: "fp32" or "bf16".
        fold: draws per forward, folded into the batch's rows. None is one at a time on a CPU, where that is faster, and
            up to 512 rows together elsewhere.
        tokenizer: for a datasets.Dataset, where the model has none.

    Raises:
        ValueError: draws < 1, an `at` that is not "mean", empty data.
    """
    if at not in (None, "mean"):
        raise ValueError(f"expected at='mean' or at=None, got at={at!r}")
    if draws < 1:
        raise ValueError(f"expected draws >= 1, got draws={draws}")
    model = posterior.model
    batches = as_batches(data, tokenizer or model.tokenizer, batch_size=batch_size, by_length=True)
    if at == "mean":
        values = {name: value.unsqueeze(0) for name, value in posterior.mean().items()}
    else:
        values = posterior.sample(draws, seed=seed)
    head, parts = posterior.head(), []
    with model.attached(precision, dropout=False):
        for batch in batches:
            batch = model.to_device({k: v for k, v in batch.items() if k != "labels"})
            together = fold or (1 if model.device.type == "cpu" else max(1, _FOLDED_ROWS // batch_rows(batch)))
            parts.append(_logits(model, batch, values, head, 1 if model.head == "bayesian" else together))
    logits = torch.empty_like(torch.cat(parts, dim=1))
    logits[:, torch.as_tensor(batches.order)] = torch.cat(parts, dim=1)
    return Prediction(logits, batches.labels, model.class_names)


def _logits(model, batch, values, head, fold: int) -> Tensor:
    """(S, B, C) on the host, `fold` draws to a forward."""
    draws, rows = len(next(iter(values.values()))), batch_rows(batch)
    pieces = []
    for start in range(0, draws, fold):
        chunk = {name: value[start : start + fold] for name, value in values.items()}
        size = len(next(iter(chunk.values())))
        if size == 1:
            outputs = model.outputs(batch, {name: value[0] for name, value in chunk.items()}, head)
        else:
            repeated = {name: value.repeat(size, *[1] * (value.dim() - 1)) for name, value in batch.items()}
            per_row = {name: value.repeat_interleave(rows, 0) for name, value in chunk.items()}
            outputs = model.outputs(repeated, per_row, head)
        logits = logits_of(outputs)
        pieces.append(logits.reshape(size, rows, *logits.shape[1:]).cpu())
    return torch.cat(pieces)
