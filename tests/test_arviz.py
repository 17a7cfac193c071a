"""Posteriors as ArviZ data, on whichever line of ArviZ is installed."""

import arviz as az
import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from conftest import tiny_bert, tiny_tokenizer, token_batches
from test_tasks import tiny_items, tiny_llama, tiny_t5, tiny_texts

import pyro_lrblora as lb
from pyro_lrblora.arviz_io import arviz_1, elpd_data, posterior_draws
from pyro_lrblora.arviz_plots import loo_pit_values
from pyro_lrblora.evidence import LOO, importance
from pyro_lrblora.networks import MeanPoolClassifier

pytestmark = pytest.mark.filterwarnings("ignore::pyro_lrblora.ScalesNotConverged")


def fit(adapter, prior=None, guide=None, **options):
    model = lb.BayesianLoRA(tiny_bert(), adapter, prior or lb.priors.Normal(0.1), **options)
    return lb.fit(model, token_batches(), guide=guide or lb.guides.LowRank(2), epochs=1, progress=False)


def groups(data):
    return {group.strip("/") for group in (data.groups if isinstance(data.groups, tuple) else data.groups())} - {""}


def test_groups_dims_and_values():
    posterior = fit(lb.LoRAXS(2), lb.priors.LayerScale(0.1))
    data = posterior.to_arviz(token_batches(), draws=7)
    assert groups(data) == {
        "posterior", "prior", "sample_stats", "posterior_predictive", "log_likelihood", "observed_data"
    }  # fmt: skip
    assert set(data["prior"]) == set(data["posterior"])  # a scale per module among them
    r = data["posterior"]["R"]
    assert r.dims == ("chain", "draw", "module", "row", "col")
    assert r.shape == (1, 7, 8, 2, 2)
    assert r.coords["module"].values.tolist() == list(posterior.model.modules)
    assert data["posterior"]["R_scale"].dims == ("chain", "draw", "module")
    draws = posterior.sample(7, seed=0)
    np.testing.assert_array_equal(r.values[0], draws["R"].numpy())
    np.testing.assert_allclose(data["sample_stats"]["log_q"].values[0], posterior.log_prob(draws).numpy(), rtol=1e-5)
    prediction = lb.predict(posterior, token_batches(), draws=7, antithetic=False)
    expected = -torch.nn.functional.cross_entropy(
        prediction.logits.flatten(0, 1), prediction.labels.repeat(7), reduction="none"
    ).reshape(7, 40)
    np.testing.assert_allclose(data["log_likelihood"]["labels"].values[0], expected.numpy(), rtol=1e-4, atol=1e-6)
    np.testing.assert_array_equal(data["observed_data"]["labels"].values, prediction.labels.numpy())
    assert set(np.unique(data["posterior_predictive"]["labels"].values)) <= {0, 1, 2}


@pytest.mark.parametrize("seed", [0, 3, -1])
def test_posterior_prior_and_labels_are_independent_noise(seed):
    """N = D = 64: with one stream for all, the latents' numbers would be the labels' too."""
    adapter, likelihood = lb.LoRAXS(4, targets=["query", "value"]), lb.likelihoods.Gaussian(1.0)
    model = lb.BayesianLoRA(tiny_bert(classes=1), adapter, likelihood=likelihood, size=64)
    assert model.sites.size == 64
    spec = lb.guides.Diagonal()
    posterior = lb.Posterior(model, spec(model), spec)
    rows = [{k: v for k, v in batch.items() if k != "labels"} for batch in token_batches(64)]
    data = posterior.to_arviz(rows, draws=50, seed=seed)
    draws = posterior.sample(50, seed=seed)
    np.testing.assert_array_equal(data["posterior"]["R"].values[0], draws["R"].numpy())
    prediction = lb.predict(posterior, rows, draws=50, seed=seed, antithetic=False)
    labels = data["posterior_predictive"]["labels"].values[0]
    noise = (labels - prediction.loc.numpy()) / prediction.scale.numpy()
    streams = [noise, *(data[group]["R"].values[0] for group in ("posterior", "prior"))]
    streams = [(each.reshape(50, 64) - each.mean()).ravel() / each.std() for each in streams]
    assert np.abs(np.corrcoef(streams) - np.eye(3)).max() < 5 / 3200**0.5
    again = posterior.to_arviz(rows, draws=50, seed=seed)
    np.testing.assert_array_equal(again["posterior_predictive"]["labels"].values[0], labels)


def test_without_data_and_without_labels():
    posterior = fit(lb.LoRAXS(2))
    assert groups(posterior.to_arviz(draws=3)) == {"posterior", "prior", "sample_stats"}
    unlabelled = [{k: v for k, v in batch.items() if k != "labels"} for batch in token_batches()]
    assert groups(posterior.to_arviz(unlabelled, draws=3)) == {
        "posterior", "prior", "sample_stats", "posterior_predictive"
    }  # fmt: skip


@pytest.mark.parametrize("network", [tiny_llama, tiny_t5])
def test_texts_are_scored_as_wholes_and_kept_as_tokens(network):
    network, tokenizer = network(), tiny_tokenizer()
    decoder = network if network.config.is_encoder_decoder else None
    texts = lb.data.Texts(tiny_texts(6), tokenizer, prompt="prompt", decoder=decoder, by_length=True, batch_size=4)
    model = lb.BayesianLoRA(network, lb.LoRAXS(2, targets="all-linear"), likelihood=lb.likelihoods.NextToken())
    posterior = lb.fit(model, texts, guide=lb.guides.Diagonal(), steps=2, progress=False)
    data = posterior.to_arviz(texts, draws=30)
    assert groups(data) == {"posterior", "prior", "sample_stats", "log_likelihood", "observed_data"}
    tokens = data["observed_data"]["tokens"]
    assert tokens.dims == ("observation", "token")
    for row, ids in zip(tiny_texts(6), tokens.values, strict=True):
        assert tokenizer.decode(ids[ids != -100]) == row["text"]
    scored = data["log_likelihood"]["text"]
    assert scored.dims == ("chain", "draw", "observation")
    prediction = lb.predict(posterior, texts, draws=30, antithetic=False)
    np.testing.assert_allclose(scored.values[0], prediction.token_log_probs.sum(-1).numpy(), rtol=1e-4)
    loo = az.loo(data)
    assert np.isfinite(float(loo.elpd_loo if hasattr(loo, "elpd_loo") else loo.elpd))


def test_choices_are_observations():
    items = lb.data.Choices(tiny_items(12), tiny_tokenizer(), batch_size=5, by_length=True)
    model = lb.BayesianLoRA(
        MeanPoolClassifier(tiny_bert().bert, 1), lb.LoRAXS(2), likelihood=lb.likelihoods.MultipleChoice()
    )
    posterior = lb.fit(model, items, guide=lb.guides.Diagonal(), steps=2, progress=False)
    data = posterior.to_arviz(items, draws=50)
    np.testing.assert_array_equal(data["observed_data"]["labels"].values, tiny_items(12)["label"])
    log_probs = lb.predict(posterior, items, draws=50, antithetic=False).logits.log_softmax(-1).numpy()
    right = log_probs[:, np.arange(12), tiny_items(12)["label"]]
    np.testing.assert_allclose(data["log_likelihood"]["labels"].values[0], right, rtol=1e-4)
    drawn = data["posterior_predictive"]["labels"]
    assert drawn.dims == ("chain", "draw", "observation")
    assert drawn.shape == (1, 50, 12)
    assert set(np.unique(drawn.values)) == {0, 1, 2}


def test_several_sites_and_a_bayesian_head():
    data = fit(lb.LoRA(2, "all-linear"), head="bayesian").to_arviz(draws=3)
    assert data["posterior"]["B_24"].dims == ("chain", "draw", "module_B_24", "row_B_24", "col_B_24")
    assert data["posterior"]["classifier.weight"].shape == (1, 3, 3, 16)


def test_a_guide_without_density_has_no_sample_stats():
    import pyro

    assert groups(fit(lb.LoRAXS(2), guide=pyro.infer.autoguide.AutoDelta).to_arviz(draws=2)) == {
        "posterior",
        "prior",
    }


def test_a_point_has_no_log_likelihood_to_leave_rows_out_of():
    found = groups(fit(lb.LoRAXS(2), guide=lb.guides.Delta()).to_arviz(token_batches(), draws=2))
    assert "log_likelihood" not in found
    assert "observed_data" in found


def test_arviz_reads_it(tmp_path):
    data = fit(lb.LoRAXS(2)).to_arviz(token_batches(), draws=50)
    loo = az.loo(data)
    assert np.isfinite(float(loo.elpd_loo if hasattr(loo, "elpd_loo") else loo.elpd))
    data.to_netcdf(tmp_path / "draws.nc")
    assert (tmp_path / "draws.nc").stat().st_size > 0


def test_leave_one_out_densities_as_arviz_has_them():
    elpd, k_hat = np.random.default_rng(0).normal(-1, 0.3, 30), np.linspace(-0.1, 0.65, 30)
    loo = lambda elpd, draws: LOO(torch.as_tensor(elpd), torch.as_tensor(k_hat), draws)
    data, worse = elpd_data(loo(elpd, 50)), elpd_data(loo(elpd - 0.1, 50))
    total = data.elpd if arviz_1() else data.elpd_loo
    assert total == pytest.approx(elpd.sum())
    assert data.se == pytest.approx(30**0.5 * elpd.std())
    assert data.good_k == pytest.approx(1 - 1 / np.log10(50))
    assert data.warning  # 0.65 is too much for 50 draws
    assert not elpd_data(loo(elpd, 5000)).warning
    np.testing.assert_array_equal(data.pareto_k.values, k_hat)
    table = az.compare({"worse": worse, "better": data})
    assert table.index.tolist() == ["better", "worse"]
    assert abs(table.loc["worse", "elpd_diff"]) == pytest.approx(3.0, abs=0.01)
    assert "30 observations" in str(data)
    assert "50 posterior samples" in str(data)


def test_draws_of_chains_stay_in_their_chains():
    kept = torch.arange(3 * 10.0).reshape(3, 10, 1, 1, 1) * torch.ones(3, 10, 8, 2, 2)
    model = lb.BayesianLoRA(tiny_bert(), lb.LoRAXS(2), size=40)
    posterior = lb.Posterior(model, lb.guides.draws.DrawsGuide({"R": kept}), lb.guides.draws.Draws(3, 10))
    draws, chains = posterior_draws(posterior, 17)
    assert chains == 3
    assert (draws["R"][:, 0, 0, 0] // 10).tolist() == [0.0] * 5 + [1.0] * 5 + [2.0] * 5
    assert posterior_draws(fit(lb.LoRAXS(2)))[1] == 1


def mistaken(outputs, batch):
    """Labels of three classes, a third of them at random."""
    probs = 0.7 * lb.likelihoods.logits_of(outputs).softmax(-1) + 0.1
    pyro.sample("labels", dist.Categorical(probs=probs), obs=batch.get("labels"))


def test_the_log_likelihood_is_that_of_the_likelihood_that_was_fitted():
    """Not of the classes that predict shows: LOO from ArviZ's data and from evidence are of one density."""
    posterior = fit(lb.LoRAXS(2), likelihood=mistaken)
    prediction = lb.predict(posterior, token_batches(), draws=20, antithetic=False)
    shown = prediction.logits.softmax(-1).gather(-1, prediction.labels.expand(20, -1)[..., None])[..., 0]
    expected = (0.7 * shown + 0.1).log()
    torch.testing.assert_close(prediction.log_likelihood, expected)
    found = posterior.to_arviz(token_batches(), draws=20)["log_likelihood"]["labels"].values[0]
    np.testing.assert_allclose(found, expected.numpy(), rtol=1e-5)
    np.testing.assert_allclose(
        importance(posterior, token_batches(), draws=20, progress=False).log_likelihood, expected.double(), rtol=1e-5
    )
    with pytest.raises(TypeError, match="probabilities of the classes that predict shows"):
        loo_pit_values(posterior, token_batches(), draws=20)


def test_the_epoch_that_is_kept_is_chosen_by_the_likelihood_that_is_fitted():
    validation = token_batches(seed=1)
    model = lb.BayesianLoRA(tiny_bert(), lb.LoRAXS(2), likelihood=mistaken)
    posterior = lb.fit(model, token_batches(), validation=validation, guide=lb.guides.Delta(), epochs=1, progress=False)
    prediction = lb.predict(posterior, validation, draws=1)
    shown = prediction.probs.gather(-1, prediction.labels[:, None])
    found = posterior.history[-1]["validation_nll"]
    assert found == pytest.approx(-float((0.7 * shown + 0.1).log().mean()), rel=1e-5)
    assert found != pytest.approx(prediction.nll, rel=1e-3)
