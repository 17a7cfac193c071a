"""The posterior predictive distribution, by Monte Carlo over draws or linearised at the mean."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import torch
from torch import Tensor, nn

from .adapters.rows import mixing_modules
from .context import check_context
from .counts import check_counts
from .data import Batch, as_batches, batch_rows, check_class_order
from .likelihoods import check_classes, prediction, summary
from .linearised import draw_logits, logit_moments, probit_logits
from .passes import watched
from .posterior import Posterior, local_parameters
from .predictions import NumberPrediction, Prediction, TokenPrediction

_DRAWS = 32
_FOLDED_ROWS = 512
_METHODS = ["monte_carlo", "linearised", "probit"]


@local_parameters
@torch.no_grad()
def predict(
    posterior: Posterior,
    data,
    *,
    draws: int | None = None,
    at: str | None = None,
    method: str = "monte_carlo",
    seed: int = 0,
    antithetic: bool = True,
    batch_size: int = 64,
    precision: str = "fp32",
    fold: int | None = None,
    progress: bool = True,
    tokenizer=None,
) -> Prediction | NumberPrediction | TokenPrediction:
    """Predict with S draws from the posterior, at its mean, or with the network linearised there.

    The same S draws serve every row and every batch: each is one function. (Linearised ones are drawn row by row.)

    Args:
        posterior: what a fit returned.
        data: a datasets.Dataset, Batches, or a re-iterable of batch dicts; labels are optional.
        draws: S, at least 1; None is 32, of an ensemble the least number from there on by which its members count
            alike, and of points one for each. More draws of one point are one forward, repeated.
        at: "mean" predicts once, at the posterior mean.
        method: "monte_carlo" runs the network once per draw; "linearised" once in all and back once per class, and
            draws logits from their normal distribution; "probit" needs no draws beside that (one set of logits). The
            last two are for Gaussian posteriors, and what Laplace approximations are meant for.
        seed: of the draws; the same seed gives the same predictions.
        antithetic: draws in pairs mirrored at the mean, where the guide is symmetric about it: the logits are nearly
            linear in the latents, so that most of the Monte Carlo error cancels. False for the independent draws of
            posterior.sample(draws, seed).
        batch_size: rows per forward, for a datasets.Dataset.
        precision: "fp32", "bf16" or "fp16".
        fold: draws per forward, folded into the batch's rows. None is one at a time on a CPU, where that is faster, and
            up to 512 rows together elsewhere.
        progress: show a progress bar once two seconds have passed.
        tokenizer: for a datasets.Dataset, where the model has none.

    Returns:
        What the likelihood predicts, be it classes, numbers, or the tokens of given texts.

    Raises:
        ValueError: draws < 1, an `at` that is not "mean", an unknown method, empty data, rows longer than the
            network's context.
        TypeError: linearised, a posterior that is not Gaussian, or labels that are not classes.
        FloatingPointError: NaN or infinity from the network; names the rows.
    """
    if at not in (None, "mean"):
        raise ValueError(f"expected at='mean' or at=None, got at={at!r}")
    if not isinstance(posterior, Posterior):
        raise TypeError(f"expected a posterior, what lb.fit returned, got {type(posterior).__name__}")
    draws = posterior.balanced_draws(_DRAWS) if draws is None else draws
    check_counts(draws=draws, fold=1 if fold is None else fold)
    if method not in _METHODS or (at and method != "monte_carlo"):
        raise ValueError(f"expected method to be one of {_METHODS}, and no at= with the last two, got {method!r}")
    model = posterior.model
    batches = as_batches(data, tokenizer or model.tokenizer, batch_size=batch_size, by_length=True)
    check_context(model.network, batches.longest, "data")
    if batches.labels is not None:
        check_class_order(model._class_names, batches.class_names, "data")
    if method != "monte_carlo":
        moments = logit_moments(posterior, batches, precision, progress)
        logits = probit_logits(*moments) if method == "probit" else draw_logits(*moments, draws, seed)
        return Prediction(logits, batches.labels, model.class_names)
    if at == "mean":
        values = {name: value.unsqueeze(0) for name, value in posterior.mean().items()}
    else:
        values = posterior.sample(1 if posterior.is_point else draws, seed=seed, antithetic=antithetic)
    copies = draws if posterior.is_point and at is None else 1
    return predict_at(model, batches, values, posterior.head(), precision, fold, progress, copies)


def predict_at(
    model,
    batches,
    values: Mapping[str, Tensor],
    head: Mapping[str, Tensor],
    precision: str = "fp32",
    fold: int | None = None,
    progress: bool = False,
    copies: int = 1,
) -> Prediction | NumberPrediction | TokenPrediction:
    """Predict with given draws, whatever they were drawn from.

    Args:
        model: a BayesianLoRA.
        batches: what as_batches returned; labels are optional.
        values: by site, (S, site shape), the parameters of a Bayesian head among them.
        head: what model.head_values returned.
        precision: "fp32", "bf16" or "fp16".
        fold, progress: see `predict`.
        copies: how many draws a lone one stands for.
    """
    parts = []
    with model.attached(precision, dropout=False):
        for batch in watched(batches, "predict", progress):
            batch = model.to_device(batch)
            parts.append(_summaries(model, batch, values, head, folding(model, batch, values, fold)))
    order = torch.as_tensor(batches.order)
    summaries = {}
    for name in [name for name in parts[0] if all(name in part for part in parts)]:
        tensors = [part[name] for part in parts]
        if name != "logits":
            tensors = _same_length(tensors)
        elif len(classes := sorted({tensor.shape[-1] for tensor in tensors})) > 1:
            raise ValueError(f"expected equally many classes or choices in every batch, got {classes}")
        joined = torch.cat(tensors, dim=1)
        found = torch.empty_like(joined).index_copy_(1, order, joined)
        summaries[name] = found.expand(copies * len(found), *found.shape[1:]) if copies > 1 else found
    return prediction(model.likelihood, summaries, batches.labels, model.class_names)


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
    # Rows that cannot be folded would be run one at a time.
    together = 1 if model.device.type == "cpu" or mixing_modules(model, batch) else _FOLDED_ROWS // batch_rows(batch)
    return fold or max(1, together)


def _summaries(model, batch, values, head, fold: int) -> dict[str, Tensor]:
    """What is kept of each draw's outputs, (S, B, ...) on the host."""
    pieces = []
    for size, repeated, outputs in outputs_at(model, batch, values, head, fold):
        if model.predicts_classes and not pieces:
            check_classes(model.likelihood, outputs, repeated)
        kept = summary(model.likelihood, outputs, repeated)
        pieces.append({name: value.reshape(size, -1, *value.shape[1:]).cpu() for name, value in kept.items()})
    return {name: torch.cat([piece[name] for piece in pieces]) for name in pieces[0]}


def _same_length(tensors: list[Tensor]) -> list[Tensor]:
    """Tensors (S, B, T), shorter ones filled up with zeros: batches of texts differ in length."""
    if tensors[0].dim() < 3:
        return tensors
    longest = max(tensor.shape[2] for tensor in tensors)
    return [nn.functional.pad(tensor, (0, longest - tensor.shape[2])) for tensor in tensors]
