"""Every prior against its density, its moments and its errors; a learned scale against the exact evidence."""

import math

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from conftest import label, tiny_bert, token_batches
from hypothesis import given, settings
from hypothesis import strategies as st
from pyro import poutine
from pyro.infer.autoguide import AutoNormal
from scipy import stats
from test_model import PRIORS

import pyro_lrblora as lb
from pyro_lrblora.adapters.targets import base_weight
from pyro_lrblora.guides.stock import build_guide
from pyro_lrblora.infer.chains import starting_point
from pyro_lrblora.priors import prior_variance
from pyro_lrblora.priors.variance import prior_covariance

pytestmark = pytest.mark.filterwarnings("ignore::pyro_lrblora.ScalesNotConverged")

SHAPES = {"R": torch.Size([3, 4, 4])}
PER_MODULE = lb.priors.Normal((0.1, 0.2, 0.4))


def log_density(prior, values, shapes=SHAPES) -> float:
    trace = poutine.trace(poutine.condition(prior, values)).get_trace(shapes)
    return float(trace.log_prob_sum())


def latents(scale=0.1, shape=SHAPES["R"]):
    return scale * torch.randn(shape, generator=torch.Generator().manual_seed(1))


def fit(model, data=None, **options):
    return lb.fit(model, token_batches() if data is None else data, **({"epochs": 2, "progress": False} | options))


def tiny_model(prior, adapter=None, **options):
    return lb.BayesianLoRA(tiny_bert(), adapter or lb.LoRAXS(2), prior, **options)


@pytest.mark.parametrize(
    ("prior", "reference"),
    [
        (lb.priors.Normal(0.3), stats.norm(0, 0.3)),
        (lb.priors.Laplace(0.3), stats.laplace(0, 0.3)),
        (lb.priors.StudentT(0.3, df=3.0), stats.t(3.0, 0, 0.3)),
    ],
    ids=["Normal", "Laplace", "StudentT"],
)
def test_independent_density(prior, reference):
    values = latents(0.5)
    assert math.isclose(log_density(prior, {"R": values}), reference.logpdf(values.numpy()).sum(), rel_tol=1e-4)


def test_normal_with_a_scale_per_module():
    values = latents(0.5)
    expected = sum(stats.norm(0, sd).logpdf(values[i].numpy()).sum() for i, sd in enumerate((0.1, 0.2, 0.4)))
    assert math.isclose(log_density(PER_MODULE, {"R": values}), expected, rel_tol=1e-4)
    assert lb.priors.Normal([0.1, 0.2, 0.4]) == PER_MODULE
    assert hash(lb.priors.Normal(torch.tensor([0.5, 0.25]))) == hash(lb.priors.Normal((0.5, 0.25)))


@given(share=st.floats(0.01, 0.99), spike=st.floats(1e-3, 0.9), scale=st.floats(1e-2, 10), seed=st.integers(0, 99))
@settings(max_examples=40, deadline=None)
def test_spike_and_slab_density_and_variance(share, spike, scale, seed):
    prior = lb.priors.SpikeSlab(scale, spike=spike, share=share)
    values = scale * torch.randn(2, 3, 3, generator=torch.Generator().manual_seed(seed))
    x, shapes = values.double().numpy(), {"R": values.shape}
    density = share * stats.norm.pdf(x, 0, scale) + (1 - share) * stats.norm.pdf(x, 0, spike * scale)
    expected = np.log(density).sum()
    assert math.isclose(log_density(prior, {"R": values}, shapes), expected, rel_tol=1e-3, abs_tol=2e-3)
    variance = prior_variance(lambda: prior(shapes), shapes)["R"]
    truth = torch.full(values.shape, scale**2 * (share + (1 - share) * spike**2))
    torch.testing.assert_close(variance, truth, rtol=1e-4, atol=0)


def test_spike_and_slab_draws_have_both_parts():
    draw = lb.priors.SpikeSlab(1.0, spike=0.001, share=0.3)({"R": torch.Size([50, 20, 20])})["R"]
    assert abs(float((draw.abs() > 0.01).float().mean()) - 0.3 * 0.992) < 0.02
    assert draw.shape == (50, 20, 20)


def test_horseshoe_density():
    values, local = latents(), latents(1.0).abs() + 0.1
    given_all = {"R": values, "R_local_scale": local, "global_scale": torch.tensor(0.2)}
    expected = stats.halfcauchy(0, 0.1).logpdf(0.2) + stats.halfcauchy().logpdf(local.numpy()).sum()
    expected += stats.norm(0, 0.2 * local.numpy()).logpdf(values.numpy()).sum()
    assert math.isclose(log_density(lb.priors.Horseshoe(0.1), given_all), expected, rel_tol=1e-4)


def test_regularised_horseshoe_density():
    """Piironen & Vehtari 2017, equation 2.8, by hand."""
    prior = lb.priors.RegularisedHorseshoe(0.1, slab=2.0, df=3.0)
    values, local = latents(), latents(1.0).abs() + 0.1
    given_all = {"R": values, "R_local_scale": local}
    given_all |= {"global_scale": torch.tensor(0.2), "slab_variance": torch.tensor(1.5)}
    squared = local.double().numpy() ** 2
    sd = 0.2 * (1.5 * squared / (1.5 + 0.2**2 * squared)) ** 0.5
    expected = stats.halfcauchy(0, 0.1).logpdf(0.2) + stats.halfcauchy().logpdf(local.numpy()).sum()
    expected += stats.invgamma(3.0 / 2, scale=3.0 * 2.0**2 / 2).logpdf(1.5) + stats.norm(0, sd).logpdf(values).sum()
    assert math.isclose(log_density(prior, given_all), expected, rel_tol=1e-4)


def test_slab_bounds_what_the_horseshoe_leaves_free():
    """With scales so large that their square overflows, a latent's sd is the slab's; far below it, the horseshoe's."""
    wide, narrow = torch.full(SHAPES["R"], 1e30), torch.full(SHAPES["R"], 1e-3)
    for local, sd in ((wide, 1.5**0.5), (narrow, 2e-4)):
        sites = {"R_local_scale": local, "global_scale": torch.tensor(0.2), "slab_variance": torch.tensor(1.5)}
        trace = poutine.trace(poutine.condition(lb.priors.RegularisedHorseshoe(), sites)).get_trace(SHAPES)
        torch.testing.assert_close(trace.nodes["R"]["fn"].stddev, torch.full(SHAPES["R"], sd))


def test_layer_scale_density():
    values, scales = latents(), torch.tensor([0.05, 0.1, 0.3])
    expected = stats.lognorm(0.7, scale=0.2).logpdf(scales.numpy()).sum()
    expected += stats.norm(0, scales[:, None, None].numpy()).logpdf(values.numpy()).sum()
    found = log_density(lb.priors.LayerScale(0.2, spread=0.7), {"R": values, "R_scale": scales})
    assert math.isclose(found, expected, rel_tol=1e-4)


@given(rows=st.integers(1, 4), columns=st.integers(1, 5), data=st.data())
@settings(max_examples=40, deadline=None)
def test_matrix_normal_density(rows, columns, data):
    lowest = lambda size: -0.9 / (size - 1) if size > 1 else -0.9
    row = data.draw(st.floats(lowest(rows), 0.9))
    column = data.draw(st.floats(lowest(columns), 0.9))
    shape = torch.Size([2, rows, columns])
    values = latents(0.5, shape)
    covariance = lambda size, r: (1 - r) * torch.eye(size).double().numpy() + r
    reference = stats.matrix_normal(
        torch.zeros(rows, columns).numpy(), 0.3**2 * covariance(rows, row), covariance(columns, column)
    )
    prior = lb.priors.MatrixNormal(0.3, row, column)
    expected = reference.logpdf(values.double().numpy()).sum()
    assert math.isclose(log_density(prior, {"R": values}, {"R": shape}), expected, rel_tol=1e-3, abs_tol=1e-3)


def test_matrix_normal_draws_are_correlated_within_a_module_only():
    prior = lb.priors.MatrixNormal(2.0, row_correlation=0.8, column_correlation=-0.3)
    draw = prior({"R": torch.Size([20000, 2, 3])})["R"]
    correlation = torch.corrcoef(draw.flatten(1).T)
    rows = torch.tensor([[1.0, 0.8], [0.8, 1.0]])
    columns = torch.full((3, 3), -0.3).fill_diagonal_(1.0)
    torch.testing.assert_close(correlation, torch.kron(rows, columns), atol=0.03, rtol=0)
    assert abs(float(draw.std()) - 2.0) < 0.03
    assert abs(float(torch.corrcoef(draw[:, 0, 0].reshape(2, -1))[0, 1])) < 0.04


def gamma_prior(shapes):
    """A user's own scales, of a distribution without an inverse cdf."""
    modules = next(iter(shapes.values()))[0]
    scale = pyro.sample("scale", dist.Gamma(2.0, 20.0).expand((modules, 1, 1)).to_event())
    return {name: pyro.sample(name, dist.Normal(0.0, scale).expand(shape).to_event()) for name, shape in shapes.items()}


def cauchy_prior(shapes):
    cauchy = dist.Cauchy(0.0, 0.1)
    return {name: pyro.sample(name, cauchy.expand(shape).to_event()) for name, shape in shapes.items()}


SLAB = stats.invgamma(2.0, scale=2.0).median()


@pytest.mark.parametrize(
    ("prior", "sd", "tolerance"),
    [
        (lb.priors.LayerScale(0.1, 1.0), 0.1, 1e-5),
        (lb.priors.Learned(lb.priors.LayerScale(0.1), per_module=True), 0.1, 1e-5),
        (lb.priors.Horseshoe(0.1), 0.1, 1e-5),
        (lb.priors.RegularisedHorseshoe(0.1), (SLAB * 0.01 / (SLAB + 0.01)) ** 0.5, 1e-3),
        (gamma_prior, stats.gamma(2.0, scale=1 / 20).median(), 0.05),
        (cauchy_prior, 0.1 / 0.6745, 0.15),
    ],
    ids=label,
)
def test_prior_sd_at_the_median_of_the_scales(prior, sd, tolerance):
    """The same for every latent and in every call, wherever torch's own generator is, which stays there."""
    seen = []
    for seed in (0, 1):
        torch.manual_seed(seed)
        before = torch.get_rng_state()
        seen.append(prior_variance(lambda: prior(SHAPES), ["R"])["R"].sqrt())
        assert torch.equal(torch.get_rng_state(), before)
    torch.testing.assert_close(seen[0], torch.full(SHAPES["R"], float(sd)), rtol=tolerance, atol=0)
    assert torch.equal(*seen)


@pytest.mark.parametrize("prior", [lb.priors.LayerScale(0.1), gamma_prior], ids=label)
@pytest.mark.parametrize("kind", ["library guide", "Pyro guide", "chain"])
def test_scales_of_a_prior_begin_at_their_median(prior, kind):
    model = tiny_model(prior).prepare(token_batches())
    if kind == "chain":
        values = starting_point(model.with_head("bayesian"), None)
    else:
        values = build_guide(lb.guides.Diagonal() if kind == "library guide" else AutoNormal, model)
        values = (values.extra if kind == "library guide" else values).median()
    (found,) = (value for name, value in values.items() if "scale" in name)
    expected = 0.1 if prior != gamma_prior else stats.gamma(2.0, scale=1 / 20).median()
    torch.testing.assert_close(found, torch.full_like(found, expected), rtol=0.05, atol=0)


def row_normal(shapes):
    """Rows of correlated entries, as torch has them: what MatrixNormal(0.2, 0.0, 0.6) is."""
    family = lambda size: dist.MultivariateNormal(torch.zeros(size), 0.04 * (0.4 * torch.eye(size) + 0.6))
    return {name: pyro.sample(name, family(shape[-1]).expand(shape[:-1]).to_event(2)) for name, shape in shapes.items()}


def test_prior_covariance_is_that_of_the_draws():
    shapes = {"R": torch.Size([2, 3, 2])}
    equal = lambda size, r: (1 - r) * torch.eye(size).double() + r
    covariance = lambda prior: prior_covariance(lambda: prior(shapes), shapes)["R"]
    found = covariance(lb.priors.MatrixNormal(0.2, 0.3, 0.6))
    truth = 0.04 * torch.kron(equal(3, 0.3), equal(2, 0.6))
    torch.testing.assert_close(found, truth.expand(2, 6, 6), rtol=1e-5, atol=1e-8)
    torch.testing.assert_close(covariance(row_normal), 0.04 * equal(2, 0.6).expand(6, 2, 2), rtol=1e-5, atol=1e-8)
    strong = torch.linalg.eigvalsh(covariance(lb.priors.MatrixNormal(1.0, 0.999, 0.8)))[0, 0]
    assert float(strong) == pytest.approx(0.001 * 0.2, rel=1e-2)
    for prior in (lb.priors.Normal(0.3), lb.priors.LayerScale(0.1), cauchy_prior):
        variance = prior_variance(lambda prior=prior: prior(shapes), shapes)["R"]
        torch.testing.assert_close(covariance(prior), variance.double().reshape(12, 1, 1))


def test_singular_values_follow_the_pretrained_weight():
    """With the SVD projection the sd of R_ij is proportional to sqrt(s_i s_j), root mean square `scale`."""
    model = tiny_model(lb.priors.Normal(), lb.LoRAXS(3, lb.projections.SVD(exact=True)))
    prior = lb.priors.SingularValues.of(model, scale=0.2)
    variance = prior_variance(lambda: prior(model.sites.shapes), ["R"])["R"]
    for module, found in zip(model.modules.values(), variance, strict=True):
        values = torch.linalg.svdvals(base_weight(module).detach())[:3]
        outer = values[:, None] * values
        torch.testing.assert_close(found, 0.2**2 * outer / outer.mean(), rtol=1e-4, atol=0)


def test_singular_values_tell_rows_from_columns():
    """R_ij multiplies b_i a_j': its row follows b_i' W0, its column W0 a_j'; the papers' scaled A changes nothing."""
    model = tiny_model(lb.priors.Normal(), lb.LoRAXS(3, lb.projections.Random(), targets=["intermediate.dense"]))
    variance = prior_variance(lambda: lb.priors.SingularValues.of(model, 0.2)(model.sites.shapes), ["R"])["R"]
    for name, found in zip(model.modules, variance, strict=True):
        basis, weight = model.adapted.bases[name], base_weight(model.modules[name]).detach()
        for i in range(3):
            for j in range(3):
                rows, columns = (basis.B[:, i] @ weight).norm(), (weight @ basis.A[j]).norm()
                first = (basis.B[:, 0] @ weight).norm(), (weight @ basis.A[0]).norm()
                ratio = rows * columns / (first[0] * first[1])
                torch.testing.assert_close(found[i, j] / found[0, 0], ratio, rtol=1e-4, atol=0)
    plain, absorbed = (
        lb.priors.SingularValues.of(
            tiny_model(lb.priors.Normal(), lb.LoRAXS(2, lb.projections.SVD(exact=True, absorb_singular_values=absorb)))
        )
        for absorb in (False, True)
    )
    flat = lambda profile: torch.tensor([pair for _, modules in profile for pair in modules])
    torch.testing.assert_close(flat(plain.profile), flat(absorbed.profile), rtol=1e-4, atol=1e-5)


def test_singular_values_and_scales_per_module_survive_the_file(tmp_path):
    model = tiny_model(lb.priors.Normal(), lb.LoRAXS(2, targets=["query"])).prepare(token_batches())
    learned = lb.priors.Learned(lb.priors.SingularValues.of(model), per_module=True)
    for prior in (lb.priors.SingularValues.of(model), lb.priors.Normal((0.1, 0.3)), learned):
        posterior = fit(model.with_prior(prior), guide=lb.guides.Diagonal())
        posterior.save(tmp_path)
        loaded = lb.Posterior.load(tmp_path, tiny_bert())
        assert loaded.model.prior == prior
        expected, found = (prior_variance(p.model.sample_prior, ["R"])["R"] for p in (posterior, loaded))
        assert torch.equal(expected, found)


def test_singular_values_of_another_adapter_or_subspace():
    with pytest.raises(ValueError, match="expected a model with LoRAXS"):
        lb.priors.SingularValues.of(tiny_model(lb.priors.Normal(), lb.LoRA(2)))
    with pytest.raises(ValueError, match=r"model\.prepare"):
        lb.priors.SingularValues.of(tiny_model(lb.priors.Normal(), lb.LoRAXS(2, lb.projections.Gradient())))
    with pytest.raises(ValueError, match=r"SingularValues\.of\(model\)"):
        lb.priors.SingularValues(0.1)
    prior = lb.priors.SingularValues.of(tiny_model(lb.priors.Normal()))
    with pytest.raises(ValueError, match="got one of another subspace"):
        tiny_model(prior, lb.LoRAXS(3)).sample_prior()
    network = tiny_bert()
    network.bert.encoder.layer[0].attention.self.query.weight.data.zero_()
    with pytest.raises(ValueError, match="weight is zero"):
        lb.priors.SingularValues.of(lb.BayesianLoRA(network, lb.LoRAXS(2)))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: lb.priors.Learned(lb.priors.Horseshoe(), per_module=True), "one global scale"),
        (lambda: lb.priors.Learned(lb.priors.Normal((0.1, 0.2))), "write per_module=True"),
        (lambda: lb.priors.SpikeSlab(0.1, spike=1.5), "expected 0 < spike < 1"),
        (lambda: lb.priors.SpikeSlab(0.1, share=0.0), "expected 0 < share < 1"),
        (lambda: lb.priors.RegularisedHorseshoe(0.1, slab=-1.0), "expected slab > 0"),
        (lambda: lb.priors.RegularisedHorseshoe(0.1, df=0.0), "expected df > 0"),
        (lambda: lb.priors.MatrixNormal(0.1, row_correlation=1.0), "expected -1 < row_correlation < 1"),
        (lambda: lb.priors.MatrixNormal(0.1, column_correlation=float("nan")), "expected -1 < column_correlation"),
        (lambda: lb.priors.MatrixNormal(0.1, column_correlation=-0.4)(SHAPES), "expected column_correlation > -0.3333"),
        (lambda: lb.priors.MatrixNormal(0.1)({"b": torch.Size([3])}), "modules, rows, columns"),
        (lambda: lb.priors.Normal((0.1, -0.2, 0.3)), "expected scale > 0"),
        (lambda: lb.priors.Normal(()), "expected scale > 0"),
        (lambda: lb.priors.Normal((0.1, 0.2))(SHAPES), "each of the 3 modules of site 'R', got 2"),
        (
            lambda: tiny_model(lb.priors.Learned(lb.priors.Normal((0.1, 0.2)), per_module=True)).learned_scale,
            "each of the 8 modules of site 'R', got 2",
        ),
    ],
)
def test_bad_arguments(make, message):
    with pytest.raises(ValueError, match=message):
        make()


@pytest.mark.parametrize("prior", [*PRIORS, PER_MODULE], ids=label)
def test_a_stock_guide_fits_every_prior(prior):
    three = lb.LoRAXS(2, targets=["query", "key", "value"], layers=[0])
    posterior = fit(tiny_model(prior, three), guide=AutoNormal)
    assert all(math.isfinite(row["elbo"]) for row in posterior.history)
    assert all(value.isfinite().all() for value in posterior.sample(2, seed=0).values())
    assert lb.predict(posterior, token_batches(), draws=2).probs.isfinite().all()
