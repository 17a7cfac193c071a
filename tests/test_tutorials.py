"""The pages that a reader can run: every python block in order, what they print, and what the page says about it."""

import re
from pathlib import Path

import pytest
from pyro.infer.autoguide import AutoNormal

import pyro_lrblora as lb
from pyro_lrblora import networks
from pyro_lrblora.networks import builtin_base

ROOT = Path(__file__).resolve().parents[1]
DOCS = ROOT / "docs"
PAGES = [*sorted(DOCS.glob("tutorials/*.md")), *sorted(DOCS.glob("how_to/*.md"))]
PAGES += [DOCS / "installation.md", DOCS / "quickstart.md"]
NUMBER = re.compile(r"-?\d[\d,]*(?:\.\d+)?")

pytestmark = [
    pytest.mark.chosen_head_scale,
    pytest.mark.filterwarnings("ignore::pyro_lrblora.ScalesNotConverged"),
    pytest.mark.filterwarnings("ignore::FutureWarning:transformers"),
]


def blocks(page: Path, language: str) -> list[str]:
    """Fenced blocks, each after as many empty lines as are above it, so that errors name the page's own lines."""
    text = page.read_text()
    found = re.finditer(rf"^```{language}\n(.*?)^```", text, re.MULTILINE | re.DOTALL)
    return ["\n" * text[: block.start(1)].count("\n") + block[1] for block in found]


def numbers(line: str) -> list[float]:
    return [float(found.replace(",", "")) for found in NUMBER.findall(line)]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_a_page_does_what_it_says(page, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    names = {"__name__": page.stem}
    capsys.readouterr()
    for block in blocks(page, "python"):
        exec(compile(block, str(page), "exec"), names)
    lines = [line for line in capsys.readouterr().out.splitlines() if line.strip()]
    # What is shown is what was printed, but for the numbers, which differ between machines.
    printed = [NUMBER.sub("#", line) for line in lines]
    for block in blocks(page, "text"):
        for line in block.split("\n"):
            assert NUMBER.sub("#", line) in [*printed, ""]
    said = globals().get(page.stem)
    assert lines
    assert said is not None or page.parent == DOCS, f"write a function {page.stem} here that checks the page's words"
    if said is not None:
        said(names, lines)


def swap_a_prior(names, lines):
    sure, differ = zip(*(numbers(line)[1:] for line in lines[:3]), strict=True)
    assert sorted(sure) == list(sure)
    assert sorted(differ) == list(differ)
    assert sure[2] > 0.85
    assert len(names["ranked"]) == 6


def swap_a_guide(names, lines):
    elbo = {name: posterior.history[-1]["elbo"] for name, posterior in names["posteriors"].items()}
    assert elbo["AutoNormal"] < elbo["Diagonal"] < elbo["LowRankPrecision"]
    found = names["found"]
    assert found["Diagonal"].dependence == pytest.approx(0, abs=1e-3)
    assert found["LowRankPrecision"].dependence > 0.1


def compare_families(names, lines):
    table, close = names["table"], names["close"]
    assert names["best"] in close.index
    assert len(close) > len(table) / 2


def read_a_report(names, lines):
    first, again = names["first"], names["again"].table
    assert (first.check, first.value, first.verdict) == ("training", "train longer", "warning")
    assert first.advice
    assert not again.iloc[0].value.startswith("train longer")
    assert Path("out/report.html").exists()
    narrow, warm = (names[fit].covariance().variance.sqrt().mean() for fit in ("narrow", "posterior"))
    assert narrow < 0.03 < 0.15 < warm < 0.3
    assert names["wrong"][names["half"]].mean() < names["wrong"].mean()


def generation(names, lines):
    few, many = (names["written"][rows] for rows in (16, 256))
    assert numbers(lines[0])[1] > numbers(lines[1])[1] + 1
    assert few.sequence_mutual_information[0] > 3 * many.sequence_mutual_information[0]
    assert 0.15 < few.sequence_mutual_information[0] / few.sequence_entropy[0] < 0.35


def large_model(names, lines):
    assert "1 file, read back the same: True" in lines
    assert "[2, 4, 4]" in lines
    assert names["unchanged"]
    assert lines.count("True") == 2


def add_a_guide(names, lines):
    scales = names["posterior"].covariance().variance.sqrt().unique()
    assert len(scales) == 6
    assert scales.max() < 0.11
    assert names["same"]


def add_a_prior(names, lines):
    median, low, high = (names["scale"].quantile(q) for q in (0.5, 0.05, 0.95))
    assert 0.05 < median < 0.2
    assert 0.02 < low < high < 0.52  # narrower than the prior


def add_a_projection(names, lines):
    nll = [float(re.search(r"NLL (\S+),", line)[1]) for line in lines]
    assert len(nll) == 3
    assert min(nll) == nll[2]


def add_a_likelihood(names, lines):
    plain, mistaken = names["scores"].values()
    assert mistaken.probs.max() > plain.probs.max()


def test_every_public_name_is_in_the_reference():
    pages = {page.stem: page.read_text() for page in DOCS.glob("reference/*.md")}
    named = set(re.findall(r"^\.\. auto\w+:: (\w+)", pages["pyro_lrblora"], re.MULTILINE)) | {"Batches"}
    assert named | set(pages) >= set(lb.__all__)


def test_the_readme_runs(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("TQDM_DISABLE", "1")
    network, tokenizer = builtin_base(num_labels=2)
    del network.encoder.encoder.layer[1:]  # one block of six, with fewer rows and epochs
    monkeypatch.setattr(networks, "builtin_base", lambda num_labels: (network, tokenizer))
    names = {"__name__": "README", "AutoNormal": AutoNormal}
    first, second, *_ = blocks(ROOT / "README.md", "python")
    for block in (first, second):
        few = (
            re.sub(r"reviews\(\d+", "reviews(16", block)
            .replace("epochs=5", "epochs=1")
            .replace(", train)", ", train, epochs=1)")
        )
        exec(compile(few, "README.md", "exec"), names)
    assert Path("out/report.html").exists()
    assert Path("out/posterior").is_dir()
    assert names["prediction"].logits.shape == (32, 16, 2)
    printed = capsys.readouterr().out
    assert all(name in printed for name in names["fits"])


def test_links_of_the_readme_lead_somewhere():
    links = re.findall(r"\]\((?!https?:)([^)#]+)", (ROOT / "README.md").read_text())
    assert links
    assert [link for link in links if not (ROOT / link).exists()] == []
