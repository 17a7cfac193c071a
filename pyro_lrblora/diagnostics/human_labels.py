"""Where people disagree about the label, does the model spread its probability as they do?"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import pandas as pd

from .. import metrics
from ..metrics import Array, standard_error


def against_votes(probs: Array, votes: Array, simulations: int = 100, seed: int = 0) -> HumanAgreement:
    """Distances between probabilities and the shares of many people's votes (Nie et al. 2020, arXiv 2010.03532).

    Args:
        probs: (N, C).
        votes: (N, C) counts, each row with at least one vote.
        simulations: sets of votes drawn from `probs`, to see what so few votes cost a model that is exactly right.
        seed: of these.

    Raises:
        ValueError: shapes that differ, no rows, votes that are no counts, a row without votes, no probabilities.
    """
    probs, votes = metrics.as_array(probs, float), metrics.as_array(votes)
    if probs.ndim != 2 or probs.shape != votes.shape or len(votes) == 0:
        raise ValueError(f"expected probs and votes (N, C) with N >= 1, got {probs.shape} and {votes.shape}")
    metrics.check_probabilities(probs)
    if votes.min() < 0 or (votes != np.round(votes)).any() or (votes.sum(-1) < 1).any():
        raise ValueError("expected votes to be counts, at least one per row; write shares times the number of voters")
    if simulations < 1:
        raise ValueError(f"expected simulations >= 1, got simulations={simulations}")
    probs = np.maximum(probs, 0) / np.maximum(probs, 0).sum(-1, keepdims=True)
    counts, generator = votes.sum(-1).astype(int), np.random.default_rng(seed)
    perfect = [_distances(probs, generator.multinomial(counts, probs)) for _ in range(simulations)]
    return HumanAgreement(
        **_distances(probs, votes),
        ceiling=float((votes.max(-1) / votes.sum(-1)).mean()),
        perfect={name: float(np.mean([each[name].mean() for each in perfect])) for name in perfect[0]},
    )


@dataclass(frozen=True)
class HumanAgreement:
    """How near N predictions are to people's votes.

    Args:
        kl: (N,) KL(votes || probs) in nats; probabilities of zero count as 1e-30.
        js: (N,) Jensen-Shannon distance, the root of the divergence in nats: between 0 and sqrt(log 2) = 0.833; divide
            by that for base 2.
        total_variation: (N,) half the summed absolute differences, a probability.
        majority: (N,) whether the predicted class has the most votes; any of those that tie counts.
        vote_share: (N,) share of the votes that the predicted class has: accuracy against a random voter.
        ceiling: the mean vote share of a model that always predicts the majority: no accuracy is above it.
        perfect: mean of each of the five where votes are drawn from `probs` themselves: what as many voters as these
            leave of each distance.
    """

    kl: np.ndarray
    js: np.ndarray
    total_variation: np.ndarray
    majority: np.ndarray
    vote_share: np.ndarray
    ceiling: float
    perfect: dict[str, float]

    @property
    def table(self) -> pd.DataFrame:
        """A row per measure, with its mean over rows, the standard error of that, and the value of a perfect model."""
        names = ["kl", "js", "total_variation", "majority", "vote_share"]
        values = {name: np.asarray(getattr(self, name), dtype=float) for name in names}
        return pd.DataFrame(
            {
                "mean": {name: v.mean() for name, v in values.items()},
                "SE": {name: standard_error(v) for name, v in values.items()},
                "perfect": self.perfect,
            }
        )


def _distances(probs: np.ndarray, votes: np.ndarray) -> dict[str, np.ndarray]:
    shares = votes / votes.sum(-1, keepdims=True)
    middle = (shares + probs) / 2
    chosen = np.take_along_axis(shares, probs.argmax(-1)[:, None], -1)[:, 0]
    return {
        "kl": _kl(shares, probs),
        "js": np.sqrt(np.maximum(_kl(shares, middle) + _kl(probs, middle), 0) / 2),
        "total_variation": np.abs(shares - probs).sum(-1) / 2,
        "majority": chosen == shares.max(-1),
        "vote_share": chosen,
    }


def _kl(p: np.ndarray, q: np.ndarray) -> np.ndarray:
    """KL(p || q) of each row, nats."""
    ratio = np.where(p > 0, p, 1) / np.where(p > 0, np.maximum(q, 1e-30), 1)
    return np.maximum((p * np.log(ratio)).sum(-1), 0)
