"""The linearised predictive: exact on a linear network, against Monte Carlo and quadrature."""

import math

import pyro
import pytest
import torch
from conftest import LinearNetwork, label, tiny_bert, tiny_reviews, tiny_tokenizer, token_batches
from pyro.infer.autoguide import (
    AutoDiagonalNormal,
    AutoIAFNormal,
    AutoLowRankMultivariateNormal,
    AutoMultivariateNormal,
    AutoNormal,
)
from scipy.integrate import quad

import pyro_lrblora as lb
from pyro_lrblora.data import as_batches
from pyro_lrblora.linearised import draw_logits, logit_moments, probit_logits
from pyro_lrblora.predictive import predict_at

G = lb.guides
GAUSSIAN = [
    G.Diagonal(),
    G.LowRank(2),
    G.LowRankPrecision(2),
    G.BlockLowRank(2),
    G.BlockLowRank(2, "covariance"),
    G.FullRank(),
    G.FullRank(per_module=True),
    G.MatrixNormal(),
    G.RotatedDiagonal(),
    AutoNormal,
    AutoDiagonalNormal,
    AutoLowRankMultivariateNormal,
    AutoMultivariateNormal,
]


def linear_posterior(spec, classes=3, spread=0.5):
    """A posterior with arbitrary parameters over a network whose logits are linear in R, and three batches."""
    torch.manual_seed(0)
    adapter = lb.LoRAXS(2, lb.projections.Random(), "all-linear")
    model = lb.BayesianLoRA(LinearNetwork(classes, modules=2), adapter, lb.priors.Normal(1.0))
    x, labels = torch.randn(9, 7), torch.randint(classes, (9,))
    batches = [{"x": x[i : i + 4], "labels": labels[i : i + 4]} for i in (0, 4, 8)]
    fit = lb.fit(model, batches, guide=spec, steps=1, rates=lb.Rates(0, 0, 0, 0), progress=False)
    for parameter in fit.guide.parameters():
        parameter.data += spread * torch.randn(parameter.shape)
    return fit, batches


def exact_moments(posterior, batches):
    """Mean and covariance of the logits: W x + J m, J S J', with J written out and S dense."""
    network = posterior.model.network
    x = torch.cat([batch["x"] for batch in batches])
    bases = posterior.model.adapted.bases.values()
    columns = [
        torch.einsum("mr,sn,bn->bmrs", basis.B, basis.A, seen).flatten(2)
        for basis, seen in zip(bases, network.inputs(x), strict=True)
    ]
    jacobian = torch.cat(columns, dim=-1).double()
    loc = posterior.model.sites.join(posterior.mean()).double()
    matrix = posterior.covariance().dense().double()
    return network(x).detach().double() + jacobian @ loc, jacobian @ matrix @ jacobian.mT


@pytest.mark.parametrize("spec", GAUSSIAN, ids=label)
def test_moments_are_exact_on_a_linear_network(spec):
    posterior, batches = linear_posterior(spec)
    moments = logit_moments(posterior, as_batches(batches))
    for found, expected in zip(moments, exact_moments(posterior, batches), strict=True):
        torch.testing.assert_close(found.double(), expected, rtol=1e-4, atol=1e-5)
    assert moments[1].diagonal(dim1=-2, dim2=-1).min() > 0


@pytest.mark.parametrize("classes", [2, 3])
def test_probabilities_agree_with_monte_carlo(classes):
    """On a linear network draws of the latents and draws of the logits have one distribution."""
    posterior, batches = linear_posterior(G.LowRank(2), classes)
    draws = 20_000
    linearised = lb.predict(posterior, batches, method="linearised", draws=draws)
    assert linearised.logits.shape == (draws, 9, classes)
    latents = posterior.model.sites.split(posterior.guide.distribution().sample((draws,)))
    prediction = predict_at(posterior.model, as_batches(batches), latents, posterior.head(), fold=draws)
    error = (linearised.logits.softmax(-1).var(0) / draws + prediction.logits.softmax(-1).var(0) / draws).sqrt()
    assert ((linearised.probs - prediction.probs).abs() < 5 * error).all()
    at_mean = lb.predict(posterior, batches, at="mean")
    assert (at_mean.probs - prediction.probs).abs().max() > 0.02  # the covariance matters here
    probit = lb.predict(posterior, batches, method="probit")
    assert probit.logits.shape == (1, 9, classes)
    off = (probit.probs - prediction.probs).abs()
    assert off.mean() < 0.8 * (at_mean.probs - prediction.probs).abs().mean()
    assert classes > 2 or off.max() < 0.02


@pytest.mark.parametrize("mean", [-3.0, -0.5, 0.0, 1.0, 4.0])
@pytest.mark.parametrize("sd", [0.1, 1.0, 3.0, 8.0])
def test_probit_of_two_classes_is_close_to_the_integral(mean, sd):
    """The average of sigmoid(z), z being the difference of two correlated logits."""
    density = lambda z: math.exp(-0.5 * z * z) / math.sqrt(2 * math.pi) / (1 + math.exp(-(mean + sd * z)))
    exact = quad(density, -10, 10, limit=200)[0]
    common = 2.0  # moves both logits, and no probability
    covariance = torch.tensor([[[common, common], [common, common + sd**2]]])
    found = probit_logits(torch.tensor([[0.0, mean]]), covariance).softmax(-1)[0, 0, 1]
    assert abs(float(found) - exact) < 0.02


def test_drawn_logits_have_their_moments():
    root = torch.tensor([[1.0, 0.0, 0.0], [0.5, 0.2, 0.0], [-1.0, 0.3, 0.0]])  # singular
    mean, covariance = torch.tensor([[1.0, 2.0, 3.0], [0.0, 0.0, 0.0]]), torch.stack([root @ root.T, torch.zeros(3, 3)])
    draws = draw_logits(mean, covariance, 40_000, seed=1)
    assert torch.equal(draws, draw_logits(mean, covariance, 40_000, seed=1))
    torch.testing.assert_close(draws[:, 0].T.cov(), covariance[0], rtol=0.04, atol=0.02)
    torch.testing.assert_close(draws[:, 0].mean(0), mean[0], rtol=0.02, atol=0.02)
    torch.testing.assert_close(draws[:, 1], mean[1].expand(40_000, 3))


def test_rows_are_independent_of_their_batch_and_in_the_datas_order():
    """Sorted by length into batches of 5, against one row at a time."""
    model = lb.BayesianLoRA(tiny_bert(), lb.LoRAXS(2), lb.priors.Normal(0.3), tokenizer=tiny_tokenizer())
    data = tiny_reviews(13)
    posterior = lb.fit(model, data, epochs=2, progress=False)
    probit = lb.predict(posterior, data, method="probit", batch_size=5)
    assert probit.labels.tolist() == data["label"]
    lengths = [len(text.split()) for text in data["text"]]
    assert lengths != sorted(lengths)
    for row in range(13):
        alone = lb.predict(posterior, data.select([row]), method="probit")
        torch.testing.assert_close(probit.logits[:, row], alone.logits[:, 0], atol=1e-5, rtol=1e-4)
    mean, covariance = logit_moments(posterior, as_batches(data, tiny_tokenizer(), batch_size=5, by_length=True))
    torch.testing.assert_close(mean, lb.predict(posterior, data, at="mean").logits[0], atol=1e-5, rtol=1e-4)
    assert torch.linalg.eigvalsh(covariance).min() > -1e-5
    unlabelled = lb.predict(posterior, data.remove_columns("label"), method="linearised", draws=4)
    assert unlabelled.labels is None
    assert torch.equal(unlabelled.logits, lb.predict(posterior, data, method="linearised", draws=4).logits)
    other = lb.predict(posterior, data, method="linearised", draws=4, seed=1)
    assert not torch.equal(unlabelled.logits, other.logits)


@pytest.mark.parametrize("head", ["point", "bayesian", "frozen"])
def test_the_jacobian_of_a_transformer(head):
    """LoRA with both factors, against autograd's Jacobian of one row at a time; dropout off."""
    model = lb.BayesianLoRA(tiny_bert().train(), lb.LoRA(2, layers=[1]), lb.priors.Normal(0.3), head=head, dropout=True)
    posterior = lb.fit(model, token_batches(8), guide=G.LowRankPrecision(2), epochs=2, progress=False)
    batch = {name: value for name, value in token_batches(8)[0].items() if name != "labels"}
    mean, covariance = logit_moments(posterior, as_batches(token_batches(8)))
    values, sites = posterior.mean(), posterior.model.sites

    def logits(flat, row):
        alone = {name: value[row : row + 1] for name, value in batch.items()}
        with posterior.model.attached(dropout=False):
            return posterior.model.outputs(alone, values | sites.split(flat), posterior.head()).logits[0]

    at, matrix = sites.join(values), posterior.covariance().dense()
    for row in (0, 5):
        jacobian = torch.autograd.functional.jacobian(lambda flat, row=row: logits(flat, row), at)
        torch.testing.assert_close(covariance[row], jacobian @ matrix @ jacobian.T, rtol=1e-3, atol=1e-4)
        torch.testing.assert_close(mean[row], logits(at, row).detach(), rtol=1e-4, atol=1e-5)


def test_a_point_has_no_covariance():
    posterior, batches = linear_posterior(G.Delta())
    mean, covariance = logit_moments(posterior, as_batches(batches))
    assert torch.equal(covariance, torch.zeros(9, 3, 3))
    at_mean = lb.predict(posterior, batches, at="mean").logits
    for method in ("linearised", "probit"):
        logits = lb.predict(posterior, batches, method=method, draws=1).logits
        torch.testing.assert_close(logits, at_mean)


@pytest.mark.parametrize("spec", [G.Flow(), G.Mixture(2), G.Mixture(2, "delta"), G.Dropout(), AutoIAFNormal], ids=label)
@pytest.mark.parametrize("method", ["linearised", "probit"])
def test_only_gaussian_posteriors(spec, method):
    posterior, batches = linear_posterior(spec, spread=0.0)
    with pytest.raises(TypeError, match="expected a Gaussian guide .* got (.*Guide|AutoIAFNormal)"):
        lb.predict(posterior, batches, method=method)


@pytest.mark.parametrize("method", ["linearised", "probit"])
def test_a_network_in_double_precision(method):
    model = lb.BayesianLoRA(tiny_bert().double(), lb.LoRAXS(2))
    posterior = lb.fit(model, token_batches(8), guide=G.Diagonal(), steps=1, progress=False)
    assert lb.predict(posterior, token_batches(8), method=method, draws=4).probs.dtype == torch.float64


def test_labels_that_are_no_classes_are_refused():
    def numbers(outputs, batch):
        mean = lb.likelihoods.logits_of(outputs)[:, 0]
        pyro.sample("labels", pyro.distributions.Normal(mean, 1.0), obs=batch.get("labels"))

    data = [batch | {"labels": batch["labels"].float()} for batch in token_batches(8)]
    posterior = lb.fit(lb.BayesianLoRA(tiny_bert(), lb.LoRAXS(2), likelihood=numbers), data, steps=1, progress=False)
    with pytest.raises(TypeError, match="expected a likelihood of classes, one per logit, got Normal"):
        lb.predict(posterior, data, method="linearised")


def test_bad_arguments():
    posterior, batches = linear_posterior(G.Diagonal())
    for options in ({"method": "laplace"}, {"method": "linearised", "at": "mean"}, {"method": "probit", "at": "mean"}):
        with pytest.raises(ValueError, match="expected method to be one of"):
            lb.predict(posterior, batches, **options)


def test_probit_ignores_what_is_common_to_all_logits():
    torch.manual_seed(0)
    root = torch.randn(5, 3, 3)
    mean, covariance = torch.randn(5, 3), root @ root.mT
    common = torch.tensor(2.5) * torch.ones(3, 3)
    torch.testing.assert_close(
        probit_logits(mean, covariance).softmax(-1), probit_logits(mean + 1.0, covariance + common).softmax(-1)
    )
