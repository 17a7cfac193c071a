"""A learned prior scale against the exact evidence, and what keeps it."""

import math

import pyro
import pytest
import torch
from conftest import GaussianNoise, LinearGaussian, label, tiny_bert, token_batches
from pyro.infer import SVI, Trace_ELBO
from pyro.infer.autoguide import AutoDelta, AutoLaplaceApproximation
from scipy import optimize
from test_model import GUIDES

import pyro_lrblora as lb
from pyro_lrblora.adapters.lora_xs import BoundLoRAXS
from pyro_lrblora.infer.elbo import PartedELBO, has_closed_form
from pyro_lrblora.posterior import local_parameters
from pyro_lrblora.priors import prior_variance

pytestmark = pytest.mark.filterwarnings("ignore::pyro_lrblora.ScalesNotConverged")


def fit(model, data=None, **options):
    return lb.fit(model, token_batches() if data is None else data, **({"epochs": 2, "progress": False} | options))


def tiny_model(prior, adapter=None, **options):
    return lb.BayesianLoRA(tiny_bert(), adapter or lb.LoRAXS(2), prior, **options)


class Evidence:
    """The exact log evidence of the linear-Gaussian problem as a function of the prior's scale, and its maximum."""

    def __init__(self, problem):
        (basis,) = problem.model.adapted.bases.values()
        x, labels = problem.batch["x"], problem.batch["labels"]
        self.jacobian = torch.einsum("mr,sn,bn->bmrs", basis.B, basis.A, x).reshape(-1, problem.size).double()
        self.residual = (labels - problem.model.network(x).detach()).reshape(-1).double()
        self.noise = torch.diag(problem.model.likelihood.sd.repeat(problem.rows).double() ** 2)
        self.clean = problem.model.network(x).detach()
        best = optimize.minimize_scalar(lambda log: -self(math.exp(log)), bounds=(-5, 3), method="bounded")
        self.scale = math.exp(best.x)

    def __call__(self, scale: float) -> float:
        marginal = self.jacobian @ self.jacobian.T * scale**2 + self.noise
        zero = torch.zeros_like(self.residual)
        return float(torch.distributions.MultivariateNormal(zero, marginal).log_prob(self.residual))


@pytest.fixture(scope="module")
def problem():
    return LinearGaussian(rank=3)


def exact_fit(problem, prior, **options):
    """With a guide that holds the exact posterior, at a scale or at any other."""
    guide, rates = lb.guides.LowRankPrecision(problem.size), lb.Rates(loc=0.02, scale=0.03, factor=0.05)
    settings = {"guide": guide, "rates": rates, "steps": 600, "clip": None} | options
    return fit(problem.model.with_prior(prior), [problem.batch], **settings)


def test_the_evidence_is_the_one_of_the_problem(problem):
    assert abs(Evidence(problem)(0.7) - problem.log_evidence) < 1e-3


@pytest.mark.parametrize("start", [0.1, 4.0])
@pytest.mark.parametrize("kl", ["closed", "mc"])
def test_learned_scale_maximises_the_exact_evidence(problem, start, kl):
    evidence = Evidence(problem)
    posterior = exact_fit(problem, lb.priors.Learned(lb.priors.Normal(start)), kl=kl)
    assert abs(float(posterior.model.learned_scale.current) / evidence.scale - 1) < 0.05
    assert posterior.settings["kl"] == kl
    variance = prior_variance(posterior.model.sample_prior, ["R"])["R"]
    torch.testing.assert_close(variance.mean().sqrt(), posterior.model.learned_scale.current)
    assert len(pyro.get_param_store()) == 0


def test_learned_scale_of_a_slab_maximises_its_evidence(problem):
    """A spike of nearly the slab's width is nearly a Normal, so that the evidence is known; the KL is Monte Carlo."""
    posterior = exact_fit(problem, lb.priors.Learned(lb.priors.SpikeSlab(0.2, spike=0.999)))
    assert abs(float(posterior.model.learned_scale.current) / Evidence(problem).scale - 1) < 0.05
    assert posterior.settings["kl"] == "mc"


def test_learned_median_of_layer_scales_is_where_the_bound_is_flat(problem):
    """E_q log Normal(log scale; m, spread) is greatest where m is the mean of q's log scales."""
    posterior = exact_fit(problem, lb.priors.Learned(lb.priors.LayerScale(0.05, spread=0.5)))
    found = float(posterior.model.learned_scale.current)
    assert found > 0.15
    assert abs(math.log(found) - float(posterior.sample(4000, seed=0)["R_scale"].log().mean())) < 0.05


def test_learned_scale_of_a_horseshoe_is_where_the_bound_is_flat(problem):
    """d/ds E_q log HalfCauchy(g; s) vanishes where E_q g^2 / (s^2 + g^2) is one half."""
    posterior = exact_fit(problem, lb.priors.Learned(lb.priors.Horseshoe(0.05)))
    found = float(posterior.model.learned_scale.current)
    assert found > 0.1
    squared = posterior.sample(4000, seed=0)["global_scale"].square()
    assert abs(float((squared / (found**2 + squared)).mean()) - 0.5) < 0.04


def test_a_scale_per_module_is_learned_for_each_module():
    """Two modules side by side, latents ten times apart: each scale is the one that its own evidence asks for."""
    problems = [LinearGaussian(rank=2, prior_scale=scale, seed=3) for scale in (0.2, 2.0)]

    class Two(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.second = (problem.model.network.layer for problem in problems)

        def forward(self, x, z):
            return torch.cat([self.first(x), self.second(z)], -1)

    bases = [next(iter(problem.model.adapted.bases.values())) for problem in problems]
    model = lb.BayesianLoRA(
        Two(),
        lb.LoRAXS(2, targets=["first", "second"]),
        lb.priors.Learned(lb.priors.Normal(0.5), per_module=True),
        GaussianNoise(torch.cat([problem.model.likelihood.sd for problem in problems])),
    )._copy(_adapted=BoundLoRAXS(dict(zip(["first", "second"], bases, strict=True))), prepared=True)
    batch = {"x": problems[0].batch["x"], "z": problems[1].batch["x"]}
    batch["labels"] = torch.cat([problem.batch["labels"] for problem in problems], -1)
    guide, rates = lb.guides.LowRankPrecision(8), lb.Rates(loc=0.02, scale=0.03, factor=0.05)
    posterior = fit(model, [batch], guide=guide, rates=rates, steps=600, clip=None)
    exact = torch.tensor([Evidence(problem).scale for problem in problems])
    assert exact[1] > 4 * exact[0]
    torch.testing.assert_close(posterior.model.learned_scale.current, exact, rtol=0.08, atol=0)


def test_a_fit_leaves_the_model_and_other_fits_alone():
    model = tiny_model(lb.priors.Learned(lb.priors.Normal(0.1))).prepare(token_batches())
    before = model.learned_scale.current.clone()
    first = fit(model, guide=lb.guides.Diagonal(), seed=0)
    fitted = first.model.learned_scale.current.clone()
    second, third = fit(model, guide=lb.guides.Diagonal(), seed=0), fit(model, guide=lb.guides.Diagonal(), seed=1)
    assert torch.equal(model.learned_scale.current, before)
    assert torch.equal(first.model.learned_scale.current, fitted)
    assert torch.equal(second.model.learned_scale.current, fitted)
    assert not torch.equal(third.model.learned_scale.current, fitted)
    assert not torch.equal(fitted, before)
    for copied in (first.model.with_head("frozen"), first.model.with_size(7), first.model.with_prior(model.prior)):
        assert torch.equal(copied.learned_scale.current, before)
    assert first.model.with_prior(lb.priors.Normal()).learned_scale is None
    assert len(pyro.get_param_store()) == 0


@pytest.mark.parametrize(
    "guide",
    [lb.guides.Delta(), AutoDelta, lb.guides.Dropout(0.2), lb.guides.Mixture(2, "delta"), AutoLaplaceApproximation],
    ids=label,
)
def test_a_point_guide_leaves_the_scale_at_its_start(guide):
    posterior = fit(tiny_model(lb.priors.Learned(lb.priors.Normal(0.1))), guide=guide, epochs=3)
    torch.testing.assert_close(posterior.model.learned_scale.current, torch.tensor(0.1))


def test_early_stopping_takes_the_scale_back_too():
    seen = []
    posterior = fit(
        tiny_model(lb.priors.Learned(lb.priors.Normal(0.1))),
        validation=token_batches(24, seed=5),
        guide=lb.guides.Diagonal(),
        epochs=12,
        patience=2,
        rates=lb.Rates(loc=0.2, scale=0.1, head=0.1),
        callbacks=[lambda row, p: seen.append((row["validation_nll"], p.model.learned_scale.current.clone()))],
    )
    best = min(seen, key=lambda pair: pair[0])[1]
    assert not torch.equal(seen[-1][1], best)
    assert torch.equal(posterior.model.learned_scale.current, best)


@pytest.mark.parametrize("per_module", [False, True])
def test_learned_scale_survives_the_file(per_module, tmp_path):
    posterior = fit(tiny_model(lb.priors.Learned(lb.priors.StudentT(0.1, df=5.0), per_module)), guide=GUIDES[1])
    posterior.save(tmp_path)
    loaded = lb.Posterior.load(tmp_path, tiny_bert())
    scale = posterior.model.learned_scale.current
    assert loaded.model.prior == posterior.model.prior
    assert torch.equal(loaded.model.learned_scale.current, scale)
    assert scale.shape == ((8,) if per_module else ())
    assert not torch.equal(scale, torch.full_like(scale, 0.1))
    assert len(pyro.get_param_store()) == 0


def test_svi_by_hand_trains_the_scale():
    model = tiny_model(lb.priors.Learned(lb.priors.Normal(0.1)), size=16)
    guide = lb.guides.Diagonal()(model)
    svi = SVI(model, guide, pyro.optim.Adam({"lr": 3e-2}), Trace_ELBO())
    for _ in range(5):
        svi.step(token_batches(16, 16)[0])
    assert abs(float(model.learned_scale.current) - 0.1) > 0.005


def test_per_module_scales_with_several_sites():
    """LoRA has a site for each factor and shape: every module of each has its own scale."""
    prior = lb.priors.Learned(lb.priors.Normal(0.3), per_module=True)
    model = tiny_model(prior, lb.LoRA(2, "all-linear"))
    shapes = model.sites.shapes
    count = sum(shape[0] for shape in shapes.values())
    model.learned_scale.log_scale.data.copy_(torch.arange(count).float().mul(0.1))
    variance, first = prior_variance(model.sample_prior, shapes), 0
    for name, shape in shapes.items():
        expected = torch.arange(first, first + shape[0]).float().mul(0.2).exp().reshape(-1, 1, 1).expand(shape)
        torch.testing.assert_close(variance[name], expected)
        first += shape[0]


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: lb.priors.Learned(lb.priors.Learned(lb.priors.Normal())), "which is learned"),
        (lambda: lb.priors.Learned(lambda shapes: {}), "a field `scale`"),
        (lambda: lb.priors.Learned(lb.priors.Normal), "a field `scale`"),
        (lambda: lb.priors.Learned(0.1), "a field `scale`"),
    ],
)
def test_learned_needs_a_prior_with_a_scale(make, message):
    with pytest.raises(TypeError, match=message):
        make()


@local_parameters
def test_the_kl_sends_a_gradient_to_the_scale(problem):
    """d KL / d log scale of a Normal prior is sum of 1 - (mean^2 + variance) / scale^2."""
    model = problem.model.with_prior(lb.priors.Learned(lb.priors.Normal(0.5)))
    guide = lb.guides.Diagonal()(model)
    assert has_closed_form(model, guide)
    PartedELBO(True, model.sites.shapes).differentiable_loss(model, guide, problem.batch).backward()
    q = guide.distribution()
    expected = (1 - (q.mean.square() + q.variance) / 0.5**2).sum()
    torch.testing.assert_close(model.learned_scale.log_scale.grad, expected.detach(), rtol=1e-4, atol=1e-4)


def test_a_reference_under_another_scale_is_refused(problem):
    """A copy learns its scale anew, so that a chain on a learned model would be under the prior it started at."""
    posterior = exact_fit(problem, lb.priors.Learned(lb.priors.Normal(0.1)), steps=60)
    scale = float(posterior.model.learned_scale.current)
    guide = lb.guides.FullRank()
    under = lambda prior: lb.Posterior(model := problem.model.with_prior(prior), guide(model), guide)
    with pytest.raises(
        ValueError, match=rf"got Normal\(scale={scale}\) and Normal\(scale=0.09.*with_prior\(Normal\(scale={scale}"
    ):
        lb.diagnostics.against_reference(posterior, under(lb.priors.Learned(lb.priors.Normal(0.1))), draws=8)
    with pytest.raises(ValueError, match="under the same prior"):
        lb.diagnostics.against_reference(posterior, under(lb.priors.StudentT(scale)), draws=8)
    lb.diagnostics.against_reference(posterior, under(lb.priors.Normal(scale)), draws=8)
    with pytest.raises(ValueError, match=r"Normal\(scale=0.1\) and Normal\(scale=0.2\)"):
        lb.diagnostics.against_reference(under(lb.priors.Normal(0.1)), under(lb.priors.Normal(0.2)), draws=8)


def test_laplace_with_a_free_covariance_under_a_learned_prior(problem):
    model = problem.model.with_prior(lb.priors.Learned(lb.priors.Normal(0.7)))
    found = lb.infer.laplace(model, [problem.batch], structure="full", epochs=1, progress=False)
    exact = torch.linalg.inv(problem.precision)
    torch.testing.assert_close(found.covariance().dense().double(), exact, rtol=0.02, atol=1e-4)
