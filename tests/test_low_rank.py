"""Whether a covariance is low-rank, against dense matrices, and only asked where the answer is not assumed."""

import numpy as np
import pytest
import torch
from conftest import LinearGaussian
from test_structure import drawn_exactly
from truth import exact

import pyro_lrblora as lb
from pyro_lrblora.diagnostics import low_rank


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


def test_few_draws_have_no_precision_but_a_reason(problem):
    found = low_rank(drawn_exactly(problem, draws=60))
    assert {part for part, _ in found.table.index} == {"covariance"}
    assert "60 draws are fewer than 4 per latent" in found.note


def test_a_random_subspace_stands_beside(problem):
    found = low_rank(exact(problem), exact(LinearGaussian(rank=3, modules=2, seed=1)))
    assert {source for _, source in found.table.index} == {
        "reference", "reference, no correlation", "random projection", "random projection, no correlation",
    }  # fmt: skip


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
