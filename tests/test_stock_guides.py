"""Pyro's own autoguides from fit to ArviZ."""

from functools import partial

import pytest
import torch
from conftest import LinearGaussian, label, tiny_bert, token_batches
from pyro.distributions.transforms import affine_autoregressive, iterated
from pyro.infer.autoguide import AutoLaplaceApproximation, AutoNormal, AutoNormalizingFlow
from test_svi import STOCK, fit

import pyro_lrblora as lb

pytestmark = pytest.mark.filterwarnings("ignore::pyro_lrblora.ScalesNotConverged")


@pytest.mark.parametrize("guide", [*STOCK, AutoNormalizingFlow, AutoLaplaceApproximation], ids=label)
def test_stock_guides_through_fit_predict_compare_and_arviz(guide):
    if guide is AutoNormalizingFlow:
        guide = partial(AutoNormalizingFlow, init_transform_fn=partial(iterated, 1, affine_autoregressive))
    batches = token_batches()
    model = lb.BayesianLoRA(tiny_bert(), lb.LoRAXS(2)).prepare(batches)
    posterior = fit(model, guide=guide, epochs=20)
    assert lb.predict(posterior, batches, draws=3).logits.std(0).max() > 0
    table = lb.compare({"stock": posterior}, batches, draws=3)
    assert table.loc["stock", "NLL"] > 0
    assert posterior.to_arviz(batches, draws=5).posterior["R"].sizes["draw"] == 5


def test_pyros_laplace_is_the_exact_posterior_of_a_linear_gaussian_model():
    problem = LinearGaussian(rank=2)
    rates = lb.Rates(loc=0.02)
    posterior = fit(problem.model, [problem.batch], guide=AutoLaplaceApproximation, epochs=1500, rates=rates)
    normal = posterior.guide.get_posterior()
    sd = torch.linalg.inv(problem.precision).diagonal().sqrt()
    assert ((normal.mean.double() - problem.mean).abs() / sd).max() < 0.05
    torch.testing.assert_close(normal.precision_matrix.double(), problem.precision, rtol=1e-3, atol=1e-2)
    assert lb.diagnostics.training(posterior).log_joint  # the point's history is of no bound


@pytest.mark.parametrize("guide", STOCK[:3], ids=label)
def test_the_covariance_of_the_latents_beside_other_sites(guide):
    """A prior's own scales lie between the latents in a stock guide's flat vector; theirs is not the latents'."""
    problem = LinearGaussian(rank=2, modules=2)
    model = problem.model.with_prior(lb.priors.LayerScale(0.5))
    posterior = fit(model, problem.batches(8), guide=guide, epochs=1)
    for name, parameter in posterior.guide.named_parameters():
        parameter.data += 0.5 * torch.randn(parameter.shape) if "loc" not in name else 0
    drawn = posterior.model.sites.join(posterior.sample(4000, seed=0)).double()
    matrix = posterior.covariance().dense().double()
    sd = matrix.diagonal().sqrt()
    assert ((drawn.T.cov() - matrix) / sd.outer(sd)).abs().max() < 0.1
    torch.testing.assert_close(posterior.covariance().variance.double(), matrix.diagonal())


def test_a_partial_of_a_stock_class_starts_as_the_class_does():
    """At `init`, with the warm start's scale; what the partial names is the user's."""
    model = lb.BayesianLoRA(tiny_bert(), lb.LoRAXS(2)).prepare(token_batches())
    point = lb.fit(model, token_batches(), guide=lb.guides.Delta(), epochs=1, progress=False)
    options = {"init": point, "epochs": 1, "rates": lb.Rates(0, 0, 0, 0), "progress": False}
    of = lambda guide: lb.fit(model, token_batches(), guide=guide, **options)
    plain, named, wide = of(AutoNormal), of(partial(AutoNormal)), of(partial(AutoNormal, init_scale=3.0))
    for posterior in (plain, named, wide):
        torch.testing.assert_close(posterior.mean()["R"], point.mean()["R"])
    torch.testing.assert_close(named.covariance().variance, plain.covariance().variance)
    torch.testing.assert_close(wide.covariance().variance, torch.full_like(wide.covariance().variance, 9.0))


def test_the_seed_counts_under_a_prior_whose_median_is_drawn():
    model = lb.BayesianLoRA(tiny_bert(), lb.LoRAXS(2), lb.priors.RegularisedHorseshoe(0.1)).prepare(token_batches())
    first, same, other = (
        lb.fit(model, token_batches(), guide=AutoNormal, epochs=1, seed=seed, progress=False).mean()["R"]
        for seed in (0, 0, 1)
    )
    assert torch.equal(first, same)
    assert not torch.allclose(first, other, atol=1e-6)
