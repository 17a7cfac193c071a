"""Stochastic variational inference: fit a guide by maximising the ELBO."""

from __future__ import annotations

import logging
import math
import warnings
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import torch
from pyro.infer.autoguide import AutoLaplaceApproximation
from tqdm.auto import tqdm

from ..data import as_batches, check_class_order
from ..guides import Delta, LatentGuide, LowRankPrecision
from ..guides.stock import check_guide_spec
from ..model import BayesianLoRA
from ..posterior import Posterior, local_parameters
from ..predictive import predict
from ..provenance import fitted_with
from .checkpoint import Checkpoint, identity_of
from .checks import (
    check_callbacks,
    check_device,
    check_distribution,
    check_estimator,
    check_predictable,
    check_prior,
    check_settings,
    check_sites,
)
from .data_parallel import Workers
from .elbo import PartedELBO, has_closed_form, sites_of_latents
from .loop import Loop
from .progress import DRIFT, ScalesNotConverged, multiplier
from .start import base_guide, in_subspace, spread_guide
from .step import Rates, gradient_scaler, optimiser_of
from .stock_laplace import normal_at_mode

_LOGGER = logging.getLogger("pyro_lrblora")
_ROWWISE_ENTRIES = 2**26  # latents of all rows of a batch, above which draws are shared


@local_parameters
@torch.enable_grad()
def svi(
    model: BayesianLoRA,
    train,
    *,
    validation=None,
    guide=LowRankPrecision(rank=8),
    epochs: int = 5,
    steps: int | None = None,
    batch_size: int = 32,
    rates: Rates = Rates(),
    schedule: str = "cosine",
    warmup: float = 0.06,
    clip: float | None = 10.0,
    init: Posterior | None = None,
    map_epochs: int = 0,
    warm_start: bool = True,
    warm_start_rows: int | None = 1024,
    kl: str = "auto",
    draws: str = "auto",
    particles: int = 1,
    antithetic: bool = False,
    path_derivative: bool = False,
    accumulate: int = 1,
    patience: int | None = None,
    keep_best: bool = False,
    validation_draws: int = 8,
    seed: int = 0,
    device: str | None = None,
    precision: str = "fp32",
    checkpoint: str | Path | None = None,
    resume_from: str | Path | None = None,
    callbacks: Sequence[Callable[[dict, Posterior], object]] = (),
    progress: bool = True,
    tokenizer=None,
) -> Posterior:
    """Fit a guide to a model by stochastic variational inference, and return the posterior with its history.

    Neither the model, nor the network, nor Pyro's param store is changed. Every epoch is a row of the history and, at
    level INFO, a line of the logger "pyro_lrblora". In a torch.distributed process group the processes share the rows
    of every batch, for the result of one process; each is to make the same call, with all rows.

    Args:
        model: prepared or not; preparing it once lets several fits share one subspace.
        train: a datasets.Dataset, Batches, or a re-iterable of batch dicts, with labels.
        validation: rows whose NLL is recorded every epoch.
        guide: a spec of pyro_lrblora.guides, a stock Pyro autoguide class, or a callable from a model to a guide.
        epochs: passes over train; `steps`, where given, counts optimiser steps instead.
        batch_size: rows per batch (of all processes together), for a datasets.Dataset.
        rates: learning rates. A point head is trained to its posterior mode under the model's head_scale.
        schedule: "cosine", "linear" or "constant", after a linear warm-up over the share `warmup` of all steps.
        clip: greatest norm of the gradient of -ELBO / N; None for no clipping.
        init: start at the mean and head of this posterior, in its subspace: Delta, then Diagonal, then LowRank. From
            one with another number of classes the subspace and the latents are taken, and the head is probed anew. A
            prior's scales stay at their median where init is a point, whose own go to zero together with the latents.
        map_epochs: fit a Delta for so many epochs first and start there.
        warm_start: set the scales from the Fisher matrix at the start (pyro#2113 asks for such staging). False takes
            them from `init`, or else the guide's start_scale: 1.0 starts at the prior, 0.1 close to the base.
        warm_start_rows: rows that Fisher matrix is computed on, scaled up to N; None for all.
        kl: "closed", "mc" (Monte Carlo), or "auto" for closed form where there is one.
        draws: "row" (a draw per row of the batch), "shared" (one per batch), or "auto" for per row where the guide
            declares it and memory allows.
        particles: draws, per row or per batch, that every step averages over.
        antithetic: draws in pairs mirrored at the guide's mean; shared draws need an even number of particles.
        path_derivative: leave out the score term of log q of the latents ("sticking the landing"), not of a prior's own
            sites or a Bayesian head; Monte Carlo KL only.
        accumulate: batches per optimiser step.
        patience: stop after so many epochs without a better validation NLL and go back to the best; None runs all.
        keep_best: go back to the epoch with the best validation NLL at the end, whether or not anything stopped early.
        validation_draws: posterior draws for that NLL.
        seed: of everything random here. The subspace of a model that is not prepared has seed 0 whatever this is, so
            that fits with several seeds share it; model.prepare(train, seed=...) for others.
        device: None leaves the network where it is; "cpu", "cuda" or "auto" ("cuda" where there is one) moves it.
            Apple's "mps" has no float64, which the algebra of probes and guides needs.
        precision: "fp32", or "bf16" or "fp16" for autocast in the network alone; guide and loss stay in float32, and
            fp16 scales the loss.
        checkpoint: folder that the fit is written to after every epoch; what this very call left there is gone on with,
            to the same result (bit for bit on a CPU) as without the break. What a callback stopped goes on too.
        resume_from: the same, but there must be something to go on with.
        callbacks: called after every epoch with the history's last row and the posterior so far, see
            pyro_lrblora.callbacks; a true value stops.
        progress: show a progress bar.
        tokenizer: for a datasets.Dataset, where the model has none.

    Raises:
        ValueError, TypeError, KeyError: bad arguments, data or checkpoint, before any work.
        FloatingPointError: NaN or infinite loss; names the batch.

    Warns:
        ScalesNotConverged: the guide's standard deviations were still moving at the end.
    """
    settings = {
        "epochs": epochs,
        "steps": steps,
        "batch_size": batch_size,
        "rates": rates,
        "schedule": schedule,
        "warmup": warmup,
        "clip": clip,
        "map_epochs": map_epochs,
        "warm_start": warm_start,
        "warm_start_rows": warm_start_rows,
        "kl": kl,
        "draws": draws,
        "particles": particles,
        "antithetic": antithetic,
        "path_derivative": path_derivative,
        "accumulate": accumulate,
        "patience": patience,
        "keep_best": keep_best,
        "validation_draws": validation_draws,
        "seed": seed,
        "precision": precision,
    }
    if not isinstance(model, BayesianLoRA):
        raise TypeError(f"expected a BayesianLoRA to fit, got {type(model).__name__}; write lb.BayesianLoRA(network)")
    check_settings(settings)
    check_device(model, device)
    check_callbacks(callbacks)
    if (patience is not None or keep_best) and validation is None:
        raise ValueError("expected validation= with patience= or keep_best=: the best is judged on rows not trained on")
    if checkpoint is not None and resume_from is not None:
        raise ValueError("expected checkpoint= or resume_from=, got both; resume_from= goes on writing to its folder")
    check_guide_spec(guide)
    tokenizer = tokenizer or model.tokenizer
    given, train = train, as_batches(train, tokenizer, batch_size=batch_size, shuffle=seed).restarted()
    model.check_labels(train, "training data")
    if validation is not None:
        validation = as_batches(validation, tokenizer, batch_size=2 * batch_size, by_length=True)
        model.check_labels(validation, "validation data")
        check_class_order(train.class_names, validation.class_names, "validation data")
    if device is not None:
        model.network.to(_device(device))
    record = fitted_with(model.device, given, train)  # before a pass in another order

    workers, arguments = Workers(), settings | {"rates": vars(rates)}
    silent = not (progress and workers.first)
    with torch.random.fork_rng():
        folder, saved = checkpoint if resume_from is None else resume_from, None
        if folder is not None or workers.size > 1:
            identity = identity_of(model, guide, train, validation, init, arguments)
            workers.check_alike(identity, model.device)
        if folder is not None:
            saved = Checkpoint(folder, identity, required=resume_from is not None)
        resuming = saved is not None and saved.values is not None
        # Probe, subspace and warm start pass over the data before there is a step to count.
        with tqdm(desc="preparing", bar_format="{desc} {elapsed}", leave=False, disable=silent):
            torch.manual_seed(seed)
            if resuming:
                model, init, warm_start = saved.model(model, train, tokenizer), None, False
            else:
                model = in_subspace(model, init, train, tokenizer)
                if map_epochs:
                    with torch.random.fork_rng():  # what does not fit together is refused before the point is fitted
                        _begun(model, guide, init, settings)
                    init = svi(
                        model, train, guide=Delta(), epochs=map_epochs, rates=rates, init=init, warm_start=False,
                        seed=seed, schedule=schedule, warmup=warmup, clip=clip, accumulate=accumulate,
                        precision=precision, progress=progress,
                    )  # fmt: skip
                    model = in_subspace(model, init, train, tokenizer)
                model = workers.model_of_first(model, tokenizer)
            fitted, closed, per_row = _begun(model, guide, init, settings)
            fitted = spread_guide(fitted, model, guide, train, init, warm_start, warm_start_rows)
        if validation is not None:
            check_predictable(model, validation)
        resolved = {"kl": "closed" if closed else "mc", "draws": "row" if per_row else "shared"}
        posterior = Posterior(model, fitted, guide, [], {"method": "svi"} | arguments | resolved | record)
        total = steps or epochs * math.ceil(len(train) / accumulate)
        loop = Loop(
            posterior, optimiser_of(posterior, rates), train,
            PartedELBO(
                closed, model.sites.shapes, fitted if path_derivative else None, antithetic, num_particles=particles
            ),
            workers.programs(model, fitted, per_row, antithetic),
            total=total, pace=multiplier(schedule, warmup, total), clip=clip, accumulate=accumulate,
            precision=precision, patience=patience, workers=workers,
            scaler=gradient_scaler(model, precision),
        )  # fmt: skip
        if resuming:
            loop.load(saved)
        else:
            loop.begin()
        with tqdm(
            total=total, initial=loop.done, desc=type(fitted).__name__.removesuffix("Guide"), unit="step",
            disable=silent,
        ) as bar:  # fmt: skip
            stop = False
            while not (loop.finished or stop):
                row = loop.run_epoch(bar.update)
                if validation is not None:
                    row["validation_nll"] = _validation_nll(posterior, validation, validation_draws, precision, workers)
                    if keep_best or patience is not None:
                        loop.best.update(row["validation_nll"])
                names = ("ELBO/row", "KL") if posterior.has_bound else ("log joint/row", "-log prior")
                bar.set_postfix({"epoch": row["epoch"], names[0]: f"{row['elbo']:.3f}", names[1]: f"{row['kl']:.1f}"})
                if workers.first:
                    _LOGGER.info(_line(row))
                    if saved is not None:
                        loop.save(saved)
                    with torch.random.fork_rng():  # whoever draws there does not change the fit
                        stop = any([*(callback(row, posterior) for callback in callbacks)])
                stop = workers.agree(stop, model.device)
    loop.best.restore()
    if not loop.best.state and loop.watch.drift > DRIFT:
        warnings.warn(
            f"the scales had not converged: their mean logarithm still moved by {loop.watch.drift:.2f} per epoch at "
            f"the full rate (converged is below {DRIFT}); train longer or raise rates.scale={rates.scale}",
            ScalesNotConverged,
            stacklevel=3,
        )
    return normal_at_mode(posterior, train) if isinstance(fitted, AutoLaplaceApproximation) else posterior


def _begun(model: BayesianLoRA, spec, init: Posterior | None, settings: Mapping) -> tuple[torch.nn.Module, bool, bool]:
    """The guide before any pass over the data, whether its KL is in closed form, and whether rows have own draws.

    Raises:
        ValueError, TypeError: a prior, a guide and settings that do not fit together.
    """
    check_prior(model)
    guide = base_guide(model, spec, init)
    if isinstance(guide, LatentGuide):
        check_distribution(guide, model.sites.size)
    closed = settings["kl"] != "mc" and not settings["path_derivative"] and has_closed_form(model, guide)
    if settings["kl"] == "closed" and not closed:
        raise ValueError(f"expected a guide and prior with a closed-form KL, got {spec!r} and {model.prior!r}")
    check_sites(model, guide)
    per_row = _per_row(settings["draws"], guide, model.sites.size * settings["batch_size"], sites_of_latents(model))
    check_estimator(guide, settings, per_row)
    return guide, closed, per_row


def _per_row(draws: str, guide, entries: int, dependent: Sequence[str]) -> bool:
    declared = getattr(guide, "rowwise", None) is not None
    if draws == "row" and dependent:
        raise ValueError(
            f"expected a prior none of whose sites depends on the latents for draws='row', got {list(dependent)}, "
            "which would see those of all rows, or count once per row; write draws='shared'"
        )
    if draws == "row" and not declared:
        raise TypeError(
            f"expected a guide that declares `rowwise` for draws='row', got {type(guide).__name__}, which would "
            "silently become one guide per row; write draws='shared'"
        )
    return declared and (draws == "row" or (draws == "auto" and not dependent and entries <= _ROWWISE_ENTRIES))


def _validation_nll(posterior: Posterior, batches, draws: int, precision: str, workers: Workers) -> float:
    mine, total, count = workers.share(batches), 0.0, 0
    if mine:
        prediction = predict(
            posterior, mine, draws=posterior.balanced_draws(draws), precision=precision, progress=False
        )
        count, observed = prediction.observations, getattr(prediction, "observed", None)
        # What is fitted is what chooses the epoch, where a user's likelihood is not that of the classes shown.
        each = prediction.nll if observed is None else math.log(len(observed)) - float(observed.logsumexp(0).mean())
        total = count * each
    total, count = workers.sums([total, count], posterior.model.device)
    return total / count


def _line(row: dict) -> str:
    told = lambda value: value if isinstance(value, int) else f"{value:.4g}"
    return ", ".join(f"{name} {told(value)}" for name, value in row.items() if value is not None)


def _device(name: str) -> str:
    if name != "auto":
        return name
    return "cuda" if torch.cuda.is_available() else "cpu"
