"""Everything a posterior made of stored draws must do."""

import json

import numpy as np
import pytest
import torch
from conftest import LinearGaussian, tiny_bert, tiny_reviews, tiny_tokenizer
from hypothesis import given, settings
from hypothesis import strategies as st

import pyro_lrblora as lb
from pyro_lrblora.infer.chains import posterior_of_chains

pytestmark = pytest.mark.filterwarnings("ignore::pyro_lrblora.ChainsNotConverged")


def stored(chains=2, draws=5):
    problem = LinearGaussian(2)
    values = torch.arange(chains * draws * 4.0).reshape(chains, draws, 1, 2, 2).square()
    return posterior_of_chains(problem.model, {"R": values}, [], {}), values.flatten(0, 1)


@given(st.integers(1, 4), st.integers(1, 30), st.integers(1, 60))
@settings(deadline=None, max_examples=60)
def test_draws_are_spread_evenly_and_without_replacement(chains, per_chain, wanted):
    guide = lb.guides.DrawsGuide({"R": torch.arange(chains * per_chain).reshape(chains, per_chain).double()})
    places = guide.spread(wanted)["R"]
    total = chains * per_chain
    counts = torch.bincount(places.long(), minlength=total)
    assert counts.sum() == wanted
    assert counts.max() - counts.min() <= 1
    gaps = places.diff()
    assert len(gaps) == 0 or gaps.max() - gaps.min() <= 1
    if wanted <= total and wanted % chains == 0:
        assert (counts.reshape(chains, -1).sum(1) == wanted // chains).all()


def test_mean_covariance_and_density_of_stored_draws():
    posterior, values = stored()
    torch.testing.assert_close(posterior.mean()["R"], values.mean(0))
    torch.testing.assert_close(posterior.covariance().dense(), values.flatten(1).T.cov())
    torch.testing.assert_close(posterior.covariance().variance, values.flatten(1).var(0))
    assert torch.equal(posterior.sample(10, seed=3)["R"], values)
    assert posterior.sample(3, seed=0)["R"].equal(posterior.sample(3, seed=1)["R"])
    assert posterior.parameter_counts()["posterior"] == 40
    assert not posterior.is_point
    with pytest.raises(TypeError, match="guide with a density"):
        posterior.log_prob(posterior.sample(2))
    with pytest.raises(ValueError, match="draws to be an integer >= 1"):
        posterior.sample(0)


def test_the_guide_takes_all_sites_from_the_same_draw():
    pairs = torch.arange(6.0).reshape(2, 3)
    guide = lb.guides.DrawsGuide({"a": pairs, "b.weight": -pairs})
    seen = {float(values["a"]) for values in (guide() for _ in range(100)) if values["a"] == -values["b.weight"]}
    assert seen == set(range(6))


@pytest.fixture(scope="module")
def sampled():
    """A short NUTS run with a Bayesian head and scales of the prior's own."""
    model = lb.BayesianLoRA(
        tiny_bert(), lb.LoRAXS(2, layers=[1]), lb.priors.LayerScale(0.1), head="bayesian", tokenizer=tiny_tokenizer()
    )
    return lb.infer.nuts(model, tiny_reviews(20), draws=6, warmup=4, max_tree_depth=3, progress=False)


def test_saved_draws_predict_bit_identically(sampled, tmp_path):
    sampled.save(tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["posterior.json", "posterior.safetensors"]
    loaded = lb.Posterior.load(tmp_path, tiny_bert(), tokenizer=tiny_tokenizer())
    for options in ({"draws": 3}, {"draws": 12}, {"at": "mean"}):
        expected, found = (lb.predict(p, tiny_reviews(), **options).logits for p in (sampled, loaded))
        assert torch.equal(expected, found)
    assert loaded.guide_spec == lb.guides.Draws(2, 6)
    assert loaded.guide.chains == 2
    card = json.loads((tmp_path / "posterior.json").read_text())
    assert card["settings"]["method"] == "nuts"
    assert {"r_hat", "ess", "divergences", "seconds"} <= set(card["settings"])
    assert len(card["history"]) == 2


def test_predictions_are_those_of_the_stored_draws(sampled):
    (batch,) = lb.Batches(tiny_reviews(9), tiny_tokenizer(), batch_size=9)
    logits = lb.predict(sampled, tiny_reviews(9), draws=12).logits
    values = {name: value.flatten(0, 1) for name, value in sampled.guide.by_chain().items()}
    with torch.no_grad():
        for place in (0, 7, 11):
            one = {name: value[place] for name, value in values.items()}
            expected = sampled.model.outputs(sampled.model.to_device(batch), one, {}).logits
            torch.testing.assert_close(logits[place], expected, atol=1e-5, rtol=1e-4)


def test_to_arviz_keeps_the_chains(sampled):
    data = sampled.to_arviz(tiny_reviews(9))
    r = data["posterior"]["R"]
    assert r.dims == ("chain", "draw", "module", "row", "col")
    np.testing.assert_array_equal(r.values, sampled.guide.by_chain()["R"].numpy())
    assert data["log_likelihood"]["labels"].shape == (2, 6, 9)
    assert data["posterior_predictive"]["labels"].shape == (2, 6, 9)
    prediction = lb.predict(sampled, tiny_reviews(9), draws=12)
    expected = prediction.logits.log_softmax(-1)[8, range(9), prediction.labels]
    np.testing.assert_allclose(data["log_likelihood"]["labels"].values[1, 2], expected.numpy(), atol=1e-6)
    fewer = sampled.to_arviz(draws=5)["posterior"]["R"]
    assert fewer.shape[:2] == (2, 2)
    np.testing.assert_array_equal(fewer.values, sampled.guide.by_chain()["R"][:, [1, 4]].numpy())
    assert sampled.to_arviz(draws=1000)["posterior"]["R"].shape[:2] == (2, 6)


def test_comparison_and_a_fit_from_the_draws(sampled):
    table = lb.compare({"NUTS": sampled}, tiny_reviews(9), draws=3)
    assert list(table.index) == ["NUTS", "NUTS, mean"]
    model = sampled.model.with_prior(lb.priors.Normal(0.1))
    fitted = lb.fit(model, tiny_reviews(20), guide=lb.guides.Delta(), init=sampled, epochs=1, progress=False,
                    rates=lb.Rates(loc=0.0, scale=0.0, factor=0.0, head=0.0))  # fmt: skip
    torch.testing.assert_close(fitted.mean()["R"], sampled.mean()["R"])
