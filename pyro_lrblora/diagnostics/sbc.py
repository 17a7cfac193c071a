"""Simulation-based calibration: does a way of fitting recover what it should, on data whose truth is known."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path

import datasets
import pandas as pd
from torch import Tensor

from ..counts import check_counts
from ..data import as_batches, batch_rows
from ..guides import FullRank
from ..infer import Rates, svi
from ..infer.parallel import run_jobs
from ..model import BayesianLoRA
from ..posterior import Posterior
from .simulated_study import SimulatedStudy
from .uniformity import EcdfTest, bias_and_width, chi_squared, holm

_LEVEL = 0.05  # of the verdict, all quantities together
_ERRORS = 3.0  # standard errors from which on a shape is named
_FEW = 20  # simulations
_BATCH = 32  # rows, of a datasets.Dataset


def full_rank_fit(model: BayesianLoRA, train, seed: int) -> Posterior:
    """A joint normal by 250 steps of SVI: near the exact posterior of tiny_problem, in a second or two."""
    rates = Rates(loc=0.03, scale=0.03, factor=0.02)
    options = {"draws": "shared", "path_derivative": True, "progress": False}
    return svi(model, train, guide=FullRank(), steps=250, rates=rates, seed=seed, **options)


def sbc(
    model: BayesianLoRA,
    data,
    fit: Callable = full_rank_fit,
    *,
    simulations: int = 100,
    draws: int = 99,
    quantities: Mapping[str, Callable] | None = None,
    seed: int = 0,
    n_jobs: int | None = 1,
    folder=None,
    progress: bool = True,
) -> SBC:
    """Simulation-based calibration (Talts et al. 2018, arXiv 1804.06788): ranks of true values among posterior draws.

    Every simulation draws all sites from the prior and labels from the likelihood at them, fits those labels, and ranks
    the truth among the posterior's draws. If `fit` gave exact posteriors, every rank would be uniform on 0..S. It tells
    about a way of fitting, on average over the prior, not about the posterior of one data set.
    `sbc(*tiny_problem(), fit)` is the quick form, in minutes.

    Ranked are the latents one by one (above 32 of them, 32 fixed random projections), a prior's own sites and a
    Bayesian head likewise, the latents' norm, the log prior, and the log likelihood of the simulated labels. Only
    the last depends on the data: a fit that ignores the data and returns the prior passes all others (Modrak et al.
    2022, arXiv 2211.02383).

    Args:
        model: head not a point, prior not learned. If not prepared, it is prepared once, on `data`; the simulations
            are conditional on that subspace.
        data: a datasets.Dataset, Batches, or a re-iterable of batch dicts. The inputs are kept and the labels replaced.
        fit: (model, batches, seed) -> Posterior, with a simulation's own labels in the batches.
        simulations: refits, n.
        draws: S of each posterior; ranks are 0..S. Of a Markov chain's stored draws, S evenly spaced ones.
        quantities: name -> function(values by site (S, site shape), batches) -> (S,), ranked beside those above.
        seed: simulation i is the same for every `simulations` and `n_jobs`, up to rounding.
        n_jobs: processes, each with one thread of torch, as for infer.parallel_fits; above 1 it needs `fit` and
            `quantities` that can be sent to another process.
        folder: where every finished simulation, failed ones too, is written as a line; a second call goes on there.
            Give every `fit` a folder of its own: functions are told apart by name only.
        progress: show a progress bar.

    Raises:
        ValueError: a point head, a learned prior scale, counts below 1, a quantity of a wrong shape or a name that is
            taken, a folder of another configuration, fewer stored draws than `draws`.
        TypeError: `fit` returned no Posterior.
        RuntimeError: every fit failed.
    """
    quantities = dict(quantities or {})
    _check_arguments(model, fit, quantities, simulations=simulations, draws=draws)
    batches = _batches(model, data)
    if not model.prepared:
        model = model.prepare(batches)
    model = model.with_size(sum(map(batch_rows, batches)))
    study = SimulatedStudy(model, batches, fit, draws, seed, quantities)
    configuration = study.configuration()
    records, file = ({}, None) if folder is None else _resume(Path(folder), configuration)
    missing = [number for number in range(simulations) if number not in records]
    jobs = {number: partial(study, number) for number in missing}
    for _, record in run_jobs(jobs, n_jobs, progress, "SBC fits"):
        records[record["simulation"]] = record
        if file is not None:
            with file.open("a") as out:
                out.write(json.dumps(record) + "\n")
    done = [records[number] for number in range(simulations)]
    ranks = {record["simulation"]: record["ranks"] for record in done if "ranks" in record}
    if not ranks:
        raise RuntimeError(f"expected some fits to succeed, all {simulations} failed, the first by {done[0]['error']}")
    table = pd.DataFrame.from_dict(ranks, orient="index", columns=configuration["quantities"])
    return SBC(table.rename_axis("simulation"), draws, _note(done, draws))


@dataclass(frozen=True)
class SBC:
    """Ranks of n true values among S posterior draws, and whether they are uniform.

    Args:
        ranks: (n, quantities), integers 0..S; the index is the simulation's number.
        draws: S.
        note: which fits failed, and what they warned of; empty where there is nothing to say.
    """

    ranks: pd.DataFrame
    draws: int
    note: str = ""

    @cached_property
    def ecdf_test(self) -> EcdfTest:
        """The simultaneous band of an ECDF of n ranks."""
        return EcdfTest.of(len(self.ranks), self.draws)

    @cached_property
    def table(self) -> pd.DataFrame:
        """A row per quantity, with bias and width (standard errors), p-values (probability), and what they mean.

        Bias is positive where the truth is above most draws, width where it is too often outside them. The adjusted p
        is Holm's over quantities, of twice the smaller of the two p-values.
        """
        rows = []
        for name in self.ranks:
            ranks = self.ranks[name].to_numpy()
            bias, width = bias_and_width(ranks, self.draws)
            tests = chi_squared(ranks, self.draws), self.ecdf_test.p_value(ranks)
            rows.append((bias, width, *tests))
        columns = ["bias", "width", "chi-squared p", "ECDF p"]
        table = pd.DataFrame(rows, index=pd.Index(self.ranks.columns, name="quantity"), columns=columns)
        table["adjusted p"] = holm((2 * table[columns[2:]].min(axis=1)).clip(upper=1).to_numpy())
        table["shape"] = [_words(*row) for row in table[["bias", "width", "adjusted p"]].to_numpy()]
        return table

    @property
    def uniform(self) -> bool:
        """Whether no quantity's ranks are off at the 5% level, all quantities together."""
        return bool((self.table["adjusted p"] >= _LEVEL).all())

    @property
    def verdict(self) -> str:
        """The result in a sentence; the quantities that are off, the worst first."""
        if self.uniform:
            return f"all {len(self.table)} quantities have ranks as uniform as {len(self.ranks)} simulations can tell"
        off = self.table[self.table["adjusted p"] < _LEVEL].sort_values("adjusted p", kind="stable")
        named = "; ".join(f"{name}: {shape}" for name, shape in off["shape"].head(5).items())
        more = f"; and {len(off) - 5} more" if len(off) > 5 else ""
        return f"{len(off)} of {len(self.table)} quantities have ranks that are not uniform: {named}{more}"


def _check_arguments(model, fit, quantities, **counts: int) -> None:
    check_counts(**counts)
    for what, value in {"fit": fit, **quantities}.items():
        if not callable(value):
            raise TypeError(f"expected {what!r} to be a function, got {type(value).__name__}")
    if model.point_head is not None:
        raise ValueError(
            "expected a head with a prior or fixed for simulation-based calibration, got head='point', which has no "
            "truth to be drawn; write model.with_head('bayesian') or model.with_head(lb.fixed_from(posterior))"
        )
    if model.learned_scale is not None:
        raise ValueError(
            f"expected a prior that can be drawn from, got {model.prior!r}, whose scale every fit learns anew; write "
            "model.with_prior(lb.priors.LayerScale(...)), or a fixed scale"
        )


def _batches(model, data) -> list[dict[str, Tensor]]:
    """The data as a list of batch dicts, padded to one width where they are a datasets.Dataset."""
    if not isinstance(data, datasets.Dataset):
        return [dict(batch) for batch in as_batches(data)]
    (whole,) = as_batches(data, model.tokenizer, batch_size=max(1, len(data)))
    return [
        {name: value[start : start + _BATCH] for name, value in whole.items()} for start in range(0, len(data), _BATCH)
    ]


def _resume(folder: Path, configuration: dict) -> tuple[dict[int, dict], Path]:
    """The simulations a folder holds already, by number, and the file that takes the others."""
    folder.mkdir(parents=True, exist_ok=True)
    settings, file = folder / "configuration.json", folder / "simulations.jsonl"
    if settings.exists():
        held = json.loads(settings.read_text())
        other = [name for name, value in configuration.items() if held.get(name) != value]
        if other:
            name = other[0]
            raise ValueError(
                f"expected a folder of the same simulations, {folder} has others ({', '.join(other)}): {name} "
                f"{held.get(name)!r} there, {configuration[name]!r} here; write another folder="
            )
    else:
        settings.write_text(json.dumps(configuration, indent=1))
    text = file.read_text() if file.exists() else ""
    whole, _, rest = text.rpartition("\n")
    if rest:  # a line that was being written when the process ended
        file.write_text(whole + "\n" if whole else "")
    return {record["simulation"]: record for record in map(json.loads, whole.splitlines())}, file


def _note(records: list[dict], draws: int) -> str:
    failed = [record for record in records if "error" in record]
    done = len(records) - len(failed)
    parts = []
    if failed:
        kinds = Counter(record["error"] for record in failed)
        named = "; ".join(f"{error} ({count})" for error, count in kinds.most_common(3))
        parts.append(f"{len(failed)} of {len(records)} fits failed and are left out, though not at random: {named}")
    warned = Counter(name for record in records for name in record.get("warnings", ()))
    if warned:
        parts.append(f"of {done} fits warned: " + ", ".join(f"{name} {count}" for name, count in warned.most_common()))
    short = sum(record.get("ess", draws) < draws for record in records)
    if short:
        parts.append(
            f"{short} of {done} chains had fewer than {draws} effective draws, whose ranks are not uniform even where "
            "the chain is right: draw more, or lower draws="
        )
    if done < _FEW:
        parts.append(f"{done} simulations are too few to see anything but gross faults")
    return ". ".join(parts)


def _words(bias: float, width: float, p_value: float) -> str:
    """What the ranks' shape says of the draws."""
    if p_value >= _LEVEL:
        return "uniform"
    found = []
    if abs(bias) > _ERRORS:
        found.append("slope: biased, draws too " + ("low" if bias > 0 else "high"))
    if width > _ERRORS:
        found.append("U: draws too narrow")
    # Ranks that pile up at one end vary little too, and say nothing of the width.
    elif width < -_ERRORS and not found:
        found.append("hump: draws too wide")
    return ", ".join(found) or "not uniform, without slope, U or hump"
