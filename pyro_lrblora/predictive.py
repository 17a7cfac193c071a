"""The posterior predictive distribution, by Monte Carlo over draws or linearised at the mean."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from .data import Batch, as_batches, batch_rows
from .likelihoods import logits_of
from .linearised import draw_logits, logit_moments, probit_logits
from .posterior import Posterior, local_parameters

_FOLDED_ROWS = 512
_METHODS = ["monte_carlo", "linearised", "probit"]


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
    method: str = "monte_carlo",
    seed: int = 0,
    batch_size: int = 64,
    precision: str = "fp32",
    fold: int | None = None,
    tokenizer=None,
) -> Prediction:
    """Predict with S draws from the posterior, at its mean, or with the network linearised there.

    The same S draws serve every row and every batch: each is one function. (Linearised ones are drawn row by row.)

    Args:
        posterior: what a fit returned.
        data: a datasets.Dataset, Batches, or a re-iterable of batch dicts; labels are optional.
        draws: S, at least 1.
        at: "mean" predicts once, at the posterior mean.
        method: "monte_carlo" runs the network once per draw; "linearised" once in all and back once per class, and
            draws logits from their normal distribution; "probit" needs no draws beside that (one set of logits). The
            last two are for Gaussian posteriors, and what Laplace approximations are meant for.
        seed: of the draws; the same seed gives the same predictions.
        batch_size: rows per forward, for a datasets.Dataset.
        precision: "fp32" or "bf16".
        fold: draws per forward, folded into the batch's rows. None is one at a time on a CPU, where that is faster, and
            up to 512 rows together elsewhere.
        tokenizer: for a datasets.Dataset, where the model has none.

    Raises:
        ValueError: draws < 1, an `at` that is not "mean", an unknown method, empty data.
        TypeError: a posterior that is not Gaussian, linearised.
    """
    if at not in (None, "mean"):
        raise ValueError(f"expected at='mean' or at=None, got at={at!r}")
    if draws < 1:
        raise ValueError(f"expected draws >= 1, got draws={draws}")
    if method not in _METHODS or (at and method != "monte_carlo"):
        raise ValueError(f"expected method to be one of {_METHODS}, and no at= with the last two, got {method!r}")
    model = posterior.model
    batches = as_batches(data, tokenizer or model.tokenizer, batch_size=batch_size, by_length=True)
    if method != "monte_carlo":
        moments = logit_moments(posterior, batches, precision)
        logits = probit_logits(*moments) if method == "probit" else draw_logits(*moments, draws, seed)
        return Prediction(logits, batches.labels, model.class_names)
    if at == "mean":
        values = {name: value.unsqueeze(0) for name, value in posterior.mean().items()}
    else:
        values = posterior.sample(draws, seed=seed)
    return predict_at(model, batches, values, posterior.head(), precision, fold)


def predict_at(
    model, batches, values: Mapping[str, Tensor], head: Mapping[str, Tensor], precision: str = "fp32", fold=None
) -> Prediction:
    """Predict with given draws, whatever they were drawn from.

    Args:
        model: a BayesianLoRA.
        batches: what as_batches returned; labels are optional.
        values: by site, (S, *site shape), the parameters of a Bayesian head among them.
        head: what model.head_values returned.
        precision: "fp32" or "bf16".
        fold: draws per forward, see `predict`.
    """
    parts = []
    with model.attached(precision, dropout=False):
        for batch in batches:
            batch = model.to_device({k: v for k, v in batch.items() if k != "labels"})
            parts.append(_logits(model, batch, values, head, folding(model, batch, values, fold)))
    logits = torch.empty_like(torch.cat(parts, dim=1))
    logits[:, torch.as_tensor(batches.order)] = torch.cat(parts, dim=1)
    return Prediction(logits, batches.labels, model.class_names)


def outputs_at(
    model, batch: Batch, values: Mapping[str, Tensor], head, fold: int
) -> Iterator[tuple[int, Batch, object]]:
    """Network outputs at S draws, `fold` of them to a forward: (draws, the batch repeated for them, outputs)."""
    draws, rows = len(next(iter(values.values()))), batch_rows(batch)
    for start in range(0, draws, fold):
        chunk = {name: value[start : start + fold] for name, value in values.items()}
        size, repeated = min(fold, draws - start), batch
        if size == 1:
            chunk = {name: value[0] for name, value in chunk.items()}
        else:
            repeated = {name: value.repeat(size, *[1] * (value.dim() - 1)) for name, value in batch.items()}
            chunk = {name: value.repeat_interleave(rows, 0) for name, value in chunk.items()}
        yield size, repeated, model.outputs(repeated, chunk, head)


def folding(model, batch: Batch, values: Mapping[str, Tensor], fold: int | None) -> int:
    """How many draws a forward takes: as asked, or one on a CPU, and up to 512 rows together elsewhere."""
    if any(name in values for name in model.head_start):
        return 1  # a draw's own head cannot be repeated over rows
    return fold or (1 if model.device.type == "cpu" else max(1, _FOLDED_ROWS // batch_rows(batch)))


def _logits(model, batch, values, head, fold: int) -> Tensor:
    """(S, B, C) on the host."""
    pieces = []
    for size, _, outputs in outputs_at(model, batch, values, head, fold):
        logits = logits_of(outputs)
        pieces.append(logits.reshape(size, -1, *logits.shape[1:]).cpu())
    return torch.cat(pieces)
