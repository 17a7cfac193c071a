"""The prior in label space: exact on a linear network, one function per draw, every head."""

import math

import pyro
import pytest
import torch
from conftest import LinearGaussian, token_batches
from test_learned_scale import Evidence, fit, tiny_model

import pyro_lrblora as lb

pytestmark = pytest.mark.filterwarnings("ignore::pyro_lrblora.ScalesNotConverged")


def test_prior_predictive_of_a_linear_network_is_exact():
    """Logits have the network's own as mean and J prior J' as covariance, within the error of 4000 draws."""
    problem = LinearGaussian(rank=3, rows=5)
    evidence = Evidence(problem)
    model = problem.model.with_prior(lb.priors.SpikeSlab(0.6, spike=0.5, share=0.25))
    logits = model.prior_predictive([{"x": problem.batch["x"]}], draws=4000).logits.double()
    assert logits.shape == (4000, 5, 6)
    flat = logits.flatten(1)
    covariance = evidence.jacobian @ evidence.jacobian.T * 0.6**2 * (0.25 + 0.75 * 0.5**2)
    sd = covariance.diagonal().sqrt()
    error = (flat.mean(0) - evidence.clean.reshape(-1).double()).abs() / (sd / 4000**0.5)
    assert error.max() < 4.5
    assert ((flat.T.cov() - covariance) / sd / sd[:, None]).abs().max() < 0.1


def test_prior_predictive_uses_the_same_functions_for_every_row():
    model = tiny_model(lb.priors.LayerScale(0.5))
    (rows,) = token_batches(40, 40)
    tens = [{name: value[i : i + 10] for name, value in rows.items()} for i in range(0, 40, 10)]
    whole, parts = (model.prior_predictive(data, draws=3, seed=2) for data in ([rows], tens))
    torch.testing.assert_close(whole.logits, parts.logits, atol=1e-5, rtol=1e-4)
    assert not torch.allclose(model.prior_predictive([rows], draws=3, seed=3).logits, whole.logits)
    unlabelled = [{name: value for name, value in rows.items() if name != "labels"}]
    assert torch.equal(model.prior_predictive(unlabelled, draws=3, seed=2).logits, whole.logits)
    assert model.prior_predictive(unlabelled, draws=3).labels is None
    with pytest.raises(ValueError, match="draws to be an integer >= 1"):
        model.prior_predictive([rows], draws=0)


@pytest.mark.parametrize("head", ["point", "bayesian", "frozen"])
def test_prior_predictive_with_each_head(head):
    """With latents next to zero all draws agree on the pretrained network, unless the head is drawn too."""
    model = tiny_model(lb.priors.Learned(lb.priors.Normal(1e-12)), head=head)
    state = torch.get_rng_state()
    logits = model.prior_predictive(token_batches(), draws=3).logits
    assert torch.equal(torch.get_rng_state(), state)
    assert len(pyro.get_param_store()) == 0
    same = torch.allclose(logits[0], logits[1])
    assert same == (head != "bayesian")
    if same:
        own = torch.cat([model.pretrained_outputs(b, model.head_start).logits for b in token_batches()]).detach()
        torch.testing.assert_close(logits[0], own)


def test_prior_predictive_sees_the_learned_scale():
    posterior = fit(tiny_model(lb.priors.Learned(lb.priors.Normal(0.1))), guide=lb.guides.Diagonal())
    spread = lambda: posterior.model.prior_predictive(token_batches(), draws=20).logits.var(0).mean()
    induced = posterior.model.induced_sd(draws=50)
    before = spread()
    posterior.model.learned_scale.log_scale.data.add_(math.log(3.0))
    assert spread() > 3 * before
    for name, value in posterior.model.induced_sd(draws=50).items():
        assert math.isclose(value, 3 * induced[name], rel_tol=1e-3)
