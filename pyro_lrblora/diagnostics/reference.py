"""How far is a posterior from a reference: moments, shape and predictions, each beside its noise floor."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import pandas as pd
import torch
from torch import Tensor

from ..guides.draws import DrawsGuide
from ..infer.start import same_tensors
from ..model import BayesianLoRA
from ..posterior import Posterior
from ..predictive import predict
from ..storage import describe

_LEAST = 8  # draws: a floor comes from quarters of them, and a correlation takes two


def against_reference(
    posterior: Posterior,
    reference: Posterior,
    data=None,
    draws: int = 1000,
    projections: int = 100,
    seed: int = 0,
    progress: bool = True,
) -> AgainstReference:
    """A posterior beside one that is better known (converged NUTS, an exact one), in units of the reference's sds.

    Both are seen through S draws of the D latents. Every number comes with its noise floor: the same number between the
    first and the second half of the reference's draws, which for stored draws are other chains, or far apart in a lone
    one. Halves are noisier than the whole, so a number at its floor is indistinguishable from none. Memory: a few
    (S, D) arrays, never D x D.

    Args:
        posterior: the one to judge.
        reference: of the same subspace and with the same head.
        data: N rows, labels not needed, for the predictive numbers of a classifier; None leaves them out.
        draws: S of each, an even number of at least 8; never more than either has stored.
        projections: random directions of the sliced Wasserstein distance.
        seed: of draws and directions.
        progress: show a progress bar where predicting takes more than two seconds.

    Raises:
        ValueError: another subspace, another head, a reference without spread, fewer than 8 draws, no projections.
    """
    _check(posterior, reference, projections)
    stored = [p.guide.total for p in (posterior, reference) if isinstance(p.guide, DrawsGuide)]
    draws = min([draws, *stored]) // 2 * 2
    if draws < _LEAST:
        raise ValueError(f"expected draws >= {_LEAST} of both posteriors, got {draws}")
    # Two seeds: draws that share their noise would look more alike than they are.
    ours, theirs = (_Draws.of(p, data, draws, s, progress) for p, s in ((posterior, seed + 1), (reference, seed)))
    varies = _varies(theirs.latents)
    if not varies.any():
        raise ValueError("expected a reference whose latents vary, got one whose draws are all the same")
    generator = torch.Generator().manual_seed(seed)
    directions = torch.randn(len(varies), projections, generator=generator, dtype=torch.float64)
    floor = _distance(*theirs.halves(), directions)
    return _distance(ours, theirs, directions, floor, _note(ours, varies, data))


@dataclass(frozen=True)
class AgainstReference:
    """Differences of a posterior from its reference over D latents, and over N rows where data were given.

    Args:
        mean_error: (D,) mean minus the reference's, in its sds.
        log_sd_ratio: (D,) log of sd over the reference's: negative is too narrow, -inf does not vary at all.
        correlation_error: root mean square difference of the correlations over all pairs of latents, its Monte Carlo
            noise taken out by multiplying differences from independent halves of the draws; 0 where that is negative.
        sliced_wasserstein: 2-Wasserstein distance over random directions, root mean square, in the reference's sds
            (Bonneel et al. 2015, doi 10.1007/s10851-014-0506-3): a shift of every mean by one sd is 1.
        total_variation: between predictive probabilities, mean over rows; a probability.
        agreement: share of rows with the same predicted class.
        draws: S of each.
        floor: the same between two halves of the reference's draws; None in a floor.
        note: what was left out, and why.

    What cannot be had is NaN.
    """

    mean_error: Tensor  # (D,)
    log_sd_ratio: Tensor  # (D,)
    correlation_error: float
    sliced_wasserstein: float
    total_variation: float
    agreement: float
    draws: int
    floor: AgainstReference | None = None
    note: str = ""

    @property
    def table(self) -> pd.DataFrame:
        """A row per quantity with its value and its floor; means over the D latents."""
        columns = {"value": self._numbers()} | ({} if self.floor is None else {"floor": self.floor._numbers()})
        return pd.DataFrame(columns).rename_axis("quantity")

    def _numbers(self) -> dict[str, float]:
        return {
            "mean error, absolute (reference sds)": float(self.mean_error.abs().nanmean()),
            "log sd ratio": float(self.log_sd_ratio.nanmean()),
            "log sd ratio, absolute": float(self.log_sd_ratio.abs().nanmean()),
            "correlation error (RMS)": self.correlation_error,
            "sliced Wasserstein-2 (reference sds)": self.sliced_wasserstein,
            "predictive total variation": self.total_variation,
            "agreement": self.agreement,
        }


@dataclass(frozen=True)
class _Draws:
    latents: Tensor  # (S, D)
    probs: Tensor | None  # (halves, N, C), each half's mean over its draws

    @staticmethod
    def of(posterior: Posterior, data, draws: int, seed: int, progress: bool) -> _Draws:
        model = posterior.model
        latents = model.sites.join(posterior.sample(draws, seed=seed)).double().cpu()
        if data is None or not model.predicts_classes:
            return _Draws(latents, None)
        logits = predict(posterior, data, draws=draws, seed=seed, antithetic=False, progress=progress).logits
        return _Draws(latents, logits.softmax(-1).unflatten(0, (2, -1)).mean(1))

    def halves(self) -> tuple[_Draws, _Draws]:
        probs = (None, None) if self.probs is None else self.probs.split(1)
        return tuple(_Draws(*half) for half in zip(self.latents.chunk(2), probs, strict=True))


def _distance(ours: _Draws, theirs: _Draws, directions: Tensor, floor=None, note="") -> AgainstReference:
    mean, sd = theirs.latents.mean(0), theirs.latents.std(0)
    known = _varies(theirs.latents)
    sd = sd.where(known, torch.nan)
    ratio = (ours.latents.std(0) / sd).where(_varies(ours.latents) | ~known, 0.0)
    unit = directions[known] / directions[known].norm(dim=0)
    projected = [(((each.latents - mean) / sd)[:, known] @ unit).sort(0).values for each in (ours, theirs)]
    variation = agreement = math.nan
    if theirs.probs is not None:
        p, q = ours.probs.mean(0), theirs.probs.mean(0)
        variation = float((p - q).abs().sum(-1).mean() / 2)
        agreement = float((p.argmax(-1) == q.argmax(-1)).double().mean())
    return AgainstReference(
        mean_error=(ours.latents.mean(0) - mean) / sd,
        log_sd_ratio=ratio.log(),
        correlation_error=_correlation_error(ours, theirs),
        sliced_wasserstein=float((projected[0] - projected[1]).square().mean().sqrt()),
        total_variation=variation,
        agreement=agreement,
        draws=len(ours.latents),
        floor=floor,
        note=note,
    )


def _correlation_error(ours: _Draws, theirs: _Draws) -> float:
    """Root mean square of C_p - C_r off the diagonal, from inner products <C_a, C_b> = ||Z_a Z_b'||^2 alone."""
    halves = [*ours.latents.chunk(2), *theirs.latents.chunk(2)]
    varies = torch.stack([_varies(half) for half in halves]).all(0)
    size = int(varies.sum())
    if size < 2:
        return math.nan
    p1, p2, r1, r2 = (_standardised(half[:, varies]) for half in halves)
    inner = lambda a, b: float((a @ b.T).square().sum())
    # The diagonals are 1 in all four, so that they cancel.
    total = inner(p1, p2) - inner(p1, r2) - inner(r1, p2) + inner(r1, r2)
    return math.sqrt(max(0.0, total) / (size * (size - 1)))


def _standardised(draws: Tensor) -> Tensor:
    """(S, D) with Z'Z the correlation matrix."""
    centred = draws - draws.mean(0)
    return centred / centred.norm(dim=0)


def _varies(draws: Tensor) -> Tensor:
    """Which of the D latents are not the same in all draws: an sd of rounding size does not tell, (D,)."""
    return draws.amax(0) > draws.amin(0)


def _check(posterior: Posterior, reference: Posterior, projections: int) -> None:
    if projections < 1:
        raise ValueError(f"expected projections >= 1, got projections={projections}")
    if reference.is_point:
        raise ValueError("expected a reference with spread, got a point; write against_reference(point, reference)")
    if not same_tensors(posterior.model.adapted.tensors(), reference.model.adapted.tensors()):
        raise ValueError(
            "expected posterior and reference in the same subspace, got other A and B; fit both from one "
            "model.prepare(train)"
        )
    priors = [_prior(each.model) for each in (posterior, reference)]
    first, second = map(describe, priors)
    if first != second and "own" not in first.keys() & second.keys():  # whose repr may hold an address
        raise ValueError(
            f"expected posterior and reference under the same prior, got {priors[0]!r} and {priors[1]!r}; fit the "
            f"reference to model.with_prior({priors[0]!r})"
        )
    heads = [_head(each) for each in (posterior, reference)]
    if not same_tensors(*heads):
        kinds = [f"{each.model.head!r} head, {sorted(head)} fixed" for each, head in zip((posterior, reference), heads)]  # noqa: B905
        raise ValueError(
            f"expected posterior and reference with the same head, got {kinds[0]} and {kinds[1]}, or other values; "
            "write model.with_head(lb.fixed_from(posterior)) for the reference, or head='bayesian' for both"
        )


def _prior(model: BayesianLoRA):
    """The prior, a learned one with the scale that a fit has left it."""
    if model.learned_scale is None:
        return model.prior
    scale = model.learned_scale.current.tolist()
    return replace(model.prior.prior, scale=tuple(scale) if isinstance(scale, list) else scale)


def _head(posterior: Posterior) -> dict[str, Tensor]:
    """What of the head no draw changes: nothing of a Bayesian one, nor of an ensemble's where members differ."""
    if posterior.model.head == "bayesian":
        return {}
    drawn = posterior.sample(_LEAST, seed=0)
    return {
        name: drawn[name][0] if name in drawn else value
        for name, value in posterior.head().items()
        if name not in drawn or (drawn[name] == drawn[name][0]).all()
    }


def _note(ours: _Draws, varies: Tensor, data) -> str:
    reasons, still = [], varies & ~_varies(ours.latents)
    if not varies.all():
        reasons.append(f"{int((~varies).sum())} of {len(varies)} latents do not vary in the reference: left out")
    if still.any():
        reasons.append(f"{int(still.sum())} of {len(varies)} latents do not vary in the posterior: no correlations")
    if int((varies & ~still).sum()) < 2 and not still.any():
        reasons.append("fewer than two latents: no correlations")
    if data is None:
        reasons.append("no data were given: no predictive total variation or agreement")
    elif ours.probs is None:
        reasons.append("the likelihood is not known to be over classes: no predictive total variation or agreement")
    return "; ".join(reasons)
