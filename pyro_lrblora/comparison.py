"""One table over several posteriors on the same data."""

from __future__ import annotations

from collections.abc import Mapping

import pandas as pd

from . import metrics
from .data import as_batches
from .posterior import Posterior
from .predictive import Prediction, predict


def compare(
    posteriors: Mapping[str, Posterior],
    test,
    *,
    train=None,
    validation=None,
    draws: int = 10,
    bins: int = 15,
    seed: int = 0,
    tokenizer=None,
) -> pd.DataFrame:
    """Score posteriors on the same rows: the predictive, the posterior mean alone, and each after temperature scaling.

    Args:
        posteriors: name -> what a fit returned; a point fit has one row, any other a second one for its mean.
        test: the rows that are scored.
        train: the rows that were fitted: adds their NLL, far below the test rows' where a fit is overconfident.
        validation: the rows the temperature is fitted on: adds the scores after scaling.
        draws: S.
        bins: of the ECE, equal width.
        seed: of the draws.
        tokenizer: for a datasets.Dataset, where a model has none.

    Returns:
        A row per posterior and one per posterior mean. Columns: accuracy, NLL (nats), ECE with its bins, Brier;
        temperature and scores at it; training NLL; the parameters of the posterior, of the head, and the posterior's
        as a share of LoRA r=8 on the same modules; seconds per training step.
    """
    if not posteriors:
        raise ValueError("expected at least one posterior, got none")
    rows = {}
    for name, posterior in posteriors.items():
        tok = tokenizer or posterior.model.tokenizer
        data = {
            role: as_batches(given, tok, batch_size=64, by_length=True)
            for role, given in (("test", test), ("validation", validation), ("train", train))
            if given is not None
        }
        for label, at in ((name, None), (f"{name}, mean", "mean")):
            if posterior.is_point and at is not None:
                continue
            count = 1 if posterior.is_point else draws
            predictions = {
                role: predict(posterior, rows_, draws=count, at=at, seed=seed) for role, rows_ in data.items()
            }
            rows[label] = _scores(predictions, bins) | _costs(posterior)
    return pd.DataFrame.from_dict(rows, orient="index")


def _scores(predictions: Mapping[str, Prediction], bins: int) -> dict[str, float]:
    test = predictions["test"]
    if test.labels is None:
        raise ValueError("expected labels in the test data, got none")
    ece = f"ECE ({bins} bins)"
    row = {
        "accuracy": metrics.accuracy(test.probs, test.labels),
        "NLL": metrics.nll(test.probs, test.labels),
        ece: metrics.ece(test.probs, test.labels, bins),
        "Brier": metrics.brier(test.probs, test.labels),
    }
    if "validation" in predictions:
        validation = predictions["validation"]
        temperature = metrics.fit_temperature(validation.log_probs, validation.labels)
        scaled = metrics.apply_temperature(test.log_probs, temperature)
        row |= {
            "temperature": temperature,
            "NLL at T": metrics.nll(scaled, test.labels),
            "ECE at T": metrics.ece(scaled, test.labels, bins),
            "Brier at T": metrics.brier(scaled, test.labels),
        }
    if "train" in predictions:
        row["train NLL"] = metrics.nll(predictions["train"].probs, predictions["train"].labels)
    return row


def _costs(posterior: Posterior) -> dict[str, float]:
    counts, history = posterior.parameter_counts(), posterior.history
    lora = sum(8 * sum(module.weight.shape) for module in posterior.model.modules.values())
    steps = history[-1]["step"] if history else 0
    return {
        "parameters": counts["posterior"],
        "head": counts["head"],
        "of LoRA r=8": counts["posterior"] / lora,
        "s/step": sum(row["seconds"] for row in history) / steps if steps else float("nan"),
    }
