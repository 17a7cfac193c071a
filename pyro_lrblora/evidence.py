"""Evidence from draws of a posterior: ELBO, importance-weighted bound, and leave-one-out prediction."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import torch
from pyro import poutine
from torch import Tensor

from .arviz_io import psis
from .counts import check_counts
from .data import as_batches
from .guides.draws import DrawsGuide
from .guides.ensemble import EnsembleGuide
from .metrics import standard_error
from .passes import watched
from .posterior import Posterior, local_parameters
from .predictive import folding, outputs_at

_ROUNDING = 16 * torch.finfo(torch.float32).eps  # of the largest log density: what sums in float32 lose


def elbo(posterior: Posterior, train, draws: int = 50, seed: int = 0, **options) -> Estimate:
    """The evidence lower bound in nats over all N rows: the mean over draws of log p(y, theta) - log q(theta).

    theta is every site: the latents, a prior's own, and a Bayesian head. A point head and a learned prior scale are
    parameters instead: the bound is conditional on them, and one with a point head bounds no evidence that could be
    compared with another head's.

    Args:
        posterior: with a density.
        train: the N rows that were fitted, with labels.
        draws: S, at least 1; each is one function for all rows.
        seed: of the draws.
        options: of importance.

    Raises:
        TypeError: the posterior has no density; says why.
        ValueError: draws < 1, no labels, or not as many rows as were fitted.
    """
    return importance(posterior, train, draws, seed, **options).elbo


def psis_loo(posterior: Posterior, train, draws: int = 200, seed: int = 0, **options) -> LOO:
    """Expected log predictive density of every fitted row had it been left out, by Pareto-smoothed importance sampling.

    The weights of row i are p(theta, y) / q(theta) / p(y_i | theta), which corrects for q not being the posterior
    (Magnusson et al. 2019, arXiv 1902.06504). Stored draws (a Markov chain's) are taken as the posterior's own: their
    weights are 1 / p(y_i | theta) (Vehtari et al. 2017, arXiv 1507.04544). Conditional on a point head and a learned
    scale, which have seen row i.

    Args:
        posterior: with a density, or of stored draws.
        train, seed, options: as for elbo.
        draws: S, of stored ones at most all; below 25 there is no tail to fit, the weights are not smoothed, and k-hat
            is NaN.

    Raises:
        TypeError: the posterior is neither; says why.
        ValueError: as elbo.
    """
    if not isinstance(posterior.guide, DrawsGuide):
        return importance(posterior, train, draws, seed, **options).loo
    _, log_likelihood = _drawn(posterior, train, min(draws, posterior.guide.total), seed, **options)
    return _loo(torch.zeros(len(log_likelihood), dtype=torch.float64), log_likelihood, 1e-6)


def k_hat_threshold(draws: int) -> float:
    """The k-hat above which S weights are not to be relied on: min(1 - 1 / log10(S), 0.7).

    A heavier tail needs more draws than these: 0.41 for 50, 0.57 for 200, 0.7 from 2155 on (Vehtari et al. 2024, arXiv
    1507.02646).

    Args:
        draws: S, at least 2.

    Raises:
        ValueError: draws < 2.
    """
    if draws < 2:
        raise ValueError(f"expected draws >= 2, got draws={draws}")
    return min(1 - 1 / math.log10(draws), 0.7)


@dataclass(frozen=True)
class Estimate:
    """A Monte Carlo estimate in nats with its standard error."""

    value: float
    standard_error: float


@dataclass(frozen=True)
class LOO:
    """Leave-one-out predictive densities of N rows.

    Args:
        elpd: (N,) log predictive density of each row, in nats.
        k_hat: (N,) Pareto shape of each row's weights: above `threshold` its elpd is not to be relied on; 0 for
            constant weights, NaN where it cannot be estimated.
        draws: S.
        note: why k-hat is NaN; empty where none is.
    """

    elpd: Tensor  # (N,)
    k_hat: Tensor  # (N,)
    draws: int
    note: str = ""

    @property
    def total(self) -> Estimate:
        """The sum over rows, in nats; its standard error is that of another N rows from the same source."""
        rows = len(self.elpd)
        return Estimate(float(self.elpd.sum()), rows * standard_error(self.elpd))

    @property
    def threshold(self) -> float:
        """The k-hat that these draws allow, see k_hat_threshold; NaN for one draw."""
        return _threshold(self.draws)

    def share_above(self, threshold: float | None = None) -> float:
        """Share of rows whose k-hat is above a threshold, None being `threshold`; NaN where any k-hat is."""
        threshold = self.threshold if threshold is None else threshold
        return float((self.k_hat > threshold).double().mean() + 0 * self.k_hat.sum())


@dataclass(frozen=True)
class Importance:
    """Log densities of S draws from q: what every estimate here is made of, in float64 on the host.

    Args:
        log_likelihood: (S, N) log p(y_i | theta_s), nats.
        log_prior: (S,) log p(theta_s), over all sites.
        log_q: (S,) log q(theta_s).
    """

    log_likelihood: Tensor  # (S, N)
    log_prior: Tensor  # (S,)
    log_q: Tensor  # (S,)

    @property
    def log_weights(self) -> Tensor:
        """log p(y, theta) - log q(theta), (S,)."""
        return self.log_likelihood.sum(1) + self.log_prior - self.log_q

    @property
    def elbo(self) -> Estimate:
        """The mean of the log weights."""
        weights = self.log_weights
        return Estimate(float(weights.mean()), standard_error(weights))

    @property
    def iwae(self) -> Estimate:
        """The log of the mean weight, the bound of S draws, between ELBO and evidence (Burda et al., arXiv 1509.00519).

        Its standard error is that of the delta method, which is too small where k_hat is large.
        """
        weights = self.log_weights
        value = weights.logsumexp(0) - math.log(len(weights))
        return Estimate(float(value), standard_error((weights - value).exp()))

    @property
    def log_evidence(self) -> Estimate:
        """The log of the mean Pareto-smoothed weight, in nats, steadier than iwae where k_hat is below `threshold`.

        Above it, expect both it and its standard error to be too small (Vehtari et al. 2024, arXiv 1507.02646). Without
        a tail to fit it is iwae.
        """
        weights, (smoothed, _) = self.log_weights, self._smoothed
        lowest = weights.argmin()  # smoothing leaves it alone, so that it tells what normalising divided by
        value = weights[lowest] - smoothed[lowest] - math.log(len(weights))
        return Estimate(float(value), standard_error((smoothed + math.log(len(weights))).exp()))

    @property
    def k_hat(self) -> float:
        """Pareto shape of the joint weights, almost always too high in high dimension; 0 where they are constant."""
        return self._smoothed[1]

    @property
    def threshold(self) -> float:
        """The k-hat that these draws allow, see k_hat_threshold; NaN for one draw."""
        return _threshold(len(self.log_q))

    @property
    def effective_draws(self) -> float:
        """1 / sum of squared normalised weights, or how many draws of the posterior these S are worth (Kong 1992)."""
        return float((-(2 * self.log_weights.log_softmax(0)).logsumexp(0)).exp())

    @property
    def largest_share(self) -> float:
        """The largest weight's share of their sum, 1 / S where they are equal, 1 where one draw is all that counts."""
        return float(self.log_weights.softmax(0).max())

    @property
    def loo(self) -> LOO:
        """See psis_loo."""
        return _loo(self.log_weights, self.log_likelihood, self._tolerance)

    @property
    def _smoothed(self) -> tuple[Tensor, float]:
        smoothed, k_hat = psis(self.log_weights.numpy()[None], self._tolerance)
        return torch.as_tensor(smoothed[0]), float(k_hat[0])

    @property
    def _tolerance(self) -> float:
        # A smaller range is rounding, whose tail means nothing.
        parts = (self.log_likelihood.sum(1), self.log_prior, self.log_q)
        return max(1e-6, _ROUNDING * max(float(part.abs().max()) for part in parts))


@local_parameters
@torch.no_grad()
def importance(posterior: Posterior, train, draws: int = 50, seed: int = 0, **options) -> Importance:
    """Log likelihood, log prior and log q of S draws, in one pass over the rows that were fitted.

    Args:
        posterior, train, draws, seed: as for elbo.
        options: batch_size=64, rows per forward, and tokenizer=, both for a datasets.Dataset; precision="fp32",
            "bf16" or "fp16", of the network; fold=, draws per forward, and progress=, as for predict.

    Raises:
        TypeError, ValueError: as elbo.
    """
    reason = why_no_density(posterior)
    if reason:
        raise TypeError(f"expected a posterior with a density, got {posterior.guide_spec!r}: {reason}")
    values, log_likelihood = _drawn(posterior, train, draws, seed, **options)
    log_prior = [_prior_trace(posterior.model, values, number).log_prob_sum() for number in range(draws)]
    log_q = posterior.log_prob(values).double().cpu()
    return Importance(log_likelihood, torch.tensor([float(each) for each in log_prior], dtype=torch.float64), log_q)


@local_parameters
@torch.no_grad()
def why_no_density(posterior: Posterior) -> str:
    """Why a posterior has no density over all sites of its model, and so no ELBO; empty where it has one."""
    if posterior.is_point:
        return "a point has no density"
    if isinstance(posterior.guide, DrawsGuide):
        return "stored draws have no density; psis_loo needs none"
    if isinstance(posterior.guide, EnsembleGuide):
        return "an ensemble's members are fits, not draws from a density"
    if not getattr(posterior.guide, "has_density", True):
        return f"a draw of {posterior.guide_spec!r} is one of finitely many points"
    values = posterior.sample(1, seed=0)
    try:
        posterior.log_prob(values)
    except TypeError as error:
        return str(error)
    with torch.random.fork_rng():
        missing = _prior_trace(posterior.model, values, 0).stochastic_nodes
    return f"its guide has no density for the prior's sites {missing}" if missing else ""


def check_fitted_rows(posterior: Posterior, batches) -> None:
    """Raise a ValueError unless the batches have labels and as many rows as the posterior was fitted to."""
    posterior.model.check_labels(batches, "training data")
    if posterior.model.size not in (None, batches.rows):
        raise ValueError(
            f"expected the N={posterior.model.size} rows that were fitted as training data, got {batches.rows} rows"
        )


@local_parameters
@torch.no_grad()
def _drawn(
    posterior: Posterior,
    train,
    draws: int,
    seed: int,
    batch_size: int = 64,
    precision: str = "fp32",
    fold: int | None = None,
    progress: bool = True,
    tokenizer=None,
) -> tuple[dict[str, Tensor], Tensor]:
    """Draws of every site, and the log likelihood of every row at each, (S, N) in the data's own order."""
    check_counts(draws=draws)
    model = posterior.model
    batches = as_batches(train, tokenizer or model.tokenizer, batch_size=batch_size, by_length=True)
    check_fitted_rows(posterior, batches)
    values, head = posterior.sample(draws, seed=seed), posterior.head()
    parts = []
    with model.attached(precision, dropout=False):
        for batch in watched(batches, "evidence", progress):
            batch = model.to_device(batch)
            parts.append(_log_likelihood(model, batch, values, head, folding(model, batch, values, fold)))
    log_likelihood = torch.empty_like(joined := torch.cat(parts, dim=1))
    log_likelihood[:, torch.as_tensor(batches.order)] = joined
    return values, log_likelihood


def _log_likelihood(model, batch, values: Mapping[str, Tensor], head, fold: int) -> Tensor:
    """(S, B) in float64 on the host, `fold` draws to a forward."""
    pieces = []
    for size, repeated, outputs in outputs_at(model, batch, values, head, fold):
        log_prob = model.log_likelihood(outputs, repeated)
        pieces.append(log_prob.double().reshape(size, -1).cpu())
    return torch.cat(pieces)


def _loo(log_weights: Tensor, log_likelihood: Tensor, tolerance: float) -> LOO:
    """From the log weights (S,) that make the draws the posterior's and the log likelihood (S, N)."""
    without = (log_weights.unsqueeze(1) - log_likelihood).T.contiguous()  # (N, S)
    smoothed, k_hat = psis(without.numpy(), tolerance)
    elpd = (torch.as_tensor(smoothed) + log_likelihood.T).logsumexp(1)
    draws, note, missing = len(log_weights), "", int(np.isnan(k_hat).sum())
    if missing:
        note = f"k-hat is unknown for {missing} of {len(k_hat)} rows: no tail to fit in {draws} draws"
    return LOO(elpd, torch.as_tensor(k_hat), draws, note)


def _threshold(draws: int) -> float:
    return k_hat_threshold(draws) if draws > 1 else math.nan


def _prior_trace(model, values: Mapping[str, Tensor], number: int) -> poutine.Trace:
    """The prior program at one of the draws."""
    at = {name: value[number] for name, value in values.items()}
    return poutine.trace(poutine.condition(model.sample_prior, at)).get_trace()
