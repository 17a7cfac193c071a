"""A fit that is cut off and goes on: bit for bit the one that was not, or an error before any work."""

import random

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from conftest import tiny_bert, tiny_reviews, tiny_tokenizer, token_batches
from pyro.infer.autoguide import AutoNormal
from safetensors.torch import load_file, save_file

import pyro_lrblora as lb
from pyro_lrblora.adapters.rows import mixing_modules
from pyro_lrblora.infer import checkpoint as checkpoint_file

pytestmark = pytest.mark.filterwarnings("ignore::pyro_lrblora.ScalesNotConverged")

REVIEWS = tiny_reviews(20)
HEAD = lb.FixedHead(dict(tiny_bert().classifier.named_parameters(prefix="classifier")))


def fresh_model(prior=lb.priors.Normal(0.1), projection=lb.projections.Gradient(), **options):
    options = {"head_scale": 1.0, "tokenizer": tiny_tokenizer()} | options
    return lb.BayesianLoRA(tiny_bert(), lb.LoRAXS(2, projection), prior, **options)


def fit(model, train=REVIEWS, **options):
    return lb.fit(model, train, **({"epochs": 4, "batch_size": 8, "progress": False} | options))


class CutOff(Exception):
    pass


def cut_after(epoch):
    def callback(row, posterior):
        if row["epoch"] == epoch:
            raise CutOff

    return [callback]


def cut_and_resume(model, folder, epoch=2, train=lambda: REVIEWS, **options):
    """Fit, break off with an exception after an epoch, and go on with a network loaded anew."""
    with pytest.raises(CutOff):
        fit(model(), train(), checkpoint=folder, callbacks=cut_after(epoch), **options)
    torch.manual_seed(99)
    return fit(model(), train(), resume_from=folder, **options)


def everything(posterior):
    """All that a fit ends with: parameters and buffers, the basis and the head's start, and the history."""
    model = posterior.model
    modules = {"guide": posterior.guide, "head": model.point_head, "prior": model.learned_scale}
    tensors = {f"{k}.{n}": v for k, m in modules.items() if m is not None for n, v in m.state_dict().items()}
    tensors |= {f"start.{name}": value for name, value in model.head_start.items()} | model.adapted.tensors()
    return tensors, [{k: v for k, v in row.items() if k != "seconds"} for row in posterior.history]


def assert_same(a, b):
    (first, history), (second, other) = everything(a), everything(b)
    assert first.keys() == second.keys()
    assert [name for name in first if not torch.equal(first[name], second[name])] == []
    assert history == other
    assert a.settings == b.settings
    assert (a.model.head_scale, a.model.size) == (b.model.head_scale, b.model.size)


CASES = {
    "low rank, draws per row": {},
    "accumulated, no whole number of steps": {"accumulate": 2, "steps": 7, "guide": lb.guides.LowRank(2)},
    "a stock guide after MAP epochs": {"guide": AutoNormal, "map_epochs": 1},
    "early stopping": {"validation": tiny_reviews(16, seed=3), "patience": 2, "rates": lb.Rates(loc=0.1, head=0.1)},
    "particles, path derivative": {"guide": lb.guides.Diagonal(), "particles": 2, "path_derivative": True},
}


@pytest.mark.parametrize("options", CASES.values(), ids=CASES)
def test_a_resumed_fit_is_the_uninterrupted_one(options, tmp_path):
    assert_same(cut_and_resume(fresh_model, tmp_path, **options), fit(fresh_model(), **options))


@pytest.mark.parametrize(
    "model",
    [
        pytest.param(
            lambda: fresh_model(lb.priors.Learned(lb.priors.LayerScale(0.1)), head="bayesian", head_scale=None),
            marks=pytest.mark.chosen_head_scale,
        ),
        lambda: fresh_model(projection=lb.projections.SVD(), head=HEAD),
        lambda: fresh_model().prepare(REVIEWS),
        lambda: lb.BayesianLoRA(tiny_bert(), lb.LoRA(2), lb.priors.Normal(1.0), tokenizer=tiny_tokenizer()),
    ],
    ids=["learned scales, Bayesian head", "fixed head", "prepared", "LoRA"],
)
def test_every_kind_of_model_resumes(model, tmp_path):
    options = {"guide": lb.guides.Diagonal(), "epochs": 2}
    assert_same(cut_and_resume(model, tmp_path, epoch=1, **options), fit(model(), **options))


def shuffled(generator):
    rows = [{name: value[0] for name, value in row.items()} for row in token_batches(20, batch_size=1)]
    made = None if generator is None else torch.Generator().manual_seed(generator)
    return torch.utils.data.DataLoader(rows, batch_size=8, shuffle=True, generator=made)


@pytest.mark.parametrize("generator", [None, 3], ids=["global generator", "its own"])
def test_a_loader_that_shuffles_goes_on_in_its_order(generator, tmp_path):
    options = {"guide": lb.guides.Diagonal()}
    resumed = cut_and_resume(fresh_model, tmp_path, train=lambda: shuffled(generator), **options)
    assert_same(resumed, fit(fresh_model(), shuffled(generator), **options))


def test_resuming_repeats_no_pass_over_the_data(tmp_path):
    """One epoch of three batches is left; preparing, the MAP fit and the warm start are not done again."""
    with pytest.raises(CutOff):
        fit(fresh_model(), checkpoint=tmp_path, callbacks=cut_after(3), map_epochs=1)
    model, runs = fresh_model(), []
    mixing_modules(model, token_batches(4)[0])  # which runs the network too, once per model
    model.network.register_forward_pre_hook(lambda *_: runs.append(1))
    fit(model, resume_from=tmp_path, map_epochs=1)
    assert len(runs) == 3
    # And what was finished is there at once.
    finished = fit(model, checkpoint=tmp_path, map_epochs=1, callbacks=cut_after(4))
    assert len(runs) == 3
    assert len(finished.history) == 4


def test_what_a_callback_stopped_can_go_on(tmp_path):
    stopped = fit(fresh_model(), checkpoint=tmp_path, callbacks=[lambda row, _: row["epoch"] == 2])
    assert len(stopped.history) == 2
    assert_same(fit(fresh_model(), checkpoint=tmp_path), fit(fresh_model()))


def test_a_crash_while_writing_leaves_the_epoch_before(tmp_path, monkeypatch):
    def half(tensors, path, card):
        save_file(tensors, path, card)
        whole = path.read_bytes()
        path.write_bytes(whole[: len(whole) // 2])
        raise CutOff

    with pytest.raises(CutOff):
        fit(fresh_model(), checkpoint=tmp_path, callbacks=cut_after(1))
    monkeypatch.setattr(checkpoint_file, "save_file", half)
    with pytest.raises(CutOff):
        fit(fresh_model(), checkpoint=tmp_path)
    monkeypatch.undo()
    assert_same(fit(fresh_model(), resume_from=tmp_path), fit(fresh_model()))


def test_members_of_an_ensemble_go_on(tmp_path):
    options = {"members": 2, "epochs": 2, "batch_size": 8, "progress": False, "warm_start": False}
    broken = iter([False, False, False, True])  # the second member, after its second epoch

    def callback(row, posterior):
        if next(broken):
            raise CutOff

    with pytest.raises(CutOff):
        lb.infer.ensemble(fresh_model(), REVIEWS, checkpoint=tmp_path, callbacks=[callback], **options)
    resumed = lb.infer.ensemble(fresh_model(), REVIEWS, checkpoint=tmp_path, **options)
    straight = lb.infer.ensemble(fresh_model(), REVIEWS, **options)
    assert all(torch.equal(v, straight.sample(4)[name]) for name, v in resumed.sample(4).items())
    with pytest.raises(ValueError, match="expected checkpoint= for an ensemble"):
        lb.infer.ensemble(fresh_model(), REVIEWS, resume_from=tmp_path, **options)


OTHER = {
    "guide": {"guide": lb.guides.Diagonal()},
    "epochs": {"epochs": 5},
    "rates": {"rates": lb.Rates(loc=0.1)},
    "seed": {"seed": 1},
    "training data": {"train": REVIEWS.select(range(19))},
    "validation data": {"validation": REVIEWS},
    "prior": {"model": lambda: fresh_model(lb.priors.Normal(0.2))},
    "network": {"model": lambda: lb.BayesianLoRA(tiny_bert(seed=2), fresh_model().adapter, tokenizer=tiny_tokenizer())},
    "init": {"init": lambda: fit(fresh_model(), guide=lb.guides.Delta(), epochs=1)},
    "dropout": {"model": lambda: fresh_model(dropout=True)},
}


@pytest.fixture(scope="module")
def begun(tmp_path_factory):
    """A folder with two of four epochs in it."""
    folder = tmp_path_factory.mktemp("begun")
    with pytest.raises(CutOff):
        fit(fresh_model(), checkpoint=folder, callbacks=cut_after(2))
    return folder


def refused(folder, match, model=fresh_model, train=REVIEWS, **options):
    """The error comes before the network runs, and the folder stays as it is."""
    before = {path.name: path.read_bytes() for path in folder.iterdir()} if folder.is_dir() else {}
    model, runs = model(), []
    options = {name: value() if name == "init" else value for name, value in options.items()}
    model.network.register_forward_pre_hook(lambda *_: runs.append(1))
    with pytest.raises(ValueError, match=match):
        fit(model, train, **({"checkpoint": folder} | options))
    assert runs == []
    assert ({path.name: path.read_bytes() for path in folder.iterdir()} if folder.is_dir() else {}) == before


@pytest.mark.parametrize(("what", "options"), OTHER.items(), ids=OTHER)
def test_another_fit_is_refused(what, options, begun):
    # A seed decides the order too, and other rows come in other batches.
    also = ", 'batches'" if what in ("seed", "training data") else ""
    refused(begun, rf"to hold this very fit, got one with other \['{what}'{also}\]", **options)


def own(scale):
    """A prior of one's own, made anew at every call, as by running a cell again."""
    return lambda shapes: {n: pyro.sample(n, dist.Normal(0.0, scale).expand(s).to_event()) for n, s in shapes.items()}


class OwnLikelihood:
    def __init__(self, temperature):
        self.temperature = temperature

    def __call__(self, outputs, batch):
        logits = lb.likelihoods.logits_of(outputs) / self.temperature
        pyro.sample("labels", dist.Categorical(logits=logits), obs=batch.get("labels"))


@pytest.mark.parametrize(
    ("what", "made"),
    [
        ("prior", lambda scale: fresh_model(prior=own(scale))),
        ("likelihood", lambda scale: fresh_model(likelihood=OwnLikelihood(10 * scale))),
    ],
)
def test_a_function_of_ones_own_that_does_something_else_is_another_fit(what, made, tmp_path):
    with pytest.raises(CutOff):
        fit(made(0.1), checkpoint=tmp_path, callbacks=cut_after(2))
    refused(tmp_path, rf"to hold this very fit, got one with other \['{what}'\]", model=lambda: made(0.2))
    assert torch.equal(fit(made(0.1), checkpoint=tmp_path).mean()["R"], fit(made(0.1)).mean()["R"])


@pytest.mark.parametrize("other", [{"shuffle": 1}, {"shuffle": None}, {"batch_size": 4}], ids=str)
def test_the_same_rows_in_other_batches_are_another_fit(other, tmp_path):
    batches = lambda **options: lb.Batches(REVIEWS, tiny_tokenizer(), **{"batch_size": 8, "shuffle": 0} | options)
    with pytest.raises(CutOff):
        fit(fresh_model(), batches(), checkpoint=tmp_path, callbacks=cut_after(2))
    refused(tmp_path, r"other \[.*'batches'\]", train=batches(**other))
    assert len(fit(fresh_model(), batches(), checkpoint=tmp_path).history) == 4


def test_other_texts_and_another_subspace_are_refused(begun):
    swapped = REVIEWS.select([1, 0, *range(2, 20)])
    refused(begun, r"other \['training data'\]", train=swapped)
    prepared = lambda: fresh_model().prepare(swapped.select(range(9)))
    refused(begun, "one prepared in another", model=prepared)


def test_a_head_with_another_start_is_refused(tmp_path):
    """The scale of its prior, and whether it was probed, change the fit."""
    with pytest.raises(CutOff):
        fit(fresh_model().prepare(REVIEWS), checkpoint=tmp_path, callbacks=cut_after(2))
    fit(fresh_model().prepare(REVIEWS), checkpoint=tmp_path)
    other = fresh_model()
    other.head_scale = 0.01
    refused(tmp_path, "its head's start", model=lambda: fresh_model().prepare(REVIEWS, probe=False))
    for model in (other, other.prepare(REVIEWS)):
        refused(tmp_path, "expected head_scale=1.0", model=lambda model=model: model)


def test_files_that_hold_no_fit_are_refused(begun, tmp_path):
    refused(tmp_path / "nowhere", "expected a fit to resume in", checkpoint=None, resume_from=tmp_path / "nowhere")
    whole = (begun / "fit.safetensors").read_bytes()
    file = tmp_path / "fit.safetensors"
    for part in (b"", whole[:100], whole[:-1]):
        file.write_bytes(part)
        refused(tmp_path, "a file that cannot be read")
    save_file(load_file(begun / "fit.safetensors"), file)
    refused(tmp_path, "expected a file of format")
    refused(file, "expected a folder for checkpoint")
    refused(begun, "got both", resume_from=begun)


def test_keep_best_returns_the_best_epoch_of_all():
    validation = token_batches(40, seed=9)  # labels are noise: every step away from the probe is overfitting
    model = lb.BayesianLoRA(tiny_bert(), lb.LoRAXS(8, targets="all-linear"), lb.priors.Normal(10.0), head_scale=1.0)
    options = {"guide": lb.guides.Delta(), "rates": lb.Rates(loc=0.05, head=0.05), "epochs": 8}
    posterior = fit(model, token_batches(24), validation=validation, keep_best=True, **options)
    recorded = [row["validation_nll"] for row in posterior.history]
    assert len(recorded) == 8
    assert min(recorded) < recorded[-1]
    prediction = lb.predict(posterior, validation, at="mean")
    assert lb.metrics.nll(prediction.probs, prediction.labels) == pytest.approx(min(recorded), abs=1e-5)
    with pytest.raises(ValueError, match="validation= with patience= or keep_best="):
        fit(model, token_batches(24), keep_best=True)


def test_a_seed_decides_everything_and_moves_nothing_of_the_users():
    """Order, probe, projection, warm start, draws and validation; whatever else draws, in a callback or before."""
    batches = lb.Batches(REVIEWS, tiny_tokenizer(), batch_size=8, shuffle=0)  # used by both fits
    draw = lambda row, posterior: (torch.rand(1), posterior.sample(1), None)[-1]
    runs = []
    for callbacks in ([], [draw]):
        model = fresh_model()
        random.seed(1), np.random.seed(1), torch.manual_seed(1)  # noqa: NPY002
        before = random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state().tolist()  # noqa: NPY002
        runs.append(fit(model, batches, validation=REVIEWS, callbacks=callbacks, seed=5))
        after = random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state().tolist()  # noqa: NPY002
        assert before == after
        torch.rand(3)
    assert_same(*runs)
    assert everything(runs[0])[1] != everything(fit(fresh_model(), batches, validation=REVIEWS, seed=6))[1]


def test_a_start_or_a_head_with_other_values_is_another_fit(tmp_path):
    """The same latents under another head, as a point and as what is held fixed."""
    point = fit(fresh_model(), guide=lb.guides.Delta(), epochs=1)
    moved = lb.Posterior(point.model.with_head("point"), point.guide, point.guide_spec)
    fit(fresh_model(), init=point, checkpoint=tmp_path / "init", epochs=1)
    refused(
        tmp_path / "init", r"got one with other \['init'\]", init=lambda: moved, epochs=1, checkpoint=tmp_path / "init"
    )
    held = lambda posterior: point.model.with_head(lb.fixed_from(posterior))
    fit(held(point), checkpoint=tmp_path / "head", epochs=1)
    refused(
        tmp_path / "head", r"got one with other \['fixed head'\]", lambda: held(moved), epochs=1,
        checkpoint=tmp_path / "head",
    )  # fmt: skip
