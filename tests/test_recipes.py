"""The scripts in models/, each on a little real data with real weights."""

import subprocess
import sys
from pathlib import Path

import pandas as pd
import pytest
from conftest import SHARED

ROOT = Path(__file__).resolve().parents[1]
SMALL = ["--rows", "24", "--validation-rows", "12", "--test-rows", "12", "--epochs", "1", "--draws", "2", "--rank", "2"]
MINILM, LLAMA = (str(SHARED / "weights" / name) for name in ("all-MiniLM-L6-v2", "stories260K-llama"))
UPPER = ["--layers", "5"]


@pytest.mark.parametrize(
    ("script", "data", "options", "columns"),
    [
        ("causal_lm.py", "tinystories_sentences", ["--base", LLAMA], {"NLL", "perplexity"}),
        ("multiple_choice.py", "arc_easy", ["--base", MINILM, "--mean-pool", *UPPER], {"accuracy", "NLL"}),
        ("multiple_choice.py", "openbookqa", ["--base", LLAMA, "--form", "answer"], {"accuracy", "NLL"}),
        ("regression.py", "chaosnli", ["--base", MINILM, "--mean-pool", *UPPER, "--text", "premise", "hypothesis",
                                       "--label", "entropy"], {"RMSE", "CRPS"}),
    ],
    ids=["causal-lm", "pairs", "answers", "regression"],
)  # fmt: skip
def test_a_recipe_runs_and_keeps_its_table(shared, tmp_path, script, data, options, columns):
    command = [sys.executable, f"models/{script}", "--data", str(shared / "data" / data), *options, *SMALL]
    done = subprocess.run([*command, "--out", str(tmp_path)], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    table = pd.read_csv(tmp_path / "table.csv", index_col=0)
    assert columns <= set(table.columns)
    assert table["NLL"].notna().all()
    assert (tmp_path / "posterior.json").exists()
