"""One simulation of simulation-based calibration: a truth, its labels, a refit, and the truth's ranks."""

from __future__ import annotations

import hashlib
import re
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np
import torch
from pyro import poutine
from torch import Tensor

from ..guides.draws import DrawsGuide
from ..model import BayesianLoRA
from ..posterior import Posterior, local_parameters
from ..predictive import folding, outputs_at

_ENTRIES = 32  # latents looked at one by one; of more, as many random projections
_FOLDED_ROWS = 512


@dataclass(frozen=True)
class SimulatedStudy:
    """What every simulation shares; calling it with a number runs that simulation.

    Args:
        model: prepared, its head not a point.
        batches: of all rows; labels are replaced.
        fit: (model, batches, seed) -> Posterior.
        draws: S of each posterior.
        seed: of all simulations.
        quantities: the user's own, name -> function(values by site, batches) -> (S,).
    """

    model: BayesianLoRA
    batches: list[Mapping[str, Tensor]]
    fit: Callable
    draws: int
    seed: int
    quantities: Mapping[str, Callable]

    def __call__(self, number: int) -> dict:
        """The simulation's number, and either its ranks or the error that the fit ended in; JSON can hold it."""
        record = {"simulation": number}
        seeds = (np.random.SeedSequence((self.seed, number)).generate_state(5) >> 1).tolist()
        truth, batches = self.simulate(*seeds[:2])
        with warnings.catch_warnings(record=True) as caught, torch.random.fork_rng():
            warnings.simplefilter("always")
            torch.manual_seed(seeds[2])
            # Whatever the user's fit raises is counted and named; one bad data set must not end the study.
            try:
                posterior = self.fit(self.model, batches, seeds[2])
            except Exception as error:
                return record | {"error": f"{type(error).__name__}: {error}"}
        sample = self._sample(posterior, truth, seeds[3])
        if not all(value.isfinite().all() for value in sample.values()):
            return record | {"error": "FloatingPointError: draws that are not finite"}
        values = {name: torch.cat([value, sample[name].to(value)]) for name, value in truth.items()}
        found = torch.stack(list(self.measure(values, batches).values())).numpy()
        if np.isnan(found).any():
            return record | {"error": "FloatingPointError: NaN among the test quantities"}
        below, equal = (found[:, 1:] < found[:, :1]).sum(1), (found[:, 1:] == found[:, :1]).sum(1)
        ranks = below + np.random.default_rng(seeds[4]).integers(0, equal, endpoint=True)
        seen = {"warnings": sorted({each.category.__name__ for each in caught}), "ess": posterior.settings.get("ess")}
        return record | {"ranks": ranks.tolist()} | {name: value for name, value in seen.items() if value}

    @local_parameters
    @torch.no_grad()
    def simulate(self, latent_seed: int, label_seed: int) -> tuple[dict[str, Tensor], list[dict[str, Tensor]]]:
        """A prior draw of every site, (1, site shape), and the batches with labels drawn from the likelihood at it."""
        model, batches = self.model, []
        with torch.random.fork_rng(), poutine.block(), model.attached(dropout=False):
            torch.manual_seed(latent_seed)
            trace = poutine.trace(model.sample_prior).get_trace()
            truth = {name: trace.nodes[name]["value"] for name in trace.stochastic_nodes}
            torch.manual_seed(label_seed)
            for batch in self.batches:
                inputs = model.to_device({name: value for name, value in batch.items() if name != "labels"})
                outputs = model.outputs(inputs, truth, model.head_values())
                batches.append({**batch, "labels": model.label_distribution(outputs, inputs).sample().cpu()})
        return {name: value.unsqueeze(0) for name, value in truth.items()}, batches

    @local_parameters
    @torch.no_grad()
    def measure(self, values: Mapping[str, Tensor], batches) -> dict[str, Tensor]:
        """All test quantities of S draws, each (S,) in float64 on the host."""
        sites, count = self.model.sites, len(next(iter(values.values())))
        latents = sites.join(values)
        found = _coordinates("latents", sites.shapes, latents)
        for name, value in values.items():
            if name not in sites.shapes:
                found |= _coordinates(name, {name: value.shape[1:]}, value.reshape(count, -1))
        found["norm of latents"] = latents.double().norm(dim=1)
        found["log prior"] = self._log_prior(values)
        found["log likelihood"] = self._log_likelihood(values, batches)
        for name, quantity in self.quantities.items():
            if name in found:
                raise ValueError(f"expected a name that is not taken for a quantity, got {name!r}")
            found[name] = torch.as_tensor(quantity(values, batches))
            if found[name].shape != (count,):
                raise ValueError(f"expected quantity {name!r} of shape ({count},), got {tuple(found[name].shape)}")
        return {name: value.double().cpu() for name, value in found.items()}

    def names(self) -> list[str]:
        """The test quantities' names, found by measuring a prior draw."""
        return list(self.measure(*self.simulate(0, 0)))

    def configuration(self) -> dict:
        """What tells one study from another: not how many simulations it has."""
        digest = hashlib.sha256()
        inputs = [{name: value for name, value in batch.items() if name != "labels"} for batch in self.batches]
        for tensors in [self.model.adapted.tensors(), self.model.head_values(), *inputs]:
            for name, value in sorted(tensors.items()):
                digest.update(name.encode() + value.detach().cpu().double().numpy().tobytes())
        return {
            "seed": self.seed,
            "draws": self.draws,
            "fit": getattr(self.fit, "__qualname__", type(self.fit).__qualname__),
            # Without addresses, which differ from process to process.
            "model": re.sub(r" at 0x[0-9a-f]+", "", repr(self.model)),
            "head scale": self.model.head_scale,
            "quantities": self.names(),
            "sha256 of inputs, subspace and head": digest.hexdigest(),
        }

    def _sample(self, posterior, truth: Mapping[str, Tensor], seed: int) -> dict[str, Tensor]:
        if not isinstance(posterior, Posterior):
            raise TypeError(f"expected fit to return a Posterior, got {type(posterior).__name__}")
        if isinstance(posterior.guide, DrawsGuide) and posterior.guide.total < self.draws:
            raise ValueError(
                f"expected at least draws={self.draws} stored draws in a posterior, got {posterior.guide.total}; write "
                "a smaller draws="
            )
        sample = posterior.sample(self.draws, seed=seed)
        missing = sorted(truth.keys() - sample.keys())
        if missing:
            raise ValueError(f"expected a posterior over every site of the model, missing {missing}")
        return sample

    def _log_prior(self, values: Mapping[str, Tensor]) -> Tensor:
        totals = []
        for number in range(len(next(iter(values.values())))):
            at = {name: value[number] for name, value in values.items()}
            trace = poutine.trace(poutine.condition(self.model.sample_prior, at)).get_trace()
            totals.append(trace.log_prob_sum().double())
        return torch.stack(totals)

    def _log_likelihood(self, values: Mapping[str, Tensor], batches) -> Tensor:
        model, head, total = self.model, self.model.head_values(), 0.0
        with model.attached(dropout=False):
            for batch in batches:
                batch = model.to_device(batch)
                # Folded on a CPU too: what can be refitted a hundred times is small.
                fold = folding(model, batch, values, max(1, _FOLDED_ROWS // len(batch["labels"])))
                pieces = []
                for size, repeated, outputs in outputs_at(model, batch, values, head, fold):
                    log_prob = model.log_likelihood(outputs, repeated)
                    pieces.append(log_prob.double().reshape(size, -1).sum(1))
                total = total + torch.cat(pieces)
        return total


def _coordinates(title: str, shapes: Mapping[str, torch.Size], flat: Tensor) -> dict[str, Tensor]:
    """The columns of flat (S, D) by entry's name, or 32 random projections of more than 32."""
    if flat.shape[1] > _ENTRIES:
        generator = torch.Generator().manual_seed(0)
        directions = torch.randn(flat.shape[1], _ENTRIES, generator=generator).to(flat)
        projected = flat @ (directions / directions.norm(dim=0))
        return {f"projection {number} of {title}": column for number, column in enumerate(projected.T)}
    index = lambda at: f"[{','.join(map(str, at))}]" if at else ""
    names = [f"{name}{index(at)}" for name, shape in shapes.items() for at in np.ndindex(*shape)]
    return dict(zip(names, flat.T, strict=True))
