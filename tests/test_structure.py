"""The structure of a posterior against dense matrices, exact posteriors and closed forms."""

from importlib import import_module
from types import SimpleNamespace

import numpy as np
import pyro
import pytest
import torch
from conftest import LinearGaussian, tiny_bert, token_batches
from test_evidence import exact
from torch.distributions import MultivariateNormal, kl_divergence
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from truth import posterior_at

import pyro_lrblora as lb
from pyro_lrblora.diagnostics.reference import against_reference
from pyro_lrblora.diagnostics.spectra import effective_rank, eigenvalues, from_draws
from pyro_lrblora.diagnostics.structure import structure
from pyro_lrblora.evidence import importance
from pyro_lrblora.guides.draws import Draws, DrawsGuide
from pyro_lrblora.guides.ensemble import Ensemble, EnsembleGuide


@pytest.fixture(scope="module")
def problem():
    return LinearGaussian(rank=3, modules=2)


def drawn_exactly(problem, draws=4000):
    """Stored draws of the exact posterior, as a converged chain leaves them."""
    torch.manual_seed(5)
    draws_ = MultivariateNormal(problem.mean, precision_matrix=problem.precision).sample((1, draws)).float()
    guide = DrawsGuide(problem.model.sites.split(draws_))
    return lb.Posterior(problem.model, guide, Draws(1, draws))


def test_the_spectrum_is_that_of_the_exact_covariance(problem):
    found, covariance = structure(exact(problem)), problem.precision.inverse()
    values = torch.linalg.eigvalsh(covariance).flip(0)
    assert found.exact
    np.testing.assert_allclose(found.eigenvalues, values, rtol=1e-3)
    np.testing.assert_allclose(found.whitened, values / 0.7**2, rtol=1e-3)
    assert found.effective_rank == pytest.approx(float(values.sum() ** 2 / values.square().sum()), rel=1e-3)
    assert found.share(2) == pytest.approx(float(values[:2].sum() / values.sum()), rel=1e-3)


def test_kl_per_module_and_in_all_are_those_of_the_marginals(problem):
    found, covariance = structure(exact(problem)), problem.precision.inverse()
    kl = lambda rows: float(
        kl_divergence(
            MultivariateNormal(problem.mean[rows], covariance[rows, rows]),
            MultivariateNormal(torch.zeros(9 if rows.stop else 18).double(), 0.49 * torch.eye(9 if rows.stop else 18)),
        )
    )
    first, second, joint = kl(slice(0, 9)), kl(slice(9, 18)), kl(slice(0, None))
    np.testing.assert_allclose(found.modules["KL (nats)"], [first, second], rtol=1e-3)
    assert found.kl == pytest.approx(joint, rel=1e-3)
    assert found.dependence == pytest.approx(joint - first - second, rel=1e-2)


@pytest.mark.parametrize(
    ("prior", "head", "reason"),
    [
        (lb.priors.Normal(0.1), "point", None),
        (lb.priors.Normal(0.1), "bayesian", None),  # a site too, but the latents do not hang on it
        (lb.priors.LayerScale(0.1), "point", "own sites (R_scale)"),
        (lb.priors.LayerScale(0.1), "bayesian", "own sites (R_scale)"),
        (lb.priors.Horseshoe(0.1), "point", "own sites (R_local_scale, global_scale)"),
        (lb.priors.Laplace(0.1), "point", "a Normal prior"),
    ],
)
def test_no_kl_to_a_prior_that_is_normal_only_given_its_scales(prior, head, reason):
    model = lb.BayesianLoRA(tiny_bert(), lb.LoRAXS(2), prior, head=head, size=8)
    spec = lb.guides.Diagonal()
    found = structure(lb.Posterior(model, spec(model), spec))
    kl = [found.kl, found.dependence, *found.modules["KL (nats)"]]
    assert np.isnan(kl).all() if reason else np.isfinite(kl).all()
    assert (reason or "") in found.note
    assert ("no KL" in found.note) == (reason is not None)


def test_contraction_is_against_the_median_scale():
    """A posterior as wide as every module's median scale has learned nothing."""
    model = lb.BayesianLoRA(tiny_bert(), lb.LoRAXS(2), lb.priors.LayerScale(0.1, 1.0), size=8)
    spec = lb.guides.FullRank()
    guide = spec(model)
    guide.set(torch.zeros(32), [0.1 * torch.eye(32)])
    table = structure(lb.Posterior(model, guide, spec)).modules
    np.testing.assert_allclose(table["prior sd"], 0.1, rtol=1e-4)
    np.testing.assert_allclose(table["contraction"], 0, atol=1e-4)


def test_modules_are_measured_against_the_prior_and_each_other(problem):
    found, covariance = structure(exact(problem)), problem.precision.inverse()
    blocks = [covariance[i : i + 9, j : j + 9] for i in (0, 9) for j in (0, 9)]
    trace = torch.stack([blocks[0].trace(), blocks[3].trace()])
    np.testing.assert_allclose(found.modules["contraction"], 1 - trace / (9 * 0.49), rtol=1e-4)
    np.testing.assert_allclose(found.modules["effective parameters"], 9 - trace / 0.49, rtol=1e-4)
    rv = blocks[1].square().sum() / (blocks[0].norm() * blocks[3].norm())
    assert found.correlation.iloc[0, 1] == pytest.approx(float(rv), rel=1e-2)


def test_stored_draws_find_what_the_closed_form_says(problem):
    truth, found = structure(exact(problem)), structure(drawn_exactly(problem), draws=1000)
    assert not found.exact
    assert "1000 draws" in found.note
    assert found.effective_rank == pytest.approx(truth.effective_rank, rel=0.1)
    assert found.variance == pytest.approx(truth.variance, rel=0.1)
    np.testing.assert_allclose(found.modules["contraction"], truth.modules["contraction"], atol=0.02)
    assert found.correlation.iloc[0, 1] == pytest.approx(truth.correlation.iloc[0, 1], abs=0.03)


def chains_apart(problem, chains=5, draws=200):
    """Stored draws of chains around modes of their own, 2 apart along one direction that is in both modules."""
    one = drawn_exactly(problem, chains * draws)
    flat = one.model.sites.join(one.guide.by_chain()).reshape(chains, draws, -1)
    flat[..., [0, 9]] += 2.0 * torch.arange(chains)[:, None, None]
    return lb.Posterior(problem.model, DrawsGuide(problem.model.sites.split(flat)), Draws(chains, draws))


def test_the_update_is_of_all_chains(problem):
    """A and B are orthonormal: W - W0 varies as much as R does, which is mostly between the chains."""
    found, truth = structure(chains_apart(problem)), structure(drawn_exactly(problem))
    assert found.induced.sum() == pytest.approx(found.variance, rel=0.1)
    assert found.variance > 5 * truth.variance
    for name, values in found.spectra["W - W0"].items():
        assert values.sum() == pytest.approx(found.spectra["latents"][name].sum(), rel=0.1)


def test_the_correlation_is_of_all_chains(problem, monkeypatch):
    posterior = chains_apart(problem)
    whole = structure(posterior, draws=1000).correlation
    monkeypatch.setattr(import_module(structure.__module__), "_PRODUCTS", 2 * 150**2)
    few = structure(posterior, draws=1000).correlation
    np.testing.assert_allclose(few, whole, atol=0.05)


def test_the_update_is_of_all_members_of_an_ensemble(problem):
    """Its draws take turns among the members: evenly spaced ones are one member's."""
    spec, guides = lb.guides.Diagonal(), []
    for member in range(5):
        guides.append(spec(problem.model))
        guides[-1].begin_at(torch.full((18,), float(member)))
    ensemble = lb.Posterior(problem.model, EnsembleGuide(guides, [{}] * 5), Ensemble(spec, 5))
    found = structure(ensemble)
    assert found.induced.sum() == pytest.approx(found.variance, rel=0.1)
    assert found.variance > 18 * 2.0


def test_the_update_s_spectrum_is_that_of_w(problem):
    """A and B are orthonormal: the eigenvalues are those of R, here from draws."""
    truth, found = structure(exact(problem)), structure(drawn_exactly(problem))
    assert found.induced.sum() == pytest.approx(truth.variance, rel=0.3)
    assert len(found.induced) == 18


def test_every_module_has_its_spectra_and_their_shares(problem):
    found, covariance = structure(exact(problem)), problem.precision.inverse()
    induced = structure(drawn_exactly(problem))
    for name, where in zip(found.modules.index, (slice(0, 9), slice(9, 18)), strict=True):
        values = torch.linalg.eigvalsh(covariance[where, where]).flip(0).numpy()
        np.testing.assert_allclose(found.spectra["latents"][name], values, rtol=1e-3)
        assert found.modules.loc[name, "first direction"] == pytest.approx(values[0] / values.sum(), rel=1e-3)
        assert found.modules.loc[name, "first eight"] == pytest.approx(values[:8].sum() / values.sum(), rel=1e-3)
        assert found.share(2, module=name) == pytest.approx(values[:2].sum() / values.sum(), rel=1e-3)
        # A and B are orthonormal: what W - W0 varies by is what R does, here from 100 draws.
        own = induced.spectra["W - W0"][name]
        assert own.sum() == pytest.approx(values.sum(), rel=0.3)
        assert len(own) == 9
        rank = values.sum() ** 2 / np.square(values).sum()
        assert induced.modules.loc[name, "W - W0: effective rank"] == pytest.approx(rank, rel=0.3)
        share = induced.share(1, "W - W0", name)
        assert induced.modules.loc[name, "W - W0: first direction"] == pytest.approx(share)
        assert share == pytest.approx(values[0] / values.sum(), abs=0.15)
    assert induced.share(18, "W - W0") == pytest.approx(1.0)
    assert induced.induced_effective_rank == pytest.approx(found.effective_rank, rel=0.3)
    with pytest.raises(ValueError, match="expected of= among"):
        found.share(1, "weights")


def test_few_draws_of_many_dimensions_do_not_lower_the_effective_rank():
    values = from_draws((x := torch.randn(100, 300).double()) - x.mean(0))
    assert effective_rank(values, 100) == pytest.approx(300, rel=0.1)
    assert effective_rank(values, None) < 100
    assert np.isnan(effective_rank(values[:2], 2.0))  # as many as chains that never moved are worth


def test_shares_of_a_spectrum_from_draws_add_up_to_one(problem, monkeypatch):
    monkeypatch.setattr(import_module("pyro_lrblora.diagnostics.structure"), "_DENSE", 17)
    found = structure(exact(problem), draws=10)
    assert not found.exact
    assert found.share(9) == pytest.approx(1)


def test_what_is_from_draws_is_from_the_draws_of_its_seed(problem, monkeypatch):
    monkeypatch.setattr(import_module("pyro_lrblora.diagnostics.structure"), "_DENSE", 17)
    first, again, other = (structure(exact(problem), draws=10, seed=seed) for seed in (0, 0, 1))
    for name in ("eigenvalues", "induced"):
        assert np.array_equal(getattr(first, name), getattr(again, name))
        assert not np.allclose(getattr(first, name), getattr(other, name))


def test_a_point_has_no_variance_and_two_sites_per_module_work():
    model = lb.BayesianLoRA(tiny_bert(), lb.LoRA(2))
    point = lb.fit(model, token_batches(16), guide=lb.guides.Delta(), epochs=2, progress=False)
    found = structure(point)
    assert found.variance == 0
    assert np.isnan(found.effective_rank)
    assert (found.modules["contraction"] == 1).all()
    assert found.modules["first direction"].isna().all()
    assert np.isnan(found.share(1, "W - W0"))
    latents = model.adapted.per_module(point.mean())
    for name, latent in latents.items():
        left, right = model.adapted.low_rank_factors(name, latent)
        relative = float((left @ right).norm() / model.modules[name].weight.norm())
        assert found.modules.loc[name, "mean W - W0 / W0"] == pytest.approx(relative, rel=1e-3, abs=1e-6)


class LargestTensor(TorchDispatchMode):
    """Keeps the number of entries of the largest tensor that any operation returned."""

    entries = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        # A view that repeats one entry takes no memory.
        owned = [tensor.untyped_storage().nbytes() for tensor in tree_leaves(out) if isinstance(tensor, torch.Tensor)]
        self.entries = max([self.entries, *(size // 8 for size in owned)])
        return out


def test_fifteen_thousand_latents_without_a_square_of_them():
    network = torch.nn.Sequential(*(torch.nn.Linear(16, 16, bias=False) for _ in range(60)))
    model = lb.BayesianLoRA(network, lb.LoRAXS(16, lb.projections.Random(), targets="all-linear"), size=10)
    guide = lb.guides.LowRank(4)
    posterior = lb.Posterior(model, guide(model), guide)
    rows = [{"input": torch.randn(10, 16), "labels": torch.randint(16, (10,))}]
    size = model.sites.size
    assert size == 15_360
    with LargestTensor() as seen:
        found = structure(posterior, draws=40)
        pieces = importance(posterior, rows, draws=4)
        beside = against_reference(posterior, posterior, draws=16, projections=10)
    assert 40 * size <= seen.entries < 300 * size  # the draws are seen, and nothing like size ** 2
    assert "above 2,048" in found.note
    assert len(found.modules) == len(found.spectra["latents"]) == len(found.spectra["W - W0"]) == 60
    assert pieces.log_likelihood.shape == (4, 10)
    assert beside.log_sd_ratio.shape == (size,)
    with LargestTensor() as seen:
        torch.ones(1000, 1000).double()
    assert seen.entries == 1000**2  # it can tell


def test_the_effective_rank_in_the_picture_is_of_the_spectrum_in_it():
    """Half the latents have a prior a hundred times as wide: flat in its units, of half the rank without them."""
    from pyro_lrblora import plots

    problem = LinearGaussian(rank=2, modules=2)
    sds = torch.tensor([0.01, 1.0])[:, None, None].expand(2, 2, 2)
    prior = lambda shapes: {"R": pyro.sample("R", pyro.distributions.Normal(0.0, sds).to_event(3))}
    model = problem.model.with_prior(prior)
    found = structure(posterior_at(SimpleNamespace(model=model), torch.zeros(8), torch.diag(sds.flatten() ** 2)))
    assert found.effective_rank == pytest.approx(4, rel=0.01)
    assert found.whitened_effective_rank == pytest.approx(8, rel=0.01)
    shown = [text.get_text() for text in plots.spectrum(found).axes[0].texts]
    assert shown == ["effective rank 8.0"]


def test_a_prior_without_a_variance_is_named():
    problem = LinearGaussian(rank=2)
    model = problem.model.with_prior(lb.priors.StudentT(0.1, df=2.0))
    posterior = lb.Posterior(model, lb.guides.Diagonal()(model), lb.guides.Diagonal())
    assert "variance is infinite" in structure(posterior).note
    assert "infinite" not in structure(lb.Posterior(problem.model, posterior.guide, posterior.guide_spec)).note


@pytest.mark.parametrize("draws", [12, 40])
def test_the_effective_rank_of_a_sample_is_that_of_what_it_is_from(draws):
    """Numerator and denominator are without bias: their means over many samples are those of the covariance."""
    generator = torch.Generator().manual_seed(0)
    sds = torch.tensor([3.0, 2.0, 1.0, 1.0, 0.5, 0.2], dtype=torch.float64)
    samples = torch.randn(4000, draws, 6, generator=generator, dtype=torch.float64) * sds
    ranks = torch.tensor([effective_rank(eigenvalues(torch.cov(each.T)), draws) for each in samples])
    truth = float(sds.square().sum() ** 2 / sds.pow(4).sum())
    # What is left is the bias of a ratio, of the order of 1 / draws; that of the trace would be as much again.
    assert ranks.median().item() == pytest.approx(truth, rel=1.4 / draws)
