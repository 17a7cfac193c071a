"""Is the posterior's covariance low-rank: asked of a reference, never of a guide whose rank is an assumption."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import pandas as pd
import torch
from torch import Tensor

from ..guides.draws import DrawsGuide
from ..guides.full_rank import FullRankGuide
from ..infer.chains import R_HAT
from ..posterior import Posterior, local_parameters
from ..priors.variance import prior_covariance, prior_variance
from ..projections import Random
from .spectra import added_precision, effective_rank, eigenvalues, independent_draws, turned

_MOST = 4096  # latents, whose covariance is decomposed whole
_PER_LATENT = 4  # draws of each, below which the inverse of a sample covariance is mostly noise
_SHARE = 0.9  # of the total, for the number of directions that hold it


@local_parameters
@torch.no_grad()
def low_rank(reference: Posterior, random: Posterior | None = None, seed: int = 0) -> LowRankness:
    """How many directions the covariance and what the data add to the precision have, beside what they have by chance.

    Both in units of the prior. The data's part of the precision is S^(1/2) C^-1 S^(1/2) - I, C the posterior's and S
    the prior's covariance: under a Normal prior it is the Fisher information in those units, and of low rank where the
    data determine few directions (the covariance is the identity minus low rank then, and itself of full rank). The
    nulls: the same marginals in those units without correlation; and the posterior in a random subspace. An effective
    rank well below both is structure. Of draws the first null is every latent's chains turned by steps of their own,
    which leaves their autocorrelation: draws that resemble those before them show few directions by chance, as fewer
    independent ones do. How many of these they are worth is read off the null's correlations. Effective ranks are
    without the bias of so many draws; shares of the trace are as the draws show them, spread by noise over more
    directions. Chains that have not converged stand apart, and the direction between them alone makes any covariance
    look low-rank: `doubt` says so.

    Args:
        reference: stored draws (lb.infer.nuts), or a normal with a free covariance (laplace structure="full").
        random: the same, of as many latents, in a subspace of projections.Random().
        seed: of the null.

    Raises:
        TypeError: a guide whose own form decides the rank.
        ValueError: more than 4,096 latents, no variance, `random` in a subspace that is not random or of another size.
    """
    if random is not None:
        check_random(reference, random)
    named = {"reference": reference} | ({} if random is None else {"random projection": random})
    for posterior in named.values():
        _check(posterior)
    rows, spectra = {}, {}
    notes, doubts = [], list(filter(None, (_doubt(posterior, name) for name, posterior in named.items())))
    for name, posterior in named.items():
        whiten, unknown = _units(posterior.model)
        if unknown:
            notes.append(f"{name}: no precision, and its covariance in units of the prior's sd only: {unknown}")
        for label, whitened, draws in _whitened(posterior, name, whiten, seed):
            values = eigenvalues(whitened)
            parts = {"covariance": (values, effective_rank(values, draws))}
            if unknown:
                pass
            elif draws is None or draws >= _PER_LATENT * len(values):
                # Without correlation it is that of the variances, which far fewer draws tell well.
                alone = draws is not None and label != name
                known = whitened.diagonal().sort(descending=True).values if alone else values
                parts["precision from the data"] = added_precision(known, None if alone else draws)
            else:
                notes.append(
                    f"{label}: no precision, its draws are worth {draws:.0f} independent ones, fewer than "
                    f"{_PER_LATENT} per latent"
                )
            for part, (spectrum, rank) in parts.items():
                rows[part, label] = {"effective rank": rank} | _row(spectrum)
                spectra[part, label] = spectrum.numpy()
    table = pd.DataFrame.from_dict(rows, orient="index")
    table.index = pd.MultiIndex.from_tuples(table.index, names=["of", "in"])
    table = table.sort_index(level=0, sort_remaining=False)
    return LowRankness(table, spectra, "; ".join([*doubts, *notes]), "; ".join(doubts))


@dataclass(frozen=True)
class LowRankness:
    """Spectra of a reference posterior beside its nulls.

    Args:
        table: a row per matrix (covariance, precision from the data) and source (reference, no correlation, random
            projection): effective rank tr(M)^2 / tr(M^2); latents, D; share of the trace in the first and in the first
            eight directions; directions that hold 90% of it.
        spectra: the same keys -> eigenvalues (D,), descending, in units of the prior.
        note: what is missing, or not to be trusted, and why.
        doubt: of that, what says that the chains have not converged, or that nobody knows.
    """

    table: pd.DataFrame
    spectra: dict[tuple[str, str], np.ndarray]
    note: str = ""
    doubt: str = ""


def check_random(reference: Posterior, random: Posterior) -> None:
    """Raise a ValueError unless `random` is the null of `reference`: a random subspace with as many latents."""
    projection = getattr(random.model.adapter, "projection", None)
    if not isinstance(projection, Random):
        raise ValueError(
            f"expected random= in a subspace of projections.Random(), got {random.model.adapter!r}; fit it to a model "
            "with adapter=lb.LoRAXS(rank, lb.projections.Random())"
        )
    sizes = [posterior.model.sites.size for posterior in (reference, random)]
    if sizes[0] != sizes[1]:
        raise ValueError(
            f"expected random= with the reference's D = {sizes[0]} latents, got {sizes[1]}; adapt the same modules "
            "with the same rank"
        )


def _check(posterior: Posterior) -> None:
    free = isinstance(posterior.guide, FullRankGuide) and posterior.guide.joint
    if not (free or isinstance(posterior.guide, DrawsGuide)):
        raise TypeError(
            f"expected a reference of stored draws or with a free covariance, got {posterior.guide_spec!r}, whose form "
            "decides the rank; write lb.infer.nuts(...) or lb.infer.laplace(..., structure='full')"
        )
    size = posterior.model.sites.size
    if size > _MOST:
        raise ValueError(f"expected at most {_MOST:,} latents, got D = {size:,}; adapt fewer modules or lower the rank")


def _doubt(posterior: Posterior, name: str) -> str:
    """Why stored draws may not be the posterior's; nothing where R-hat is fine, or where there are no chains."""
    if not isinstance(posterior.guide, DrawsGuide):
        return ""
    r_hat = posterior.settings.get("r_hat")
    if r_hat is None:
        return f"{name}: draws without an R-hat, whether their chains converged is not known"
    if not r_hat <= R_HAT:
        return f"{name}: R-hat is {r_hat:.3f}, above {R_HAT}, so the chains have not converged: not to be trusted"
    return ""


def _units(model) -> tuple[Callable[[Tensor], Tensor], str]:
    """What takes flat latents (..., D) to units of the prior, S^(-1/2) times each; and why S is its diagonal only."""
    try:
        covariance, unknown = prior_covariance(model.sample_prior, model.sites.shapes), ""
    except TypeError as error:
        variance, unknown = prior_variance(model.sample_prior, model.sites.shapes), str(error)
        covariance = {name: value.double().reshape(-1, 1, 1) for name, value in variance.items()}
    roots = {}
    for name, blocks in covariance.items():
        values, vectors = torch.linalg.eigh(blocks.cpu())
        roots[name] = (vectors * values.rsqrt().unsqueeze(-2)) @ vectors.mT

    def whiten(flat: Tensor) -> Tensor:
        parts = flat.split([len(root) * root.shape[-1] for root in roots.values()], dim=-1)
        pieces = [part.unflatten(-1, root.shape[:2]) for part, root in zip(parts, roots.values(), strict=True)]
        whitened = [torch.einsum("...be,bef->...bf", *each) for each in zip(pieces, roots.values(), strict=True)]
        return torch.cat([each.flatten(-2) for each in whitened], dim=-1)

    return whiten, unknown


def _whitened(
    posterior: Posterior, name: str, whiten: Callable[[Tensor], Tensor], seed: int
) -> list[tuple[str, Tensor, float | None]]:
    """Label, covariance in units of the prior (D, D), independent draws it is worth: as it is, and uncorrelated."""
    model, bare = posterior.model, f"{name}, no correlation"
    if isinstance(posterior.guide, FullRankGuide):
        covariance = whiten(whiten(posterior.covariance().dense().double().cpu()).T)
        return [(name, covariance, None), (bare, covariance.diagonal().diag(), None)]
    draws = model.sites.join(posterior.sample(posterior.guide.total)).double().cpu()
    if not bool((draws.amax(0) > draws.amin(0)).any()):
        raise ValueError("expected a reference whose latents vary, got one whose draws are all the same")
    draws, generator = whiten(draws), torch.Generator().manual_seed(seed)
    alone = turned(draws, posterior.guide.chains, generator)
    worth = independent_draws(draws, posterior.guide.chains)
    return [(label, torch.cov(each.T).reshape(2 * [each.shape[1]]), worth)
            for label, each in ((name, draws), (bare, alone))]  # fmt: skip


def _row(values: Tensor) -> dict[str, float]:
    total = values.sum()
    shares = (values / total).cumsum(0) if total > 0 else torch.full_like(values, torch.nan)
    return {
        "latents": len(values),
        "first direction": float(shares[0]),
        "first eight": float(shares[min(8, len(values)) - 1]),
        f"directions for {_SHARE:.0%}": int((shares < _SHARE).sum()) + 1 if total > 0 else np.nan,
    }
