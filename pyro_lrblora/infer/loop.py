"""The epochs of a fit, and all that changes from one to the next."""

from __future__ import annotations

import math
import time
from collections.abc import Callable

import torch
from torch import Tensor

from ..data import row_weight
from ..posterior import Posterior
from .checkpoint import Checkpoint
from .data_parallel import Workers
from .elbo import PartedELBO
from .progress import BestState, ScaleWatch, load_states, states, under
from .start import subspace_of
from .step import add_gradients, step


class Loop:
    """Runs epochs of optimiser steps; between two of them it can be written to a checkpoint and read back.

    Args:
        posterior: what is trained; its history grows by a row per epoch.
        optimiser: over its parameters.
        train: Batches, or batches of the user's own.
        elbo, programs: the estimator, and the model and guide (or their row-wise forms) it is of.
        total: optimiser steps in all.
        pace: the factor on the learning rates at each step.
        clip, accumulate, precision, patience: as for svi.
        workers: the processes that share the rows of a batch.
        scaler: of the loss, where the network computes in fp16.
    """

    def __init__(
        self,
        posterior: Posterior,
        optimiser: torch.optim.Optimizer,
        train,
        elbo: PartedELBO,
        programs: tuple[Callable, Callable],
        *,
        total: int,
        pace: Callable[[int], float],
        clip: float | None,
        accumulate: int,
        precision: str,
        patience: int | None,
        workers: Workers,
        scaler: torch.amp.GradScaler,
    ):
        self.posterior, self.optimiser, self.train, self.workers = posterior, optimiser, train, workers
        self.elbo, self.programs, self.scaler = elbo, programs, scaler
        self.total, self.pace, self.clip, self.accumulate, self.precision = total, pace, clip, accumulate, precision
        self.rates = [group["lr"] for group in optimiser.param_groups]
        model = posterior.model
        trained = {"guide": posterior.guide, "head": model.point_head, "prior": model.learned_scale}
        self.trained = {name: module for name, module in trained.items() if module is not None}
        self.watch, self.best = ScaleWatch(), BestState(self.trained, patience)
        self.epoch = self.done = 0  # epochs and optimiser steps so far

    @property
    def finished(self) -> bool:
        """Whether all steps are done, or patience is at its end."""
        return self.done >= self.total or self.best.exhausted

    def begin(self) -> None:
        """Where all processes start: alike."""
        self.workers.begin_alike(self.trained, self.posterior.model.device)
        self.watch.record(self.posterior.guide, 0.0)

    def run_epoch(self, after_step: Callable[[], object]) -> dict:
        """One pass over the data, or what is left of it: the history's next row."""
        model = self.posterior.model
        self.epoch += 1
        begun, spent, seen, sums = time.perf_counter(), 0.0, 0.0, [0.0, 0.0]
        for position, batch in enumerate(self.train):
            part = row_weight(batch, self.train)
            batch, share = self.workers.part(batch)
            where, weight = (position, self.epoch), part * share / self.accumulate
            add_gradients(model, self.elbo, *self.programs, batch, where, self.precision, weight, self.scaler)
            bound, seen = self.elbo.bound, seen + part
            sums = [sums[0] + part * share * bound.log_likelihood, sums[1] + part * share * bound.kl]
            if (position + 1) % self.accumulate and position + 1 < len(self.train):
                continue
            spent += self.pace(self.done) * self.accumulate / len(self.train)
            self._step()
            after_step()
            if self.done == self.total:
                break
        log_likelihood, kl = (value / seen for value in self.workers.sums(sums, model.device))
        row = {
            "epoch": self.epoch, "step": self.done, "elbo": (log_likelihood - kl) / model.size, "kl": kl,
            "log_likelihood": log_likelihood / model.size,
            "mean_log_sd": self.watch.record(self.posterior.guide, spent), "seconds": time.perf_counter() - begun,
        }  # fmt: skip
        self.posterior.history.append(row)
        return row

    def save(self, checkpoint: Checkpoint) -> None:
        """Write all that the next epoch depends on."""
        subspace, described = subspace_of(self.posterior.model)
        tensors = {f"subspace.{name}": value for name, value in subspace.items()}
        tensors |= {f"trained.{name}": value for name, value in states(self.trained).items()}
        tensors |= {f"best.{name}": value for name, value in self.best.state.items()}
        tensors |= {
            f"optimiser.{number}.{name}": value
            for number, moments in self.optimiser.state_dict()["state"].items()
            for name, value in moments.items()
        }
        tensors |= {f"random.{name}": value for name, value in self._random_states().items()}
        values = {
            "subspace": described,
            "epoch": self.epoch,
            "step": self.done,
            "history": self.posterior.history,
            "watch": self.watch.points,
            "scaler": self.scaler.state_dict(),
            "best": [None if math.isinf(self.best.nll) else self.best.nll, self.best.waited],
        }
        checkpoint.write(tensors, values)

    def load(self, checkpoint: Checkpoint) -> None:
        """Go on where a checkpoint was written; the posterior's model is already in its subspace."""
        values = checkpoint.values
        load_states(self.trained, under("trained.", checkpoint.tensors))
        moments: dict[int, dict[str, Tensor]] = {}
        for key, value in under("optimiser.", checkpoint.tensors).items():
            number, name = key.split(".")
            moments.setdefault(int(number), {})[name] = value
        groups = self.optimiser.state_dict()["param_groups"]
        self.optimiser.load_state_dict({"state": moments, "param_groups": groups})
        self.scaler.load_state_dict(values["scaler"])
        self.epoch, self.done = values["epoch"], values["step"]
        self.posterior.history.extend(values["history"])
        self.watch.points = [tuple(point) for point in values["watch"]]
        nll, self.best.waited = values["best"]
        self.best.nll, self.best.state = math.inf if nll is None else nll, under("best.", checkpoint.tensors)
        self._set_random_states(under("random.", checkpoint.tensors))

    def _step(self) -> None:
        # A group of which nothing had a gradient has none in any process.
        parameters = [p for group in self.optimiser.param_groups for p in group["params"]]
        self.workers.add_up(p.grad for p in parameters if p.grad is not None)
        for group, rate in zip(self.optimiser.param_groups, self.rates, strict=True):
            group["lr"] = rate * self.pace(self.done)
        step(self.optimiser, self.clip, self.scaler)
        self.done += 1

    def _random_states(self) -> dict[str, Tensor]:
        device = self.posterior.model.device
        found = {"cpu": torch.get_rng_state()}
        if device.type != "cpu":
            found[device.type] = torch.get_device_module(device).get_rng_state(device)
        if self.train.generator is not None:
            found["order"] = self.train.generator.get_state()
        return found

    def _set_random_states(self, saved: dict[str, Tensor]) -> None:
        device = self.posterior.model.device
        torch.set_rng_state(saved["cpu"])
        if device.type != "cpu" and device.type in saved:
            torch.get_device_module(device).set_rng_state(saved[device.type], device)
        if "order" in saved:
            self.train.generator.set_state(saved["order"])
