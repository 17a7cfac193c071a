"""The fit: what it leaves alone, what it reproduces, every option, and every way to get it wrong."""

import math
import warnings

import numpy as np
import pyro
import pytest
import torch
from conftest import LinearGaussian, label, tiny_bert, tiny_reviews, tiny_tokenizer, token_batches
from pyro.distributions import Normal
from pyro.infer import Predictive
from pyro.infer.autoguide import (
    AutoIAFNormal,
    AutoLowRankMultivariateNormal,
    AutoMultivariateNormal,
    AutoNormal,
    AutoNormalMessenger,
)
from test_model import GUIDES, PRIORS, users_prior

import pyro_lrblora as lb
from pyro_lrblora.infer.progress import BestState, multiplier

pytestmark = pytest.mark.filterwarnings("ignore::pyro_lrblora.ScalesNotConverged")

STOCK = [AutoNormal, AutoMultivariateNormal, AutoLowRankMultivariateNormal, AutoIAFNormal]


def fit(model, train=None, **options):
    return lb.fit(model, token_batches() if train is None else train, **({"epochs": 2, "progress": False} | options))


def same_posterior(a, b):
    first, second = a.sample(3, seed=0), b.sample(3, seed=0)
    heads = all(torch.equal(a.head()[k], b.head()[k]) for k in a.head())
    return heads and all(torch.equal(first[k], second[k]) for k in first)


@pytest.mark.parametrize("guide", [*GUIDES, *STOCK], ids=label)
@pytest.mark.parametrize("head", ["point", "bayesian"])
def test_network_model_and_param_store_are_left_alone(guide, head):
    network = tiny_bert().train()
    before = {name: value.clone() for name, value in network.state_dict().items()}
    mine = pyro.param("mine", torch.ones(2))
    model = lb.BayesianLoRA(network, lb.LoRAXS(2), head=head).prepare(token_batches())
    start = {name: value.clone() for name, value in model.head_start.items()}
    posterior = fit(model, guide=guide)
    lb.predict(posterior, token_batches(), draws=2)
    posterior.mean(), posterior.head(), posterior.sample(2)
    assert all(torch.equal(before[name], value) for name, value in network.state_dict().items())
    assert network.training
    assert all(parameter.requires_grad and parameter.grad is None for parameter in network.parameters())
    assert list(pyro.get_param_store().keys()) == ["mine"]
    assert pyro.param("mine") is mine
    assert all(torch.equal(start[name], value) for name, value in model.head_start.items())


@pytest.mark.parametrize("first", GUIDES[1:3], ids=label)
@pytest.mark.parametrize("second", [lb.guides.Diagonal(), AutoNormal], ids=label)
def test_two_fits_are_independent_in_either_order(first, second):
    model = lb.BayesianLoRA(tiny_bert(), lb.LoRAXS(2), lb.priors.LayerScale(0.1)).prepare(token_batches())
    inputs = {k: v for k, v in token_batches(8)[0].items() if k != "labels"}

    def by_hand(posterior):
        torch.manual_seed(0)
        return Predictive(posterior.model, guide=posterior.guide, num_samples=2, return_sites=["R"])(inputs)["R"]

    a = fit(model, guide=first)
    alone = a.sample(3, seed=0)["R"]
    drawn = by_hand(a)
    b = fit(model, guide=second, seed=1)
    by_hand(b)
    assert torch.equal(a.sample(3, seed=0)["R"], alone)
    assert torch.equal(by_hand(a), drawn)
    assert same_posterior(fit(model, guide=second, seed=1), b)
    assert same_posterior(fit(model, guide=first), a)


@pytest.mark.parametrize("guide", [*GUIDES, AutoNormal], ids=label)
def test_same_seed_same_result(guide):
    model = lb.BayesianLoRA(tiny_bert(), lb.LoRAXS(2, lb.projections.Gradient()), tokenizer=tiny_tokenizer())
    runs = []
    for noise in (1, 2):
        torch.manual_seed(noise)  # the global generator must not matter, and must not be moved
        state = torch.get_rng_state()
        runs.append(fit(model, tiny_reviews(), guide=guide, seed=5))
        assert torch.equal(torch.get_rng_state(), state)
    assert same_posterior(*runs)
    assert not same_posterior(runs[0], fit(model, tiny_reviews(), guide=guide, seed=6))


@pytest.mark.parametrize("guide", GUIDES, ids=label)
@pytest.mark.parametrize("prior", [*PRIORS, users_prior], ids=label)
def test_every_guide_with_every_prior(guide, prior):
    posterior = fit(lb.BayesianLoRA(tiny_bert(), lb.LoRAXS(2), prior), guide=guide)
    assert math.isfinite(posterior.history[-1]["elbo"])
    extra = set(posterior.sample(2)) - {"R"}
    horseshoe = {"global_scale", "R_local_scale"}
    expected = {
        "Horseshoe": horseshoe,
        "RegularisedHorseshoe": {*horseshoe, "slab_variance"},
        "LayerScale": {"R_scale"},
    }
    scaled = prior.prior if isinstance(prior, lb.priors.Learned) else prior
    assert extra == expected.get(type(scaled).__name__, set())


@pytest.mark.parametrize("guide", GUIDES, ids=label)
def test_lora_with_both_factors_latent(guide):
    posterior = fit(lb.BayesianLoRA(tiny_bert(), lb.LoRA(2, "all-linear"), lb.priors.Normal(1.0)), guide=guide)
    mean = posterior.mean()
    assert sum(value.numel() for value in mean.values()) == posterior.model.sites.size
    assert all(mean[name].abs().sum() > 0 for name in posterior.model.sites.shapes)


def test_training_improves_the_bound_up_to_the_evidence():
    problem = LinearGaussian(rank=2)
    posterior = fit(
        problem.model,
        [problem.batch],
        warm_start=False,
        epochs=600,
        rates=lb.Rates(loc=0.02, scale=0.05, factor=0.05),
    )
    bounds = [row["elbo"] * problem.rows for row in posterior.history]
    assert sum(bounds[:20]) / 20 < problem.log_evidence - 5
    assert abs(sum(bounds[-20:]) / 20 - problem.log_evidence) < 1.5


def test_closed_and_monte_carlo_kl_have_the_same_expectation():
    problem = LinearGaussian(rank=2)
    fixed = lb.Rates(0, 0, 0, 0)
    kl = lambda form, steps: [
        row["kl"] for row in fit(problem.model, [problem.batch], kl=form, epochs=steps, rates=fixed).history
    ]
    closed, sampled = kl("closed", 1), torch.tensor(kl("mc", 400))
    assert abs(sampled.mean() - closed[0]) < 4 * sampled.std() / 20
    assert fit(problem.model, [problem.batch], kl="auto").settings["kl"] == "closed"


def test_hierarchical_prior_has_a_conditional_closed_form():
    model = lb.BayesianLoRA(tiny_bert(), lb.LoRAXS(2), lb.priors.LayerScale(0.1)).prepare(token_batches())
    fixed = {"rates": lb.Rates(0, 0, 0, 0), "epochs": 60}
    kl = {form: torch.tensor([row["kl"] for row in fit(model, kl=form, **fixed).history]) for form in ("closed", "mc")}
    error = (kl["closed"].var() / 60 + kl["mc"].var() / 60).sqrt()
    assert abs(kl["closed"].mean() - kl["mc"].mean()) < 4 * error


def test_laplace_prior_falls_back_to_monte_carlo():
    model = lb.BayesianLoRA(tiny_bert(), lb.LoRAXS(2), lb.priors.Laplace(0.1))
    assert fit(model).settings["kl"] == "mc"
    with pytest.raises(ValueError, match="closed-form KL"):
        fit(model, kl="closed")


def test_accumulation_is_one_step_on_the_larger_batch():
    """A linear-Gaussian Delta fit: deterministic, so four batches of 6 must equal one of 24.

    Adam does not see a gradient's length, clipping does: the bound is one that only some of the steps reach.
    """
    problem = LinearGaussian(rank=2)
    options = {"guide": lb.guides.Delta(), "steps": 20, "rates": lb.Rates(loc=0.1), "clip": 20.0}
    large = fit(problem.model, [problem.batch], **options)
    small = fit(problem.model, problem.batches(6), accumulate=4, **options)
    assert small.history[-1]["step"] == large.history[-1]["step"] == 20
    torch.testing.assert_close(small.mean()["R"], large.mean()["R"], atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("sizes", [(22, 2), (5, 19)])
def test_batches_of_unequal_size_in_a_fixed_order_find_the_exact_posterior(sizes):
    problem = LinearGaussian(rank=2)
    parts = zip(*(value.split(sizes) for value in problem.batch.values()), strict=True)
    batches = [dict(zip(problem.batch, part, strict=True)) for part in parts]
    posterior = fit(
        problem.model, batches, guide=lb.guides.FullRank(), epochs=300, draws="shared", path_derivative=True,
        rates=lb.Rates(loc=0.03, scale=0.03, factor=0.03),
    )  # fmt: skip
    q = posterior.guide.distribution()
    assert problem.reverse_kl(q.mean.detach(), q.covariance().dense().detach()) < 0.1
    # An ELBO is below the evidence, also where it is an average over batches.
    assert sum(row["elbo"] for row in posterior.history[-50:]) / 50 * 24 == pytest.approx(problem.log_evidence, abs=1)


def test_sites_that_depend_on_each_other_have_no_closed_form():
    """KL of a guide that is the prior itself is zero; the product of its conditionals at one draw is another prior."""

    def chained(shapes):
        a = pyro.sample("A", Normal(0.0, 0.5).expand(shapes["A"]).to_event())
        return {"A": a, "B": pyro.sample("B", Normal(a.mT, 0.1).to_event())}

    model = lb.BayesianLoRA(tiny_bert(), lb.LoRA(1, targets=["query"]), chained)
    assert fit(model, draws="shared").settings["kl"] == "mc"
    with pytest.raises(ValueError, match="closed-form KL"):
        fit(model, kl="closed")


def test_parameters_expanded_from_fewer_numbers_are_trained():
    """Under a fused step they would write past the end of their memory."""

    class Expanded(lb.guides.LatentGuide):
        def __init__(self, model):
            super().__init__(model)
            loc, _ = self.starting_point(model)
            self.loc = torch.nn.Parameter(loc)
            self.log_scale = torch.nn.Parameter(torch.tensor(-3.0).expand(len(loc)))

        def distribution(self):
            return Normal(self.loc, self.log_scale.exp()).to_event(1)

    found = fit(lb.BayesianLoRA(tiny_bert(), lb.LoRAXS(2)), guide=Expanded, warm_start=False).guide.log_scale
    assert found.is_contiguous()
    assert len(found.unique()) > 1
    fit(lb.BayesianLoRA(tiny_bert(), lb.LoRAXS(2)), guide=AutoNormalMessenger)


def test_steps_override_epochs():
    assert fit(lb.BayesianLoRA(tiny_bert()), epochs=1, steps=12).history[-1]["step"] == 12


@pytest.mark.parametrize("schedule", ["cosine", "linear", "constant"])
def test_schedules(schedule):
    from pyro_lrblora.infer.progress import multiplier

    factor = multiplier(schedule, 0.1, 100)
    values = [factor(step) for step in range(100)]
    assert values[0] == 0.1
    assert max(values) == pytest.approx(1.0)
    assert values[:10] == sorted(values[:10])
    if schedule != "constant":
        assert values[10:] == sorted(values[10:], reverse=True)
        assert values[-1] < 0.02


def test_early_stopping_goes_back_to_the_best():
    batches = token_batches(24)
    validation = token_batches(40, seed=9)  # labels are noise: every step away from the probe is overfitting
    options = {"guide": lb.guides.Delta(), "rates": lb.Rates(loc=0.05, head=0.05), "epochs": 30}
    model = lb.BayesianLoRA(tiny_bert(), lb.LoRAXS(8, targets="all-linear"), lb.priors.Normal(10.0))
    posterior = fit(model, batches, validation=validation, patience=2, **options)
    recorded = [row["validation_nll"] for row in posterior.history]
    assert len(recorded) < 30
    prediction = lb.predict(posterior, validation, at="mean")
    assert lb.metrics.nll(prediction.probs, prediction.labels) == pytest.approx(min(recorded), abs=1e-5)


def test_callbacks_see_every_epoch_and_can_stop():
    seen = []

    def callback(row, posterior):
        seen.append((row["epoch"], posterior.sample(1)["R"].shape))
        return row["epoch"] == 3

    posterior = fit(lb.BayesianLoRA(tiny_bert(), lb.LoRAXS(2)), epochs=9, callbacks=[callback])
    assert [epoch for epoch, _ in seen] == [1, 2, 3]
    assert len(posterior.history) == 3


def test_scales_that_still_move_are_named():
    model = lb.BayesianLoRA(tiny_bert(), lb.LoRAXS(2)).prepare(token_batches())
    with pytest.warns(lb.ScalesNotConverged, match=r"moved by 0\.\d\d per epoch.*rates.scale=0.05"):
        fit(model, warm_start=False, rates=lb.Rates(scale=0.05))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        fit(model, guide=lb.guides.Delta())
        fit(model, rates=lb.Rates(scale=0.0))


def test_staged_by_hand():
    """Delta, then Diagonal, then LowRankPrecision, each from the one before, in one subspace."""
    model = lb.BayesianLoRA(tiny_bert(), lb.LoRAXS(2, lb.projections.Gradient())).prepare(token_batches())
    still = {"rates": lb.Rates(0, 0, 0, 0), "epochs": 1}
    posterior = fit(model, guide=lb.guides.Delta(), rates=lb.Rates(loc=0.05))
    for guide in (lb.guides.Diagonal(), lb.guides.LowRankPrecision(2), lb.guides.LowRank(2), AutoNormal):
        staged = fit(model, guide=guide, init=posterior, **still)
        torch.testing.assert_close(staged.mean()["R"], posterior.mean()["R"])
        assert all(torch.equal(staged.head()[k], posterior.head()[k]) for k in posterior.head())
        posterior = staged
    other = lb.BayesianLoRA(tiny_bert(), lb.LoRAXS(2, lb.projections.Random())).prepare(token_batches())
    with pytest.raises(ValueError, match="same subspace|the model's adapter"):
        fit(other, init=posterior)
    # A model that has no subspace yet takes that of init; a frozen head can be trained on from there.
    adopted = fit(lb.BayesianLoRA(tiny_bert(), model.adapter), init=posterior, **still)
    assert adopted.model.adapted is model.adapted
    frozen = fit(lb.BayesianLoRA(tiny_bert(), model.adapter, head="frozen"))
    trained = fit(lb.BayesianLoRA(tiny_bert(), model.adapter), init=frozen, **still)
    assert torch.equal(trained.head()["classifier.weight"], tiny_bert().classifier.weight)


def test_a_start_from_a_task_with_other_classes():
    """Its subspace and latents carry over (MNLI to RTE, as the paper does); the head is the new task's own."""
    adapter = lb.LoRAXS(2, lb.projections.Gradient())
    start = fit(lb.BayesianLoRA(tiny_bert(3), adapter), guide=lb.guides.Delta(), rates=lb.Rates(loc=0.05))
    two, model = token_batches(classes=2), lb.BayesianLoRA(tiny_bert(2), adapter)
    still = {"rates": lb.Rates(0, 0, 0, 0), "epochs": 1}
    posterior = fit(model, two, init=start, **still)
    assert posterior.model.adapted is start.model.adapted
    torch.testing.assert_close(posterior.mean()["R"], start.mean()["R"])
    probed = lb.BayesianLoRA(tiny_bert(2), lb.LoRAXS(2)).prepare(two)
    torch.testing.assert_close(posterior.head(), probed.head_start)
    # A head already started stays where it is.
    unprobed = model.in_subspace_of(start.model).prepare(two, probe=False)
    assert torch.equal(
        fit(unprobed, two, init=start, **still).head()["classifier.weight"], tiny_bert(2).classifier.weight
    )


def test_map_epochs_move_the_start():
    model = lb.BayesianLoRA(tiny_bert(), lb.LoRAXS(2)).prepare(token_batches())
    still = {"rates": lb.Rates(loc=0.01, scale=0, factor=0, head=0), "steps": 1, "warmup": 0.0}
    # Adam's first step is the rate in every entry; many steps of a point fit are not.
    spread = lambda posterior: float(posterior.mean()["R"].abs().std())
    assert spread(fit(model, **still)) < 1e-4
    assert spread(fit(model, map_epochs=3, **still)) > 1e-3


def test_what_does_not_fit_together_is_refused_before_map_epochs(monkeypatch):
    model = lb.BayesianLoRA(tiny_bert(), lb.LoRAXS(2)).prepare(token_batches())
    monkeypatch.setattr("pyro_lrblora.infer.loop.Loop.run_epoch", lambda *_: pytest.fail("an epoch was run"))
    with pytest.raises(TypeError, match="symmetric about its mean"):
        fit(model, guide=lb.guides.Flow(), antithetic=True, map_epochs=1)
    with pytest.raises(ValueError, match="closed-form KL"):
        fit(model, guide=lb.guides.Flow(), kl="closed", map_epochs=1)


def test_fixed_head_stays_and_bayesian_head_learns():
    model = lb.BayesianLoRA(tiny_bert(), lb.LoRAXS(2)).prepare(token_batches())
    first = fit(model)
    fixed = fit(model.with_head(lb.fixed_from(first)))
    assert all(torch.equal(fixed.head()[k], first.head()[k]) for k in first.head())
    assert fixed.parameter_counts()["head"] == 51
    bayesian = fit(model.with_head("bayesian"))
    assert bayesian.head() == {}
    assert not torch.equal(bayesian.mean()["classifier.weight"], model.head_start["classifier.weight"])
    lb.fixed_from(bayesian)


def test_bf16_autocast_stays_in_the_network():
    posterior = fit(lb.BayesianLoRA(tiny_bert(), lb.LoRAXS(2)), precision="bf16")
    assert all(parameter.dtype == torch.float32 for parameter in posterior.guide.parameters())
    single = fit(lb.BayesianLoRA(tiny_bert(), lb.LoRAXS(2)))
    assert posterior.history[-1]["elbo"] != single.history[-1]["elbo"]
    assert posterior.history[-1]["elbo"] == pytest.approx(single.history[-1]["elbo"], rel=0.05)


def test_progress_bar_tells_epoch_bound_and_kl(capsys):
    fit(lb.BayesianLoRA(tiny_bert(), lb.LoRAXS(2)), progress=True)
    shown = capsys.readouterr().err
    assert shown.index("preparing") < shown.index("LowRankPrecision") < shown.index("ELBO/row=")
    assert "KL=" in shown
    assert "epoch=2" in shown
    fit(lb.BayesianLoRA(tiny_bert(), lb.LoRAXS(2)), progress=False)
    assert capsys.readouterr().err == ""


def test_integers_of_numpy_are_integers():
    """for seed in np.arange(3): as a user writes it."""
    model = lb.BayesianLoRA(tiny_bert(), lb.LoRAXS(2, layers=np.arange(1)))
    ours, theirs = (fit(model, seed=kind(3), epochs=kind(1)) for kind in (int, np.int64))
    assert same_posterior(ours, theirs)
    of = lambda kind: lb.predict(ours, token_batches(), draws=kind(2), seed=kind(1), fold=kind(2)).logits
    assert torch.equal(of(int), of(np.int64))
    with pytest.raises(ValueError, match="fold to be an integer >= 1, got fold=-1"):
        lb.predict(ours, token_batches(), fold=-1)


BAD = [
    ({"epochs": 0}, ValueError, "epochs to be an integer >= 1"),
    ({"batch_size": 0}, ValueError, "batch_size"),
    ({"steps": -1}, ValueError, "steps"),
    ({"kl": "exact"}, ValueError, "kl to be one of"),
    ({"schedule": "step"}, ValueError, "schedule"),
    ({"draws": "two"}, ValueError, "draws"),
    ({"precision": "fp8"}, ValueError, "precision"),
    ({"patience": 2}, ValueError, "validation="),
    ({"guide": "low_rank"}, TypeError, "guide spec"),
    ({"guide": lambda model: None}, TypeError, "PyroModule"),
    ({"guide": AutoNormal, "draws": "row"}, TypeError, "rowwise"),
    ({"guide": lb.guides.LowRank}, TypeError, "write LowRank"),
    ({"patience": 0, "validation": token_batches()}, ValueError, "patience to be an integer >= 1"),
    ({"validation_draws": 0}, ValueError, "validation_draws"),
    ({"warm_start_rows": 0}, ValueError, "warm_start_rows"),
    ({"map_epochs": -1}, ValueError, "map_epochs to be an integer >= 0"),
    ({"clip": 0}, ValueError, "clip=None for no clipping"),
    ({"clip": -1.0}, ValueError, "expected clip > 0"),
    ({"warmup": 3}, ValueError, "warmup"),
    ({"rates": 1e-3}, TypeError, "Rates"),
    ({"callbacks": print}, TypeError, "list of callables"),
    ({"callbacks": (callback for callback in [print])}, TypeError, "list of callables"),
    ({"callbacks": [lambda row: None]}, TypeError, r"called with \(row, posterior\), got <lambda>\(row\)"),
    ({"seed": None}, ValueError, "seed to be an integer"),
]


@pytest.mark.parametrize(("options", "error", "message"), BAD, ids=[message for *_, message in BAD])
def test_bad_options(options, error, message):
    with pytest.raises(error, match=message):
        fit(lb.BayesianLoRA(tiny_bert()), **options)


def test_a_built_guide_is_refused():
    model = lb.BayesianLoRA(tiny_bert(), size=40)
    with pytest.raises(TypeError, match="built DiagonalGuide"):
        fit(model, guide=lb.guides.Diagonal()(model))


def test_guide_without_a_needed_site():
    def forgetful(model):
        return AutoNormal(pyro.poutine.block(model, hide=["R_scale"]))

    with pytest.raises(ValueError, match="expected the guide to sample .*R_scale"):
        fit(lb.BayesianLoRA(tiny_bert(), lb.LoRAXS(2), lb.priors.LayerScale(0.1)), guide=forgetful)


@pytest.mark.parametrize("rank", [0, -2])
@pytest.mark.parametrize("family", [lb.guides.LowRank, lb.guides.LowRankPrecision])
def test_guide_rank_must_be_positive(family, rank):
    with pytest.raises(ValueError, match="expected rank >= 1"):
        family(rank)


def test_a_loss_that_is_not_finite_names_its_batch():
    class Exploding(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = torch.nn.Linear(4, 3)

        def forward(self, x):
            return self.layer(x) + torch.where(x[:, :1] > 9, float("nan"), 0.0)

    batches = [{"x": torch.randn(6, 4), "labels": torch.tensor([0, 1, 2] * 2)} for _ in range(3)]
    batches[2]["x"][3, 0] = 10.0
    model = lb.BayesianLoRA(Exploding(), lb.LoRAXS(2, targets=["layer"]))
    with pytest.raises(FloatingPointError, match=r"batch 2 of epoch 1: expected finite logits.*rows \[3\]"):
        fit(model, batches, warm_start=False)
    with pytest.raises(FloatingPointError, match="batch 2: expected finite logits"):
        fit(model, batches)
    problem = LinearGaussian(rank=2)
    with (
        pyro.validation_enabled(False),
        pytest.raises(FloatingPointError, match="batch 0 of epoch 1: expected a finite loss"),
    ):
        fit(problem.model, [problem.batch | {"x": problem.batch["x"] * float("inf")}], warm_start=False)


@pytest.mark.chosen_head_scale
def test_a_start_brings_the_prior_of_its_head_along():
    """An unprepared model takes the scale that was cross-validated for `init`, or the head would have another prior."""
    point = fit(lb.BayesianLoRA(tiny_bert(), lb.LoRAXS(2)), guide=lb.guides.Delta())
    assert point.model.head_scale is not None
    again = fit(lb.BayesianLoRA(tiny_bert(), lb.LoRAXS(2)), guide=lb.guides.Diagonal(), init=point)
    assert again.model.head_scale == point.model.head_scale


# --- the course of the rates, and where it stops


def test_the_rate_of_every_step_by_hand():
    paces = {name: [multiplier(name, 0.2, 10)(step) for step in range(10)] for name in ("linear", "constant", "cosine")}
    assert paces["linear"] == pytest.approx([0.5, 1, *(left / 8 for left in range(8, 0, -1))])
    assert paces["constant"] == pytest.approx([0.5, *9 * [1]])
    assert paces["cosine"][:2] == pytest.approx([0.5, 1])
    assert paces["cosine"][2:] == pytest.approx([(1 - math.cos(math.pi * left / 8)) / 2 for left in range(8, 0, -1)])


def test_the_warm_up_and_the_schedule_asked_for_move_the_parameters():
    """Adam's first step is as long as its rate, whatever the gradient."""

    def first_step(**options):
        problem = LinearGaussian(rank=2)
        rates, moved = lb.Rates(loc=0.01, scale=0, factor=0), []
        stop = lambda row, posterior: moved.append(posterior.guide.loc.detach().abs().mean())
        fit(problem.model, [problem.batch], steps=10, rates=rates, warm_start=False, callbacks=[stop], **options)
        return float(moved[0])

    assert first_step(warmup=0.2, schedule="constant") == pytest.approx(0.005, rel=1e-3)
    assert first_step(warmup=0.5, schedule="linear") == pytest.approx(0.002, rel=1e-3)
    assert first_step(warmup=0.0, schedule="constant") == pytest.approx(0.01, rel=1e-3)


def test_patience_counts_epochs_and_the_first_of_equals_is_kept():
    layer = torch.nn.Linear(1, 1)
    best, exhausted = BestState({"layer": layer}, patience=2), []
    for weight, nll in enumerate((1.0, 1.0, 1.2, 1.1)):
        layer.weight.data.fill_(weight)
        best.update(nll)
        exhausted.append(best.exhausted)
    assert exhausted == [False, False, True, True]
    best.restore()
    assert layer.weight.item() == 0


def test_the_validation_nll_is_of_as_many_draws_as_asked_for():
    validation = token_batches(seed=1)
    for draws in (2, 6):
        posterior = fit(
            lb.BayesianLoRA(tiny_bert(), lb.LoRAXS(2)), validation=validation, epochs=1, validation_draws=draws
        )
        expected = lb.predict(posterior, validation, draws=draws, progress=False).nll
        assert posterior.history[-1]["validation_nll"] == pytest.approx(expected, rel=1e-5)


def test_every_callback_is_called_though_the_first_stops():
    called = []
    stop, note = lambda *_: called.append("stop") or True, lambda *_: called.append("note")
    fit(lb.BayesianLoRA(tiny_bert(), lb.LoRAXS(2)), callbacks=[stop, note], epochs=3)
    assert called == ["stop", "note"]
