"""The study: cached lower layers are the network's own, rows stay apart, lines make the tables, a cut goes on."""

import argparse
import importlib
import json
from pathlib import Path
from types import SimpleNamespace

import datasets
import numpy as np
import pandas as pd
import pytest
import torch
from conftest import tiny_reviews

import pyro_lrblora as lb
from pyro_lrblora.networks import MeanPoolClassifier, builtin_base

ROOT = Path(__file__).parents[1]
MODELS = ROOT / "models"
pytestmark = pytest.mark.filterwarnings("ignore::pyro_lrblora.ScalesNotConverged")
TINY = ["--rows", "24", "--validation-rows", "16", "--test-rows", "24", "--outside-rows", "12", "--epochs", "1",
        "--max-length", "24", "--draws", "2", "--frozen-layers", "5", "--seeds", "0",
        "--judged-rows", "20"]  # fmt: skip


@pytest.fixture
def script(monkeypatch):
    """A script of models/study/ by name, imported as python would find it there."""
    for folder in (MODELS, MODELS / "study"):
        monkeypatch.syspath_prepend(str(folder))
    return importlib.import_module


def lines(folder):
    return [json.loads(line) for line in (folder / "runs.jsonl").read_text().splitlines()]


def test_upper_layers_on_cached_states_are_the_network(script):
    upper = script("upper_layers")
    classifier, tokenizer = builtin_base(3)
    torch.manual_seed(0)
    torch.nn.init.normal_(classifier.classifier.weight)
    reviews = tiny_reviews(9)
    items = {"question": reviews["text"], "choices": [["good", "a very bad film"]] * 9, "label": [1] * 9}
    choices = lb.data.Choices(datasets.Dataset.from_dict(items), tokenizer, batch_size=4)
    for rows, classes in ((lb.Batches(reviews, tokenizer, batch_size=4), 3), (choices, 1)):
        states = upper.LowerStates(rows, classifier.encoder, 4, 5, None)
        network = upper.UpperLayers(classifier.encoder, 4, classes).eval()
        network.classifier.weight.data = classifier.classifier.weight[:classes].detach()
        whole = MeanPoolClassifier(classifier.encoder, classes).eval()
        whole.classifier = network.classifier
        assert torch.equal(states.labels, rows.labels)
        with torch.no_grad():
            found = torch.cat([network(batch["hidden"], batch["attention_mask"]).logits for batch in states.in_order()])
            inputs = ({name: x for name, x in batch.items() if name != "labels"} for batch in rows)
            wanted = torch.cat([whole(**batch).logits for batch in inputs])
        torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-5)


def test_a_pair_is_two_texts_compared(script):
    upper, pairs = script("upper_layers"), script("pairs")
    classifier, tokenizer = builtin_base(3)
    rows = tiny_reviews(6)
    texts = {"premise": list(rows["text"]), "hypothesis": ["a film", "dull"] * 3, "label": [0, 1, 2] * 2}
    states = upper.LowerStates(
        pairs.Pairs(datasets.Dataset.from_dict(texts), tokenizer, 24), classifier.encoder, 4, 4, None
    )
    network = upper.UpperLayers(classifier.encoder, 4, 3, compared=True).eval()
    torch.manual_seed(0)
    torch.nn.init.normal_(network.classifier.weight)
    assert states.labels.tolist() == texts["label"]

    def mean(column):
        batch = tokenizer(texts[column], padding=True, return_tensors="pt")
        hidden, mask = classifier.encoder(**batch).last_hidden_state, batch["attention_mask"].unsqueeze(-1)
        return (hidden * mask).sum(1) / mask.sum(1)

    with torch.no_grad():
        found = torch.cat([network(batch["hidden"], batch["attention_mask"]).logits for batch in states.in_order()])
        u, v = mean("premise"), mean("hypothesis")
        wanted = network.classifier(torch.cat([u, v, (u - v).abs()], 1))
    torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-5)


def test_rows_of_a_split_stay_apart(script, shared):
    tasks = script("tasks")
    args = argparse.Namespace(data=str(shared / "data"), base="builtin", frozen_layers=5, batch_size=8, max_length=24,
                              rows=20, validation_rows=10, test_rows=16, outside_rows=8, judged_rows=12)  # fmt: skip
    first, second = (tasks.problem("snli", seed, args) for seed in (0, 1))
    equal = lambda a, b: a.shape == b.shape and torch.equal(a, b)
    hidden = lambda batches: batches._encoded["hidden"]
    assert [len(hidden(rows)) for rows in (first.train, first.validation, first.test, first.outside)] == [20, 10, 16, 8]
    for rows in (first.validation, first.test):
        assert not any(equal(a, b) for a in hidden(rows) for b in hidden(first.train))
    assert all(equal(a, b) for a, b in zip(hidden(first.test), hidden(second.test), strict=True))
    assert not all(equal(a, b) for a, b in zip(hidden(first.train), hidden(second.train), strict=True))
    batches, votes = first.votes
    assert votes.shape == (8, 3)
    assert (votes.sum(1) == 100).all()
    judged = tasks.problem("snli", 0, args, test=False)
    assert judged.outside is judged.votes is None
    assert len(hidden(judged.test)) == 12
    for rows in (first.train, first.validation, first.test):
        assert not any(equal(a, b) for a in hidden(judged.test) for b in hidden(rows))


def test_a_study_from_tuning_to_tables_that_goes_on(script, shared, tmp_path, capsys):
    study = script("study")
    command = [
        "--data",
        str(shared / "data"),
        "--tasks",
        "sst2",
        "--development",
        "sst2",
        "--out",
        str(tmp_path),
        *TINY,
    ]
    command += ["--methods", "LoRA", "LowRankPrecision", "--variations", "default", "K = 2"]
    study.main([*command, "--stages", "tune", "defaults"])
    tuned = lines(tmp_path)
    assert len(tuned) == 4 + 4 + 2
    for run in tuned:
        wanted = {"validation", "judged", "losses"}
        assert all(set(row) == wanted for name, row in run["rows"].items() if name != "fit")
    study.main([*command, "--stages", "scores"])
    scored = [run for run in lines(tmp_path) if run["settings"]["stage"] == "scores"]
    best = {
        name: min(
            (run["rows"][row]["judged"]["NLL"], run["settings"]["value"])
            for run in tuned
            if run["settings"]["method"] == name and run["settings"]["stage"] == "tune"
        )[1]
        for name, row in (("LoRA", "point"), ("LowRankPrecision", "draws"))
    }
    assert {run["settings"]["method"]: run["settings"]["value"] for run in scored} == best
    tables = (tmp_path / "tables.md").read_text()
    assert "| LowRankPrecision - LoRA " in tables
    assert "| K = 2 " in tables
    assert f"{scored[1]['rows']['draws']['test']['NLL']:.3f}" in tables
    assert (tmp_path / "nll_24.svg").exists()
    before = (tmp_path / "runs.jsonl").read_text()
    study.main(command)
    assert (tmp_path / "runs.jsonl").read_text() == before
    assert "1/2 scores sst2 LoRA" in capsys.readouterr().out
    more = [run | {"settings": run["settings"] | {"rows": 48}} for run in scored]
    script("tables").write_tables([*lines(tmp_path), *more], tmp_path)
    both = (tmp_path / "tables.md").read_text()
    ours = tables[tables.index("## 24 training rows") :]
    assert both.endswith(ours)  # rows of another setting change nothing there
    assert "### Tuned values" in ours
    assert "### Tuned values" not in both.removesuffix(ours)
    assert (tmp_path / "nll_48.svg").exists()


@pytest.mark.filterwarnings("ignore::pyro_lrblora.ChainsNotConverged")
def test_spectra_of_a_full_matrix_and_of_a_chain(script, shared, capsys):
    command = ["--data", str(shared / "data"), "--tasks", "sst2", "--frozen-layers", "5", "--rank", "2", "--rows", "24"]
    command += ["--validation-rows", "16", "--epochs", "1", "--max-length", "24"]
    script("spectrum").main([*command, "--chain-rank", "1", "--chain-rows", "8", "--chain-draws", "4"])
    printed = capsys.readouterr().out
    assert printed.count("full Gauss-Newton matrix") == 2
    assert "sst2, NUTS, r = 1" in printed


def test_what_a_scale_means_for_the_logits_is_linear_where_it_is_small(script, shared, capsys):
    command = ["--data", str(shared / "data"), "--tasks", "sst2", "--frozen-layers", "5", "--rows", "24"]
    command += ["--validation-rows", "16", "--max-length", "24", "--draws", "4", "--scales", "0.03", "0.06"]
    found = script("prior_scale")
    found.ADAPTERS = {name: found.ADAPTERS[name] for name in ("Gradient, r = 8", "SVD, r = 8")}
    found.main(command)
    rows = [line.split("|")[1:-1] for line in capsys.readouterr().out.splitlines() if "sst2" in line]
    assert [row[2].strip() for row in rows] == list(found.ADAPTERS)
    small, double = (float(value) for value in rows[0][3:])
    assert double == pytest.approx(2 * small, rel=0.15)
    assert small > 5 * float(rows[1][4])


def test_the_documented_tables_are_those_of_the_lines(script, tmp_path):
    results, rows = ROOT / "docs" / "results", set()
    for name in ("study", "study_rte_arc"):
        runs = [json.loads(line) for line in (results / f"{name}.jsonl").read_text().splitlines()]
        script("tables").write_tables(runs, tmp_path)
        tables = (tmp_path / "tables.md").read_text()
        assert (results / name / "tables.md").read_text() == tables
        rows |= set(tables.splitlines())
    shown = [line for line in (results / "study.md").read_text().splitlines() if line.startswith("|")]
    assert shown
    assert set(shown) <= rows


def test_values_are_chosen_by_the_mean_over_seeds_and_tasks_at_the_rows_and_layers(script):
    tuning, methods = script("tuning"), script("methods").METHODS

    def run(value, task, seed, nll, rows, judged=True, frozen=4):
        row = {"validation": {"NLL": -nll}} | ({"judged": {"NLL": nll}} if judged else {})
        settings = {"stage": "tune", "task": task, "method": "LoRA", "value": value, "seed": seed, "rows": rows}
        settings["frozen_layers"] = frozen
        return {"settings": settings, "rows": {"point": row}}

    # By its last seed or by one task alone the first value would win.
    runs = [run(3e-4, "a", seed, nll, 100) for seed, nll in enumerate((0.9, 0.2))] + [run(3e-4, "b", 0, 0.6, 100)]
    runs += [run(1e-3, "a", seed, nll, 100) for seed, nll in enumerate((0.4, 0.4))] + [run(1e-3, "b", 0, 0.6, 100)]
    runs += [run(3e-3, "a", 0, 0.0, 100)]  # not made on every task
    assert tuning.chosen(runs, "LoRA", methods, 100, 4) == 1e-3
    assert tuning.tuning(runs).loc[("LoRA", 3e-4), "a"] == pytest.approx(0.55)
    more = [run(3e-4, task, 0, 0.1, 1000, judged=False) for task in "ab"]
    more += [run(1e-3, task, 0, 0.3, 1000, judged=False) for task in "ab"]  # its validation NLL is the lower one
    assert tuning.chosen(runs + more, "LoRA", methods, 100, 4) == 1e-3
    assert tuning.chosen([*more, run(1e-3, "a", 0, 0.3, 50)], "LoRA", methods, 1000, 4) == 1e-3
    assert tuning.chosen(runs, "LoRA", methods, 1000, 4) == 1e-3  # none made with as many rows
    deeper = [run(3e-4, "a", 0, 0.1, 100, frozen=0), run(1e-3, "a", 0, 0.2, 100, frozen=0)]
    assert tuning.chosen(runs + deeper, "LoRA", methods, 100, 0) == 3e-4
    assert tuning.chosen(runs + deeper, "LoRA", methods, 100, 4) == 1e-3
    assert tuning.chosen(runs, "LoRA", methods, 100, 0) == 1e-3  # none made with as many layers
    assert tuning.chosen(runs, "BLoB-like", methods, 100, 4) == methods["BLoB-like"].grid[2]
    assert tuning.chosen([], "LoRA", methods, 100, 4) == methods["LoRA"].grid[2]


def test_paired_differences_against_brute_force(script):
    differences = script("differences")
    generator = np.random.default_rng(0)
    losses = generator.normal(size=(2, 3, 40))  # methods, seeds, rows

    def run(method, seed, values, task="t"):
        row = {"losses": {"NLL": list(values)}, "losses, tempered": {"NLL": list(values + 1)}}
        return {"settings": {"stage": "scores", "task": task, "method": method, "seed": seed}, "rows": {"draws": row}}

    names = (differences.OURS, "LoRA")
    runs = [run(name, seed, losses[i, seed]) for i, name in enumerate(names) for seed in range(3)]
    found = differences.paired(runs, "NLL", "LoRA").loc["t"]
    difference = losses[0] - losses[1]
    assert found["difference"] == pytest.approx(difference.mean())
    assert found["SE"] == pytest.approx(
        differences.difference_of(dict(enumerate(difference)), dict.fromkeys(range(3), 0))["SE"]
    )
    assert differences.paired(runs, "NLL", "LoRA", temper_other=True).loc["t", "difference"] == pytest.approx(
        difference.mean() - 1
    )
    runs.append(run(differences.OURS, 0, losses[0, 0], "u"))
    assert list(differences.paired(runs, "NLL", "LoRA").index) == ["t"]  # LoRA has not been run on u
    both = differences.paired([*runs, run("LoRA", 0, losses[1, 0], "u")], "NLL", "LoRA")
    single = difference[0].std(ddof=1) / 40**0.5
    assert both.loc["all tasks", "difference"] == pytest.approx((difference.mean() + difference[0].mean()) / 2)
    assert both.loc["all tasks", "SE"] == pytest.approx((found["SE"] ** 2 + single**2) ** 0.5 / 2)
    assert both.loc["all tasks", "seeds"] == 1


@pytest.mark.parametrize("same_rows", [True, False])
@pytest.mark.parametrize("sds", [(1.0, 0.0, 0.5), (0.5, 0.3, 1.0), (1.0, 0.1, 2.0)], ids=["rows", "seeds", "residual"])
def test_standard_errors_are_the_spread_of_the_difference(script, same_rows, sds):
    """Over studies with effects of rows, seeds and both: the mean variance reported is that of what was found."""
    difference_of, (row, seed, residual) = script("differences").difference_of, sds
    generator, found = np.random.default_rng(0), []
    for _ in range(1500):
        rows = generator.normal(0, row, (1 if same_rows else 3, 40))
        losses = rows + generator.normal(0, seed, (3, 1)) + generator.normal(0, residual, (3, 40))
        each = difference_of(dict(enumerate(losses)), dict.fromkeys(range(3), 0.0), same_rows)
        found.append((each["difference"], each["SE"] ** 2))
    differences, variances = np.transpose(found)
    # The variance is kept from falling below its parts, which makes it larger on average, by a few tenths at most.
    assert 0.9 < variances.mean() / differences.var() < 1.4


def test_a_figure_against_the_reference_s_by_brute_force(script):
    tables = script("tables")
    values = np.random.default_rng(2).normal(size=(2, 2, 3))  # methods, tasks, seeds
    index = [{"method": ("LoRA", "Diagonal")[m], "task": "ab"[t], "seed": s} for m, t, s in np.ndindex(2, 2, 3)]
    main = pd.DataFrame(index).assign(ECE=values.ravel())
    difference = values[1] - values[0]
    error = np.sqrt((difference.var(1, ddof=1) / 3).sum()) / 2
    assert tables._against_reference(main, "ECE").to_dict() == {"Diagonal": f"{difference.mean():+.3f} ± {error:.3f}"}


def test_steps_to_a_target_count_those_that_never_reach_it(script):
    tables = script("tables")

    def run(method, seed, curve):
        settings = {"stage": "scores", "task": "t", "method": method, "seed": seed}
        return {"settings": settings, "rows": {"fit": {"curve": curve}}}

    runs = [run("LoRA", seed, [[1, 0.9], [2, 0.5]]) for seed in range(3)]
    runs += [run("Diagonal", seed, [[1, 0.9], [2, nll]]) for seed, nll in enumerate((0.5, 0.6, 0.7))]
    runs += [run(tables.OURS, seed, [[1, nll], [2, 0.4]]) for seed, nll in enumerate((0.4, 0.6, 0.7))]
    found = tables.convergence(runs)
    assert found["steps"].to_dict() == {"LoRA": 2, "Diagonal": np.inf, tables.OURS: 2}
    assert found["reached"].round(2).to_dict() == {"LoRA": 1, "Diagonal": 0.33, tables.OURS: 1}
    assert found["best at first"].round(2).to_dict() == {"LoRA": 0, "Diagonal": 0, tables.OURS: 0.33}
    assert "never" in tables._markdown(found)


def test_variations_against_brute_force(script):
    losses = np.random.default_rng(1).normal(size=(2, 2, 2, 30))  # variations, tasks, seeds, rows

    def run(name, task, seed, values):
        settings = {"stage": "defaults", "task": task, "method": name, "seed": seed}
        return {"settings": settings, "rows": {"draws": {"losses": {"NLL": list(values)}}}}

    names, over = ("default", "K = 2"), ("a", "b")
    runs = [run(names[i], over[j], k, losses[i, j, k]) for i, j, k in np.ndindex(2, 2, 2)]
    runs += [run("default", "a", 2, losses[0, 0, 0] + 1)]  # a seed that the other does not have
    found = script("differences").variations(runs).loc["K = 2"]
    difference = losses[1] - losses[0]
    assert found["a"] == pytest.approx(difference[0].mean())
    assert found["all tasks"] == pytest.approx(difference.mean())
    rows = [max(each.mean(1).var(ddof=1) / 2, each.var(1, ddof=1).mean() / 60) for each in difference]
    assert found["SE"] == pytest.approx(np.sqrt(np.sum(rows)) / 2)
    assert found["seeds"] == 2


def test_a_run_made_again_with_another_value_stands_alone(script):
    run = lambda stage, value, rows: {
        "settings": {"stage": stage, "task": "t", "method": "LoRA", "seed": 0, "value": value}, "rows": rows
    }  # fmt: skip
    tuned, scored = [run("tune", value, value) for value in (1, 2)], [run("scores", value, value) for value in (1, 2)]
    assert script("lines").latest([*tuned, *scored]) == [*tuned, scored[1]]


def test_averages_are_over_the_same_runs_for_every_method(script):
    tables = script("tables")
    made = {"LoRA": "ab", tables.OURS: "abc", "third": "a", "fourth": "abd"}
    rows = [
        {"method": method, "task": task, "seed": 0, "prediction": "draws"} for method in made for task in made[method]
    ]
    kept = tables._complete(tables.pd.DataFrame(rows))
    assert set(zip(kept["method"], kept["task"], strict=True)) == {
        (method, task) for method in ("LoRA", tables.OURS, "fourth") for task in "ab"
    }


def test_seconds_are_those_of_the_fit_and_not_of_preparing(script, monkeypatch):
    methods = script("methods")
    now = [0.0]

    def passes(seconds, result):
        now[0] += seconds
        return result

    class Model:
        prepare = lambda self, *_, **__: passes(100.0, self)
        with_prior = lambda self, prior: self

    monkeypatch.setattr(methods, "time", SimpleNamespace(process_time=lambda: now[0]))
    monkeypatch.setattr(methods.lb, "BayesianLoRA", lambda *_, **__: Model())
    fits = methods.Fits(SimpleNamespace(network=None, likelihood=None, train=None, seed=0), None)
    monkeypatch.setattr(fits, "fit", lambda *_, **__: passes(1.0, "posterior"))
    for rate in (1e-3, 1e-3, 3e-3):  # prepared and fitted, taken again, fitted anew
        fits.borrowed, begun = 0.0, now[0]
        fits.point(methods.LORA, rate)
        assert now[0] - begun + fits.borrowed == 1.0


def test_averages_are_over_seeds_and_then_tasks_by_brute_force(script):
    """A method without every run is left out, and a task with more seeds weighs no more."""
    tables = script("tables")
    generator = np.random.default_rng(4)
    figures = ["accuracy", "NLL", "Brier", "ECE (15 bins)", "ECE if calibrated", "ECE (15 bins of equal mass)", "AURC"]
    runs, nll = [], {}
    for method in ("LoRA", tables.OURS, "partial"):
        for task, seed in [("a", 0), ("a", 1), ("a", 2), ("b", 0), ("b", 1)][: 4 if method == "partial" else 5]:
            test, tempered = ({name: float(generator.uniform()) for name in figures} for _ in range(2))
            nll[method, task, seed] = test["NLL"], tempered["NLL"]
            row = {"test": test, "test, tempered": tempered, "temperature": 1.0}
            about = {"parameters": 20, "LoRA r=8": 10, "head": 1, "CPU seconds": 1.0}
            settings = {"stage": "scores", "task": task, "method": method, "seed": seed}
            runs.append({"settings": settings, "rows": {"draws": row, "fit": about}})
    table = tables.averages(tables.scores(runs))
    assert list(table.index) == ["LoRA", tables.OURS]
    for method in table.index:
        of = lambda task, which, method=method: [v[which] for (m, t, _), v in nll.items() if (m, t) == (method, task)]
        for place, name in enumerate(("NLL", "NLL at T")):
            assert table.loc[method, name] == pytest.approx(np.mean([np.mean(of(task, place)) for task in "ab"]))
        spread = np.mean([np.std(of(task, 0), ddof=1) for task in "ab"])
        assert table.loc[method, "NLL s.d. over seeds"] == pytest.approx(spread)
        assert table.loc[method, "of LoRA r=8"] == 2


def test_the_value_that_was_taken_is_bold(script):
    index = pd.MultiIndex.from_tuples([("LoRA", 0.1), ("LoRA", 0.2)], names=["method", "value"])
    assert "0.1: 0.600, **0.2: 0.500**" in script("tables")._wide(pd.DataFrame({"t": [0.6, 0.5]}, index=index))
