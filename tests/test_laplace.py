"""Laplace approximations against dense matrices: the Gauss-Newton matrix, its structures, and the evidence."""

import math
import sys

import numpy as np
import pyro
import pytest
import torch
from conftest import LinearGaussian, tiny_bert, tiny_tokenizer, token_batches
from pyro.infer.autoguide import AutoDelta
from scipy.optimize import minimize

import pyro_lrblora as lb

STRUCTURES = ["diagonal", "kron", "low_rank", "full"]
RANK = 2


@pytest.fixture(scope="module")
def problem():
    return LinearGaussian(rank=2, modules=2)


def point_at(model, batches, loc):
    """A Delta posterior at given latents."""
    point = lb.fit(model, batches, guide=lb.guides.Delta(), steps=1, rates=lb.Rates(0, 0, 0, 0), progress=False)
    point.guide.loc.data.copy_(loc)
    return point


def weighted_jacobian(model, batch, at, head) -> np.ndarray:
    """Rows g whose outer products add up to the Gauss-Newton matrix, dense, from autograd's Jacobian of the outputs."""
    outputs = lambda flat: lb.likelihoods.logits_of(model.outputs(batch, model.sites.split(flat), head))
    jacobian = torch.autograd.functional.jacobian(outputs, at).double()  # (B, C, D)
    if hasattr(model.likelihood, "sd"):
        return (jacobian / model.likelihood.sd[:, None]).flatten(0, 1).numpy()
    probs = outputs(at).detach().double().softmax(-1)
    centred = jacobian - torch.einsum("bc,bcd->bd", probs, jacobian).unsqueeze(1)
    return (probs.sqrt().unsqueeze(-1) * centred).flatten(0, 1).numpy()


def structured(rows: np.ndarray, structure: str, shapes, rank: int = RANK) -> np.ndarray:
    """What a structure keeps of the sum of outer products of rows (n, D), as a dense matrix."""
    matrix = rows.T @ rows
    if structure == "full":
        return matrix
    if structure == "diagonal":
        return np.diag(matrix.diagonal())
    if structure == "low_rank":
        values, vectors = np.linalg.eigh(matrix)
        top = (vectors[:, -rank:] * values[-rank:]) @ vectors[:, -rank:].T
        return top + np.diag((matrix - top).diagonal())
    blocks, start = [], 0
    for count, r, c in shapes:
        for _ in range(count):
            g = rows[:, start : start + r * c].reshape(-1, r, c)
            left, right = np.einsum("kij,klj->il", g, g), np.einsum("kij,kil->jl", g, g)
            blocks.append(np.kron(left, right) / np.trace(left))
            start += r * c
    return torch.block_diag(*map(torch.from_numpy, blocks)).numpy()


def exact_mode(problem, jacobian, scale):
    """Posterior mean, log evidence and precision under Normal(0, scale), dense."""
    sd = problem.model.likelihood.sd.repeat(problem.rows).double().numpy()
    residual = (problem.batch["labels"] - problem.model.network(problem.batch["x"])).flatten().double().numpy() / sd
    precision = jacobian.T @ jacobian + np.eye(problem.size) / scale**2
    marginal = scale**2 * jacobian @ jacobian.T + np.eye(len(sd))
    evidence = -0.5 * (residual @ np.linalg.solve(marginal, residual) + np.linalg.slogdet(2 * math.pi * marginal)[1])
    return np.linalg.solve(precision, jacobian.T @ residual), evidence - np.log(sd).sum(), precision


@pytest.mark.parametrize("scale", [0.07, 0.7, 7.0])
@pytest.mark.parametrize("structure", STRUCTURES)
def test_a_linear_gaussian_posterior(problem, structure, scale):
    """Full is the exact posterior, and its evidence the exact one; every other is its structure of the same matrix."""
    model = problem.model.with_prior(lb.priors.Normal(scale))
    jacobian = weighted_jacobian(model, problem.batch, torch.zeros(8), {})
    mode, evidence, precision = exact_mode(problem, jacobian, scale)
    if scale == 0.7:
        torch.testing.assert_close(torch.from_numpy(precision), problem.precision, rtol=1e-5, atol=1e-5)
        assert evidence == pytest.approx(problem.log_evidence, abs=1e-3)
    point = point_at(model, problem.batches(7), torch.from_numpy(mode))
    posterior = lb.infer.laplace(model, problem.batches(7), structure=structure, rank=RANK, init=point)
    kept = structured(jacobian, structure, model.sites.shapes.values()) + np.eye(8) / scale**2
    covariance = posterior.covariance().dense().double()
    rtol = 1e-5 if structure == "full" else 1e-3
    spread = covariance.diagonal().sqrt()
    error = (covariance - torch.from_numpy(np.linalg.inv(kept))).abs() / (spread[:, None] * spread)
    assert error.max() < rtol
    assert torch.equal(posterior.mean()["R"], point.mean()["R"])
    joint = evidence - 0.5 * (8 * math.log(2 * math.pi) - np.linalg.slogdet(precision)[1])
    expected = joint + 0.5 * (8 * math.log(2 * math.pi) - np.linalg.slogdet(kept)[1])
    assert posterior.settings["log_evidence"] == pytest.approx(expected, abs=2e-3)


together = lambda batches: {name: torch.cat([batch[name] for batch in batches]) for name in batches[0]}


def classifier(**options):
    adapter = lb.LoRAXS(2, layers=[1])
    return lb.BayesianLoRA(tiny_bert(), adapter, lb.priors.Normal(0.5), tokenizer=tiny_tokenizer(), **options)


@pytest.fixture(scope="module")
def point():
    return lb.fit(classifier(), token_batches(24), guide=lb.guides.Delta(), epochs=10, progress=False)


@pytest.mark.parametrize("structure", STRUCTURES)
def test_a_classifier(point, structure):
    """Against sum_b J' (diag(p) - p p') J with J from autograd; batches one by one, or all rows together."""
    batch = together(token_batches(24))
    at = point.guide.loc.detach()
    rows = weighted_jacobian(point.model, batch, at, point.head())
    probs = lb.predict(point, [batch], draws=1).probs.double()
    hessian = torch.diag_embed(probs) - probs.unsqueeze(-1) * probs.unsqueeze(-2)
    logits = lambda flat: point.model.outputs(batch, point.model.sites.split(flat), point.head()).logits
    jacobian = torch.autograd.functional.jacobian(logits, at).double()
    dense = torch.einsum("bcd,bce,bef->df", jacobian, hessian, jacobian)
    torch.testing.assert_close(torch.from_numpy(rows.T @ rows), dense, rtol=1e-4, atol=1e-5)
    posterior = lb.infer.laplace(point.model, token_batches(24), structure=structure, rank=RANK, init=point)
    kept = structured(rows, structure, point.model.sites.shapes.values()) + np.eye(len(at)) / 0.5**2
    covariance = posterior.covariance().dense().double()
    torch.testing.assert_close(covariance, torch.from_numpy(np.linalg.inv(kept)), rtol=2e-3, atol=2e-4)
    log_lik = float(probs.log()[torch.arange(24), batch["labels"]].sum())
    log_prior = float(torch.distributions.Normal(0.0, 0.5).log_prob(at.double()).sum())
    size = len(at)
    expected = log_lik + log_prior + 0.5 * (size * math.log(2 * math.pi) - np.linalg.slogdet(kept)[1])
    assert posterior.settings["log_evidence"] == pytest.approx(expected, abs=5e-3)
    assert torch.equal(posterior.head()["classifier.weight"], point.head()["classifier.weight"])


@pytest.mark.parametrize("scale", [1e-7, 1e-3, 1e3, 1e7])
def test_the_tuned_prior_does_not_depend_on_the_prior_it_came_with(point, scale):
    batches = token_batches(24)
    far = point_at(point.model.with_prior(lb.priors.Normal(scale)), batches, point.guide.loc.detach())
    near = point_at(point.model, batches, point.guide.loc.detach())
    tuned = [
        lb.infer.laplace(start.model, batches, prior_precision="marginal_likelihood", init=start).model.prior.scale
        for start in (far, near)
    ]
    assert tuned[0] == pytest.approx(tuned[1], rel=1e-2)


@pytest.mark.parametrize("tuning", ["marginal_likelihood", "per_module"])
@pytest.mark.parametrize("structure", STRUCTURES)
def test_the_tuned_prior_has_the_greatest_evidence(point, structure, tuning):
    """Against scipy on the dense formula, mode and curvature held fixed."""
    batch = together(token_batches(24))
    at = point.guide.loc.detach()
    rows = weighted_jacobian(point.model, batch, at, point.head())
    kept = structured(rows, structure, point.model.sites.shapes.values())
    modules = len(point.model.modules) if tuning == "per_module" else 1
    owner = np.repeat(np.arange(modules), len(at) // modules)

    def minus_evidence(log_precision):
        prior = np.exp(log_precision)[owner]
        quadratic = (prior * at.double().numpy() ** 2).sum()
        return 0.5 * (np.linalg.slogdet(kept + np.diag(prior))[1] + quadratic - np.log(prior).sum())

    best = minimize(
        minus_evidence, np.full(modules, 1.0), method="Nelder-Mead", options={"fatol": 1e-9, "maxiter": 4000}
    )
    posterior = lb.infer.laplace(
        point.model, token_batches(24), structure=structure, rank=RANK, prior_precision=tuning, init=point
    )
    scales = np.atleast_1d(posterior.model.prior.scale)
    assert len(scales) == modules
    assert minus_evidence(-2 * np.log(scales)) < best.fun + 1e-3
    assert minus_evidence(np.full(modules, math.log(4.0))) > best.fun + 0.01  # the prior it came with is not it
    assert point.model.prior == lb.priors.Normal(0.5)
    precision = np.linalg.inv(posterior.covariance().dense().double().numpy())
    expected = kept + np.diag(scales[np.arange(modules)][owner] ** -2.0)
    np.testing.assert_allclose(precision, expected, rtol=2e-2, atol=2e-2 * np.abs(expected).max())
    fixed = lb.infer.laplace(point.model, token_batches(24), structure=structure, rank=RANK, init=point)
    assert posterior.settings["log_evidence"] > fixed.settings["log_evidence"]


@pytest.mark.parametrize("structure", STRUCTURES)
def test_saved_loaded_and_predicted(point, structure, tmp_path):
    tuned = {"prior_precision": "per_module"} if structure == "kron" else {}
    posterior = lb.infer.laplace(point.model, token_batches(24), structure=structure, rank=RANK, init=point, **tuned)
    posterior.save(tmp_path)
    loaded = lb.Posterior.load(tmp_path, tiny_bert())
    assert loaded.model.prior == posterior.model.prior
    assert loaded.settings == posterior.settings
    for options in ({"draws": 3}, {"method": "linearised"}, {"method": "probit"}):
        first, second = (lb.predict(p, token_batches(16), **options).logits for p in (posterior, loaded))
        assert torch.equal(first, second)


def test_the_point_is_fitted_where_none_is_given():
    """The same as by hand, and for LoRA too ("Laplace-LoRA")."""
    for adapter in (lb.LoRAXS(2), lb.LoRA(2, "all-linear")):
        model = lb.BayesianLoRA(tiny_bert(), adapter, lb.priors.Normal(0.5)).prepare(token_batches(16))
        posterior = lb.infer.laplace(model, token_batches(16), epochs=3, progress=False, seed=1)
        by_hand = lb.fit(model, token_batches(16), guide=lb.guides.Delta(), epochs=3, progress=False, seed=1)
        assert all(torch.equal(posterior.mean()[name], by_hand.mean()[name]) for name in model.sites.shapes)
        assert model.prior == posterior.model.prior == lb.priors.Normal(0.5)
        assert lb.predict(posterior, token_batches(16), method="linearised", draws=3).probs.isfinite().all()


@pytest.mark.parametrize(
    ("prior", "found"),
    [
        (lb.priors.Horseshoe(0.1), "Horseshoe"),
        (lb.priors.LayerScale(0.1), "R_scale"),
        (lb.priors.Laplace(0.1), "another distribution"),
        (lb.priors.StudentT(0.1), "another distribution"),
    ],
    ids=lambda value: value if isinstance(value, str) else type(value).__name__,
)
def test_only_normal_priors(prior, found):
    """Refused before the point fit: the data are not even looked at."""
    for adapter in (lb.LoRAXS(2), lb.LoRAXS(2, lb.projections.Gradient())):
        model = lb.BayesianLoRA(tiny_bert(), adapter, prior)
        with pytest.raises(ValueError, match=f"expected a Normal prior for a Laplace approximation, got .*{found}"):
            lb.infer.laplace(model, None)


def factored(shapes):
    values = lb.priors.Normal(0.1)(shapes)
    pyro.factor("factor", -2 * sum(value.square().sum() for value in values.values()))
    return values


@pytest.mark.parametrize(
    ("prior", "found"),
    [
        (pyro.poutine.scale(lb.priors.Normal(0.1), scale=4.0), "poutine.scale"),
        (pyro.poutine.mask(lb.priors.Normal(0.1), mask=False), "poutine.mask"),
        (factored, r"the latents, \['factor'\]"),
    ],
    ids=["scale", "mask", "factor"],
)
def test_normal_priors_of_another_density(prior, found):
    model = lb.BayesianLoRA(tiny_bert(), lb.LoRA(2), prior)
    with pytest.raises(ValueError, match=f"expected a Normal prior for a Laplace approximation, got .*{found}"):
        lb.infer.laplace(model, None)


def test_a_prior_that_shows_only_in_a_subspace_is_refused_once_there_is_one():
    model = lb.BayesianLoRA(
        tiny_bert(), lb.LoRAXS(2, lb.projections.Gradient()), pyro.poutine.scale(lb.priors.Normal(0.1), scale=4.0)
    )
    with pytest.raises(ValueError, match="expected a Normal prior for a Laplace approximation, got .*poutine.scale"):
        lb.infer.laplace(model, token_batches(16), steps=1, progress=False)


def test_bad_arguments(point):
    with pytest.raises(ValueError, match="got 'bayesian'"):
        lb.infer.laplace(classifier(head="bayesian"), token_batches(24))
    for options, message in (
        ({"structure": "dense"}, "structure to be one of"),
        ({"prior_precision": 3.0}, "prior_precision to be one of"),
        ({"init": lb.infer.laplace(point.model, token_batches(24), init=point)}, "expected init= to be a point"),
        ({"init": point, "epochs": 3}, "no options of a fit"),
        ({"structure": "low_rank", "rank": 0}, "rank to be an integer >= 1, got rank=0"),
    ):
        with pytest.raises(ValueError, match=message):
            lb.infer.laplace(point.model, token_batches(24), **options)
    stock = lb.fit(point.model, token_batches(24), guide=AutoDelta, epochs=1, progress=False)
    posterior = lb.infer.laplace(point.model, token_batches(24), init=stock)
    assert torch.equal(posterior.mean()["R"], stock.mean()["R"])
    model = lb.BayesianLoRA(tiny_bert(), lb.LoRA(2, "all-linear"))
    with pytest.raises(ValueError, match="every latent site to cover all modules"):
        lb.infer.laplace(model, token_batches(16), prior_precision="per_module", steps=1, progress=False)


def test_too_full_a_matrix_is_refused_before_the_point_is_fitted(monkeypatch):
    fitted = lambda *args, **options: pytest.fail("a point was fitted")
    monkeypatch.setattr(sys.modules["pyro_lrblora.infer.laplace"], "svi", fitted)
    monkeypatch.setattr(sys.modules["pyro_lrblora.guides.full_rank"], "_COPIES", 1e9)
    with pytest.raises(ValueError, match="most_gigabytes"):
        lb.infer.laplace(lb.BayesianLoRA(tiny_bert(), lb.LoRAXS(2)), token_batches(), structure="full")


def test_a_point_fitted_to_other_rows_is_refused(point, monkeypatch):
    monkeypatch.setattr(point.model, "outputs", lambda *args: pytest.fail("the network has run"))
    with pytest.raises(ValueError, match="expected the N=24 rows that were fitted as training data, got 16 rows"):
        lb.infer.laplace(point.model, token_batches(16), init=point)


def test_sites_of_as_many_modules_are_not_those_of_all_modules():
    """An MLP's two layers have their factors at two pairs of sites, each of one module per layer of the network."""
    model = lb.BayesianLoRA(tiny_bert(), lb.LoRA(2, targets="mlp"))
    assert {shape[0] for shape in model.sites.shapes.values()} == {2}
    assert len(model.modules) == 4
    with pytest.raises(ValueError, match="every latent site to cover all modules"):
        lb.infer.laplace(model, None, prior_precision="per_module")


def test_a_structured_prior_is_not_replaced_by_another():
    model = lb.BayesianLoRA(tiny_bert(), lb.LoRAXS(2)).prepare(token_batches())
    per_module = lb.priors.Normal([0.1] * len(model.modules))
    for prior, message in (
        (lb.priors.SingularValues.of(model), "expected lb.priors.Normal for prior_precision='marginal_likelihood'"),
        (per_module, "write prior_precision='per_module'"),
    ):
        with pytest.raises(ValueError, match=message):
            lb.infer.laplace(model.with_prior(prior), token_batches(), prior_precision="marginal_likelihood")
    for prior, tuning in ((per_module, "per_module"), (lb.priors.SingularValues.of(model), "fixed")):
        options = {"prior_precision": tuning, "steps": 1, "progress": False}
        lb.infer.laplace(model.with_prior(prior), token_batches(), **options)


def test_a_point_under_another_prior_is_refused():
    model = lb.BayesianLoRA(tiny_bert(), lb.LoRAXS(2)).prepare(token_batches())
    point = lb.fit(model, token_batches(), guide=lb.guides.Delta(), epochs=1, progress=False)
    with pytest.raises(ValueError, match=r"the model's prior Normal\(scale=0.3\), got Normal\(scale=0.1\)"):
        lb.infer.laplace(model.with_prior(lb.priors.Normal(0.3)), token_batches(), init=point)


@pytest.mark.parametrize("head", ["point", "frozen"])
def test_a_point_that_was_stored_is_still_the_models_own(tmp_path, head):
    data = token_batches()
    model = lb.BayesianLoRA(
        tiny_bert(), lb.LoRAXS(2), lb.priors.Normal([0.1, 0.2] * 4),
        lb.likelihoods.Categorical(class_names=("a", "b", "c")), head=head,
    ).prepare(data)  # fmt: skip
    point = lb.fit(model, data, guide=lb.guides.Delta(), epochs=1, progress=False)
    point.save(tmp_path)
    stored = lb.Posterior.load(tmp_path, tiny_bert())
    around = [lb.infer.laplace(model, data, init=start) for start in (point, stored)]
    assert around[0].settings["log_evidence"] == pytest.approx(around[1].settings["log_evidence"], rel=1e-5)
    if head == "frozen":
        other = model.with_head(lb.FixedHead({name: value + 1 for name, value in model.head_start.items()}))
        with pytest.raises(ValueError, match="the model's head"):
            lb.infer.laplace(other, data, init=stored)


def test_a_point_of_another_model_is_refused():
    network, data = tiny_bert(), token_batches()
    model = lb.BayesianLoRA(network, lb.LoRAXS(2)).prepare(data)
    point = lb.fit(model, data, guide=lb.guides.Delta(), epochs=1, progress=False)
    other = lb.BayesianLoRA(network, lb.LoRAXS(2), likelihood=lb.likelihoods.Categorical(class_names=("a", "b", "c")))
    for wrong, message in (
        (other, "the model's likelihood"),
        (model.with_head("frozen"), "the model's head 'frozen', got 'point'"),
        (lb.BayesianLoRA(network, lb.LoRAXS(3)), "the model's adapter"),
        (lb.BayesianLoRA(network, lb.LoRAXS(2, lb.projections.Random())), "the model's adapter"),
    ):
        with pytest.raises(ValueError, match=message):
            lb.infer.laplace(wrong, data, init=point)
