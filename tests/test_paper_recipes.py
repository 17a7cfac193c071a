"""The papers' recipes in models/paper/: what they start from, what they keep, and each once on a little real data."""

import importlib
import json
import statistics
from argparse import Namespace
from pathlib import Path

import datasets
import pandas as pd
import pytest
import torch
from conftest import SHARED, tiny_bert, tiny_reviews, tiny_tokenizer

import pyro_lrblora as lb

PAPER = Path(__file__).resolve().parents[1] / "models" / "paper"
LLAMA = str(SHARED / "weights" / "stories260K-llama")
MINILM = str(SHARED / "weights" / "all-MiniLM-L6-v2")
GLUE = ["--small", "--base", MINILM, "--rows", "24", "--validation-rows", "16", "--test-rows", "24", "--nli-rows", "16",
        "--max-length", "24", "--draws", "2"]  # fmt: skip
COMMONSENSE = ["--small", "--base", LLAMA, "--rows", "24", "--validation-rows", "16", "--test-rows", "24",
               "--draws", "2"]  # fmt: skip


@pytest.fixture
def script(monkeypatch):
    """A script of models/paper/ by name, imported as python would find it there."""
    monkeypatch.syspath_prepend(str(PAPER.parent))
    monkeypatch.syspath_prepend(str(PAPER))
    return importlib.import_module


@pytest.fixture
def fits(monkeypatch):
    """The calls of every function that fits."""
    calls = []
    for owner, name in ((lb, "fit"), (lb.infer, "swag"), (lb.infer, "laplace")):

        def counted(*args, _method=getattr(owner, name), **options):
            calls.append(options)
            return _method(*args, **options)

        monkeypatch.setattr(owner, name, counted)
    return calls


def lines(folder):
    return [json.loads(line) for line in (folder / "results.jsonl").read_text().splitlines()]


# --- each script once


def test_glue_starts_at_the_nli_adapter_and_resumes(shared, script, fits, tmp_path, capsys):
    glue = script("glue")
    command = [*GLUE, "--data", str(shared / "data"), "--tasks", "mrpc", "--out", str(tmp_path)]
    command += ["--methods", "B-LoRA-XS", "LowRankPrecision"]
    glue.main(command)
    runs = lines(tmp_path)
    assert [run["settings"]["method"] for run in runs] == ["B-LoRA-XS", "LowRankPrecision"]
    for run in runs:
        assert set(run["rows"]) == {"draws", "mean"}
        assert all(0 < row["NLL"] < 10 and row["T"] > 0 for row in run["rows"].values())
    assert len(pd.read_csv(tmp_path / "table.csv")) == 4

    # Two NLI fits, and a fit of each method that starts at their latents (with a head of its own: test_svi).
    targets = [options["init"] for options in fits if options.get("init") is not None]
    assert len(fits) == 4
    assert len(targets) == 2
    starts = {}
    for folder in (tmp_path / "starts").iterdir():
        network = glue.load_base(MINILM, 3, True, "float32")[0]
        start = lb.Posterior.load(folder, network)
        starts[type(start.model.adapter.projection)] = start
    for init in targets:
        start = starts[type(init.model.adapter.projection)]
        assert init.model.classes == 3
        assert start.model.classes == 3
        assert start.mean()["R"].any()
        assert torch.equal(init.mean()["R"], start.mean()["R"])
        for name, tensor in start.model.adapted.tensors().items():
            assert torch.equal(tensor, init.model.adapted.tensors()[name])

    before = (tmp_path / "results.jsonl").read_text()
    glue.main(command)
    assert len(fits) == 4
    assert (tmp_path / "results.jsonl").read_text() == before
    assert "LowRankPrecision 2 0: there" in capsys.readouterr().out


def test_commonsense_shares_a_point_and_resumes(shared, script, fits, tmp_path):
    commonsense = script("commonsense")
    command = [*COMMONSENSE, "--data", str(shared / "data"), "--tasks", "arc_easy", "--out", str(tmp_path)]
    command += ["--methods", "MAP", "Laplace-diagonal"]
    commonsense.main(command)
    assert [set(run["rows"]) for run in lines(tmp_path)] == [{"point"}, {"linearised"}]
    assert all(0 < row["NLL"] < 10 for run in lines(tmp_path) for row in run["rows"].values())
    assert len(fits) == 2  # the point, and the approximation around it
    commonsense.main(command)
    assert len(fits) == 2
    # Scored by the answers' own tokens: another study, in the same file.
    commonsense.main([*command[:-3], "--methods", "MAP", "--form", "answer"])
    assert len(fits) == 3
    assert [run["settings"]["form"] for run in lines(tmp_path)] == ["letter", "letter", "answer"]


# --- what needs no data


def test_a_scaled_update_is_a_scaled_rate():
    """16 / r on the update, at the paper's rate, against none at 16 / r times that rate."""

    class Scaled:
        statistics = None

        def __init__(self, factor):
            self.factor = factor

        def __call__(self, weight, rank, statistics, generator):
            basis = lb.projections.SVD(exact=True)(weight, rank, statistics, generator)
            return lb.projections.Basis(self.factor * basis.A, basis.B)

    logits = []
    for factor, rate in ((8.0, 1e-3), (1.0, 8e-3)):
        adapter = lb.LoRAXS(2, Scaled(factor))
        model = lb.BayesianLoRA(tiny_bert(), adapter, lb.priors.Normal(1e3), tokenizer=tiny_tokenizer())
        model = model.prepare(tiny_reviews(), probe=False)
        posterior = lb.fit(
            model, tiny_reviews(), guide=lb.guides.Delta(), epochs=3, rates=lb.Rates(loc=rate), schedule="constant",
            clip=None, progress=False,
        )  # fmt: skip
        logits.append(lb.predict(posterior, tiny_reviews(), draws=1).logits)
        assert posterior.mean()["R"].abs().max() > rate
    torch.testing.assert_close(*logits, atol=1e-3, rtol=1e-3)


def test_a_plan_has_every_setting_once(script):
    glue = script("glue")
    args = Namespace(
        tasks=["rte", "cola"], methods=["LoRA", "LoRA-XS"], ranks=[2, 8], seeds=[0, 1], lora_rank=8, rows=5, out="",
        device="cpu",
    )  # fmt: skip
    plan = glue.planned(args)
    assert len(plan) == 2 * (1 + 2) * 2
    assert {run["rank"] for run in plan if run["method"] == "LoRA"} == {8}
    assert list(plan[0]) == ["task", "method", "rank", "seed", "rows"]


def test_finished_runs_are_kept_and_a_line_that_was_cut_off_is_not(script, tmp_path):
    runs_of = script("runs").Runs
    plan = [{"task": "a", "seed": seed, "rows": 3} for seed in range(4)]
    made = []

    def make(settings):
        made.append(settings["seed"])
        if settings["seed"] == 3 and len(made) < 5:
            raise ValueError("no")
        return {"draws": {"NLL": float(settings["seed"] ** 2)}}

    path = tmp_path / "new" / "results.jsonl"
    assert runs_of(path).complete(plan, make) == 1
    path.write_text(path.read_text()[:-9])  # of seed 2
    assert runs_of(path).complete(plan, make) == 0
    assert made == [0, 1, 2, 3, 2, 3]
    assert runs_of(path).complete(plan, make) == 0
    assert len(made) == 6
    table = runs_of(path).table(plan)
    assert table.loc[("a", "draws"), "seeds"] == 4
    assert table.loc[("a", "draws"), "NLL"] == statistics.median([0, 1, 4, 9])
    assert table.loc[("a", "draws"), "NLL s.d."] == pytest.approx(statistics.stdev([0, 1, 4, 9]))
    assert runs_of(path).complete([{**plan[0], "rows": 4}], make) == 0
    assert len(made) == 7  # other settings are another run


def test_items_of_the_hub_are_those_of_the_folder(script):
    commonsense = script("commonsense")
    item = {"question": "q", "choices": ["x", "y"], "label": 1}
    hub = {"question_stem": "q", "choices": {"text": ["x", "y"], "label": ["1", "2"]}, "answerKey": "2"}
    assert commonsense.science(item) == commonsense.science(hub) == item
    gap = {"sentence": "s _", "option1": "x", "option2": "y"}
    assert commonsense.winogrande(gap | {"answer": "2"}) == commonsense.winogrande(gap | {"label": 1})
    asked = {"question": "is it", "passage": "p"}
    assert commonsense.boolq(asked | {"answer": True}) == commonsense.boolq(asked | {"label": 1})
    assert commonsense.boolq(asked | {"label": 1}) == {"question": "p\nis it?", "choices": ["no", "yes"], "label": 1}


def test_twins_are_on_one_side_and_odd_items_are_counted(script, tmp_path, capsys):
    commonsense = script("commonsense")
    folder = tmp_path / "winogrande"
    folder.mkdir()
    rows = [
        {"qID": f"pair{n // 2}-{n % 2 + 1}", "sentence": f"{n} _", "option1": "x", "option2": "y", "label": n % 2}
        for n in range(40)
    ]
    datasets.Dataset.from_list(rows).to_parquet(str(folder / "train_s.parquet"))
    datasets.Dataset.from_list(rows[:6]).to_parquet(str(folder / "validation.parquet"))
    args = Namespace(data=str(tmp_path), rows=100, validation_rows=10, test_rows=5)
    task = commonsense.TASKS["winogrande_s"]
    train, validation, test = commonsense.items_of(task, 0, args)
    pair = lambda items: {int(item["question"].split()[0]) // 2 for item in items}
    assert len(validation) == 10
    assert len(train) >= 20
    assert len(test) == 5
    assert not pair(train) & pair(validation)

    odd = [{"question": "film", "choices": ["good", "bad", "dull"], "label": 0}]
    long = [{"question": "film " * 30, "choices": ["good", "bad"], "label": 0}]
    assert commonsense.fitting([*test, *odd, *long], task, tiny_tokenizer(), 40) == test
    assert "left out of 7 items: 1 without 2 choices, 1 of more than 40 tokens" in capsys.readouterr().out


def test_without_letters_in_the_vocabulary_the_answers_are_scored(script, tmp_path, capsys):
    tiny_tokenizer().save_pretrained(tmp_path)
    args = Namespace(base=str(tmp_path), form="letter")
    assert script("commonsense").form_of(args, 4) == "answer"
    assert "letter 'A'" in capsys.readouterr().out
