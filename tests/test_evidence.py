"""ELBO, importance-weighted bound and PSIS-LOO against exact values."""

import math

import arviz as az
import numpy as np
import pytest
import torch
from conftest import LinearGaussian, tiny_bert, tiny_reviews, tiny_tokenizer, token_batches
from hypothesis import given, settings
from hypothesis import strategies as st
from truth import exact, posterior_at

import pyro_lrblora as lb
from pyro_lrblora.arviz_io import psis
from pyro_lrblora.evidence import LOO, Importance, elbo, importance, k_hat_threshold, psis_loo
from pyro_lrblora.infer.chains import posterior_of_chains
from pyro_lrblora.plots.weights import loo_k_hat, weight_tail

pytestmark = pytest.mark.filterwarnings("ignore::pyro_lrblora.ScalesNotConverged")


def off(problem):
    """Somewhat too wide, correlated a little otherwise, and beside the mean."""
    covariance = problem.precision.inverse()
    sd = covariance.diagonal().sqrt()
    return problem.mean + 0.3 * sd, 1.2 * covariance + 0.1 * torch.diag(sd**2)


def leave_one_out(problem):
    """Log predictive density of every row given all others, in closed form: (rows,)."""
    (basis,) = problem.model.adapted.bases.values()
    x, y, network = problem.batch["x"].double(), problem.batch["labels"].double(), problem.model.network
    jacobian = torch.einsum("mr,sn,bn->bmrs", basis.B.double(), basis.A.double(), x).flatten(2)  # (rows, m, D)
    residual = y - x @ network.layer.weight.double().T
    noise = problem.model.likelihood.sd.double() ** 2
    densities = []
    for row in range(problem.rows):
        weighted = jacobian[row] / noise[:, None]
        precision = problem.precision - jacobian[row].T @ weighted
        mean = torch.linalg.solve(precision, problem.precision @ problem.mean - weighted.T @ residual[row])
        spread = jacobian[row] @ torch.linalg.solve(precision, jacobian[row].T) + torch.diag(noise)
        predictive = torch.distributions.MultivariateNormal(jacobian[row] @ mean, spread)
        densities.append(predictive.log_prob(residual[row]))
    return torch.stack(densities)


@pytest.mark.parametrize("size", [24, 7])
def test_the_elbo_is_the_log_evidence_minus_the_kl(size):
    problem = LinearGaussian(rank=3)
    mean, covariance = off(problem)
    found = elbo(posterior_at(problem, mean, covariance), problem.batches(size), draws=1000, fold=500)
    kl = problem.reverse_kl(mean, covariance)
    assert kl > 0.3  # or the KL would not be tested
    assert 0 < found.standard_error < kl / 4
    assert abs(found.value - (problem.log_evidence - kl)) < 4 * found.standard_error


def test_the_standard_error_of_the_elbo_is_its_spread_over_seeds():
    problem = LinearGaussian(rank=2)
    posterior = posterior_at(problem, *off(problem))
    estimates = [elbo(posterior, problem.batches(24), draws=30, seed=seed, fold=30) for seed in range(40)]
    spread = np.std([each.value for each in estimates], ddof=1)
    assert np.mean([each.standard_error for each in estimates]) == pytest.approx(spread, rel=0.4)


@pytest.mark.parametrize("rank", [2, 4])
def test_at_the_exact_posterior_the_weights_are_constant(rank):
    problem = LinearGaussian(rank)
    pieces = importance(exact(problem), problem.batches(24), draws=100)
    assert pieces.k_hat == 0
    for found in (pieces.elbo, pieces.iwae, pieces.log_evidence):
        assert found.value == pytest.approx(problem.log_evidence, abs=1e-3)
        assert found.standard_error < 1e-4
    assert pieces.effective_draws == pytest.approx(100, rel=1e-4)
    assert pieces.largest_share == pytest.approx(0.01, rel=1e-3)


def test_many_draws_bring_the_bound_to_the_evidence():
    problem = LinearGaussian(rank=2)
    pieces = importance(posterior_at(problem, *off(problem)), problem.batches(24), draws=1500, fold=500)
    assert pieces.k_hat < 0.7
    assert abs(pieces.iwae.value - problem.log_evidence) < 4 * pieces.iwae.standard_error
    assert problem.log_evidence - pieces.elbo.value > 10 * pieces.iwae.standard_error
    smoothed = pieces.log_evidence
    assert 0 < smoothed.standard_error < 1.05 * pieces.iwae.standard_error
    assert abs(smoothed.value - problem.log_evidence) < 4 * smoothed.standard_error


def test_half_and_double_the_sd_are_seen_in_every_number():
    """Of D normals: ELBO = evidence - D (log 1/c + (c^2 - 1) / 2), and ESS / S = (sqrt(2 - 1/c^2) / c)^D if c > 1."""
    problem = LinearGaussian(rank=2)
    covariance, draws = problem.precision.inverse(), 1000
    at = lambda c: importance(
        posterior_at(problem, problem.mean, c**2 * covariance), problem.batches(24), draws=draws, fold=500
    )
    good, narrow, wide = at(1.0), at(0.5), at(2.0)
    for pieces, c in ((narrow, 0.5), (wide, 2.0)):
        kl = 4 * (-math.log(c) + (c**2 - 1) / 2)
        assert abs(pieces.elbo.value - (problem.log_evidence - kl)) < 4 * pieces.elbo.standard_error
        assert pieces.elbo.value < pieces.log_evidence.value
        assert pieces.effective_draws < 0.6 * good.effective_draws
        assert pieces.largest_share > 3 * good.largest_share
    # Weights of a narrow q have the shape 1 - c^2, without a second moment; of a wide one they are bounded.
    assert narrow.k_hat > narrow.threshold > wide.k_hat
    assert narrow.k_hat == pytest.approx(0.75, abs=0.25)
    assert wide.effective_draws / draws == pytest.approx((math.sqrt(2 - 1 / 4) / 2) ** 4, rel=0.15)
    assert narrow.largest_share > 3 * wide.largest_share
    assert abs(wide.log_evidence.value - problem.log_evidence) < 4 * wide.log_evidence.standard_error


@pytest.mark.parametrize(
    ("draws", "expected"), [(10, 0.0), (100, 0.5), (1000, 2 / 3), (2154, 0.69999), (2155, 0.7), (10**6, 0.7)]
)
def test_the_limit_of_k_hat_rises_with_the_draws(draws, expected):
    assert k_hat_threshold(draws) == pytest.approx(expected, abs=2e-5)
    loo = LOO(torch.zeros(4), torch.tensor([expected - 0.01, expected + 0.01, 0.75, 0.75]), draws)
    assert loo.share_above() == (0.75 if expected < 0.74 else 0)
    assert loo.share_above(0.72) == 0.5
    with pytest.raises(ValueError, match="draws >= 2"):
        k_hat_threshold(1)


def test_the_smoothed_evidence_is_the_mean_of_pareto_weights():
    """With u uniform, w = u^-k has the mean 1 / (1 - k); at k = 0.5 the plain mean is the noisier one."""
    smooth, plain = [], []
    for seed in range(40):
        uniform = torch.rand(1000, generator=torch.Generator().manual_seed(seed)).double()
        pieces = Importance(torch.zeros(1000, 1).double(), -0.5 * uniform.log() + 300, torch.zeros(1000).double())
        smooth.append(pieces.log_evidence.value - 300)
        plain.append(pieces.iwae.value - 300)
    assert np.mean(smooth) == pytest.approx(math.log(1 / 0.5), abs=0.03)
    assert np.std(smooth) < np.std(plain)


@settings(deadline=None, max_examples=25)
@given(seed=st.integers(0, 1000), shift=st.floats(-1e3, 1e3), draws=st.integers(2, 60), spread=st.floats(0, 5))
def test_weights_are_between_equal_and_one_alone(seed, shift, draws, spread):
    log_weights = torch.as_tensor(np.random.default_rng(seed).normal(size=draws) * spread + shift)
    pieces = Importance(torch.zeros(draws, 1).double(), log_weights, torch.zeros(draws).double())
    weights = np.exp(log_weights.numpy() - log_weights.numpy().max())
    assert pieces.effective_draws == pytest.approx(weights.sum() ** 2 / (weights**2).sum())
    assert pieces.largest_share == pytest.approx(1 / weights.sum())
    assert 1 - 1e-9 <= pieces.effective_draws <= draws + 1e-9
    assert pieces.elbo.value - 1e-9 <= pieces.iwae.value <= float(log_weights.max()) + 1e-9
    assert float(log_weights.min()) - 1e-9 <= pieces.log_evidence.value <= float(log_weights.max()) + 1e-9
    if draws < 25 or spread == 0:
        assert pieces.log_evidence.value == pytest.approx(pieces.iwae.value, abs=1e-6)


@pytest.mark.parametrize("off_by", [False, True], ids=["exact", "off"])
def test_leave_one_out_is_that_of_bayesian_linear_regression(off_by):
    problem = LinearGaussian(rank=2)
    posterior = posterior_at(problem, *off(problem)) if off_by else exact(problem)
    loo, truth = psis_loo(posterior, problem.batches(24), draws=2000, fold=500), leave_one_out(problem)
    assert (loo.k_hat < 0.7).all()
    assert loo.share_above() == 0
    torch.testing.assert_close(loo.elpd, truth, atol=0.06, rtol=0)
    assert loo.total.value == pytest.approx(float(truth.sum()), abs=0.2)
    assert loo.total.standard_error == pytest.approx(float(truth.var() * problem.rows) ** 0.5, rel=0.02)
    in_sample = importance(posterior, problem.batches(24), draws=500).log_likelihood.mean(0)
    assert float((in_sample - truth).abs().max()) > 0.3  # or leaving out would not be tested


def chains_of(posterior, chains, draws):
    values = {name: value.unflatten(0, (chains, draws)) for name, value in posterior.sample(chains * draws).items()}
    return posterior_of_chains(posterior.model, values, [], {})


@pytest.mark.filterwarnings("ignore::pyro_lrblora.ChainsNotConverged")
def test_stored_draws_leave_one_out_without_a_density():
    problem = LinearGaussian(rank=2)
    stored = chains_of(exact(problem), 2, 1000)
    loo = psis_loo(stored, problem.batches(24), draws=5000)
    assert loo.draws == 2000  # no more than there are
    torch.testing.assert_close(loo.elpd, leave_one_out(problem), atol=0.06, rtol=0)
    assert loo.share_above() == 0
    fewer = psis_loo(stored, problem.batches(24), draws=500)
    assert fewer.draws == 500
    assert not torch.equal(fewer.elpd, loo.elpd)
    with pytest.raises(ValueError, match="N=24 rows"):
        psis_loo(stored, problem.batches(24) * 2)
    with pytest.raises(ValueError, match="draws to be an integer >= 1"):
        psis_loo(stored, problem.batches(24), draws=0)


@pytest.mark.filterwarnings("ignore::pyro_lrblora.ChainsNotConverged")
@pytest.mark.filterwarnings("ignore:Estimated shape parameter:UserWarning")
def test_leave_one_out_of_stored_draws_is_that_of_arviz():
    data = tiny_reviews(30)
    model = lb.BayesianLoRA(tiny_bert(), lb.LoRAXS(2), lb.priors.Normal(1.0), head="frozen", tokenizer=tiny_tokenizer())
    spec = lb.guides.Diagonal()
    guide = spec(model.with_size(30))
    guide.scale = torch.full_like(guide.scale, 0.7)
    stored = chains_of(lb.Posterior(model.with_size(30), guide, spec), 2, 50)
    found = psis_loo(stored, data, draws=100)
    options = {"pointwise": True} | ({"reff": 1.0} if hasattr(az, "psislw") else {})
    expected = az.loo(stored.to_arviz(data), **options)
    pointwise = expected.loo_i if hasattr(expected, "loo_i") else expected.elpd_i
    np.testing.assert_allclose(found.elpd, pointwise.values, atol=1e-4)
    np.testing.assert_allclose(found.k_hat, expected.pareto_k.values, atol=1e-3)
    assert found.threshold == pytest.approx(float(expected.good_k))
    assert found.k_hat.max() - found.k_hat.min() > 0.1
    fitted = lb.predict(stored, data, draws=100).log_probs[torch.arange(30), torch.tensor(data["label"])]
    assert (found.elpd < fitted).all()  # a row that was left out is never better known


def test_a_priors_own_sites_are_in_the_evidence():
    """D = 1 under a scale of its own, integrated out on a grid: the bound of many draws must reach that evidence."""
    problem = LinearGaussian(rank=1, rows=6)
    model, spec = problem.model.with_prior(lb.priors.LayerScale(0.3, spread=0.3)), lb.guides.Diagonal()
    posterior = lb.Posterior(model, spec(model), spec)
    information, weighted = problem.fisher.item(), (problem.precision @ problem.mean).item()
    log_s = torch.linspace(-4, 3, 7001).double()
    # log p(y | s) up to what the problem's own Normal prior of 0.7 has too.
    relative = lambda s2: -0.5 * torch.log1p(information * s2) + 0.5 * weighted**2 / (information + 1 / s2)
    given_s = problem.log_evidence + relative((2 * log_s).exp()) - relative(torch.tensor(0.7**2).double())
    joint = torch.distributions.Normal(math.log(0.3), 0.3).log_prob(log_s) + given_s
    evidence, weight = float(torch.logsumexp(joint, 0)) + math.log(0.001), joint.softmax(0)
    mean = float((weight * log_s).sum())
    posterior.guide.loc.data.fill_(weighted / (information + math.exp(-2 * mean)))
    posterior.guide.scale = torch.full((1,), 1.3 * (information + math.exp(-2 * mean)) ** -0.5)
    posterior.guide.extra.locs.R_scale.data.fill_(mean)
    posterior.guide.extra.scales.R_scale = torch.full((1,), 1.3 * float((weight * (log_s - mean) ** 2).sum()) ** 0.5)
    found = importance(posterior, [problem.batch], draws=1000, fold=500)
    assert found.iwae.standard_error < 0.05
    assert abs(found.iwae.value - evidence) < 4 * found.iwae.standard_error
    assert found.elbo.value < evidence - found.elbo.standard_error


def test_a_bayesian_head_is_in_the_densities_and_rows_keep_their_order():
    data = tiny_reviews(30)
    model = lb.BayesianLoRA(tiny_bert(), lb.LoRAXS(2), head="bayesian", tokenizer=tiny_tokenizer())
    posterior = lb.fit(model, data, epochs=1, progress=False)
    pieces, draws = importance(posterior, data, draws=4, seed=5, batch_size=8), posterior.sample(4, seed=5)
    assert {"classifier.weight", "classifier.bias"} < set(draws)
    start = posterior.model.head_start["classifier.bias"]
    around = {"R": (0.0, 0.1), "classifier.weight": (0.0, posterior.model.head_scale)}
    around["classifier.bias"] = start, start.abs().clamp(min=1)
    normal = lambda name: torch.distributions.Normal(*around[name]).log_prob(draws[name]).flatten(1).sum(1)
    torch.testing.assert_close(pieces.log_prior.float(), sum(map(normal, draws)), rtol=1e-5, atol=1e-3)
    torch.testing.assert_close(pieces.log_q, posterior.log_prob(draws).double())
    log_probs = lb.predict(posterior, data, draws=4, seed=5, antithetic=False).logits.log_softmax(-1)
    expected = log_probs.gather(-1, torch.tensor(data["label"]).expand(4, -1).unsqueeze(-1)).squeeze(-1)
    torch.testing.assert_close(pieces.log_likelihood.float(), expected, atol=1e-5, rtol=1e-5)


def test_folded_draws_are_the_same_draws():
    model = lb.BayesianLoRA(tiny_bert(), lb.LoRAXS(2), head="frozen")
    posterior = lb.fit(model, token_batches(), epochs=1, progress=False)
    one, three = (importance(posterior, token_batches(), draws=7, fold=fold) for fold in (1, 3))
    torch.testing.assert_close(one.log_likelihood, three.log_likelihood, atol=1e-5, rtol=1e-5)
    assert one.log_likelihood.std(0).min() > 1e-4


@pytest.mark.parametrize("k", [0.2, 0.5, 0.9])
def test_k_hat_finds_the_shape_of_pareto_weights(k):
    uniform = np.random.default_rng(0).uniform(size=(1, 40_000))
    smoothed, found = psis(-k * np.log(uniform))
    assert found[0] == pytest.approx(k, abs=0.1)
    assert np.exp(smoothed).sum() == pytest.approx(1)


@settings(deadline=None, max_examples=25)
@given(seed=st.integers(0, 1000), shift=st.floats(-1e3, 1e3), draws=st.integers(2, 60))
def test_weights_are_normalised_and_a_constant_changes_nothing(seed, shift, draws):
    log_weights = np.random.default_rng(seed).normal(size=(3, draws))
    before = log_weights.copy()
    smoothed, k_hat = psis(log_weights)
    np.testing.assert_array_equal(log_weights, before)
    np.testing.assert_allclose(np.exp(smoothed).sum(1), 1)
    moved, moved_k = psis(log_weights + shift)
    np.testing.assert_allclose(moved, smoothed, atol=1e-7)
    np.testing.assert_allclose(moved_k, k_hat, atol=1e-5)
    assert np.isnan(k_hat).all() == (draws < 25)


def test_constant_weights_and_a_tied_tail():
    row = np.linspace(-1, 0, 100)
    tied = np.minimum(row, -0.5)
    smoothed, k_hat = psis(np.stack([0 * row, 1e-8 * row, tied]))
    np.testing.assert_array_equal(k_hat, [0, 0, np.nan])
    np.testing.assert_allclose(smoothed[0], -math.log(100))
    np.testing.assert_allclose(np.exp(smoothed[2]), np.exp(tied) / np.exp(tied).sum())


def test_one_unknown_k_hat_makes_their_share_unknown():
    log_likelihood = torch.zeros(100, 2).double()
    log_likelihood[50:, 1] = 1.0  # row 1's weights are tied, row 0's are not
    pieces = Importance(log_likelihood, torch.linspace(0, 1e-3, 100).double(), torch.zeros(100).double())
    tied = Importance(log_likelihood, log_likelihood[:, 1] * 0, torch.zeros(100).double())
    assert not pieces.loo.k_hat.isnan().any()
    assert math.isnan(tied.loo.share_above())
    assert tied.loo.note


def test_pictures_show_every_weight_and_every_row():
    weights = torch.randn(200, generator=torch.Generator().manual_seed(0)).double() * 2
    pieces = Importance(torch.zeros(200, 1).double(), weights, torch.zeros(200).double())
    (axes,) = weight_tail(pieces).axes
    drawn = {line.get_label(): line.get_ydata() for line in axes.lines}
    np.testing.assert_allclose(drawn["draws"], weights.softmax(0).sort(descending=True).values)
    assert list(drawn["equal weights"]) == [1 / 200] * 2
    line = next(line for line in axes.lines if line.get_label().startswith("Pareto"))
    slope = np.diff(np.log(line.get_ydata())) / np.diff(np.log(line.get_xdata()))
    np.testing.assert_allclose(slope, -pieces.k_hat)
    assert f"worth {pieces.effective_draws:.1f}" in axes.get_title()
    lone = Importance(torch.zeros(30, 1).double(), 5.0 * torch.arange(30).double(), torch.zeros(30).double())
    assert "draws (26 below 1e-08 left out)" in {line.get_label() for line in weight_tail(lone).axes[0].lines}
    loo = LOO(torch.zeros(5), torch.tensor([0.1, 0.9, 0.3, torch.nan, 0.7]), 100)
    (axes,) = loo_k_hat(loo).axes
    assert {line.get_label(): list(line.get_xdata()) for line in axes.lines[:2]} == {
        "reliable (2)": [0, 2], "above the limit (2)": [1, 4]
    }  # fmt: skip
    assert "unknown for 1 of 5 rows" in axes.get_title("left")
    for empty in (
        Importance(torch.zeros(1, 1), torch.zeros(1), torch.zeros(1)),
        Importance(torch.zeros(50, 1), *torch.zeros(2, 50)),
    ):
        for figure in (weight_tail(empty), loo_k_hat(empty.loo)):
            figure.canvas.draw()
