"""What the posterior's covariance looks like: its spectrum, its modules, and how they hang together."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import pandas as pd
import torch
from torch import Tensor

from ..adapters.targets import base_weight
from ..distributions import CovarianceFactors
from ..guides import LatentGuide
from ..guides.draws import DrawsGuide
from ..infer.elbo import is_normal
from ..infer.start import prior_sites
from ..posterior import Posterior, local_parameters
from ..priors import prior_variance
from . import spectra

_DENSE = 2048  # latents, up to which the covariance is decomposed whole
_BLOCK = 512  # latents of a module, up to which its block is written out
_TOP = {"first direction": 1, "first eight": 8}  # of a spectrum, whose share of the variance is in the table
_UPDATES = 100  # draws of W - W0, whose inner products take the square of it
_PRODUCTS = 4e7  # inner products of draws, of all modules together, for their correlation


@local_parameters
@torch.no_grad()
def structure(posterior: Posterior, draws: int = 500, seed: int = 0) -> Structure:
    """Spectrum of the covariance of the latents and of W - W0, and contraction, KL and correlation of the modules.

    In closed form where the posterior's covariance has one (the spectrum up to D = 2048), else from S draws through
    their S x S inner products; nothing is ever D x D above that. From draws, traces of squares are corrected for their
    number (Bai & Saranadasa 1996), eigenvalues are not: they spread, as those of any sample covariance do.

    Args:
        posterior: any; of a point all variances are zero.
        draws: S, at least 8, of stored ones at most all.
        seed: of the draws.

    Raises:
        ValueError: fewer than 8 draws.
    """
    if isinstance(posterior.guide, DrawsGuide):
        draws = min(draws, posterior.guide.total)
    if draws < 8:
        raise ValueError(f"expected draws >= 8, got {draws}")
    model, notes = posterior.model, []
    samples = {name: value.cpu() for name, value in posterior.sample(draws, seed=seed).items()}
    latents = model.sites.join(samples).double()
    worth = _worth(posterior, latents)
    prior = model.sites.join(prior_variance(model.sample_prior, model.sites.shapes)).double().cpu()
    covariance = _covariance(posterior)
    exact = covariance is not None
    if not exact:
        notes.append(f"no covariance in closed form: all of it is from {draws} draws")
    elif latents.shape[1] > _DENSE:
        notes.append(f"D = {latents.shape[1]:,} is above {_DENSE:,}: the spectrum is from {draws} draws")
    whole = exact and latents.shape[1] <= _DENSE
    dense = covariance.dense().double().cpu() if whole else None
    centred = latents - latents.mean(0)
    spectrum = lambda scale: (
        spectra.eigenvalues(dense / torch.outer(scale, scale))
        if whole
        else spectra.from_draws(centred / scale)[: len(scale)]
    )
    eigenvalues, whitened = spectrum(torch.ones_like(prior)), spectrum(prior.sqrt())
    # Not the first of `samples`: of stored draws these are the first chain's.
    updates = min(draws, _UPDATES)
    spread = {name: value.cpu() for name, value in posterior.sample(updates, seed=seed).items()}
    few = _worth(posterior, model.sites.join(spread).double())
    gram, sizes = _update_products(model, spread)
    mean = model.sites.join(posterior.mean()).double().cpu()
    blocks = _blocks(model, covariance, centred)
    found = {"latents": {}, "W - W0": {}}
    drawn = None if exact else draws
    kl, dependence, table = _modules(posterior, blocks, prior, mean, drawn, worth, notes, found["latents"])
    found["W - W0"] = {name: spectra.from_products(each) for name, each in gram.items()}
    table["W - W0: effective rank"] = {
        name: spectra.effective_rank(torch.as_tensor(values), few) for name, values in found["W - W0"].items()
    }
    for label, top in _TOP.items():
        table[f"W - W0: {label}"] = {name: spectra.share(values, top) for name, values in found["W - W0"].items()}
    table["W - W0: sd of an entry"] = {
        name: float(values.sum() / sizes[name][0]) ** 0.5 for name, values in found["W - W0"].items()
    }
    # Different draws' products estimate the squared norm of the mean without the variance that equal ones add.
    table["mean W - W0 / W0"] = {
        name: max(0.0, float(each.sum() - each.diagonal().sum()) / (len(each) * (len(each) - 1))) ** 0.5
        / sizes[name][1]
        for name, each in gram.items()
    }
    variance = float(covariance.variance.double().sum()) if exact else float(centred.square().sum() / (draws - 1))
    induced = spectra.from_products(sum(gram.values()))
    return Structure(
        eigenvalues=eigenvalues.numpy(),
        whitened=whitened.numpy(),
        induced=induced,
        variance=variance,
        effective_rank=spectra.effective_rank(eigenvalues, None if whole else worth),
        whitened_effective_rank=spectra.effective_rank(whitened, None if whole else worth),
        induced_effective_rank=spectra.effective_rank(torch.as_tensor(induced), few),
        modules=table,
        spectra=found,
        correlation=_correlation(model, dense, centred),
        kl=kl,
        dependence=dependence,
        exact=whole,
        draws=draws,
        note="; ".join(notes),
    )


@dataclass(frozen=True)
class Structure:
    """The covariance of D latents in L modules.

    Args:
        eigenvalues: (M,) of the covariance of the latents, descending; all D, or those that S draws show.
        whitened: (M,) of the covariance in units of the prior's standard deviations: 1 has learned nothing.
        induced: eigenvalues above zero of the covariance of all W - W0 together, from at most 100 draws.
        variance: the trace of the covariance.
        effective_rank: participation ratio tr(C)^2 / tr(C^2): D where all eigenvalues are equal; NaN without variance.
        whitened_effective_rank: the same in units of the prior's standard deviations.
        induced_effective_rank: the same of all W - W0 together.
        modules: a row per module: latents; prior sd and posterior sd, root mean squares; contraction, 1 - trace over
            the prior's; effective parameters, the sum over latents of 1 - variance / prior variance (MacKay 1992,
            doi 10.1162/neco.1992.4.3.415); effective rank of its block, and the share of its variance in the first
            direction and in the first eight; KL of its marginal to the prior, nats; effective rank and the same shares
            of the covariance of W - W0; sd of an entry of W - W0; norm of the mean W - W0 over that of W0.
        spectra: "latents" and "W - W0" -> module -> eigenvalues of its covariance, descending, from as many draws as
            those of all together; without the latents of a module that has more than 512.
        correlation: (L, L) RV coefficients between modules, 0 to 1 (Robert & Escoufier 1976); from draws debiased (Song
            et al. 2012).
        kl: of all latents to the prior, nats; NaN where there is no closed form, as with a prior that has scales of its
            own.
        dependence: kl minus the sum over modules, nats: what the modules know of each other.
        exact: whether the spectrum is in closed form.
        draws: S.
        note: what is from draws or missing, and why.
    """

    eigenvalues: np.ndarray
    whitened: np.ndarray
    induced: np.ndarray
    variance: float
    effective_rank: float
    whitened_effective_rank: float
    induced_effective_rank: float
    modules: pd.DataFrame
    spectra: dict[str, dict[str, np.ndarray]]
    correlation: pd.DataFrame
    kl: float
    dependence: float
    exact: bool
    draws: int
    note: str = ""

    def share(self, top: int, of: str = "latents", module: str | None = None) -> float:
        """Share of the variance in the first eigenvalues; NaN without variance.

        Args:
            top: how many.
            of: "latents" or "W - W0".
            module: one of them; None is all together.
        """
        if of not in self.spectra or module not in (None, *self.spectra[of]):
            raise ValueError(
                f"expected of= among {list(self.spectra)} and a module with a spectrum or None, got {of!r}, {module!r}"
            )
        if module is not None:
            return spectra.share(self.spectra[of][module], top)
        if of == "W - W0":
            return spectra.share(self.induced, top)
        # Over their own sum: eigenvalues from draws do not add up to a trace in closed form.
        return spectra.share(self.eigenvalues, top) if self.variance > 0 else float("nan")


def _worth(posterior: Posterior, latents: Tensor) -> float:
    """How many independent draws as many of a posterior's are worth: those of a chain resemble each other."""
    if not isinstance(posterior.guide, DrawsGuide):
        return len(latents)
    chains = posterior.guide.chains
    return spectra.independent_draws(latents, chains if len(latents) % chains == 0 else 1)


def _covariance(posterior: Posterior):
    """In closed form, or None. Stored draws have that of a sample only."""
    if isinstance(posterior.guide, DrawsGuide):
        return None
    try:
        return posterior.covariance()
    except TypeError:
        return None


def _update_products(model, samples) -> tuple[dict[str, Tensor], dict[str, tuple[int, float]]]:
    """Inner products (S, S) of draws of W - W0 by module, and the entries and norm of W0."""
    drawn = {name: samples[name] for name in model.sites.shapes}
    sizes, draws = {}, len(next(iter(drawn.values())))
    gram = {name: torch.empty(draws, draws, dtype=torch.float64) for name in model.modules}  # first: see _blocks
    for name, latent in model.adapted.per_module(drawn).items():
        left, right = model.adapted.low_rank_factors(name, latent)
        left, right = (each.double().cpu().expand(len(latent[0]), *each.shape[-2:]) for each in (left, right))
        # tr(R_s' L_s' L_t R_t): r x r for every pair, never m x n.
        inner = torch.einsum("smr,tmq->strq", left, left), torch.einsum("srn,tqn->strq", right, right)
        gram[name].copy_((inner[0] * inner[1]).sum((-2, -1)))
        weight = base_weight(model.modules[name])
        sizes[name] = weight.numel(), float(weight.float().norm())
    return gram, sizes


def _places(model) -> dict[str, Tensor]:
    """Where each module's latents are in the flat vector."""
    owners = [module for site in model.sites.shapes for module in model.adapted.members[site]]
    places: dict[str, list[Tensor]] = {}
    for owner, where in zip(owners, model.sites.modules(), strict=True):
        places.setdefault(owner, []).append(torch.arange(where.start, where.stop))
    return {name: torch.cat(parts) for name, parts in places.items()}


def _blocks(model, covariance, centred: Tensor) -> dict[str, tuple[Tensor, Tensor | None, Tensor]]:
    """By module: where, the covariance block (None where too large), the variances."""
    places = _places(model)
    if covariance is None:
        variance = centred.square().sum(0) / (len(centred) - 1)
    else:
        variance = covariance.variance.double().cpu()
    # All that is kept comes first: between the large temporaries below it would leave holes that add up to gigabytes.
    blocks = {
        name: (where, centred.new_empty(len(where), len(where)) if len(where) <= _BLOCK else None, variance[where])
        for name, where in places.items()
    }
    for where, block, _ in blocks.values():
        if block is None:
            continue
        if covariance is None:
            own = centred[:, where]
            block.copy_(own.T @ own / (len(own) - 1))
        elif isinstance(covariance, CovarianceFactors):
            factor = covariance.factor[where].double()  # rows of the factor: the units below are a block times D
            block.copy_(covariance.diagonal[where].double().diag() + covariance.sign * factor @ factor.T)
        else:
            units = torch.zeros(len(where), centred.shape[1]).to(covariance.variance)
            units[torch.arange(len(where)), where] = 1
            block.copy_(covariance.times(units).cpu()[:, where])
    return blocks


def _modules(
    posterior, blocks, prior, mean, drawn: int | None, worth: float, notes: list[str], found: dict[str, np.ndarray]
) -> tuple[float, float, pd.DataFrame]:
    """KL of all latents, what it exceeds the modules' by, and the table of the modules; their spectra are filled in."""
    sites, others = prior_sites(posterior.model)
    scales = sorted(set(others) - set(posterior.model.head_start))  # a Bayesian head is independent of the latents
    if not all(bool(fn.variance.isfinite().all()) for fn in sites.values()):
        notes.append("the prior's variance is infinite: the median magnitude over 0.6745 stands for its sd")
    normal = drawn is None and not posterior.is_point and all(is_normal(fn) for fn in sites.values())
    if not normal:
        notes.append("no KL: it takes a Gaussian guide and a Normal prior")
    elif scales:
        notes.append(f"no KL: the latents are Normal only given the prior's own sites ({', '.join(scales)})")
        normal = False
    centre = (
        posterior.model.sites.join({name: fn.mean for name, fn in sites.items()}).double().cpu() if normal else None
    )
    rows = {}
    for name, (where, block, variance) in blocks.items():
        own, kl = prior[where], float("nan")
        if normal and block is not None:
            ratio = block / own.sqrt().outer(own.sqrt())
            off = (mean[where] - centre[where]).square() / own
            kl = float((ratio.diagonal() + off - 1).sum() - torch.linalg.slogdet(ratio)[1]) / 2
        values = None if block is None else spectra.eigenvalues(block)
        if values is not None:
            found[name] = values[: None if drawn is None else drawn - 1].numpy()  # no more than draws can show
        rows[name] = {
            "latents": len(where),
            "prior sd": float(own.mean()) ** 0.5,
            "posterior sd": float(variance.mean()) ** 0.5,
            "contraction": float(1 - variance.sum() / own.sum()),
            "effective parameters": float((1 - variance / own).sum()),
            "effective rank": float("nan") if values is None else spectra.effective_rank(values, drawn and worth),
            **{label: spectra.share(found.get(name, np.zeros(0)), top) for label, top in _TOP.items()},
            "KL (nats)": kl,
        }
    table = pd.DataFrame.from_dict(rows, orient="index").rename_axis("module")
    if not (normal and isinstance(posterior.guide, LatentGuide)):
        return float("nan"), float("nan"), table
    variance = posterior.covariance().variance.double().cpu()
    cross = 0.5 * (torch.log(2 * torch.pi * prior) + (variance + (mean - centre).square()) / prior).sum()
    joint = float(cross) - float(posterior.guide.distribution().entropy())
    return joint, joint - float(table["KL (nats)"].sum(skipna=False)), table


def _correlation(model, dense: Tensor | None, centred: Tensor) -> pd.DataFrame:
    places = _places(model)
    if dense is not None:
        squares = torch.stack(
            [torch.stack([dense[a][:, b].square().sum() for b in places.values()]) for a in places.values()]
        )
    else:
        squares = _unbiased_products([centred[:, where] for where in places.values()])
    own = squares.diagonal().clamp(min=0).sqrt()
    values = (squares / own.outer(own).clamp(min=1e-300)).clamp(0, 1)
    return pd.DataFrame(values.numpy(), index=list(places), columns=list(places))


def _unbiased_products(parts: list[Tensor]) -> Tensor:
    """Unbiased estimates of |C_ab|_F^2 for all pairs of modules (the linear HSIC of Song et al. 2012, equation 5)."""
    total = len(parts[0])
    rows = min(total, max(8, int((_PRODUCTS / len(parts)) ** 0.5)))
    # At random: the first would be one chain's, evenly spaced ones could be one member's of an ensemble.
    kept = torch.randperm(total, generator=torch.Generator().manual_seed(0))[:rows].sort().values
    flat = []
    for part in parts:
        gram = part[kept] @ part[kept].T
        gram.fill_diagonal_(0)
        # U-centring: inner products of such matrices over n (n - 3) are unbiased (Szekely & Rizzo 2014).
        sums = gram.sum(0)
        gram = gram - (sums[:, None] + sums[None, :]) / (rows - 2) + sums.sum() / ((rows - 1) * (rows - 2))
        gram.fill_diagonal_(0)
        flat.append(gram.flatten())
    flat = torch.stack(flat)
    return flat @ flat.T / (rows * (rows - 3))
