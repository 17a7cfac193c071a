"""What the scripts in models/ share: rows as the hub has them, processes, padding, a hub that cannot be reached."""

import importlib
import os
import socket
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import datasets
import pandas as pd
import pytest
from conftest import tiny_tokenizer
from huggingface_hub import constants
from huggingface_hub.errors import RepositoryNotFoundError
from test_tasks import tiny_items, tiny_llama, tiny_texts

import pyro_lrblora as lb
from pyro_lrblora.networks import AnswerScorer

MODELS = Path(__file__).resolve().parents[1] / "models"
SMALL = ["--rows", "12", "--validation-rows", "4", "--test-rows", "6", "--epochs", "1", "--draws", "2", "--rank", "2"]


@pytest.fixture
def script(monkeypatch):
    """A script of models/ by name, imported as python would find it there."""
    monkeypatch.syspath_prepend(str(MODELS))
    return importlib.import_module


@pytest.fixture
def run(script, monkeypatch):
    """Call a script's main with flags."""

    def called(name, *flags):
        monkeypatch.setattr(sys, "argv", [name, *map(str, flags)])
        script(name).main()

    return called


# --- multiple choice


def as_on_the_hub(row):
    """ARC's columns: choices with their letters or numbers, and the answer's."""
    letters = list("ABCD" if row["label"] else "1234")[: len(row["choices"])]
    return {
        "id": "Mercury_1",
        "question": row["question"],
        "choices": {"text": row["choices"], "label": letters},
        "answerKey": letters[row["label"]],
    }


@pytest.fixture
def arc(tmp_path):
    """A folder of items as the hub has ARC."""
    for name, rows in (("train", 20), ("validation", 6), ("test", 8)):
        items = [as_on_the_hub(row) for row in tiny_items(rows, seed=rows)]
        datasets.Dataset.from_list(items).to_parquet(str(tmp_path / f"{name}.parquet"))
    return tmp_path


def test_items_of_the_hub_are_converted(script, arc):
    choices = script("multiple_choice")
    rows = script("sequence_classification").load_splits(str(arc), 20, 0, 8, 0)
    items = choices.items_of(rows[2], "question")
    plain = tiny_items(8, seed=8).shuffle(seed=0)
    assert items.to_list() == plain.select_columns(items.column_names).to_list()
    assert choices.items_of(plain, "question") is plain
    assert len(rows[1]) == 0
    stem = rows[2].rename_column("question", "question_stem")  # OpenBookQA
    assert choices.items_of(stem, "question").to_list() == items.to_list()
    assert choices.items_of(stem, "question_stem")["question_stem"] == items["question"]


def test_multiple_choice_runs_on_items_of_the_hub(script, run, arc, tmp_path, monkeypatch):
    network, likelihood = AnswerScorer(tiny_llama()), lb.likelihoods.MultipleChoice()
    batches = lambda *args, **options: lb.data.Choices(*args, pair=False, **options)
    loaded = lambda *_: (network, tiny_tokenizer(), likelihood, batches)
    monkeypatch.setattr(script("multiple_choice"), "load", loaded)
    flags = ["--guides", "Delta", "--choices", "3", "--device", "cpu", *SMALL]
    run("multiple_choice", "--data", arc, "--out", tmp_path / "out", *flags)
    assert pd.read_csv(tmp_path / "out" / "table.csv")["accuracy"].notna().all()


def test_a_test_split_whose_answers_are_kept_back_is_not_tested_on(script, tmp_path):
    for name, answer in (("train", "A"), ("test", ""), ("validation", "B")):
        rows = [{"question": f"{name} {n}", "choices": ["x", "y"], "answerKey": answer} for n in range(5)]
        datasets.Dataset.from_list(rows).to_parquet(str(tmp_path / f"{name}.parquet"))
    assert set(script("sequence_classification").load_splits(str(tmp_path), 2, 1, 9, 0)[2]["answerKey"]) == {"B"}


@pytest.mark.parametrize(
    ("ending", "method"), [("parquet", "parquet"), ("csv", "csv"), ("json", "json"), ("jsonl", "json")]
)
def test_data_are_a_file_or_a_folder_with_one_per_split(script, tmp_path, ending, method):
    rows = datasets.Dataset.from_dict({"text": ["good, very", "bad"], "label": [1, 0]})
    for split in ("train", "test"):
        getattr(rows, f"to_{method}")(str(tmp_path / f"{split}.{ending}"))
    (tmp_path / "README.md").write_text("no rows")
    read = script("sequence_classification").read_splits
    found = read(str(tmp_path))
    assert {name: split.to_list() for name, split in found.items()} == dict.fromkeys(("test", "train"), rows.to_list())
    assert read(str(tmp_path / f"train.{ending}"))["train"].to_list() == rows.to_list()


def test_labels_that_are_texts_are_classes_alike_in_all_splits(script, tmp_path):
    rows = {"train": ["pos", "neg", "pos", "mid"] * 5, "test": ["pos", "neg"], "validation": ["pos", None]}
    for split, labels in rows.items():
        texts = [f"{label} {n}" for n, label in enumerate(labels)]
        datasets.Dataset.from_dict({"text": texts, "label": labels}).to_csv(str(tmp_path / f"{split}.csv"))
    scripts = script("sequence_classification")
    splits = scripts.load_splits(str(tmp_path), 16, 4, 9, 0, classes=True)
    for split in splits:
        assert split.features["label"].names == ["mid", "neg", "pos"]
        assert [text.split()[0] for text in split["text"]] == split.features["label"].int2str(split["label"][:])
    assert scripts.count_classes(*splits) == 3
    unlabelled = scripts.load_splits(str(tmp_path), 16, 4, 9, 0, ["validation"], classes=True)[2]
    with pytest.raises(SystemExit, match="got -1; write .* drop rows without a label"):
        scripts.count_classes(unlabelled)
    assert set(scripts.load_splits(str(tmp_path), 16, 4, 9, 0)[2]["label"]) == {"pos", "neg"}  # other tasks' own
    lists = {"rows": datasets.Dataset.from_dict({"text": ["a", "b"], "label": [[0, 1], [1]]})}
    assert scripts._with_classes(lists) == lists


def test_a_folder_or_file_without_rows_is_one_message(script, tmp_path):
    (tmp_path / "notes.txt").write_text("no rows")
    for source in (tmp_path, tmp_path / "notes.txt"):
        with pytest.raises(SystemExit, match=r"expected --data to be a file ending in \.parquet, .*, got '.*'"):
            script("sequence_classification").read_splits(str(source))


@pytest.mark.parametrize(("names", "sizes"), [(["train"], (1000, 300, 50)), (["train", "test"], (30, 10, 50))])
def test_rows_of_the_only_split_with_labels_are_trained_on_or_tested_on(script, tmp_path, names, sizes):
    for name in names:
        rows = [{"text": f"{name} {n}", "label": n % 2 if name == "train" else -1} for n in range(100)]
        datasets.Dataset.from_list(rows).to_parquet(str(tmp_path / f"{name}.parquet"))
    load = script("sequence_classification").load_splits
    splits = [[set(rows["text"]) for rows in load(str(tmp_path), *sizes, seed)] for seed in (0, 1)]
    for train, validation, test in splits:
        assert len(test) == 50
        assert (len(train), len(validation)) == ((38, 12) if sizes[0] > 50 else (30, 10))
        assert not train & test | validation & test | train & validation
    assert splits[0][2] == splits[1][2]
    assert splits[0][1] != splits[1][1]


# --- processes


@pytest.fixture
def texts(tmp_path):
    """Flags of a small language model, and of texts for it."""
    tiny_llama().save_pretrained(tmp_path / "base")
    tiny_tokenizer().save_pretrained(tmp_path / "base")
    (tmp_path / "data").mkdir()
    for name, rows in (("train", 16), ("test", 6)):
        tiny_texts(rows, seed=rows).to_parquet(str(tmp_path / "data" / f"{name}.parquet"))
    flags = ["--base", tmp_path / "base", "--data", tmp_path / "data", "--max-length", 16, "--batch-size", 5]
    flags += ["--prompt", "good", "--new-tokens", 8, "--guides", "LowRankPrecision", "--device", "cpu"]
    return list(map(str, [*flags, *SMALL]))


def test_two_launched_processes_fit_what_one_fits(run, texts, tmp_path, monkeypatch):
    pytest.importorskip("accelerate")
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        port = found.getsockname()[1]
    launch = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--master-addr", "127.0.0.1"]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(sys.path)}
    command = [*launch, "--master-port", str(port), str(MODELS / "causal_lm.py"), *texts, "--out", tmp_path / "two"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    assert "fit apart" not in done.stderr
    assert done.stdout.count("adapted modules") == done.stdout.count("nats per token, ") == 1

    run("causal_lm", *texts, "--out", tmp_path / "one")
    one, two = (pd.read_csv(tmp_path / name / "table.csv", index_col=0) for name in ("one", "two"))
    columns = ["NLL", "perplexity", "train NLL"]
    pd.testing.assert_frame_equal(one[columns], two[columns], rtol=1e-4)


def test_several_processes_are_refused_where_not_every_family_shares_its_work(run, monkeypatch, capsys):
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(SystemExit):
        run("compare_families", "--families", "swag")
    assert "expected one process" in capsys.readouterr().err


# --- loading


def test_rows_of_a_sorted_data_set_are_taken_from_all_of_it(script, tmp_path):
    for split in ("train", "test"):
        texts = {"text": ["a film"] * 60, "label": [0] * 30 + [1] * 30}
        datasets.Dataset.from_dict(texts).to_parquet(tmp_path / f"{split}.parquet")
    found = script("sequence_classification").load_splits(str(tmp_path), 100, 100, 20, 0)
    assert [len(rows) for rows in found] == [45, 15, 20]
    assert set(found[2]["label"]) == {0, 1}


@pytest.mark.parametrize(
    ("column", "labels", "classes"),
    [("label", [0, 1, 1], 3), ("labels", [0, 2, 0], 3), ("label", ["a", "b", "a"], None), ("label", [0, -1, 1], None)],
)
def test_classes_are_counted_over_all_splits(script, column, labels, classes):
    count = script("sequence_classification").count_classes
    splits = [
        datasets.Dataset.from_dict({column: values}) for values in (labels, labels[:1] if classes is None else [2])
    ]
    if classes is None:
        with pytest.raises(SystemExit, match="expected classes 0, 1, ... in the column"):
            count(*splits)
    else:
        assert count(*splits) == classes


def test_a_tokenizer_that_cannot_pad_gets_a_token_for_it(script, tmp_path):
    tokenizer = tiny_tokenizer(pad=False)
    tokenizer.save_pretrained(tmp_path / "unknown")
    tokenizer.eos_token = "good"
    tokenizer.save_pretrained(tmp_path / "end")
    found = [script("loading").tokenizer_of(str(tmp_path / name)).pad_token for name in ("unknown", "end")]
    assert found == ["[UNK]", "good"]


@pytest.mark.parametrize(
    "load",
    [
        lambda script: script("sequence_classification").load_base("me/none", 2, False, "float32"),
        lambda script: script("sequence_classification").load_base("me/none", 2, True, "float32"),
        lambda script: script("sequence_classification").read_splits("me/none:small"),
        lambda script: script("multiple_choice").load("me/none", "pair", False, "float32", 4),
        lambda script: script("multiple_choice").load("me/none", "letter", False, "float32", 4),
        lambda script: script("loading").tokenizer_of("me/none"),
    ],
)
def test_a_hub_that_cannot_be_reached_is_one_message(script, load):
    assert constants.HF_HUB_OFFLINE  # tests/conftest.py
    message = r"got 'me/none'; the hub cannot be reached \(HF_HUB_OFFLINE is set\): write a folder, or unset HF_HUB"
    with pytest.raises(SystemExit, match=message) as error:
        load(script)
    assert error.value.__suppress_context__
    assert isinstance(error.value.code, str)  # printed, with exit code 1


def test_a_hub_that_does_not_answer_or_refuses(script, monkeypatch, tmp_path):
    loading = script("loading")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    wrapped = OSError("We couldn't connect")
    wrapped.__cause__ = ConnectionRefusedError("no")
    message = r"reached \(ConnectionRefusedError\): write a folder, or try again where"
    with pytest.raises(SystemExit, match=message), loading.from_hub("me/none", "--base"):
        raise wrapped
    response = SimpleNamespace(headers={}, request=None, status_code=404)
    refused = RepositoryNotFoundError("404\nnot found", response=response)
    message = r"got 'me/none': 404 not found; write a folder that exists, or owner/name"
    with pytest.raises(SystemExit, match=message), loading.from_hub("me/none", "--base"):
        raise refused
    with pytest.raises(SystemExit, match=r"got './missing': Repo id .* write a folder that exists"):
        loading.tokenizer_of("./missing")
    with pytest.raises(OSError, match="config"), loading.from_hub(str(tmp_path), "--base"):
        raise OSError("a folder without config is another matter")
