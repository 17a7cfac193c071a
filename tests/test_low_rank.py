"""Whether a covariance is low-rank, against dense matrices, and only asked where the answer is not assumed."""

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from conftest import LinearGaussian
from test_structure import drawn_exactly
from torch.distributions import constraints
from truth import exact, posterior_at

import pyro_lrblora as lb
from pyro_lrblora.diagnostics import low_rank, structure
from pyro_lrblora.guides.draws import Draws, DrawsGuide
from pyro_lrblora.prior_predictive import prior_draws


@pytest.fixture(scope="module")
def problem():
    return LinearGaussian(rank=3, modules=2)


def rank(values) -> float:
    return float(values.sum() ** 2 / values.square().sum())


def test_both_spectra_are_those_of_the_dense_matrices(problem):
    found = low_rank(exact(problem))
    data = 0.49 * torch.linalg.eigvalsh(problem.fisher).flip(0)  # the prior's sd is 0.7
    covariance = torch.linalg.eigvalsh(problem.precision.inverse()).flip(0) / 0.49
    np.testing.assert_allclose(found.spectra["precision from the data", "reference"], data, rtol=2e-3, atol=2e-3)
    np.testing.assert_allclose(found.spectra["covariance", "reference"], covariance, rtol=1e-3)
    ranks = found.table["effective rank"]
    assert ranks["precision from the data", "reference"] == pytest.approx(rank(data), rel=5e-3)
    assert ranks["covariance", "reference"] == pytest.approx(rank(covariance), rel=1e-3)
    bare = problem.precision.inverse().diagonal() / 0.49
    assert ranks["covariance", "reference, no correlation"] == pytest.approx(rank(bare), rel=1e-3)
    row = found.table.loc[("covariance", "reference")]
    assert row["first eight"] == pytest.approx(float(covariance[:8].sum() / covariance.sum()), rel=1e-3)
    held = (covariance.cumsum(0) / covariance.sum()).numpy()
    assert row["directions for 90%"] == int(np.argmax(held >= 0.9)) + 1


def test_stored_draws_find_the_same_and_shuffling_removes_it(problem):
    truth, found = low_rank(exact(problem)).table, low_rank(drawn_exactly(problem)).table
    assert list(truth.index) == list(found.index)
    np.testing.assert_allclose(found["effective rank"], truth["effective rank"], rtol=0.1)
    covariance = found.loc["covariance", "effective rank"]
    assert covariance["reference"] < 0.8 * covariance["reference, no correlation"]


def of_the_prior(model, draws=2000):
    """Stored draws of the prior, as a chain leaves them where the data say nothing."""
    kept = {name: value.unsqueeze(0) for name, value in prior_draws(model, draws, 0).items()}
    return lb.Posterior(model, DrawsGuide(kept), Draws(1, draws))


CORRELATED = lb.priors.MatrixNormal(0.1, row_correlation=0.8, column_correlation=0.8)


def test_draws_of_a_correlated_prior_know_nothing_of_data(problem):
    found = low_rank(of_the_prior(problem.model.with_prior(CORRELATED)))
    for of in ("reference", "reference, no correlation"):
        assert found.spectra["precision from the data", of].max() < 0.3  # of 2,000 draws
    assert found.table.loc[("covariance", "reference"), "effective rank"] == pytest.approx(18, rel=0.03)
    spectrum, null = (found.spectra["covariance", of] for of in ("reference", "reference, no correlation"))
    np.testing.assert_allclose(spectrum, null, atol=0.1)


@pytest.mark.parametrize("per_latent", [8, 40])
def test_the_effective_rank_of_the_precision_has_no_bias_of_the_draws(per_latent):
    """One direction known from data, of 64: a sample covariance's own inverse would show several."""
    problem = LinearGaussian(rank=4, modules=4)
    known = torch.nn.functional.normalize(torch.randn(64, generator=torch.Generator().manual_seed(0)), dim=0)
    precision = (torch.eye(64) + 20 * torch.outer(known, known)).double() / 0.1**2
    problem.model = problem.model.with_prior(lb.priors.Normal(0.1))
    exactly = torch.distributions.MultivariateNormal(torch.zeros(64).double(), precision_matrix=precision)
    torch.manual_seed(0)
    ranks = []
    for _ in range(10):
        draws = exactly.sample((1, per_latent * 64)).float()
        posterior = lb.Posterior(problem.model, DrawsGuide({"R": draws.unflatten(-1, (4, 4, 4))}), Draws(1, 64))
        ranks.append(low_rank(posterior).table.loc["precision from the data", "effective rank"])
    assert np.mean([rank["reference"] for rank in ranks]) == pytest.approx(1, abs=0.15)
    marginal = 1 / precision.inverse().diagonal() * 0.1**2 - 1
    null = float(marginal.sum() ** 2 / marginal.square().sum())
    # Noise in variances makes those of latents that know nothing seem to know something.
    assert null - 3 < np.mean([rank["reference, no correlation"] for rank in ranks]) < null + 15


def test_the_data_s_part_of_the_precision_in_units_of_a_correlated_prior():
    """S^(1/2) F S^(1/2), F the Fisher information, for any S: here of a Kronecker product in both modules."""
    problem = LinearGaussian(rank=3, modules=2)
    problem.model = problem.model.with_prior(CORRELATED)
    equal = 0.2 * torch.eye(3).double() + 0.8
    prior = torch.block_diag(*2 * [0.01 * torch.kron(equal, equal)])
    root = torch.linalg.cholesky(prior)
    data = torch.linalg.eigvalsh(root.T @ problem.fisher @ root).flip(0)
    found = low_rank(posterior_at(problem, problem.mean, (problem.fisher + prior.inverse()).inverse()))
    np.testing.assert_allclose(found.spectra["precision from the data", "reference"], data, rtol=5e-3, atol=5e-3)
    np.testing.assert_allclose(found.spectra["covariance", "reference"], 1 / (1 + data.flip(0)), rtol=5e-3)
    assert found.note == ""


class RealMixture(dist.MixtureSameFamily):
    support = constraints.real_vector  # torch has no transform to its own


def test_a_correlated_prior_of_unknown_covariance_has_no_precision_but_a_reason(problem):
    def mixture(shapes):
        weights = dist.Categorical(torch.ones(2))
        root = torch.linalg.cholesky(0.2 * torch.eye(3) + 0.8)
        parts = dist.MultivariateNormal(torch.zeros(2, 3), scale_tril=torch.tensor([0.1, 0.2])[:, None, None] * root)
        rows = RealMixture(weights, parts)
        return {name: pyro.sample(name, rows.expand(shape[:-1]).to_event(2)) for name, shape in shapes.items()}

    found = low_rank(of_the_prior(problem.model.with_prior(mixture)))
    assert {part for part, _ in found.table.index} == {"covariance"}
    assert "no precision" in found.note
    assert "RealMixture of (3,) at site 'R'" in found.note
    sd = found.spectra["covariance", "reference, no correlation"]
    np.testing.assert_allclose(sd, 1, atol=0.3)


def test_few_draws_have_no_precision_but_a_reason(problem):
    found = low_rank(drawn_exactly(problem, draws=60))
    assert {part for part, _ in found.table.index} == {"covariance"}
    assert "independent ones, fewer than 4 per latent" in found.note


@pytest.mark.parametrize("draws", [400, 100], ids=["enough", "too few for a precision"])
def test_draws_that_resemble_those_before_them_are_not_taken_for_structure(problem, draws):
    """Latents without any correlation, each a chain with an autocorrelation of 0.9: 1 draw of theirs in 9.5 counts."""
    generator, chains, kept = torch.Generator().manual_seed(0), 4, []
    state = torch.randn(chains, 2, 3, 3, generator=generator)
    for _ in range(draws):
        state = 0.9 * state + 0.19**0.5 * torch.randn(state.shape, generator=generator)
        kept.append(state)
    posterior = lb.Posterior(problem.model, DrawsGuide({"R": torch.stack(kept, 1)}), Draws(chains, draws))
    found = low_rank(posterior)
    ranks = found.table.loc["covariance", "effective rank"]
    assert ranks["reference"] == pytest.approx(18, rel=0.1)
    assert ranks["reference"] == pytest.approx(ranks["reference, no correlation"], rel=0.1)
    assert structure(posterior).effective_rank == pytest.approx(18, rel=0.15)
    parts = {part for part, _ in found.table.index}
    assert parts == ({"covariance", "precision from the data"} if draws == 400 else {"covariance"})
    if draws == 100:
        worth = float(found.note.split("worth ")[1].split()[0])
        assert worth == pytest.approx(400 * 0.19 / 1.81, rel=0.3)


def test_a_random_subspace_stands_beside(problem):
    found = low_rank(exact(problem), exact(LinearGaussian(rank=3, modules=2, seed=1)))
    assert {source for _, source in found.table.index} == {
        "reference", "reference, no correlation", "random projection", "random projection, no correlation",
    }  # fmt: skip


def test_a_null_may_have_a_precision_where_the_reference_has_too_few_draws(problem):
    reference, random = drawn_exactly(problem, draws=60), drawn_exactly(LinearGaussian(rank=3, modules=2, seed=1))
    found = lb.diagnose(exact(problem), [problem.batch], reference=reference, random=random, draws=4)
    assert "effective rank of the reference (covariance)" in [check.check for check in found.checks]


def test_a_null_that_is_none_is_refused(problem):
    chosen = lb.BayesianLoRA(problem.model.network, lb.LoRAXS(3, targets="all-linear"), size=problem.rows)
    with pytest.raises(ValueError, match=r"projections.Random\(\), got LoRAXS"):
        low_rank(exact(problem), lb.Posterior(chosen, lb.guides.FullRank()(chosen), lb.guides.FullRank()))
    with pytest.raises(ValueError, match="D = 18 latents, got 9"):
        low_rank(exact(problem), exact(LinearGaussian(rank=3)))
    with pytest.raises(ValueError, match="reference= with random="):
        lb.diagnose(exact(problem), [problem.batch], random=exact(problem))


@pytest.mark.parametrize(("r_hat", "doubt"), [(1.003, ""), (1.2, "R-hat is 1.200"), (np.nan, "R-hat is nan")])
def test_chains_that_have_not_converged_are_not_to_be_trusted(problem, r_hat, doubt):
    reference = drawn_exactly(problem, draws=400)
    reference.settings["r_hat"] = r_hat
    found = low_rank(reference)
    assert (found.doubt == "") == (doubt == "")
    assert doubt in found.note
    diagnosis = lb.diagnose(exact(problem), [problem.batch], reference=reference, draws=4)
    verdicts = {check.check.split(" (")[0]: check.verdict for check in diagnosis.checks}
    wanted = "warning" if doubt else "good"
    assert verdicts["R-hat of the reference"] == verdicts["effective rank of the reference"] == wanted


def test_draws_whose_convergence_nobody_recorded(problem):
    assert "is not known" in low_rank(drawn_exactly(problem, draws=100)).doubt
    assert low_rank(exact(problem)).doubt == ""  # it has no chains


def test_the_random_subspace_reaches_diagnosis_and_report(problem, tmp_path):
    null = exact(LinearGaussian(rank=3, modules=2, seed=1))
    written = lb.report(
        {"one": exact(problem)}, [problem.batch], tmp_path / "report.md", reference=exact(problem), random=null, draws=4
    )
    table = low_rank(exact(problem), null).table
    rank = table.loc[("precision from the data", "random projection"), "effective rank"]
    assert f"{rank:.1f} in a random subspace" in repr(written.diagnosis)
    assert "random projection, no correlation" in (tmp_path / "report.md").read_text()


def test_a_guide_whose_form_decides_is_refused(problem):
    for spec in (lb.guides.LowRank(2), lb.guides.Diagonal(), lb.guides.FullRank(per_module=True)):
        with pytest.raises(TypeError, match="decides the rank"):
            low_rank(lb.Posterior(problem.model, spec(problem.model), spec))


def test_one_module_at_a_site_is_not_all_of_them():
    """LoRA on one module: two blocks per_module, each of a site with one module."""
    spec, model = lb.guides.FullRank(per_module=True), LinearGaussian(rank=2, modules=1).model
    model = lb.BayesianLoRA(model.network, lb.LoRA(2, targets="all-linear"), model.prior, model.likelihood, size=8)
    with pytest.raises(TypeError, match="decides the rank"):
        low_rank(lb.Posterior(model, spec(model), spec))
