"""Model cards, the hub that answers, refuses or cannot be reached, and saves that a crash left half done."""

import os
import shutil
import socket
from pathlib import Path
from types import SimpleNamespace

import datasets
import huggingface_hub
import pytest
import torch
from conftest import tiny_bert, tiny_reviews, tiny_tokenizer, token_batches
from huggingface_hub import ModelCard, constants
from huggingface_hub.errors import RepositoryNotFoundError
from test_model import users_prior
from test_peft_io import posterior_of, predicted

import pyro_lrblora as lb
from pyro_lrblora import sharing
from pyro_lrblora.provenance import data_hash

FILES = ["README.md", "posterior.json", "posterior.safetensors"]


def posterior(seed=0, prior=lb.priors.Normal(0.1), network=None):
    model = lb.BayesianLoRA(network or tiny_bert(), lb.LoRAXS(2), prior, size=40)
    torch.manual_seed(seed)
    return posterior_of(model)


def check_same(first, second):
    for options in ({"draws": 3, "seed": 4}, {"at": "mean"}):
        assert torch.equal(predicted(first, **options), predicted(second, **options))


@pytest.fixture
def no_connections(monkeypatch):
    monkeypatch.setattr(socket, "create_connection", lambda *_, **__: pytest.fail("opened a connection"))
    monkeypatch.setattr(socket, "getaddrinfo", lambda *_, **__: pytest.fail("looked up an address"))
    monkeypatch.setattr(huggingface_hub, "snapshot_download", lambda *_, **__: pytest.fail("asked the hub"))


# --- folders and cards


@pytest.mark.usefixtures("no_connections")
def test_a_folder_is_the_whole_posterior_and_never_asks_the_hub(tmp_path, monkeypatch):
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    fitted = posterior()
    fitted.save_pretrained(tmp_path / "out")
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == FILES
    monkeypatch.chdir(tmp_path)
    for source in (tmp_path / "out", str(tmp_path / "out"), "out"):
        check_same(lb.Posterior.from_pretrained(source, tiny_bert()), fitted)
    check_same(lb.Posterior.load("out", tiny_bert()), fitted)


def test_the_card_says_what_it_is_and_how_it_was_fitted(tmp_path):
    model = lb.BayesianLoRA(tiny_bert(), lb.LoRAXS(2, targets="query|.*value"), lb.priors.Laplace(0.1))
    fitted = lb.fit(model, token_batches(16), guide=lb.guides.LowRank(3), epochs=1, seed=11, progress=False)
    table = lb.compare({"mine | yours": fitted}, token_batches(8))
    fitted.save_pretrained(
        tmp_path / "film", base_model="me/base", license="apache-2.0", comparison=table, data=token_batches(16),
        language="en", datasets=["sst2"],
    )  # fmt: skip
    card = ModelCard.load(tmp_path / "film" / "README.md")
    data = card.data.to_dict()
    assert (data["base_model"], data["license"], data["language"]) == ("me/base", "apache-2.0", "en")
    assert (data["datasets"], data["library_name"]) == (["sst2"], "pyro_lrblora")
    rows = dict(row.split("|", 2)[1:] for row in card.text.splitlines() if row.startswith("| "))
    rows = {name.strip(): value.strip(" |`") for name, value in rows.items()}
    assert rows["prior"] == "Laplace(scale=0.1)"
    assert rows["guide"] == "LowRank(rank=3, start_scale=0.1)"
    assert rows["adapter"] == repr(model.adapter).replace("|", "\\|")
    assert (rows["method"], rows["seed"], rows["training rows N"]) == ("svi", "11", "16")
    assert rows["training rows, sha256"] == data_hash(token_batches(16))
    assert f"torch {torch.__version__}" in rows["versions"]
    assert 'from_pretrained("film", network' in card.text
    scores = [line for line in card.text.splitlines() if line.startswith("| mine \\| yours ")]
    assert f" {table['NLL'].iloc[0]:.3f} |" in scores[0]
    assert f" {table['parameters'].iloc[0]:.0f} |" in scores[0]
    assert all(note in card.text for note in table.attrs["notes"])


@pytest.mark.parametrize("name", ["bert-base-cased", "google-bert/bert-base-cased"])
def test_nothing_is_invented_in_the_card(name, tmp_path, monkeypatch):
    """No licence, no base that nobody named, no folder of this machine; a name that the hub knows is taken."""
    network = tiny_bert()
    fitted = posterior(network=network)
    monkeypatch.chdir(tmp_path)
    Path("bases").mkdir()
    for folder in ("", "bases", str(tmp_path / "bases")):
        network.config._name_or_path = network.name_or_path = folder
        fitted.save_pretrained("plain")
        text = Path("plain/README.md").read_text()
        assert not {"license", "base_model"} & ModelCard(text).data.to_dict().keys()
        assert "bases" not in text
        assert "## Scores" not in text
    network.name_or_path = name
    fitted.save_pretrained("named")
    assert ModelCard.load("named/README.md").data.base_model == name


def test_the_card_of_a_point_is_of_a_point(tmp_path, monkeypatch):
    model = lb.BayesianLoRA(tiny_bert(), lb.LoRAXS(2))
    point = lb.fit(model, token_batches(16), guide=lb.guides.Delta(), epochs=1, progress=False)
    around = lb.infer.laplace(model, token_batches(16), init=point)
    for name, fitted in {"point": point, "around": around}.items():
        (tmp_path / name).mkdir()
        monkeypatch.chdir(tmp_path / name)
        fitted.save_pretrained(".")
        text = (tmp_path / name / "README.md").read_text()
        assert ("not one adapter but a distribution" in text) == (name == "around")
        assert f"# {name}\n" in text
        assert "-log prior" in text
        assert ", kl " not in text


def test_rows_that_were_not_fitted_are_not_in_the_card(tmp_path):
    rows, tokenizer = tiny_reviews(16), tiny_tokenizer()
    model = lb.BayesianLoRA(tiny_bert(), lb.LoRAXS(2), tokenizer=tokenizer)
    fitted = lb.fit(model, rows, guide=lb.guides.Diagonal(), epochs=1, progress=False)
    fitted.save_pretrained(tmp_path, data=rows)
    with pytest.raises(ValueError, match="expected data= to be the rows that were fitted"):
        fitted.save_pretrained(tmp_path, data=tiny_reviews(16, seed=3))
    with pytest.raises(TypeError, match="write posterior.push_to_hub"):
        fitted.save_pretrained(tmp_path, push_to_hub=True)


def test_the_card_asks_for_ones_own_parts(tmp_path):
    posterior(prior=users_prior).save_pretrained(tmp_path)
    assert "tokenizer=tokenizer, prior=...)" in (tmp_path / "README.md").read_text()
    lb.Posterior.from_pretrained(tmp_path, tiny_bert(), prior=users_prior)
    own = lambda model: lb.guides.Diagonal()(model)
    options = {"members": 2, "guide": own, "steps": 1, "progress": False}
    lb.infer.ensemble(lb.BayesianLoRA(tiny_bert(), lb.LoRAXS(2)), token_batches(16), **options).save_pretrained(
        tmp_path
    )
    assert "tokenizer=tokenizer, guide=...)" in (tmp_path / "README.md").read_text()


def test_data_have_one_hash_wherever_they_are_kept(tmp_path):
    rows = [{"text": f"film {number}", "label": number % 2, "raw": bytes([number % 256])} for number in range(1500)]
    first = datasets.Dataset.from_list(rows)
    first.save_to_disk(tmp_path)
    stored = datasets.load_from_disk(tmp_path)
    same = [stored, first.with_format("torch"), datasets.Dataset.from_list(rows[::-1]).select(range(1499, -1, -1))]
    assert {data_hash(each) for each in same} == {data_hash(first)}
    rows[1200]["label"] += 1
    others = [first.select(range(1499)), first.shuffle(seed=0), datasets.Dataset.from_list(rows)]
    assert len({data_hash(each) for each in [first, *others]}) == 4
    batches = token_batches(16)
    assert data_hash(batches) == data_hash([dict(reversed(batch.items())) for batch in token_batches(16)])
    batches[1]["labels"][0] += 1
    assert data_hash(batches) != data_hash(token_batches(16))
    half = [{"x": torch.ones(3, dtype=torch.bfloat16), "scalar": torch.tensor(1.0)}]
    assert data_hash(half) != data_hash([{"x": torch.ones(3), "scalar": torch.tensor(1.0)}])


# --- the hub


class FakeHub:
    """What push_to_hub and from_pretrained call, kept in a folder."""

    def __init__(self, folder, monkeypatch):
        self.folder, self.calls = folder, []
        monkeypatch.setattr(huggingface_hub, "HfApi", self.api)
        monkeypatch.setattr(huggingface_hub, "snapshot_download", self.download)

    def api(self, **options):
        self.calls.append(("api", options))
        return self

    def create_repo(self, repo_id, **options):
        self.calls.append(("create_repo", repo_id, options))

    def upload_folder(self, *, repo_id, folder_path, **options):
        self.calls.append(("upload_folder", repo_id, options))
        shutil.copytree(folder_path, self.folder / repo_id)
        return SimpleNamespace(commit_url=f"https://hub/{repo_id}/commit/1")

    def download(self, repo_id, *, allow_patterns, **options):
        self.calls.append(("download", repo_id, options))
        target = self.folder / "cache"
        target.mkdir()
        for path in (self.folder / repo_id).iterdir():
            if path.name in allow_patterns:
                shutil.copy(path, target)
        return str(target)


def test_pushed_and_fetched_is_the_same_posterior(tmp_path, monkeypatch):
    hub, fitted = FakeHub(tmp_path, monkeypatch), posterior()
    address = fitted.push_to_hub("me/films", private=True, token="t", commit_message="first", license="mit")
    assert address == "https://hub/me/films/commit/1"
    assert hub.calls == [
        ("api", {"token": "t"}),
        ("create_repo", "me/films", {"private": True, "exist_ok": True}),
        ("upload_folder", "me/films", {"revision": None, "commit_message": "first"}),
    ]
    assert sorted(path.name for path in (tmp_path / "me/films").iterdir()) == FILES
    card = ModelCard.load(tmp_path / "me/films/README.md")
    assert card.data.license == "mit"
    assert 'from_pretrained("me/films", network' in card.text
    (tmp_path / "me/films/pickle.bin").write_bytes(b"not wanted")
    check_same(lb.Posterior.from_pretrained("me/films", tiny_bert(), revision="v1"), fitted)
    assert sorted(os.listdir(tmp_path / "cache")) == FILES[1:]
    assert hub.calls[-1] == ("download", "me/films", {"revision": "v1", "token": None, "cache_dir": None})


def test_nothing_is_made_on_the_hub_where_the_card_cannot_be_written(tmp_path, monkeypatch):
    hub = FakeHub(tmp_path, monkeypatch)
    with pytest.raises(TypeError, match="expected what lb.compare returned"):
        posterior().push_to_hub("me/films", comparison={"NLL": 0.3})
    assert hub.calls == []


def alone(error):
    """The error says it all: no other one is shown above it."""
    return error.value.__suppress_context__ and error.value.__cause__ is None


def test_offline_says_so_and_what_to_write(tmp_path):
    assert constants.HF_HUB_OFFLINE  # tests/conftest.py
    with pytest.raises(
        ConnectionError, match=r"'me/films'.*HF_HUB_OFFLINE is set.*from_pretrained\(\"folder/\""
    ) as error:
        lb.Posterior.from_pretrained("me/films", tiny_bert(), cache_dir=tmp_path)
    assert alone(error)
    with pytest.raises(ConnectionError, match=r"HF_HUB_OFFLINE is set.*save_pretrained\(\"folder/\"\)") as error:
        posterior().push_to_hub("me/films")
    assert alone(error)


def test_a_hub_that_does_not_answer(tmp_path, monkeypatch):
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")  # nobody listens there
    with pytest.raises(ConnectionError, match=r"'me/films'.*cannot be reached .*from_pretrained\(\"folder/\"") as error:
        lb.Posterior.from_pretrained("me/films", tiny_bert(), cache_dir=tmp_path)
    assert alone(error)
    with pytest.raises(ConnectionError, match=r"cannot be reached \(ConnectError\).*save_pretrained") as error:
        posterior().push_to_hub("me/films", token="t")
    assert alone(error)


def test_a_hub_that_refuses(monkeypatch):
    def refuse(*_, **__):
        raise RepositoryNotFoundError("404 Client Error.\n\nRepository Not Found", response=response)

    response = SimpleNamespace(headers={}, request=None, status_code=404)
    monkeypatch.setattr(huggingface_hub, "snapshot_download", refuse)
    monkeypatch.setattr(huggingface_hub.HfApi, "create_repo", refuse)
    for call in (
        lambda: lb.Posterior.from_pretrained("me/none", tiny_bert()),
        lambda: posterior().push_to_hub("me/no"),
    ):
        with pytest.raises(OSError, match="the hub answered: 404 Client Error. Repository Not Found") as error:
            call()
        assert alone(error)
        assert not isinstance(error.value, ConnectionError)


def test_a_name_that_is_neither_folder_nor_repository(tmp_path):
    for source in (tmp_path / "missing", str(tmp_path / "missing"), "a/b/c"):
        with pytest.raises(ValueError, match="to be a folder, or a repository on the hub, got a name") as error:
            lb.Posterior.from_pretrained(source, tiny_bert())
        assert alone(error)
    with pytest.raises(ValueError, match="got a name that the hub cannot have"):
        posterior().push_to_hub("a/b/c")


# --- half-written


@pytest.mark.parametrize("moves", [0, 1])
def test_a_crash_while_saving_never_mixes_two_saves(moves, tmp_path, monkeypatch):
    first, second = posterior(0), posterior(1)
    first.save(tmp_path)
    replace, done = os.replace, []

    def crashing(*paths):
        if len(done) == moves:
            raise KeyboardInterrupt
        done.append(replace(*paths))

    monkeypatch.setattr(os, "replace", crashing)
    with pytest.raises(KeyboardInterrupt):
        second.save(tmp_path)
    monkeypatch.undo()
    if moves == 0:
        check_same(lb.Posterior.load(tmp_path, tiny_bert()), first)
    else:
        with pytest.raises(ValueError, match="of another save"):
            lb.Posterior.load(tmp_path, tiny_bert())
    second.save(tmp_path)
    check_same(lb.Posterior.load(tmp_path, tiny_bert()), second)
    assert sorted(path.name for path in tmp_path.iterdir()) == FILES[1:]


@pytest.mark.parametrize("name", FILES[1:])
@pytest.mark.parametrize("how", ["missing", "empty", "cut short", "of another save"])
def test_half_a_posterior_is_refused(how, name, tmp_path):
    posterior(0).save_pretrained(tmp_path / "a")
    posterior(1).save_pretrained(tmp_path / "b")
    path = tmp_path / "a" / name
    content = path.read_bytes()
    path.unlink()
    if how == "of another save":
        shutil.copy(tmp_path / "b" / name, path)
    elif how != "missing":
        path.write_bytes(content[: 0 if how == "empty" else -20])
    expected = {"missing": f"missing {name}", "of another save": "of another save"}.get(
        how, "cannot be read|damaged one"
    )
    with pytest.raises(ValueError, match=expected):
        lb.Posterior.from_pretrained(tmp_path / "a", tiny_bert())


def test_the_card_is_written_last(tmp_path, monkeypatch):
    """A card beside no posterior would promise what is not there."""
    monkeypatch.setattr(sharing, "save", lambda *_: (_ for _ in ()).throw(OSError("disk full")))
    with pytest.raises(OSError, match="disk full"):
        posterior().save_pretrained(tmp_path / "out")
    assert not (tmp_path / "out" / "README.md").exists()
