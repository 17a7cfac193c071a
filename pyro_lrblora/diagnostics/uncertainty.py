"""Where the uncertainty of a prediction comes from: the data, or what the posterior does not know."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import datasets
import numpy as np
import pandas as pd
import torch

from ..data.columns import text_columns
from ..predictions import Prediction

_SCORES = ["entropy", "expected_entropy", "mutual_information", "disagreement", "max_probability"]
_POINT = "one draw: mutual information and disagreement are zero by construction, not by knowledge"


def decompose(prediction: Prediction) -> Uncertainty:
    """Split the entropy of each row's predictive distribution into an aleatoric and an epistemic part.

    entropy = expected_entropy + mutual_information: the entropy of the mean over draws is the mean of the draws' own
    entropies (aleatoric: more data would not remove it) plus how much they differ (epistemic: more data would),
    Houlsby et al. 2011 (arXiv 1112.5745), Depeweg et al. 2018 (arXiv 1710.07283). S draws cannot show more than log S
    nats of the epistemic part.

    Args:
        prediction: logits (S, N, C); labels are optional.

    Raises:
        ValueError: no draws, no rows, or logits that are NaN.
    """
    logits = prediction.logits
    if logits.ndim != 3 or 0 in logits.shape or bool(torch.isnan(logits).any()):
        raise ValueError(f"expected logits (S, N, C) without NaN, none of them 0, got {tuple(logits.shape)}")
    draws, rows, classes = logits.shape
    mean = torch.zeros(rows, classes, dtype=torch.float64)
    votes = torch.zeros(rows, classes, dtype=torch.float64)
    expected = torch.zeros(rows, dtype=torch.float64)
    for drawn in logits:  # one at a time: a double copy of all would be twice the prediction's own memory
        probs = drawn.double().softmax(-1)
        mean += probs / draws
        expected += torch.special.entr(probs).sum(-1) / draws
        votes[torch.arange(rows), probs.argmax(-1)] += 1
    total = torch.special.entr(mean).sum(-1)
    return Uncertainty(
        entropy=total.numpy(),
        expected_entropy=expected.numpy(),
        mutual_information=(total - expected).clamp(min=0).numpy(),
        disagreement=(1 - votes.max(-1).values / draws).numpy(),
        max_probability=mean.max(-1).values.numpy(),
        predicted=mean.argmax(-1).numpy(),
        labels=None if prediction.labels is None else np.asarray(prediction.labels),
        note=_POINT if draws == 1 else "",
    )


def most_uncertain(
    prediction: Prediction, data=None, by: str = "entropy", top: int = 10, text: str | Sequence[str] | None = None
) -> pd.DataFrame:
    """The rows a prediction is least sure of, with their texts, the least sure first.

    Args:
        prediction: logits (S, N, C); labels are optional.
        data: the datasets.Dataset that was predicted, for the texts; other data, or none, leave them out.
        by: "entropy", "expected_entropy", "mutual_information", "disagreement", or "max_probability" (lowest first).
        top: how many rows.
        text: the text column or columns; None looks for the usual names.

    Returns:
        Indexed by row number, with the text columns, label, predicted (names where the prediction has them), the
        probability of each class, entropy and mutual information in nats. What is left out, and why, is in
        attrs["notes"].

    Raises:
        ValueError: an unknown `by`, top < 1, or data of another length.
    """
    if by not in _SCORES or top < 1:
        raise ValueError(f"expected by to be one of {_SCORES} and top >= 1, got by={by!r}, top={top}")
    texts, notes = _texts(data, prediction.logits.shape[1], text)
    parts = decompose(prediction)
    score = parts.table[by].to_numpy() * (1 if by == "max_probability" else -1)
    rows = np.argsort(score, kind="stable")[:top]
    names = list(prediction.class_names or range(prediction.logits.shape[-1]))
    name = lambda k: names[k] if 0 <= k < len(names) else k
    table = pd.DataFrame({column: [values[int(row)] for row in rows] for column, values in texts.items()}, index=rows)
    if parts.labels is None:
        notes.append("no labels in the data: which of these are wrong is unknown")
    else:
        table["label"] = [name(int(k)) for k in parts.labels[rows]]
    table["predicted"] = [name(int(k)) for k in parts.predicted[rows]]
    probs = prediction.probs[torch.as_tensor(rows)].numpy()
    for k, column in enumerate(names):
        table[f"p({column})"] = probs[:, k]
    table["entropy"], table["mutual information"] = parts.entropy[rows], parts.mutual_information[rows]
    table.index.name = "row"
    table.attrs["notes"] = notes + [parts.note] * bool(parts.note)
    return table


@dataclass(frozen=True)
class Uncertainty:
    """Uncertainty of N rows; entropies in nats.

    Args:
        entropy: (N,) of the predictive distribution, expected_entropy + mutual_information.
        expected_entropy: (N,) the aleatoric part.
        mutual_information: (N,) the epistemic part, between label and weights.
        disagreement: (N,) share of draws that do not predict the class most of them do (variation ratio).
        max_probability: (N,) of the predictive distribution.
        predicted: (N,) its most probable class.
        labels: (N,) where the data have them.
        note: what the numbers cannot say, and why.
    """

    entropy: np.ndarray
    expected_entropy: np.ndarray
    mutual_information: np.ndarray
    disagreement: np.ndarray
    max_probability: np.ndarray
    predicted: np.ndarray
    labels: np.ndarray | None = None
    note: str = ""

    @property
    def right(self) -> np.ndarray | None:
        """(N,) whether the predicted class is the label; None without labels."""
        return None if self.labels is None else self.predicted == self.labels

    @property
    def epistemic_share(self) -> float:
        """Share of the mean entropy that is epistemic; 0 where every row is certain."""
        total = self.entropy.mean()
        return float(self.mutual_information.mean() / total) if total > 0 else 0.0

    @property
    def table(self) -> pd.DataFrame:
        """A row per row of the data, a column per measure."""
        return pd.DataFrame({name: getattr(self, name) for name in _SCORES})


def _texts(data, rows: int, text) -> tuple[dict[str, Sequence[str]], list[str]]:
    """Columns of text by name, and why there are none."""
    if not isinstance(data, datasets.Dataset):
        return {}, ["no datasets.Dataset was given: row numbers stand for the texts"]
    if len(data) != rows:
        raise ValueError(f"expected the data that were predicted, {rows} rows, got {len(data)}")
    try:
        return {name: data[name] for name in text_columns(data, text)}, []
    except KeyError as error:
        if text is not None:
            raise
        return {}, [f"row numbers stand for the texts: {error.args[0]}"]
