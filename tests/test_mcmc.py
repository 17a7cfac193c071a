"""Markov chains against exact posteriors, against each other, and everything a posterior made of draws must do."""

import importlib
import math

import arviz as az
import numpy as np
import pyro
import pytest
import torch
from conftest import LinearGaussian, label, tiny_bert, tiny_reviews, tiny_tokenizer, token_batches
from pyro import distributions as dist

import pyro_lrblora as lb
from pyro_lrblora.arviz_io import convergence
from pyro_lrblora.infer import stochastic_gradients
from pyro_lrblora.infer.chains import ChainsNotConverged, log_joint, posterior_of_chains
from pyro_lrblora.infer.preconditioner import preconditioner
from pyro_lrblora.priors import prior_variance
from pyro_lrblora.priors.variance import prior_covariance

pytestmark = pytest.mark.filterwarnings("ignore::pyro_lrblora.infer.ChainsNotConverged")

# How much too large the variance comes out where G P has the eigenvalue 1, batches being all rows: the step times this.
BIAS = {"sgld": 1 / 4, "sghmc": 1 / (2 * (2 - 0.3))}


def run(method, model, train, **options):
    short = (
        {"draws": 6, "warmup": 4, "max_tree_depth": 2} if method == "nuts" else {"draws": 6, "burn_in": 2, "thin": 1}
    )
    return getattr(lb.infer, method)(model, train, **(short | {"progress": False} | options))


def flat_draws(posterior):
    """(chains, S, D) in float64."""
    return posterior.model.sites.join(posterior.guide.by_chain()).double().numpy()


def assert_moments(posterior, mean, covariance, sigmas=4.5):
    """Mean and sd of every latent within so many Monte Carlo standard errors of the truth."""
    draws, sd = flat_draws(posterior), covariance.diagonal().sqrt().numpy()
    size = np.array([float(az.ess(x, method="mean")) for x in np.moveaxis(draws, 2, 0)])
    size_sd = np.array([float(az.ess(x, method="sd")) for x in np.moveaxis(draws, 2, 0)])
    assert size.min() > 40, "too few effective draws to test anything"
    assert np.all(abs(draws.mean((0, 1)) - mean.numpy()) < sigmas * sd / size**0.5)
    assert np.all(abs(draws.reshape(-1, len(sd)).std(0) / sd - 1) < sigmas / (2 * size_sd) ** 0.5)


# --- the truth


@pytest.mark.parametrize(("rank", "full_mass", "rows"), [(2, False, 24), (4, True, 8)])
def test_nuts_draws_from_the_exact_posterior(rank, full_mass, rows):
    problem = LinearGaussian(rank, prior_scale={2: 0.7, 4: 0.1}[rank])
    posterior = lb.infer.nuts(
        problem.model, problem.batches(rows), draws=100, warmup=70, full_mass=full_mass, progress=False
    )
    assert_moments(posterior, problem.mean, problem.precision.inverse())
    assert posterior.settings["r_hat"] < 1.05
    assert posterior.settings["divergences"] == 0


@pytest.mark.parametrize(
    ("method", "rank", "options"),
    [
        ("sgld", 2, {"step_size": 1.0}),
        ("sgld", 4, {"step_size": 2.0}),
        ("sghmc", 2, {"step_size": 0.5, "friction": 0.3}),
        ("sghmc", 4, {"step_size": 1.5, "friction": 0.3}),
    ],
    ids=label,
)
def test_full_batch_chains_have_the_discretised_dynamics_own_moments(method, rank, options, monkeypatch):
    """On a Gaussian the stationary covariance is known: P^-1 (I - c G P)^-1, c being step times BIAS."""
    problem = LinearGaussian(rank, prior_scale={2: 0.7, 4: 0.1}[rank])
    seen, recording = [], lambda *args: seen.append(preconditioner(*args)) or seen[-1]
    monkeypatch.setattr(stochastic_gradients, "preconditioner", recording)
    posterior = run(method, problem.model, problem.batches(24), draws=500, thin=4, burn_in=150, **options)
    shrink = options["step_size"] * BIAS[method] * seen[0].double().diag() @ problem.precision
    biased = torch.linalg.solve(torch.eye(rank**2).double() - shrink, problem.precision.inverse(), left=False)
    assert_moments(posterior, problem.mean, biased)
    inflation = (biased.diagonal() * problem.precision.inverse().diagonal().reciprocal()).max()
    assert inflation > 1.05  # or the bias would not be tested


@pytest.mark.parametrize(
    ("method", "options"), [("sgld", {"step_size": 0.8}), ("sghmc", {"step_size": 0.2, "friction": 0.3})], ids=label
)
def test_minibatch_chains_are_close_to_the_exact_posterior(method, options):
    """To first order the variance is too large by a factor of 1.4 at most (sgld: 1 + h N / 4 B, N / B being 2)."""
    problem = LinearGaussian(2, prior_scale=0.1)
    posterior = run(method, problem.model, problem.batches(12), draws=600, thin=5, burn_in=100, **options)
    sd = problem.precision.inverse().diagonal().sqrt().numpy()
    draws = flat_draws(posterior).reshape(-1, 4)
    size = posterior.settings["ess"]
    assert size > 60
    assert np.all(abs(draws.mean(0) - problem.mean.numpy()) < sd * (0.1 + 4 / size**0.5))
    ratio = draws.std(0) / sd
    assert np.all(ratio > 1 - 4 / (2 * size) ** 0.5)
    assert np.all(ratio < 1.4**0.5 + 4 / (2 * size) ** 0.5)


def test_the_log_joint_is_exact_and_a_batchs_is_right_on_average():
    problem = LinearGaussian(2)
    at = torch.randn(4).double()
    values = {"R": at.float().reshape(1, 2, 2)}
    with problem.model.attached():
        whole, base = (log_joint(problem.model, problem.batch, v) for v in (values, {"R": torch.zeros(1, 2, 2)}))
        parts = [log_joint(problem.model, batch, values) for batch in problem.batches(8)]
    torch.testing.assert_close(torch.stack(parts).mean(), whole)
    quadratic = lambda x: -0.5 * (x - problem.mean) @ problem.precision @ (x - problem.mean)
    torch.testing.assert_close((whole - base).double(), quadratic(at) - quadratic(0 * at), rtol=1e-4, atol=1e-3)


def unequal(problem, sizes):
    parts = zip(*(value.split(sizes) for value in problem.batch.values()), strict=True)
    return [dict(zip(problem.batch, part, strict=True)) for part in parts]


@pytest.mark.parametrize("sizes", [(8, 8, 8), (22, 2), (3, 20, 1)])
def test_every_row_counts_once_in_the_gradients_of_a_pass(sizes):
    """A chain that stands still at zero: its gradients' mean over two passes is that of all rows, P m."""
    problem, seen = LinearGaussian(2), []
    stochastic_gradients.stochastic_gradient_chains(
        lambda position, momentum, gradient, scale: seen.append(gradient.double()), problem.model,
        unequal(problem, sizes), draws=2 * len(sizes) - 1, burn_in=1, thin=1, batch_size=1, chains=1, init=None, seed=0,
        progress=False, tokenizer=None, settings={"method": "none"},
    )  # fmt: skip
    assert len(seen) == 2 * len(sizes)
    torch.testing.assert_close(torch.stack(seen).mean(0), problem.precision @ problem.mean, rtol=1e-4, atol=1e-2)


def stiffness(problem, prior):
    """(D, D) precision of the prior, the preconditioner's values, and the exact posterior precision and mean."""
    model = problem.model.with_prior(prior)
    (blocks,) = prior_covariance(model.sample_prior, model.sites.shapes).values()
    precision = problem.fisher + torch.block_diag(*blocks.inverse())
    mean = torch.linalg.solve(precision, problem.precision @ problem.mean)
    scale = preconditioner(model, lb.data.as_batches([problem.batch]), model.sites, torch.zeros(problem.size))
    return model, precision, mean, scale.double()


@pytest.mark.parametrize("correlation", [0.5, 0.9, 0.99])
@pytest.mark.parametrize("rank", [2, 4])
def test_the_preconditioner_knows_a_correlated_priors_curvature(rank, correlation):
    """G P has a largest eigenvalue of about 1, which is what the step's units are."""
    problem = LinearGaussian(rank, prior_scale=0.1)
    _, precision, _, scale = stiffness(problem, lb.priors.MatrixNormal(0.1, correlation, correlation))
    largest = torch.linalg.eigvalsh(scale.sqrt()[:, None] * precision * scale.sqrt())[-1]
    assert 0.4 < largest < 1.1


def test_chains_under_a_correlated_prior():
    """Where the prior is a hundred times stiffer than its variance tells."""
    problem, prior = LinearGaussian(2, prior_scale=0.1), lb.priors.MatrixNormal(0.1, 0.9, 0.9)
    model, precision, mean, scale = stiffness(problem, prior)
    posterior = run("sghmc", model, problem.batches(24), draws=500, thin=4, burn_in=100, step_size=1.5, friction=0.1)
    shrink = 1.5 / (2 * (2 - 0.1)) * scale.diag() @ precision
    assert_moments(posterior, mean, torch.linalg.solve(torch.eye(4).double() - shrink, precision.inverse(), left=False))
    rough = run("sgld", model, problem.batches(24), draws=200)
    sd = precision.inverse().diagonal().sqrt()
    assert (abs(flat_draws(rough) - mean.numpy()) / sd.numpy()).max() < 6


def test_the_preconditioner_knows_a_prior_whose_sites_depend_on_each_other():
    def tied(shapes):
        a = pyro.sample("A", dist.Normal(0.0, 0.1).expand(shapes["A"]).to_event())
        return {"A": a, "B": pyro.sample("B", dist.Normal(5 * a.mT, 0.01).to_event())}

    model = lb.BayesianLoRA(tiny_bert(), lb.LoRA(1, ["query"], layers=[1]), tied, head="frozen", size=40)
    scale = preconditioner(model, lb.data.as_batches(token_batches()), model.sites, torch.zeros(32)).sqrt()
    # Of each pair 1 / 0.1^2 + (5 / 0.01)^2, -5 / 0.01^2 and 1 / 0.01^2; the likelihood's part only adds to it.
    eye = torch.eye(16)
    prior = torch.cat([torch.cat([250100 * eye, -50000 * eye], 1), torch.cat([-50000 * eye, 10000 * eye], 1)])
    assert 0.4 < torch.linalg.eigvalsh(scale[:, None] * prior * scale)[-1] < 1.1


@pytest.mark.parametrize(
    "prior", [lb.priors.Normal((0.3,)), lb.priors.Laplace(0.1), lb.priors.StudentT(0.1)], ids=label
)
def test_latents_that_are_independent_count_with_their_variance(prior, monkeypatch):
    """Laplace's curvature is zero or infinite, and Student's t has more at its middle than its variance tells."""
    problem = LinearGaussian(2)
    model = problem.model.with_prior(prior)
    precision = model.sites.join(prior_variance(model.sample_prior, model.sites.shapes)).reciprocal()
    by_variance = lambda *args: (precision, lambda units: (precision / units).max())
    found = []
    for _ in range(2):
        torch.manual_seed(5)
        at = torch.full((4,), 0.1)
        found.append(preconditioner(model, lb.data.as_batches(problem.batches(8)), model.sites, at))
        monkeypatch.setattr("pyro_lrblora.infer.preconditioner._prior_curvature", by_variance)
    assert torch.equal(*found)


def test_nuts_integrates_over_a_horseshoes_scales():
    """D = 1: given s = global * local the latent is normal, and s is integrated out on a grid."""
    problem = LinearGaussian(1, rows=3)
    model = problem.model.with_prior(lb.priors.Horseshoe(0.3))
    posterior = lb.infer.nuts(model, [problem.batch], draws=300, warmup=80, chains=1, max_tree_depth=5, progress=False)
    draws = posterior.guide.by_chain()
    assert set(draws) == {"R", "R_local_scale", "global_scale"}
    assert (draws["R_local_scale"] > 0).all()
    assert (draws["global_scale"] > 0).all()
    information, weighted = problem.fisher.item(), (problem.precision @ problem.mean).item()
    grid = torch.linspace(-12, 12, 1201).double()
    log_cauchy = lambda log, scale: (
        log - torch.log1p((2 * (log - math.log(scale))).exp()).double()
    )  # d log, up to a constant
    log_s2 = 2 * (grid[:, None] + grid[None])
    precision = information + (-log_s2).exp()
    log_weight = log_cauchy(grid, 0.3)[:, None] + log_cauchy(grid, 1.0)[None]
    log_weight = log_weight - 0.5 * (1 + information * log_s2.exp()).log() + 0.5 * weighted**2 / precision
    weight = (log_weight - log_weight.max()).exp()
    weight /= weight.sum()
    mean = (weight * weighted / precision).sum()
    variance = (weight * (1 / precision + (weighted / precision) ** 2)).sum() - mean**2
    assert_moments(posterior, mean.reshape(1), variance.reshape(1, 1))
    log_local = (weight.sum(0) * grid).sum()
    drawn = draws["R_local_scale"].log().flatten().numpy()
    assert abs(drawn.mean() - log_local) < 4.5 * drawn.std() / float(az.ess(drawn[None])) ** 0.5


def test_nuts_and_sgld_predict_alike_on_a_transformer():
    """Both layers' attention, D = 24, labels that depend on the text: the predictions move, and move together."""
    rows = token_batches(24, 24, classes=2)
    (batch,) = rows
    batch["labels"] = (batch["input_ids"][:, 0] > 30).long()
    model = lb.BayesianLoRA(
        tiny_bert(2), lb.LoRAXS(2, targets=["query", "key", "value"]), lb.priors.Normal(1.0), head="frozen"
    )
    assert model.sites.size == 24
    exact = lb.infer.nuts(model, rows, draws=60, warmup=40, chains=1, max_tree_depth=3, progress=False)
    rough = lb.infer.sgld(model, rows, draws=100, burn_in=50, thin=4, step_size=1.0, progress=False)
    probs, other = (lb.predict(p, rows, draws=60).probs for p in (exact, rough))
    with model.attached():
        base = model.outputs(batch, model.start(), model.head_values()).logits.softmax(-1).detach()
    assert (probs - base).abs().max() > 0.1
    assert (probs - other).abs().max() < 0.04


# --- convergence


def planted(apart):
    torch.manual_seed(0)
    draws = torch.randn(2, 200, 1, 2, 2)
    draws[1, ..., 0, 0] += apart
    return {"R": draws, "global_scale": torch.rand(2, 200)}


def test_chains_that_are_apart_are_noticed():
    problem = LinearGaussian(2)
    history = [{"chain": 0, "seconds": 1.0}]
    r_hat, ess = convergence(planted(0.0))
    assert r_hat < 1.02
    assert ess > 200
    with pytest.warns(ChainsNotConverged, match=r"R-hat is 1\.[1-9]\d\d at its largest .* below 1.05"):
        posterior = posterior_of_chains(problem.model, planted(2.0), history, {"method": "nuts"})
    assert posterior.settings["r_hat"] > 1.1
    assert posterior.settings["ess"] < 20
    assert posterior.settings["seconds"] == 1.0


def test_a_lone_chain_is_compared_with_itself():
    drifting = {"R": torch.randn(1, 200, 1, 2, 2) + torch.linspace(0, 3, 200).reshape(1, -1, 1, 1, 1)}
    assert convergence(drifting)[0] > 1.2
    assert convergence({"R": torch.randn(1, 201, 1, 2, 2)})[0] < 1.06


@pytest.mark.filterwarnings("ignore:invalid value:RuntimeWarning")
def test_a_chain_that_never_moves_has_not_converged():
    with pytest.warns(ChainsNotConverged, match="R-hat is nan"):
        posterior_of_chains(LinearGaussian(2).model, {"R": torch.zeros(2, 20, 1, 2, 2)}, [], {})


# --- what a run leaves alone, and its start


@pytest.mark.parametrize("method", ["nuts", "sgld", "sghmc"])
def test_network_model_store_and_generator_are_left_alone(method):
    network = tiny_bert().train()
    before = {name: value.clone() for name, value in network.state_dict().items()}
    mine = pyro.param("mine", torch.ones(2))
    model, dropping = (
        lb.BayesianLoRA(network, lb.LoRAXS(2, layers=[1]), head="bayesian", dropout=dropout).prepare(token_batches())
        for dropout in (False, True)  # which would make the log joint random, and is left out
    )
    start = {name: value.clone() for name, value in model.head_start.items()}
    state = torch.get_rng_state()
    first, again = (run(method, m, token_batches(), chains=2, seed=3) for m in (model, dropping))
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(a, b) for a, b in zip(first.sample(9).values(), again.sample(9).values(), strict=True))
    other = run(method, model, token_batches(), seed=4)
    assert not torch.equal(first.sample(1)["R"], other.sample(1)["R"])
    chains = first.guide.by_chain()
    assert set(chains) == {"R", *model.head_start}
    assert chains["R"].shape[:2] == (2, 6)
    assert not torch.equal(chains["R"][0], chains["R"][1])
    lb.predict(first, token_batches(), draws=2)
    assert all(torch.equal(before[name], value) for name, value in network.state_dict().items())
    assert network.training
    assert all(parameter.requires_grad and parameter.grad is None for parameter in network.parameters())
    assert list(pyro.get_param_store().keys()) == ["mine"]
    assert pyro.param("mine") is mine
    assert all(torch.equal(start[name], value) for name, value in model.head_start.items())


@pytest.mark.parametrize("method", ["nuts", "sgld", "sghmc"])
def test_the_same_batches_twice_give_the_same_draws(method):
    """Though they shuffle, and each pass takes their order on."""
    train = lb.Batches(tiny_reviews(), tiny_tokenizer(), batch_size=8 if method != "nuts" else 40, shuffle=0)
    model = lb.BayesianLoRA(tiny_bert(), lb.LoRAXS(2, layers=[1]), head="frozen")
    first, second = (run(method, model, train, seed=3).sample(6)["R"] for _ in range(2))
    assert torch.equal(first, second)


@pytest.mark.parametrize("method", ["nuts", "sgld", "sghmc"])
def test_init_is_where_the_chain_starts(method, monkeypatch):
    """Seen from the first draws at a tiny step, or from what NUTS is given."""
    model = lb.BayesianLoRA(tiny_bert(), lb.LoRAXS(2, layers=[1])).prepare(token_batches())
    init = lb.fit(model, token_batches(), guide=lb.guides.Delta(), epochs=2, rates=lb.Rates(loc=5.0), progress=False)
    centre = init.mean()["R"]
    assert centre.abs().mean() > 0.2
    model = model.with_head("bayesian")
    if method == "nuts":
        module, starts = importlib.import_module("pyro_lrblora.infer.nuts"), []
        monkeypatch.setattr(module, "log_joint", lambda *args: starts.append(args[2]) or log_joint(*args))
        run("nuts", model, token_batches(), init=init, chains=3)
        apart = torch.stack([start["R"] for start in starts]) - centre
        assert len(starts) == 3
        assert abs(apart.std() - 0.05) < 0.02  # half a prior sd
        assert apart.mean().abs() < 0.03
        head = torch.stack([start["classifier.weight"] for start in starts])
        assert (head - init.head()["classifier.weight"]).abs().max() < 2.5 * model.head_scale
    else:
        sampled = run(method, model, token_batches(), init=init, draws=4, step_size=1e-8)
        torch.testing.assert_close(sampled.mean()["R"], centre, atol=1e-3, rtol=0)
        for name, value in init.head().items():
            torch.testing.assert_close(sampled.mean()[name], value, atol=1e-3, rtol=0)
    elsewhere = lb.BayesianLoRA(tiny_bert(), lb.LoRAXS(2, lb.projections.Random(), layers=[1]), head="bayesian")
    with pytest.raises(ValueError, match="same subspace|the model's adapter"):
        run(method, elsewhere.prepare(token_batches()), token_batches(), init=init)


# --- refusals


@pytest.mark.parametrize("method", ["nuts", "sgld", "sghmc"])
def test_bad_input_is_refused_before_any_work(method):
    point = lb.BayesianLoRA(tiny_bert(), lb.LoRAXS(2))
    with pytest.raises(ValueError, match=r"head='bayesian' or head=lb.fixed_from\(posterior\)"):
        run(method, point, token_batches())
    model = point.with_head("frozen")
    for bad in ({"draws": 0}, {"chains": 1.5}, {"burn_in" if method != "nuts" else "warmup": -1}):
        with pytest.raises(ValueError, match=f"expected {next(iter(bad))} to be an integer >= 1"):
            run(method, model, token_batches(), **bad)
    with pytest.raises(ValueError, match="expected draws >= 4, the fewest that Pyro"):
        lb.infer.nuts(model, token_batches(), draws=3)
    bad = {"nuts": {"target_accept": 1.0}, "sgld": {"step_size": 4.0}, "sghmc": {"friction": 0.0}}[method]
    with pytest.raises(ValueError, match=f"expected {next(iter(bad))}"):
        run(method, model, token_batches(), **bad)
    with pytest.raises(ValueError, match="expected a column 'label'"):
        run(method, model, [{k: v for k, v in batch.items() if k != "labels"} for batch in token_batches()])


def test_batches_of_several_widths_are_no_one_batch():
    model = lb.BayesianLoRA(tiny_bert(), lb.LoRAXS(2), head="frozen")
    wide, narrow = token_batches(16)
    narrow = {name: value[:, :5] if value.dim() > 1 else value for name, value in narrow.items()}
    with pytest.raises(ValueError, match=r"one width.*input_ids.*\(5,\), \(7,\)"):
        run("nuts", model, [wide, narrow])


@pytest.mark.parametrize("prior", [lb.priors.Horseshoe(0.1), lb.priors.LayerScale(0.1)], ids=label)
@pytest.mark.parametrize("method", ["sgld", "sghmc"])
def test_constrained_sites_are_left_to_nuts(method, prior):
    problem = LinearGaussian(2)
    with pytest.raises(ValueError, match=r"without constrained sites.*lb.infer.nuts"):
        run(method, problem.model.with_prior(prior), problem.batches(8))


def users_mixture(shapes):
    weights, scales = dist.Categorical(torch.tensor([0.5, 0.5])), torch.tensor([0.01, 1.0])
    mixture = dist.MixtureSameFamily(weights, dist.Normal(0.0, scales))
    return {name: pyro.sample(name, mixture.expand(shape).to_event()) for name, shape in shapes.items()}


@pytest.mark.parametrize(
    "prior", [lb.priors.SpikeSlab(0.1), lb.priors.Learned(lb.priors.SpikeSlab(0.1)), users_mixture], ids=label
)
@pytest.mark.parametrize("method", ["sgld", "sghmc"])
def test_mixtures_are_left_to_nuts(method, prior):
    """Before the data are looked at, whether or not the adapter is to see them."""
    for adapter in (lb.LoRAXS(2), lb.LoRAXS(2, lb.projections.Gradient())):
        model = lb.BayesianLoRA(tiny_bert(), adapter, prior, head="frozen")
        with pytest.raises(TypeError, match=r"a mixture at site 'R'; write lb.infer.nuts"):
            run(method, model, None)


def test_a_prior_for_a_subspace_that_the_data_tell_is_not_judged_before():
    model = lb.BayesianLoRA(tiny_bert(), lb.LoRAXS(3, lb.projections.Gradient(), layers=[1]), head="frozen")
    prior = lb.priors.SingularValues.of(model.prepare(token_batches()))
    assert run("sgld", model.with_prior(prior), token_batches()).sample(2)["R"].isfinite().all()


@pytest.mark.parametrize("method", ["nuts", "sgld", "sghmc"])
def test_nan_names_its_batch(method):
    problem = LinearGaussian(2)
    batches = [{name: value.clone() for name, value in batch.items()} for batch in problem.batches(8)]
    batches[1]["labels"][3] = torch.nan
    with pytest.raises(FloatingPointError, match=f"in batch {0 if method == 'nuts' else 1}: expected a finite"):
        run(method, problem.model, batches)
    batches[1]["x"][3] = torch.nan
    with pytest.raises(FloatingPointError, match=f"in batch {0 if method == 'nuts' else 1}: expected a finite"):
        run(method, problem.model, batches)


def test_the_settings_of_a_chain_reach_pyro(monkeypatch):
    problem, given = LinearGaussian(rank=2), []
    module = importlib.import_module("pyro_lrblora.infer.nuts")
    kernel = module.NUTS
    monkeypatch.setattr(module, "NUTS", lambda *args, **options: given.append(options) or kernel(*args, **options))
    lb.infer.nuts(
        problem.model, [problem.batch], draws=4, warmup=2, target_accept=0.6, max_tree_depth=3, full_mass=True,
        progress=False,
    )  # fmt: skip
    wanted = {"target_accept_prob": 0.6, "max_tree_depth": 3, "full_mass": True}
    assert {name: given[0][name] for name in wanted} == wanted
