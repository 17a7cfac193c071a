"""Many fits over processes: the same results, kept and not run again."""

import os
from functools import partial

import joblib
import pytest
import torch
from conftest import tiny_bert, token_batches

import pyro_lrblora as lb
from pyro_lrblora.infer.parallel import run_jobs

DATA = token_batches(24)


def prepared():
    return lb.BayesianLoRA(tiny_bert(), lb.LoRAXS(2)).prepare(DATA)


def seeds(model, numbers=(0, 1), **options):
    fit = partial(lb.fit, model, DATA, guide=lb.guides.Diagonal(), steps=2, warm_start=False, progress=False, **options)
    return {f"seed {seed}": partial(fit, seed=seed) for seed in numbers}


def latents(posterior):
    return posterior.sample(3, seed=0)["R"]


def refuse():
    raise AssertionError("this fit was finished before")


@pytest.mark.filterwarnings("ignore::pyro_lrblora.ScalesNotConverged")
def test_two_processes_give_the_posteriors_of_one_and_a_folder_keeps_them(tmp_path):
    model = prepared()
    one = lb.parallel_fits(seeds(model), model.network, progress=False)
    two = lb.parallel_fits(seeds(model), model.network, n_jobs=2, folder=tmp_path, progress=False)
    assert list(one) == list(two) == ["seed 0", "seed 1"]
    for name in one:
        assert torch.equal(latents(one[name]), latents(two[name]))
        assert two[name].model.network is model.network
        torch.testing.assert_close(lb.predict(one[name], DATA).logits, lb.predict(two[name], DATA).logits)
    assert not torch.equal(latents(one["seed 0"]), latents(one["seed 1"]))
    again = lb.parallel_fits(dict.fromkeys(one, refuse), model.network, n_jobs=2, folder=tmp_path, progress=False)
    assert all(torch.equal(latents(again[name]), latents(two[name])) for name in two)


@pytest.mark.filterwarnings("ignore::pyro_lrblora.ScalesNotConverged")
def test_only_what_is_missing_runs_after_a_failure(tmp_path):
    model = prepared()
    jobs = seeds(model) | {"seed 1": refuse}
    options = {"folder": tmp_path, "progress": False}
    with pytest.warns(UserWarning, match="'seed 1' failed.*AssertionError: this fit was finished"):
        first = lb.parallel_fits(jobs, model.network, **options)
    assert list(first) == ["seed 0"]
    (tmp_path / "seed 1").mkdir()
    (tmp_path / "seed 1" / "posterior.safetensors").write_bytes(b"half")  # a process that died while writing
    both = lb.parallel_fits(seeds(model) | {"seed 0": refuse}, model.network, **options)
    assert list(both) == ["seed 0", "seed 1"]
    (tmp_path / "seed 1" / "posterior.json").write_text("{")
    with pytest.raises(ValueError, match="cannot be read"):
        lb.parallel_fits(jobs, model.network, **options)


@pytest.mark.filterwarnings("ignore::pyro_lrblora.ScalesNotConverged")
def test_what_died_between_its_two_files_is_fitted_again(tmp_path, monkeypatch):
    model, replace, moved = prepared(), os.replace, []

    def once(source, target):
        if moved:
            raise KeyboardInterrupt
        moved.append(replace(source, target))

    monkeypatch.setattr(os, "replace", once)
    with pytest.raises(KeyboardInterrupt):
        lb.parallel_fits(seeds(model, [0]), model.network, folder=tmp_path, progress=False)
    monkeypatch.setattr(os, "replace", replace)
    again = lb.parallel_fits(seeds(model, [0]), model.network, folder=tmp_path, progress=False)
    assert list(again) == ["seed 0"]


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_all_failing_is_an_error_and_so_is_what_returns_no_posterior():
    with pytest.raises(RuntimeError, match="all 2 failed, 'one' with no Posterior, but a NoneType"):
        lb.parallel_fits({"one": lambda: None, "two": refuse}, tiny_bert(), progress=False)


@pytest.mark.parametrize("name", ["", "..", "a/b", 3])
def test_names_that_are_no_folders_are_refused(name, tmp_path):
    with pytest.raises(ValueError, match="can be folders"):
        lb.parallel_fits({name: refuse}, tiny_bert(), folder=tmp_path)


def test_threads_and_no_processes_are_refused():
    jobs = {"one": refuse, "two": refuse}
    with joblib.parallel_config("threading", n_jobs=2), pytest.raises(ValueError, match="backend of processes"):
        lb.parallel_fits(jobs, tiny_bert(), progress=False)
    with pytest.raises(ValueError, match="n_jobs=0"):
        lb.parallel_fits(jobs, tiny_bert(), n_jobs=0)


def test_joblib_says_how_many_processes_and_which_backend():
    jobs = {str(number): partial(pow, number, 2) for number in range(4)}
    for backend in ("loky", "multiprocessing"):
        with joblib.parallel_config(backend, n_jobs=2):
            assert dict(run_jobs(jobs, None)) == {"0": 0, "1": 1, "2": 4, "3": 9}


@pytest.mark.filterwarnings("ignore::pyro_lrblora.ScalesNotConverged")
def test_members_of_an_ensemble_do_not_depend_on_the_processes():
    model = prepared().with_prior(lambda shapes: lb.priors.Normal(0.1)(shapes))  # own function: on no file
    options = {"members": 2, "steps": 2, "warm_start": False, "progress": False}
    one, two = (lb.infer.ensemble(model, DATA, n_jobs=n, **options) for n in (1, 2))
    drawn = [posterior.sample(2, seed=0) for posterior in (one, two)]
    assert all(torch.equal(drawn[0][name], drawn[1][name]) for name in drawn[0])
    assert [row["member"] for row in two.history] == [0, 1]
    torch.testing.assert_close(lb.predict(one, DATA, draws=2).logits, lb.predict(two, DATA, draws=2).logits)
    with pytest.raises(ValueError, match="expected epochs"):
        lb.infer.ensemble(model, DATA, members=2, epochs=0, progress=False)
