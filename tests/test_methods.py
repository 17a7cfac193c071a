"""SWAG, ensembles, dropout, TFB and BLoB's family, against what they say they compute."""

import math

import numpy as np
import pytest
import torch
from conftest import LinearGaussian, LinearNetwork, label, tiny_bert, tiny_reviews, tiny_tokenizer, token_batches
from pyro.infer.autoguide import AutoNormal

import pyro_lrblora as lb
from pyro_lrblora.metrics import nll
from pyro_lrblora.model import PRECISIONS

pytestmark = pytest.mark.filterwarnings("ignore::pyro_lrblora.ScalesNotConverged")
QUIET = {"progress": False}
STANDING = lb.Rates(0, 0, 0, 0)
together = lambda batches: {name: torch.cat([batch[name] for batch in batches]) for name in batches[0]}


def classifier(prior=None, adapter=None, **options):
    return lb.BayesianLoRA(
        tiny_bert(), adapter or lb.LoRAXS(2, layers=[1]), prior or lb.priors.Normal(0.3),
        tokenizer=tiny_tokenizer(), **options,
    )  # fmt: skip


def same_after_the_file(posterior, folder):
    """Saved, loaded, and predicted bit for bit alike."""
    posterior.save(folder)
    loaded = lb.Posterior.load(folder, tiny_bert(), tokenizer=tiny_tokenizer())
    assert repr(loaded.guide_spec) == repr(posterior.guide_spec)
    assert loaded.settings == posterior.settings
    for options in ({"draws": 4, "seed": 3}, {"at": "mean"}):
        first, second = (lb.predict(p, token_batches(16), **options).logits for p in (posterior, loaded))
        assert torch.equal(first, second)


def check_one_function_per_draw(posterior):
    """A row's logits, draw by draw, do not depend on the batch it is in; two draws are not one function."""
    batches = token_batches(16)
    whole = lb.predict(posterior, [together(batches)], draws=4)
    parts = lb.predict(posterior, batches, draws=4)
    torch.testing.assert_close(whole.logits, parts.logits, atol=1e-5, rtol=1e-4)
    assert len(whole.logits.unique(dim=0)) == 4


# --- SWAG


class Trajectory:
    """Records points and heads, as a callback."""

    def __init__(self):
        self.rows, self.points, self.heads = [], [], []

    def __call__(self, row, point):
        self.rows.append(row)
        self.points.append(point.guide.loc.detach().double().numpy().copy())
        self.heads.append({name: value.clone() for name, value in point.head().items()})


@pytest.mark.parametrize(("columns", "scale"), [(2, 0.5), (3, 0.5), (7, 0.5), (3, 2.0)])
def test_swag_is_the_trajectorys_covariance(columns, scale):
    """Equation 4 by hand: last K deviations from the running mean, over K - 1, and the diagonal, times the scale."""
    seen = Trajectory()
    posterior = lb.infer.swag(
        classifier(), token_batches(24), columns=columns, snapshots=7, every=2, burn_in=1, covariance_scale=scale,
        callbacks=[seen], **QUIET,
    )  # fmt: skip
    points = np.stack(seen.points)
    assert [row["step"] for row in seen.rows] == [5, 7, 9, 11, 13, 15, 17]  # after an epoch of three
    assert posterior.history[1:] == seen.rows
    assert all(math.isfinite(row["log_joint"]) for row in seen.rows)
    assert (np.diff(points, axis=0) != 0).any(1).all()
    running = np.cumsum(points, 0) / np.arange(1, 8)[:, None]
    deviations = (points - running)[-columns:]
    variance = (points**2).mean(0) - points.mean(0) ** 2
    expected = scale * (np.diag(variance) + deviations.T @ deviations / (columns - 1))
    spread = np.sqrt(expected.diagonal())
    found = posterior.covariance().dense().double().numpy()
    np.testing.assert_allclose(found / np.outer(spread, spread), expected / np.outer(spread, spread), atol=1e-4)
    np.testing.assert_allclose(posterior.mean()["R"].flatten(), points.mean(0), rtol=1e-5, atol=1e-7)
    for name, value in posterior.head().items():
        torch.testing.assert_close(value, torch.stack([head[name] for head in seen.heads]).mean(0))
    assert not torch.equal(seen.heads[0]["classifier.weight"], seen.heads[-1]["classifier.weight"])


def test_swag_starts_where_it_is_told():
    """burn_in=0: at the base, or at init; None for `every` is once per epoch; the model is left alone."""
    model = classifier().prepare(token_batches(16))
    head = {name: value.clone() for name, value in model.head_values().items()}
    still = {"columns": 2, "snapshots": 3, "burn_in": 0, "rates": STANDING, **QUIET}
    seen = Trajectory()
    base = lb.infer.swag(model, token_batches(16), callbacks=[seen], **still)
    assert [row["step"] for row in seen.rows] == [2, 4, 6]
    assert base.mean()["R"].abs().max() == 0
    assert base.covariance().variance.max() < 1e-6
    init = lb.fit(model, token_batches(16), guide=lb.guides.Delta(), epochs=4, **QUIET)
    started = lb.infer.swag(model, token_batches(16), init=init, **still)
    torch.testing.assert_close(started.mean()["R"], init.mean()["R"])
    torch.testing.assert_close(started.head()["classifier.weight"], init.head()["classifier.weight"])
    burnt = lb.infer.swag(model, token_batches(16), **(still | {"burn_in": 4, "rates": lb.Rates(), "snapshots": 2}))
    assert burnt.mean()["R"].abs().max() > 0.01
    assert len(burnt.history) == 4 + 2
    assert all(torch.equal(head[name], value) for name, value in model.head_values().items())


def test_swag_collects_at_the_mode_of_an_exact_problem():
    """After the burn-in the mean of the snapshots is near the posterior mean, in posterior standard deviations."""
    problem = LinearGaussian(rank=2)
    posterior = lb.infer.swag(
        problem.model, problem.batches(8), burn_in=300, rates=lb.Rates(loc=0.02), every=3, columns=4, **QUIET
    )
    sd = torch.linalg.inv(problem.precision).diagonal().sqrt()
    assert ((posterior.mean()["R"].flatten() - problem.mean).abs() / sd).max() < 0.5


def test_swag_collects_at_the_mode_of_batches_of_unequal_size():
    """From the exact mode, which a pass of a fixed order, 22 rows and then 2, must not leave."""
    problem = LinearGaussian(rank=2)
    parts = zip(*(value.split((22, 2)) for value in problem.batch.values()), strict=True)
    batches = [dict(zip(problem.batch, part, strict=True)) for part in parts]
    mode = lb.fit(problem.model, batches, guide=lb.guides.Delta(), steps=1, rates=STANDING, **QUIET)
    mode.guide.loc.data.copy_(problem.mean)
    options = {"burn_in": 0, "rates": lb.Rates(loc=0.003), "snapshots": 40, "every": 6, "columns": 4, "clip": None}
    posterior = lb.infer.swag(problem.model, batches, init=mode, **options, **QUIET)
    sd = torch.linalg.inv(problem.precision).diagonal().sqrt()
    assert ((posterior.mean()["R"].flatten() - problem.mean).abs() / sd).max() < 0.3


@pytest.mark.parametrize("burn_in", [0, 1])
def test_swag_twice_with_the_same_batches(burn_in):
    train = lb.Batches(tiny_reviews(), tiny_tokenizer(), batch_size=8, shuffle=0)
    options = {"columns": 2, "snapshots": 3, "every": 2, "burn_in": burn_in, **QUIET}
    first, second = (lb.infer.swag(classifier(), train, **options).sample(2, seed=0)["R"] for _ in range(2))
    assert torch.equal(first, second)


def test_swag_predicts_and_is_saved(tmp_path):
    posterior = lb.infer.swag(classifier(), token_batches(16), columns=3, snapshots=5, burn_in=1, **QUIET)
    same_after_the_file(posterior, tmp_path)
    check_one_function_per_draw(posterior)
    again = lb.infer.swag(classifier(), token_batches(16), columns=3, snapshots=5, burn_in=1, **QUIET)
    assert torch.equal(again.sample(2, seed=0)["R"], posterior.sample(2, seed=0)["R"])
    lora = classifier(adapter=lb.LoRA(2, "all-linear"))
    swag_lora = lb.infer.swag(lora, token_batches(16), columns=2, snapshots=2, every=1, burn_in=1, **QUIET)
    assert lb.predict(swag_lora, token_batches(16), draws=2).probs.isfinite().all()


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_swag_collects_in_the_precision_asked_for(precision):
    """Not only the burn-in: the network's own outputs are of that kind, and the trajectory is near that in single."""
    model = classifier()
    kinds, options = set(), {"columns": 2, "snapshots": 4, "every": 1, **QUIET}
    handle = model.network.classifier.register_forward_hook(lambda module, args, output: kinds.add(output.dtype))
    point = lb.fit(model, token_batches(16), guide=lb.guides.Delta(), epochs=1, progress=False)
    kinds.clear()
    half = lb.infer.swag(model, token_batches(16), init=point, burn_in=0, precision=precision, **options)
    handle.remove()
    assert kinds == {PRECISIONS[precision]}
    assert half.settings["precision"] == precision
    single = lb.infer.swag(model, token_batches(16), init=point, burn_in=0, **options)
    moved = [(posterior.mean()["R"] - point.mean()["R"]).flatten() for posterior in (single, half)]
    assert not torch.equal(*moved)
    assert torch.cosine_similarity(*moved, dim=0) > 0.9


@pytest.mark.parametrize(
    ("model", "options", "message"),
    [
        (classifier, {"precision": "fp8"}, "precision to be one of"),
        (lambda: classifier(lb.priors.Horseshoe(0.1)), {}, "only sites are the latents .*'R_local_scale'"),
        (lambda: classifier(lb.priors.LayerScale(0.1)), {}, "only sites are the latents .*'R_scale'"),
        (lambda: classifier(head="bayesian"), {}, "only sites are the latents .*'classifier.weight'"),
        (classifier, {"columns": 21}, "columns <= snapshots, got columns=21, snapshots=20"),
        (classifier, {"columns": 1}, "2 <= columns"),
        (classifier, {"every": 0}, "every >= 1"),
        (classifier, {"burn_in": -1}, "burn_in >= 0"),
        (classifier, {"covariance_scale": 0.0}, "covariance_scale > 0"),
    ],
)
def test_swag_refuses(model, options, message):
    with pytest.raises(ValueError, match=message):
        lb.infer.swag(model(), None, **options)


# --- ensemble


@pytest.mark.parametrize("members", [2, 3])
def test_every_member_is_drawn_once_with_its_own_head(members, tmp_path):
    """The members as the fits themselves saw them, against the draws; at the mean, the average of all parameters."""
    fits = []
    model = classifier().prepare(token_batches(16))
    posterior = lb.infer.ensemble(
        model, token_batches(16), members=members, epochs=2,
        callbacks=[lambda row, fit: fits.append(fit) if row["epoch"] == 2 else None], **QUIET,
    )  # fmt: skip
    assert len(fits) == members
    logits = lb.predict(posterior, token_batches(16), draws=members).logits
    for fit, found in zip(fits, logits, strict=True):
        torch.testing.assert_close(found, lb.predict(fit, token_batches(16), draws=1).logits[0])
    assert len(logits.unique(dim=0)) == members
    heads = [fit.head()["classifier.weight"] for fit in fits]
    assert not torch.equal(heads[0], heads[1])
    average = lambda values: sum(values) / members
    torch.testing.assert_close(posterior.mean()["R"], average([fit.mean()["R"] for fit in fits]), rtol=1e-4, atol=1e-6)
    head = {name: average([fit.head()[name] for fit in fits]) for name in fits[0].head()}
    torch.testing.assert_close(posterior.head(), head)
    outputs = model.outputs(together(token_batches(16)), {"R": average([fit.mean()["R"] for fit in fits])}, head)
    at_mean = lb.predict(posterior, token_batches(16), at="mean")
    torch.testing.assert_close(at_mean.logits[0], outputs.logits.detach(), rtol=1e-3, atol=1e-5)
    same_after_the_file(posterior, tmp_path)


@pytest.mark.parametrize("guide", [lb.guides.LowRank(2), AutoNormal], ids=label)
def test_an_ensemble_of_posteriors(guide, tmp_path):
    """Draws of one member differ; the members' starts do."""
    posterior = lb.infer.ensemble(classifier(), token_batches(16), members=2, guide=guide, epochs=1, **QUIET)
    same_after_the_file(posterior, tmp_path)
    check_one_function_per_draw(posterior)
    first, second = (member.loc if hasattr(member, "loc") else member.locs.R for member in posterior.guide.members)
    assert not torch.allclose(first, second)
    assert {row["member"] for row in posterior.history} == {0, 1}


def test_ensembles_start_apart_and_can_be_reproduced():
    fixed = {"members": 2, "steps": 1, "rates": STANDING, **QUIET}
    draw = lambda **options: lb.infer.ensemble(classifier(), token_batches(16), **fixed, **options).sample(2)["R"]
    first = draw(spread=0.5)
    assert torch.equal(first, draw(spread=0.5))
    assert not torch.equal(first, draw(spread=0.5, seed=7))
    assert 0.3 < first.std() / (0.5 * 0.3) < 1.7
    assert draw(spread=0.0).abs().max() == 0
    members = torch.cat([first, draw(spread=0.5, seed=1), draw(spread=0.5, seed=2)])
    assert len(members.flatten(1).unique(dim=0)) == 6  # consecutive seeds share no member


def test_every_member_has_an_order_of_its_own():
    """Of Batches that shuffle by a seed of theirs; those that do not shuffle keep their order."""
    batches = lambda shuffle: lb.Batches(tiny_reviews(), tiny_tokenizer(), batch_size=8, shuffle=shuffle)
    model, train = classifier().prepare(batches(None)), batches(0)
    # From one start, so that members differ in their order alone.
    fit = lambda train: lb.infer.ensemble(model, train, members=2, spread=0.0, seed=5, epochs=2, **QUIET)
    locs = lambda train: torch.stack([member.loc.detach() for member in fit(train).guide.members])
    first = locs(train)
    alone = [lb.fit(model, batches(s), guide=lb.guides.Delta(), epochs=2, **QUIET).guide.loc for s in (10, 11)]
    torch.testing.assert_close(first, torch.stack(alone).detach())
    assert not torch.equal(*first)
    assert torch.equal(first, locs(train))
    assert torch.equal(*locs(batches(None)))


@pytest.mark.parametrize("per_module", [False, True])
def test_the_average_of_learned_scales_is_geometric(per_module, tmp_path):
    fits, prior = [], lb.priors.Learned(lb.priors.Normal(0.3), per_module)
    keep = lambda row, fit: fits.append(fit) if row["epoch"] == 2 else None
    posterior = lb.infer.ensemble(
        classifier(prior), token_batches(16), members=2, guide=lb.guides.Diagonal(), epochs=2, spread=3.0,
        rates=lb.Rates(scale=0.3), callbacks=[keep], **QUIET,
    )  # fmt: skip
    first, second = (fit.model.learned_scale.current for fit in fits)
    assert not torch.allclose(first, second)
    torch.testing.assert_close(posterior.model.learned_scale.current, (first * second).sqrt())
    same_after_the_file(posterior, tmp_path)
    loaded = lb.Posterior.load(tmp_path, tiny_bert())
    assert torch.equal(loaded.model.learned_scale.current, posterior.model.learned_scale.current)


def test_ensembles_refuse():
    for options, message in (({"members": 1}, "members to be an integer >= 2"), ({"init": 0}, "no init= for an ense")):
        with pytest.raises(ValueError, match=message):
            lb.infer.ensemble(classifier(), token_batches(16), **options)


# --- dropout


@pytest.mark.parametrize("adapter", [lb.LoRAXS(2), lb.LoRA(2, "all-linear")], ids=label)
@pytest.mark.parametrize("rate", [0.1, 0.5])
def test_dropout_has_its_moments_and_drops_whole_columns(adapter, rate):
    posterior = lb.infer.mc_dropout(classifier(adapter=adapter), token_batches(16), rate=rate, epochs=1, **QUIET)
    q, sites = posterior.guide.distribution(), posterior.model.sites
    draws, loc = q.sample((4000,)), posterior.guide.loc.detach()
    torch.testing.assert_close(q.mean, loc)
    error = (q.variance / 4000).sqrt()
    assert ((draws.mean(0) - loc).abs() <= 5 * error + 1e-6).all()
    for name, values in sites.split(draws).items():
        kept = (values / sites.split(loc)[name]).nan_to_num(1.0)
        if name[0] == "B":
            assert torch.equal(kept, torch.ones_like(kept))
            continue
        variance = sites.split(q.variance)[name]
        torch.testing.assert_close(variance, sites.split(loc)[name].square() * rate / (1 - rate))
        assert abs(float((kept == 0).float().mean()) - rate) < 0.02
        torch.testing.assert_close(kept, kept[..., :1, :].expand_as(kept), rtol=1e-4, atol=0)
        assert (kept.amax((0, 1, 2, 3)) - 1 / (1 - rate)).abs() < 1e-3


def test_dropout_predicts_and_is_saved(tmp_path):
    posterior = lb.infer.mc_dropout(classifier(), token_batches(16), rate=0.5, epochs=2, **QUIET)
    same_after_the_file(posterior, tmp_path)
    logits = lb.predict(posterior, token_batches(16), draws=4).logits
    whole = lb.predict(posterior, [together(token_batches(16))], draws=4).logits
    torch.testing.assert_close(logits, whole, atol=1e-5, rtol=1e-4)
    assert len(logits.unique(dim=0)) > 1
    for rate in (0.0, 1.0):
        with pytest.raises(ValueError, match="0 < rate < 1"):
            lb.infer.mc_dropout(classifier(), token_batches(16), rate=rate)


# --- TFB


@pytest.mark.parametrize("adapter", [lb.LoRAXS(2), lb.LoRA(2, "all-linear")], ids=label)
def test_tfb_is_the_widest_within_tolerance(adapter, tmp_path):
    point = lb.fit(classifier(adapter=adapter), token_batches(16), guide=lb.guides.Delta(), epochs=10, **QUIET)
    posterior = lb.infer.tfb(point, token_batches(16), tolerance=0.01)
    base, allowed = posterior.settings["nll_at_point"], 1.01 * posterior.settings["nll_at_point"]
    at_point = lb.predict(point, token_batches(16), draws=1)
    assert base == pytest.approx(nll(at_point.probs, at_point.labels))
    assert all(torch.equal(posterior.mean()[name], point.mean()[name]) for name in point.model.sites.shapes)
    assert torch.equal(posterior.head()["classifier.weight"], point.head()["classifier.weight"])

    def reached(factor):
        guide = posterior.guide
        guide.scale = guide.scale.detach() * factor
        prediction = lb.predict(posterior, token_batches(16), draws=10)
        guide.scale = guide.scale.detach() / factor
        return nll(prediction.probs, prediction.labels)

    assert reached(1.0) <= allowed * (1 + 1e-6)
    assert reached(1.0) == pytest.approx(posterior.settings["nll"], rel=1e-5)
    assert math.exp(-8.9) < posterior.settings["scale"] < math.exp(2.9)
    assert reached(1.5) > allowed
    spread = {name: value.std(0).mean() for name, value in posterior.sample(50, seed=0).items()}
    for name, value in spread.items():
        wanted = 0.0 if name[0] == "B" else posterior.settings["scale"] * 0.3
        assert float(value) == pytest.approx(wanted, rel=0.1, abs=1e-4)
    same_after_the_file(posterior, tmp_path)


@pytest.mark.parametrize("noise", [0.05, 5.0])
def test_tfb_tolerates_a_share_of_a_negative_nll_too(noise):
    """Densities of numbers are above 1 where the noise is small."""
    torch.manual_seed(0)
    network, x = LinearNetwork(outputs=1).requires_grad_(False), torch.randn(64, 7)
    batches = [{"x": x, "labels": network(x).flatten() + noise * torch.randn(64)}]
    adapter = lb.LoRAXS(1, lb.projections.Random(), targets="all-linear")
    model = lb.BayesianLoRA(network, adapter, lb.priors.Normal(0.3), lb.likelihoods.Gaussian(noise), head="frozen")
    point = lb.fit(model, batches, guide=lb.guides.Delta(), epochs=200, rates=lb.Rates(loc=0.01), **QUIET)
    posterior = lb.infer.tfb(point, batches, tolerance=0.01)
    base, found = posterior.settings["nll_at_point"], posterior.settings["nll"]
    assert (base < 0) == (noise < 1)
    assert found <= base + 0.01 * abs(base)
    posterior.guide.scale = 1.1 * posterior.guide.scale.detach()
    assert lb.predict(posterior, batches, draws=10).nll > base + 0.01 * abs(base)
    assert posterior.settings["scale"] > 0.01


def test_tfb_refuses():
    point = lb.fit(classifier(), token_batches(16), guide=lb.guides.Delta(), epochs=1, **QUIET)
    diagonal = lb.fit(classifier(), token_batches(16), guide=lb.guides.Diagonal(), epochs=1, **QUIET)
    bayesian = lb.fit(classifier(head="bayesian"), token_batches(16), guide=lb.guides.Delta(), epochs=1, **QUIET)
    unlabelled = [{k: v for k, v in batch.items() if k != "labels"} for batch in token_batches(16)]
    for posterior, anchor, options, message in (
        (diagonal, token_batches(16), {}, "expected a point posterior"),
        (bayesian, token_batches(16), {}, "head='point'"),
        (point, unlabelled, {}, "label"),
        (point, token_batches(16), {"tolerance": 0.0}, "tolerance > 0"),
        (point, token_batches(16), {"steps": 0}, "steps >= 1"),
    ):
        with pytest.raises(ValueError, match=message):
            lb.infer.tfb(posterior, anchor, **options)


# --- BLoB's family


def test_blob_widens_one_factor_alone():
    """LoRA with a Diagonal guide on A and a point on B, trained: B's draws move by 1e-4 of the prior's sd."""
    model = classifier(lb.priors.Normal(0.3), lb.LoRA(2, "all-linear"))
    posterior = lb.fit(model, token_batches(16), guide=lb.guides.Diagonal(point_sites=("B",)), epochs=3, **QUIET)
    start = posterior.model.start()
    for name, values in posterior.sample(50, seed=0).items():
        spread = values.std(0)
        assert (spread.max() < 1e-4) == (name[0] == "B")
        assert not torch.equal(posterior.mean()[name], start[name])
    sizes = posterior.model.sites.shapes
    random = sum(shape.numel() for name, shape in sizes.items() if name[0] == "A")
    assert posterior.parameter_counts()["posterior"] == posterior.model.sites.size + random
    check_one_function_per_draw(posterior)
    for wrong in (("C",), ("A", "B")):
        with pytest.raises(ValueError, match="expected point_sites among"):
            lb.guides.Diagonal(point_sites=wrong)(model)


def test_options_of_a_fit_that_swag_does_not_make_are_refused():
    model = lb.BayesianLoRA(tiny_bert(), lb.LoRAXS(2))
    with pytest.raises(ValueError, match=r"no options of svi with burn_in=0.*\['schedule'\]"):
        lb.infer.swag(model, token_batches(16), burn_in=0, schedule="linear", progress=False)


def test_swag_goes_on_from_the_posterior_it_is_given():
    model = classifier().prepare(token_batches())
    point = lb.fit(model, token_batches(), guide=lb.guides.Delta(), epochs=2, **QUIET)
    found = lb.infer.swag(
        model, token_batches(), init=point, burn_in=1, snapshots=3, columns=2, rates=STANDING, **QUIET
    )
    for name, value in point.mean().items():
        torch.testing.assert_close(found.mean()[name], value)


def test_the_seed_of_swag_is_that_of_its_point_too():
    model, options = classifier().prepare(tiny_reviews()), {"burn_in": 2, "snapshots": 2, "columns": 2, "every": 1}
    fit = lambda seed: lb.infer.swag(model, tiny_reviews(), seed=seed, **options, **QUIET)
    means = [fit(seed).mean()["R"] for seed in (0, 0, 1)]
    assert torch.equal(means[0], means[1])
    assert not torch.allclose(means[0], means[2], atol=1e-6)


def test_the_seed_of_laplace_is_that_of_its_point():
    model = classifier().prepare(tiny_reviews())
    fit = lambda seed: lb.infer.laplace(model, tiny_reviews(), structure="diagonal", epochs=1, seed=seed, **QUIET)
    means = [fit(seed).mean()["R"] for seed in (0, 0, 1)]
    assert torch.equal(means[0], means[1])
    assert not torch.allclose(means[0], means[2], atol=1e-6)


def test_tfb_s_score_is_of_the_draws_and_seed_asked_for():
    point = lb.fit(classifier(), token_batches(), guide=lb.guides.Delta(), epochs=1, **QUIET)
    posterior = lb.infer.tfb(point, token_batches(), draws=3, seed=5, steps=4)
    expected = lb.predict(posterior, token_batches(), draws=3, seed=5).nll
    assert posterior.settings["nll"] == pytest.approx(expected, rel=1e-5)
    for other in ({"draws": 10, "seed": 5}, {"draws": 3, "seed": 0}):
        assert posterior.settings["nll"] != pytest.approx(lb.predict(posterior, token_batches(), **other).nll, rel=1e-6)


def test_members_have_batches_of_the_size_asked_for():
    fit = lambda size: lb.infer.ensemble(classifier(), tiny_reviews(40), members=2, epochs=1, batch_size=size, **QUIET)
    assert [fit(size).history[0]["step"] for size in (8, 20)] == [5, 2]
