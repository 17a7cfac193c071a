"""What `predict` returns, by kind of label: classes, numbers, or tokens; each with its scores.

All have `labels`, `nll` (nats per observation), `observations` (rows, or scored tokens), `scores(bins)` (a name and a
number each), `losses()` (what those of the scores that are means over rows are the means of) and `log_likelihood`
(S, N); all but texts, which are given, `draw_labels()`.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from torch import Tensor, from_numpy
from torch.distributions import Categorical, Normal

from . import metrics


@dataclass(frozen=True)
class Prediction:
    """Classes (or choices) predicted for N rows from S draws, on the host, in the data's own order.

    Args:
        logits: (S, N, C).
        labels: (N,) where the data have them.
        class_names: C names.
        observed: (S, N), log probability of the labels where a likelihood gives them another one than the logits do.
    """

    logits: Tensor  # (S, N, C)
    labels: Tensor | None  # (N,)
    class_names: Sequence[str] | None = None
    observed: Tensor | None = None  # (S, N)

    @property
    def log_probs(self) -> Tensor:
        """Log of the posterior predictive probabilities, (N, C)."""
        return self.logits.log_softmax(-1).logsumexp(0) - math.log(len(self.logits))

    @property
    def probs(self) -> Tensor:
        """Posterior predictive probabilities, (N, C), the mean over draws."""
        return self.log_probs.exp()

    @property
    def predicted(self) -> Tensor:
        """The most probable class of each row, (N,)."""
        return self.log_probs.argmax(-1)

    @property
    def entropy(self) -> Tensor:
        """Entropy of each row's predictive distribution, nats, (N,), aleatoric and epistemic."""
        return self._decomposed("entropy")

    @property
    def mutual_information(self) -> Tensor:
        """The part of the entropy that is epistemic, nats, (N,); see diagnostics.decompose for the rest."""
        return self._decomposed("mutual_information")

    @property
    def log_likelihood(self) -> Tensor:
        """Log probability of each row's label under each draw, nats, (S, N), by the likelihood that was fitted."""
        if self.observed is not None:
            return self.observed
        labels = from_numpy(metrics.class_labels(self.labels, self.logits.shape[-1]))
        index = labels.expand(len(self.logits), -1).unsqueeze(-1)
        return self.logits.log_softmax(-1).gather(-1, index).squeeze(-1)

    @property
    def observations(self) -> int:
        """How many the NLL is the mean of, N."""
        return self.logits.shape[1]

    @property
    def nll(self) -> float:
        """Mean negative log probability of the labels, nats per row."""
        return float(self.losses()["NLL"].mean())

    def tempered(self, temperature: float) -> Prediction:
        """The same with log probabilities divided by a temperature and normalised again, as one draw."""
        return Prediction((self.log_probs / temperature).unsqueeze(0), self.labels, self.class_names)

    def scores(self, bins: int = 15) -> dict[str, float]:
        """Accuracy, NLL in nats, ECE over bins of equal width, Brier score."""
        of = (self.probs, self.labels)
        return {
            "accuracy": metrics.accuracy(*of),
            "NLL": self.nll,
            f"ECE ({bins} bins)": metrics.ece(*of, bins),
            "Brier": metrics.brier(*of),
        }

    def losses(self) -> dict[str, np.ndarray]:
        """What NLL and Brier are the means of, (N,) each."""
        labels, log_probs = metrics.class_labels(self.labels, self.logits.shape[-1]), self.log_probs.double().numpy()
        hits = np.eye(self.logits.shape[-1])[labels]
        return {
            "NLL": -np.take_along_axis(log_probs, labels[:, None], 1)[:, 0],
            "Brier": np.square(np.exp(log_probs) - hits).sum(-1),
        }

    def _decomposed(self, name: str) -> Tensor:
        from .diagnostics import decompose

        return from_numpy(getattr(decompose(self), name))

    def draw_labels(self) -> Tensor:
        """Labels drawn under each draw, (S, N), from torch's own generator."""
        return Categorical(logits=self.logits).sample()


@dataclass(frozen=True)
class NumberPrediction:
    """Numbers predicted for N rows from S draws: an equal mixture of S normals for each row.

    Args:
        loc: (S, N), in units of the labels.
        scale: (S, N), the noise's standard deviation under each draw.
        labels: (N,) where the data have them.
    """

    loc: Tensor  # (S, N)
    scale: Tensor  # (S, N)
    labels: Tensor | None  # (N,)

    @property
    def mean(self) -> Tensor:
        """Posterior predictive mean, (N,)."""
        return self.loc.mean(0)

    @property
    def aleatoric_sd(self) -> Tensor:
        """The part of the predictive standard deviation that is noise in the data, (N,)."""
        return self.scale.square().mean(0).sqrt()

    @property
    def epistemic_sd(self) -> Tensor:
        """The part that more data would take away, the spread of the draws' means, (N,)."""
        return self.loc.std(0, correction=0)

    @property
    def sd(self) -> Tensor:
        """Posterior predictive standard deviation, (N,)."""
        return (self.aleatoric_sd.square() + self.epistemic_sd.square()).sqrt()

    @property
    def log_likelihood(self) -> Tensor:
        """Log density of each row's label under each draw, nats, (S, N)."""
        return Normal(self.loc, self.scale).log_prob(metrics.given(self.labels).to(self.loc))

    @property
    def observations(self) -> int:
        """How many the NLL is the mean of, N."""
        return self.loc.shape[1]

    @property
    def nll(self) -> float:
        """Mean negative log predictive density of the labels, nats per row."""
        return float(self.losses()["NLL"].mean())

    def cdf(self, values: Tensor) -> Tensor:
        """Predictive probability that a row's label is below a value, (N,)."""
        return Normal(self.loc, self.scale).cdf(values.to(self.loc)).mean(0)

    def scores(self, bins: int = 15) -> dict[str, float]:
        """RMSE, NLL in nats, CRPS in units of the labels, and the share of labels inside the central 90% interval."""
        place, losses = self.cdf(metrics.given(self.labels)), self.losses()
        return {
            "RMSE": float((self.mean - self.labels).square().mean().sqrt()),
            "NLL": float(losses["NLL"].mean()),
            "CRPS": float(losses["CRPS"].mean()),
            "in 90% interval": float(((place > 0.05) & (place < 0.95)).double().mean()),
        }

    def losses(self) -> dict[str, np.ndarray]:
        """What NLL and CRPS are the means of, (N,) each."""
        mixture = self.log_likelihood.double().logsumexp(0) - math.log(len(self.loc))
        return {"NLL": -mixture.numpy(), "CRPS": metrics.crps_of_normals(self.loc, self.scale, self.labels)}

    def draw_labels(self) -> Tensor:
        """Labels drawn under each draw, (S, N), from torch's own generator."""
        return Normal(self.loc, self.scale).sample()


@dataclass(frozen=True)
class TokenPrediction:
    """N given texts scored token by token under S draws.

    Args:
        token_log_probs: (S, N, T) nats, 0 where a token is not scored.
        entropy: (S, N, T) of each draw's distribution at that place, nats, 0 where a token is not scored.
        scored: (N, T).
    """

    token_log_probs: Tensor  # (S, N, T)
    entropy: Tensor  # (S, N, T)
    scored: Tensor  # (N, T)

    @property
    def labels(self) -> Tensor:
        """(N,) tokens that are scored in each row."""
        return self.scored.sum(-1)

    @property
    def log_likelihood(self) -> Tensor:
        """Log probability of each text under each draw, nats, (S, N)."""
        return self.token_log_probs.sum(-1)

    @property
    def log_probs(self) -> Tensor:
        """Log of each token's probability averaged over draws, (N, T), what is generated from."""
        mixture = self.token_log_probs.logsumexp(0) - math.log(len(self.token_log_probs))
        return mixture * self.scored

    @property
    def observations(self) -> int:
        """How many the NLL is the mean of, the tokens that are scored."""
        return int(self.scored.sum())

    @property
    def nll(self) -> float:
        """Mean negative log probability of a token, averaged over draws token by token, in nats."""
        return float(-self.log_probs.double().sum() / self.scored.sum())

    def scores(self, bins: int = 15) -> dict[str, float]:
        """NLL in nats per token, its exponential, and the NLL of whole texts, which re-weighs draws as they unfold."""
        texts = self.log_likelihood.double().logsumexp(0) - math.log(len(self.entropy))
        return {
            "NLL": self.nll,
            "perplexity": math.exp(self.nll),
            "NLL, whole texts": float(-texts.sum() / self.scored.sum()),
            "mean entropy": float(self.entropy.double().sum() / len(self.entropy) / self.scored.sum()),
        }

    def losses(self) -> dict[str, np.ndarray]:
        """What the NLL per token is the mean of, (N,): the NLL and what each text moves it by.

        A ratio of two sums over texts, nats and tokens, has the standard error of its linearisation (Cochran 1977,
        section 2.11), in which long texts weigh more and do not look like noise; so have paired differences.
        """
        nats, tokens = -self.log_probs.double().sum(-1), self.scored.double().sum(-1)
        return {"NLL": (self.nll + (nats - self.nll * tokens) / tokens.mean()).numpy()}
