"""Many independent fits, over the processes of whatever backend joblib is set to, and only those that are missing."""

from __future__ import annotations

import tempfile
import warnings
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from numbers import Integral
from pathlib import Path

import torch
from joblib import Parallel, delayed, effective_n_jobs
from joblib.parallel import get_active_backend
from torch import nn
from tqdm.auto import tqdm

from ..posterior import Posterior
from ..storage import FILES


def parallel_fits(
    jobs: Mapping[str, Callable[[], Posterior]],
    network: nn.Module,
    *,
    n_jobs: int | None = None,
    folder=None,
    progress: bool = True,
    **load,
) -> dict[str, Posterior]:
    """Run independent fits, several at a time, and keep what is finished: families, seeds, priors, data sets.

        fits = {f"seed {s}": partial(lb.fit, model, train, seed=s, progress=False) for s in range(10)}
        posteriors = lb.parallel_fits(fits, network, n_jobs=4, folder="seeds")

    Every fit has its own seed, so the results do not depend on `n_jobs`, up to rounding: a process has one thread of
    torch. A job is sent to its process together with the network it holds.

    Args:
        jobs: name -> a function without arguments that returns a posterior; with more than one process, one that can be
            sent to another (a functools.partial, a lambda).
        network: the base, on which posteriors are read back.
        n_jobs: processes; -1 takes all cores, None what joblib.parallel_config says, or else 1: this process. So does
            the backend: loky on this machine, Dask or Ray on many.
        folder: keeps a posterior per name, and one that is there is read and not fitted again. Names are all that tells
            jobs apart: take another folder for other settings.
        progress: show a progress bar.
        load: `prior`, `likelihood`, `guide`, `tokenizer` of Posterior.load; own functions are on no file.

    Returns:
        The posteriors by name, in the jobs' order; those that failed are missing.

    Raises:
        ValueError: names that are no folder's, a backend of threads, a posterior in the folder that cannot be read.
        RuntimeError: every fit failed.

    Warns:
        UserWarning: a fit that failed, with its error; the others go on. Other processes write their own warnings to
            the standard error stream.
    """
    folders = {} if folder is None else {name: Path(folder) / _checked(name) for name in jobs}
    held = [name for name, where in folders.items() if (where / FILES[1]).exists()]
    posteriors = {name: Posterior.load(folders[name], network, **load) for name in held}
    attempts = {name: partial(_attempt, job) for name, job in jobs.items() if name not in posteriors}
    failed = {}
    for name, found in run_fits(attempts, network, n_jobs, load, folders, progress):
        if isinstance(found, Posterior):
            posteriors[name] = found
        else:
            failed[name] = found
            warnings.warn(f"the fit of {name!r} failed and is left out: {found}", stacklevel=2)
    if failed and not posteriors:
        name, error = next(iter(failed.items()))
        raise RuntimeError(f"expected some fits to succeed, all {len(failed)} failed, {name!r} with {error}")
    return {name: posteriors[name] for name in jobs if name in posteriors}


def run_fits(
    jobs: Mapping[str, Callable], network: nn.Module, n_jobs: int | None, load: Mapping, folders=(), progress=False
) -> Iterator[tuple[str, object]]:
    """run_jobs for posteriors, which come back without the network; what a job raises is raised here.

    Args:
        jobs, network, n_jobs, load, progress: as for parallel_fits.
        folders: by name, where to keep the posteriors; empty for nowhere.
    """
    here = processes(n_jobs) == 1
    sent = jobs if here else {name: partial(_packed, job) for name, job in jobs.items()}
    for name, found in run_jobs(sent, n_jobs, progress, "fits"):
        if isinstance(found, Posterior) and name in folders:
            found.save(folders[name])
        yield name, _unpacked(found, network, load, dict(folders).get(name)) if isinstance(found, dict) else found


def run_jobs(
    jobs: Mapping[str, Callable[[], object]], n_jobs: int | None = 1, progress: bool = False, unit: str = "jobs"
) -> Iterator[tuple[str, object]]:
    """The names and results of functions without arguments, as they end.

    Args:
        jobs: by name; with several processes, functions and results that can be sent between them.
        n_jobs: processes, as for parallel_fits; 1 runs the jobs here, one after the other.
        progress: show a progress bar, that counts in `unit`.

    Raises:
        ValueError: a backend of threads, which would share the network.
    """
    bar = partial(tqdm, total=len(jobs), disable=not progress, unit=unit.removesuffix("s"), desc=unit)
    if processes(n_jobs) == 1 or len(jobs) < 2:
        yield from bar((name, job()) for name, job in jobs.items())
        return
    backend, _ = get_active_backend()
    if getattr(backend, "supports_sharedmem", False):
        raise ValueError(
            f"expected a joblib backend of processes, got {type(backend).__name__}: one network carries one adapter at "
            "a time; write joblib.parallel_config('loky')"
        )
    # A backend that cannot hand over results one by one hands them over together.
    how = "generator_unordered" if getattr(backend, "supports_return_generator", False) else "list"
    yield from bar(Parallel(n_jobs, return_as=how)(delayed(_on_one_thread)(*job) for job in jobs.items()))


def processes(n_jobs: int | None) -> int:
    """How many processes joblib's backend would use.

    Raises:
        ValueError: n_jobs is 0 or no integer.
    """
    if not (n_jobs is None or isinstance(n_jobs, Integral) and n_jobs != 0):
        raise ValueError(f"expected n_jobs to be an integer >= 1, -1 or None, got n_jobs={n_jobs!r}")
    return effective_n_jobs(n_jobs)


def _on_one_thread(name: str, job: Callable[[], object]) -> tuple[str, object]:
    torch.set_num_threads(1)
    return name, job()


def _attempt(job: Callable[[], Posterior]) -> Posterior | str:
    # Whatever a fit raises is named; the others are worth having.
    try:
        posterior = job()
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return posterior if isinstance(posterior, Posterior) else f"no Posterior, but a {type(posterior).__name__}"


def _packed(job: Callable[[], object]) -> dict[str, bytes] | object:
    """A posterior as its files, so that the network stays where it is."""
    found = job()
    if not isinstance(found, Posterior):
        return found
    with tempfile.TemporaryDirectory() as folder:
        found.save(folder)
        return {name: (Path(folder) / name).read_bytes() for name in FILES}


def _unpacked(files: Mapping[str, bytes], network: nn.Module, load: Mapping, folder: Path | None) -> Posterior:
    with tempfile.TemporaryDirectory() as elsewhere:
        folder = folder or Path(elsewhere)
        folder.mkdir(parents=True, exist_ok=True)
        for name in FILES:
            partial_file = folder / f"{name}.partial"
            partial_file.write_bytes(files[name])
            partial_file.replace(folder / name)
        return Posterior.load(folder, network, **load)


def _checked(name: str) -> str:
    if not (isinstance(name, str) and name == Path(name).name and name not in ("", ".", "..")):
        raise ValueError(f"expected names of jobs that can be folders, got {name!r}")
    return name
