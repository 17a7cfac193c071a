"""Deep ensemble: independent fits with equal weights (Lakshminarayanan et al. 2017, arXiv 1612.01474)."""

from __future__ import annotations

from functools import partial
from pathlib import Path

import torch

from ..counts import check_counts
from ..data import EncodedBatches, as_batches
from ..guides import Delta
from ..guides.ensemble import Ensemble, EnsembleGuide
from ..model import BayesianLoRA
from ..posterior import Posterior, local_parameters
from ..priors import prior_variance
from ..provenance import fitted_with
from .parallel import run_fits
from .start import start_at
from .svi import svi


@local_parameters
def ensemble(
    model: BayesianLoRA,
    train,
    *,
    members: int = 5,
    guide=Delta(),
    spread: float = 0.1,
    seed: int = 0,
    n_jobs: int | None = 1,
    tokenizer=None,
    batch_size: int = 32,
    checkpoint: str | Path | None = None,
    **options,
) -> Posterior:
    """Fit M guides from different starts and orders of the data, in one subspace, each with its own point head.

    A draw is a draw from one member with that member's head; predict(draws=M) takes every member once. With LoRA
    and Delta members it is the LoRA ensemble; any other guide makes an ensemble of posteriors.

    Args:
        model: prepared or not.
        train: as for svi.
        members: M, at least 2.
        guide: the members' family.
        spread: standard deviation of the members' starts around the base, as a share of the prior's.
        seed: of the starts, the fits and the order of rows (of Batches too, where they shuffle), member m having
            seed * M + m, so that ensembles of different seeds share no member.
        n_jobs: processes, as for parallel_fits.
        tokenizer: for a datasets.Dataset, where the model has none.
        batch_size: rows per batch, for a datasets.Dataset.
        checkpoint: as for svi, with a folder in it for every member.
        options: of svi, for every member.

    Raises:
        ValueError: fewer than 2 members, or an option that is not for an ensemble.
    """
    check_counts(2, members=members)
    if "init" in options:
        raise ValueError("expected no init= for an ensemble: its members start apart; write members= and spread=")
    if "resume_from" in options:
        raise ValueError("expected checkpoint= for an ensemble, which goes on with what is there, got resume_from=")
    tokenizer = tokenizer or model.tokenizer
    rows = as_batches(train, tokenizer, batch_size=batch_size).restarted()
    model.check_labels(rows, "training data")
    if not model.prepared:
        model = model.prepare(rows, tokenizer=tokenizer)
    jobs = {}
    for member, own_seed in enumerate(range(seed * members, (seed + 1) * members)):
        start = start_at(model, None, rows, tokenizer)
        with torch.no_grad():
            variance = model.sites.join(prior_variance(model.sample_prior, model.sites.shapes))
            generator = torch.Generator().manual_seed(own_seed)
            noise = torch.randn(len(variance), generator=generator).to(variance)
            start.guide.loc += spread * variance.sqrt() * noise
        # Batches bring the seed of their order with them, the same for all.
        given = train.restarted(own_seed) if isinstance(train, EncodedBatches) else train
        jobs[f"member {member}"] = partial(
            svi, model, given, guide=guide, init=start, seed=own_seed, tokenizer=tokenizer, batch_size=batch_size,
            checkpoint=None if checkpoint is None else Path(checkpoint) / f"member_{member}", **options,
        )  # fmt: skip
    own = {"prior": model.prior, "likelihood": model.likelihood, "guide": guide, "tokenizer": tokenizer}
    found = dict(run_fits(jobs, model.network, n_jobs, own))
    fits = [found[name] for name in jobs]
    combined = EnsembleGuide([fit.guide for fit in fits], [fit.head() for fit in fits])
    # The posterior's own head, for a prediction at the mean, is the average of the members'.
    averaged = fits[0].model.with_head(fits[0].model.head)
    if averaged.point_head is not None:
        states = [fit.model.point_head.state_dict() for fit in fits]
        averaged.point_head.load_state_dict({k: sum(state[k] for state in states) / members for k in states[0]})
    if averaged.learned_scale is not None:
        logs = [fit.model.learned_scale.log_scale.detach() for fit in fits]
        averaged.learned_scale.log_scale.data.copy_(sum(logs) / members)  # their geometric mean
    history = [{"member": number, **row} for number, fit in enumerate(fits) for row in fit.history]
    settings = {"method": "ensemble", "members": members, "spread": spread, "seed": seed, "member": fits[0].settings}
    settings |= fitted_with(averaged.device, train, rows)
    return Posterior(averaged, combined, Ensemble(guide, members), history, settings)
