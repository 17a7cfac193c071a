"""Simulation-based calibration: exact posteriors pass, each planted fault is caught by the check that should."""

import json
import warnings

import numpy as np
import pandas as pd
import pyro
import pytest
import torch
from conftest import LinearGaussian, tiny_bert, tiny_reviews, tiny_tokenizer, token_batches
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import binom
from test_evidence import posterior_at

import pyro_lrblora as lb
from pyro_lrblora.diagnostics.sbc import SBC, _note, full_rank_fit, sbc
from pyro_lrblora.diagnostics.simulated_study import SimulatedStudy
from pyro_lrblora.diagnostics.tiny_problem import tiny_problem
from pyro_lrblora.diagnostics.uniformity import EcdfTest, bias_and_width, bin_edges, chi_squared, holm
from pyro_lrblora.guides.draws import Draws
from pyro_lrblora.plots.ranks import ecdf_differences, rank_histograms

pytestmark = pytest.mark.filterwarnings("ignore::pyro_lrblora.ScalesNotConverged")

PROBLEM = LinearGaussian(rank=2)


def conjugate(scale=1.0, shift=0.0, ignore_data=False):
    """A fit that returns the exact posterior of whatever labels it is given, or that with a planted fault.

    Args:
        scale: of its standard deviations.
        shift: of its mean, in posterior standard deviations.
        ignore_data: return the prior instead.
    """
    (basis,) = PROBLEM.model.adapted.bases.values()
    x = PROBLEM.batch["x"].double()
    jacobian = torch.einsum("mr,sn,bn->bmrs", basis.B.double(), basis.A.double(), x).reshape(-1, PROBLEM.size)
    noise = PROBLEM.model.likelihood.sd.double().repeat(PROBLEM.rows)
    clean = PROBLEM.model.network(PROBLEM.batch["x"]).double().reshape(-1)
    covariance = PROBLEM.precision.inverse()
    prior = 0.7**2 * torch.eye(PROBLEM.size).double()

    def fit(model, train, seed):
        labels = torch.cat([batch["labels"] for batch in train]).double().reshape(-1)
        mean = covariance @ jacobian.T @ ((labels - clean) / noise**2)
        if ignore_data:
            return posterior_at(PROBLEM, 0 * mean, prior)
        return posterior_at(PROBLEM, mean + shift * covariance.diagonal().sqrt(), scale**2 * covariance)

    return fit


def study(fit, simulations=100, draws=19, **options):
    return sbc(PROBLEM.model, PROBLEM.batches(10), fit, simulations=simulations, draws=draws, progress=False, **options)


def prior_fit(model, train, seed):
    """The prior: a fit that costs nothing."""
    spec = lb.guides.Diagonal(start_scale=1.0)
    return lb.Posterior(model, spec(model), spec)


LATENTS = [f"R[0,{i},{j}]" for i in range(2) for j in range(2)]


# --- faults


def test_the_exact_posterior_has_uniform_ranks():
    result = study(conjugate(), simulations=150)
    assert list(result.ranks) == [*LATENTS, "norm of latents", "log prior", "log likelihood"]
    assert result.ranks.shape == (150, 7)
    assert result.ranks.min().min() == 0
    assert result.ranks.max().max() == 19
    assert result.uniform
    assert result.table["adjusted p"].min() > 0.1
    assert result.table[["bias", "width"]].abs().max().max() < 3
    assert set(result.table["shape"]) == {"uniform"}
    assert "all 7 quantities" in result.verdict
    assert result.note == ""


@pytest.mark.parametrize(
    ("fault", "shape", "column", "sign"),
    [
        ({"scale": 0.5}, "too narrow", "width", 1),
        ({"scale": 2.0}, "too wide", "width", -1),
        ({"shift": 0.7}, "too high", "bias", -1),
        ({"shift": -0.7}, "too low", "bias", 1),
    ],
    ids=["narrow", "wide", "high", "low"],
)
def test_a_planted_fault_is_caught_and_named_for_what_it_is(fault, shape, column, sign):
    result = study(conjugate(**fault))
    assert not result.uniform
    assert result.table.loc[LATENTS, "shape"].str.contains(shape).all()
    assert (sign * result.table.loc[LATENTS, column] > 3).all()
    assert (result.table.loc[LATENTS, ["chi-squared p", "ECDF p"]] < 0.05).all().all()
    assert shape in result.verdict


def test_only_the_log_likelihood_catches_a_fit_that_ignores_the_data():
    table = study(conjugate(ignore_data=True), seed=1).table
    blind = table.drop(index="log likelihood")
    assert set(blind["shape"]) == {"uniform"}
    assert table.loc["log likelihood", "adjusted p"] < 1e-3
    assert "too low" in table.loc["log likelihood", "shape"]


def test_a_point_posterior_is_too_narrow():
    result = study(conjugate(scale=1e-6), simulations=60)
    assert set(result.ranks[LATENTS[0]]) <= {0, 19}
    assert result.table.loc[LATENTS, "shape"].str.contains("too narrow").all()


def test_equal_values_are_ranked_at_random():
    """A quantity that is the same for every draw and the truth tells nothing, so its ranks are uniform."""
    constant = {"one": lambda values, batches: torch.ones(len(values["R"]))}
    result = study(conjugate(), simulations=60, quantities=constant)
    assert result.table.loc["one", "adjusted p"] > 0.1
    assert result.ranks["one"].nunique() > 15


def test_a_quantity_of_the_users_own_sees_values_and_simulated_labels():
    seen = []

    def residual(values, batches):
        seen.append(torch.cat([batch["labels"] for batch in batches]))
        return values["R"].flatten(1).sum(1)

    result = study(conjugate(shift=1.0), simulations=40, quantities={"sum": residual})
    assert "too high" in result.table.loc["sum", "shape"]
    assert not torch.equal(seen[-1], seen[-2])
    assert seen[-1].shape == PROBLEM.batch["labels"].shape


# --- what is simulated


def test_labels_are_drawn_from_the_likelihood_at_latents_drawn_from_the_prior():
    """Over 600 simulations: labels have the network's own outputs as mean, J prior J' plus noise as covariance."""
    study = SimulatedStudy(PROBLEM.model, PROBLEM.batches(10), None, 1, 0, {})
    simulated = [study.simulate(number, number + 1000) for number in range(600)]
    latents = torch.stack([truth["R"].flatten() for truth, _ in simulated])
    assert latents.std(0).numpy() == pytest.approx(0.7, abs=0.08)
    labels = torch.stack([torch.cat([batch["labels"] for batch in batches]) for _, batches in simulated])
    found = (labels - PROBLEM.model.network(PROBLEM.batch["x"])).flatten(1).double()
    (basis,) = PROBLEM.model.adapted.bases.values()
    jacobian = torch.einsum("mr,sn,bn->bmrs", basis.B, basis.A, PROBLEM.batch["x"]).reshape(-1, PROBLEM.size).double()
    noise = PROBLEM.model.likelihood.sd.double().repeat(PROBLEM.rows) ** 2
    covariance = 0.7**2 * jacobian @ jacobian.T + torch.diag(noise)
    sd = covariance.diagonal().sqrt()
    assert (found.mean(0).abs() / (sd / 600**0.5)).max() < 4.5
    assert ((found.T.cov() - covariance) / sd / sd[:, None]).abs().max() < 0.25


def test_more_than_32_latents_are_seen_through_projections_and_other_sites_are_ranked_too():
    model = lb.BayesianLoRA(
        tiny_bert(), lb.LoRAXS(4), lb.priors.LayerScale(0.1), head="bayesian", head_scale=1.0, size=40
    )
    spec = lb.guides.Diagonal(start_scale=1.0)
    fit = lambda model, train, seed: lb.Posterior(model, spec(model), spec)
    result = sbc(model, token_batches(), fit, simulations=3, draws=5, progress=False)
    names = list(result.ranks)
    modules = len(model.modules)
    assert names[:32] == [f"projection {i} of latents" for i in range(32)]
    assert [f"R_scale[{i}]" for i in range(modules)] == [name for name in names if name.startswith("R_scale")]
    assert [name for name in names if "of classifier.weight" in name] == [
        f"projection {i} of classifier.weight" for i in range(32)
    ]
    assert "classifier.bias[2]" in names
    assert "too few" in result.note


def test_the_log_prior_is_over_all_sites_and_the_log_likelihood_over_all_rows():
    model = lb.BayesianLoRA(
        tiny_bert(), lb.LoRAXS(2), lb.priors.LayerScale(0.1), head="frozen", tokenizer=tiny_tokenizer()
    )
    seen = {}

    def keep(values, batches):
        seen.update(values=values, batches=batches)
        return values["R"].flatten(1)[:, 0]

    spec = lb.guides.Diagonal(start_scale=1.0)
    fit = lambda model, train, seed: lb.Posterior(model, spec(model), spec)
    data = tiny_reviews(70)
    sbc(model, data, fit, simulations=1, draws=7, quantities={"kept": keep}, progress=False)
    values, batches = seen["values"], seen["batches"]
    assert [len(batch["labels"]) for batch in batches] == [32, 32, 6]
    assert values["R"].shape[0] == 8
    found = SimulatedStudy(model.prepare(data), batches, fit, 7, 0, {}).measure(values, batches)
    scales = values["R_scale"]
    hyper = torch.distributions.LogNormal(np.log(0.1), 1.0).log_prob(scales).sum(1)
    latents = torch.distributions.Normal(0.0, scales[..., None, None]).log_prob(values["R"]).flatten(1).sum(1)
    torch.testing.assert_close(found["log prior"].float(), hyper + latents, rtol=1e-4, atol=1e-3)
    with torch.no_grad():
        for draw in (0, 5):
            at = {name: value[draw] for name, value in values.items()}
            total = sum(
                torch.distributions.Categorical(logits=model.outputs(batch, at, model.head_values()).logits)
                .log_prob(batch["labels"])
                .sum()
                for batch in batches
            )
            assert float(found["log likelihood"][draw]) == pytest.approx(float(total), abs=1e-3)


def test_the_default_refits_the_tiny_problem():
    model, data = tiny_problem(rows=20)
    assert model.sites.size == 18
    result = sbc(model, data, simulations=2, draws=9, progress=False)
    assert result.ranks.shape == (2, 21)


# --- fits that fail


def test_fits_that_fail_are_counted_and_named():
    exact, calls = conjugate(), []

    def sometimes(model, train, seed):
        calls.append(seed)
        if len(calls) % 3 == 0:
            raise FloatingPointError("NaN in batch 0")
        if len(calls) == 1:
            warnings.warn("scales moved", lb.ScalesNotConverged, stacklevel=1)
        return exact(model, train, seed)

    result = study(sometimes, simulations=9, draws=9)
    assert list(result.ranks.index) == [0, 1, 3, 4, 6, 7]
    assert "3 of 9 fits failed" in result.note
    assert "FloatingPointError: NaN in batch 0 (3)" in result.note
    assert "ScalesNotConverged 1" in result.note


def test_chains_with_fewer_effective_draws_than_ranks_are_counted():
    records = [{"ess": ess} for ess in (50.0, 99.0, 99.5, 98.9)]
    assert _note(records, 99).startswith("2 of 4 chains had fewer than 99 effective draws")
    assert "chains" not in _note(records, 50)


def test_when_every_fit_fails_it_says_why():
    def never(model, train, seed):
        raise ValueError("no such guide")

    with pytest.raises(RuntimeError, match="all 3 failed, the first by ValueError: no such guide"):
        study(never, simulations=3)


def test_draws_that_are_not_finite_are_a_failed_fit():
    exact, calls = conjugate(), []

    def broken(model, train, seed):
        calls.append(seed)
        posterior = exact(model, train, seed)
        if len(calls) == 2:
            posterior.guide.loc.data.fill_(float("inf"))
        return posterior

    result = study(broken, simulations=3, draws=9)
    assert list(result.ranks.index) == [0, 2]
    assert "not finite" in result.note


# --- resuming and processes


def test_a_folder_is_continued_and_a_half_written_line_is_done_again(tmp_path):
    exact, calls = conjugate(), []

    def fit(model, train, seed):
        calls.append(seed)
        return exact(model, train, seed)

    whole = study(fit, simulations=6, draws=9)
    study(fit, simulations=4, draws=9, folder=tmp_path / "sbc")
    lines = (tmp_path / "sbc" / "simulations.jsonl").read_text()
    assert len(lines.splitlines()) == 4
    (tmp_path / "sbc" / "simulations.jsonl").write_text(lines[:-9])  # the process died in the fourth
    calls.clear()
    resumed = study(fit, simulations=6, draws=9, folder=tmp_path / "sbc")
    assert len(calls) == 3
    assert resumed.ranks.equals(whole.ranks)
    calls.clear()
    again = study(fit, simulations=6, draws=9, folder=tmp_path / "sbc")
    assert not calls
    assert again.ranks.equals(whole.ranks)
    records = [json.loads(line) for line in (tmp_path / "sbc" / "simulations.jsonl").read_text().splitlines()]
    assert [record["simulation"] for record in records] == list(range(6))


@pytest.mark.parametrize(
    "other",
    [{"seed": 1}, {"draws": 8}, {"quantities": {"first": lambda values, batches: values["R"][:, 0, 0, 0]}}],
    ids=["seed", "draws", "quantities"],
)
def test_a_folder_of_other_simulations_is_refused(tmp_path, other):
    study(conjugate(), simulations=1, draws=9, folder=tmp_path)
    with pytest.raises(ValueError, match=f"others.*{next(iter(other))}"):
        study(conjugate(), **{"simulations": 1, "draws": 9, "folder": tmp_path} | other)


def test_a_folder_of_other_inputs_or_another_prior_is_refused(tmp_path):
    options = {"simulations": 1, "draws": 9, "folder": tmp_path, "progress": False}
    sbc(*tiny_problem(10), prior_fit, **options)
    with pytest.raises(ValueError, match="inputs"):
        sbc(*tiny_problem(10, seed=1), prior_fit, **options)
    model, data = tiny_problem(10)
    with pytest.raises(ValueError, match="model"):
        sbc(model.with_prior(lb.priors.Normal(0.4)), data, prior_fit, **options)
    with pytest.raises(ValueError, match="fit"):
        sbc(model, data, full_rank_fit, **options)
    sbc(model, data, prior_fit, **options)


def test_two_processes_give_the_ranks_of_one(tmp_path):
    quick = lambda model, train, seed: lb.fit(
        model, train, guide=lb.guides.Diagonal(), steps=5, seed=seed, progress=False
    )
    problem, options = tiny_problem(20), {"simulations": 4, "draws": 19, "progress": False}
    one = sbc(*problem, quick, **options)
    two = sbc(*problem, quick, n_jobs=2, folder=tmp_path, **options)
    assert two.ranks.equals(one.ranks)
    assert sbc(*problem, quick, folder=tmp_path, **options).ranks.equals(one.ranks)
    assert one.ranks.nunique().max() > 1


def test_nothing_global_is_changed():
    state = torch.get_rng_state()
    sbc(*tiny_problem(10), simulations=1, draws=5, progress=False)
    assert torch.equal(torch.get_rng_state(), state)
    assert len(pyro.get_param_store()) == 0


# --- arguments


def test_a_point_head_and_a_learned_scale_are_refused():
    data = token_batches()
    with pytest.raises(ValueError, match="with_head"):
        sbc(lb.BayesianLoRA(tiny_bert(), lb.LoRAXS(2)), data)
    model = lb.BayesianLoRA(tiny_bert(), lb.LoRAXS(2), lb.priors.Learned(lb.priors.Normal(0.1)), head="frozen")
    with pytest.raises(ValueError, match="learns anew"):
        sbc(model, data)


@pytest.mark.parametrize("argument", [{"simulations": 0}, {"draws": 0}, {"n_jobs": 0}, {"draws": 9.5}], ids=repr)
def test_counts_are_checked(argument):
    with pytest.raises(ValueError, match=f"expected {next(iter(argument))} to be an integer >= 1"):
        sbc(*tiny_problem(10), **argument)


def test_what_cannot_be_ranked_is_refused():
    column = lambda values, batches: values["R"][:, 0, 0, 0]
    quick = {"simulations": 1, "draws": 9, "progress": False}
    with pytest.raises(TypeError, match="Posterior, got NoneType"):
        sbc(*tiny_problem(10), lambda model, train, seed: None, **quick)
    with pytest.raises(TypeError, match="to be a function, got int"):
        sbc(*tiny_problem(10), prior_fit, quantities={"one": 1}, **quick)
    with pytest.raises(ValueError, match="not taken"):
        sbc(*tiny_problem(10), prior_fit, quantities={"log prior": column}, **quick)
    with pytest.raises(ValueError, match=r"shape \(1,\)"):
        sbc(*tiny_problem(10), prior_fit, quantities={"R": lambda values, batches: values["R"]}, **quick)
    with pytest.raises(ValueError, match="at least draws=9 stored draws in a posterior, got 8"):
        sbc(
            *tiny_problem(10),
            lambda model, train, seed: lb.Posterior(model, Draws(2, 4)(model), Draws(2, 4)),
            **quick,
        )


# --- uniformity


@settings(deadline=None, max_examples=30)
@given(n=st.integers(10, 400), draws=st.integers(1, 300))
def test_bins_cover_all_ranks_and_expect_enough_in_each(n, draws):
    edges = bin_edges(n, draws)
    assert edges[0] == 0
    assert edges[-1] == draws + 1
    assert (np.diff(edges) >= 1).all()
    assert len(edges) == 3 or np.diff(edges).min() / (draws + 1) * n >= 2.4
    assert 0 <= chi_squared(np.random.default_rng(0).integers(0, draws + 1, n), draws) <= 1


@pytest.mark.parametrize(("n", "draws"), [(30, 9), (100, 99), (250, 400)])
def test_the_band_holds_uniform_ranks_as_often_as_it_says(n, draws):
    test, generator = EcdfTest.of(n, draws), np.random.default_rng(1)
    low, high = test.band(0.9)
    p_values, inside = [], []
    for _ in range(1500):
        ranks = generator.integers(0, draws + 1, n)
        ecdf = np.array([(ranks < at).mean() for at in test.thresholds])
        np.testing.assert_allclose(ecdf, test.ecdf(ranks))
        inside.append(((ecdf >= low - 1e-9) & (ecdf <= high + 1e-9)).all())
        p_values.append(test.p_value(ranks))
    # Counts are few, so that it holds somewhat more often; 1500 give it to 0.008.
    assert 0.87 < np.mean(inside) < 0.95
    np.testing.assert_array_equal(
        np.array(inside), np.array(p_values) > (1 + 0.1 * len(test.null)) / (1 + len(test.null))
    )
    assert np.mean(np.array(p_values) < 0.05) < 0.07


def test_tails_are_those_of_the_binomial_test():
    test = EcdfTest.of(20, 9)
    for place, count in ((0, 0), (4, 12), (8, 20)):
        share = test.thresholds[place] / 10
        both = min(binom.cdf(count, 20, share), 1 - binom.cdf(count - 1, 20, share))
        assert test.tails[place, count] == pytest.approx(min(1, 2 * both))


@pytest.mark.parametrize("draws", [1, 9, 99])
def test_bias_and_width_are_standard_scores_of_uniform_ranks(draws):
    generator = np.random.default_rng(0)
    scores = np.array([bias_and_width(generator.integers(0, draws + 1, 100), draws) for _ in range(4000)])
    assert np.abs(scores[:, 0].mean()) < 0.06
    assert scores[:, 0].std() == pytest.approx(1, abs=0.05)
    if draws > 1:
        assert np.abs(scores[:, 1].mean()) < 0.06
        assert scores[:, 1].std() == pytest.approx(1, abs=0.05)


@settings(deadline=None, max_examples=50)
@given(p_values=st.lists(st.floats(0, 1), min_size=1, max_size=20))
def test_holm_keeps_the_order_and_corrects_the_smallest_in_full(p_values):
    p_values = np.array(p_values)
    adjusted = holm(p_values)
    assert (adjusted >= p_values).all()
    assert adjusted.min() == pytest.approx(min(1, len(p_values) * p_values.min()))
    assert (np.diff(adjusted[np.argsort(p_values)]) >= 0).all()


def test_holm_of_a_worked_example():
    np.testing.assert_allclose(holm(np.array([0.01, 0.04, 0.03, 0.005])), [0.03, 0.06, 0.06, 0.02])


# --- pictures


def test_pictures_show_the_counts_and_mark_what_is_off():
    generator = np.random.default_rng(0)
    ranks = pd.DataFrame(
        {"flat": generator.integers(0, 100, 100), "log likelihood": 50 + generator.integers(-9, 9, 100)}
    )
    result = SBC(ranks, 99)
    figure = rank_histograms(result)
    titles = [axis.get_title() for axis in figure.axes]
    assert titles == ["log likelihood\nhump: draws too wide", "flat\nuniform"]
    counts = [patch.get_height() for patch in figure.axes[1].patches]
    np.testing.assert_array_equal(counts, np.histogram(ranks["flat"], bin_edges(100, 99))[0])
    assert len(ecdf_differences(result).axes[0].lines) == 3
    with pytest.raises(ValueError, match="expected quantities among"):
        rank_histograms(result, ["nothing"])
