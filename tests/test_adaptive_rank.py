"""A rank for every module under one budget: the allocation against brute force, and such ranks all the way."""

import itertools

import pytest
import torch
from conftest import tiny_bert, token_batches
from hypothesis import given
from hypothesis import strategies as st
from test_projections import P, prepared

import pyro_lrblora as lb

SPECTRA = st.lists(st.lists(st.integers(0, 9), min_size=1, max_size=4), min_size=1, max_size=4).map(
    lambda spectra: {f"m{i}": sorted(map(float, spectrum), reverse=True) for i, spectrum in enumerate(spectra)}
)
cost = lambda ranks: sum(rank**2 for rank in ranks.values())
captured = lambda spectra, ranks: sum(sigma**2 for name, rank in ranks.items() for sigma in spectra[name][:rank])


def every_budget(spectra):
    """From rank 1 everywhere to all that can be spent, and a little more."""
    return range(len(spectra), cost({name: len(spectrum) for name, spectrum in spectra.items()}) + 3)


@given(spectra=SPECTRA)
def test_ranks_keep_the_budget_and_capture_the_most_for_what_they_spend(spectra):
    every = [
        dict(zip(spectra, choice, strict=True))
        for choice in itertools.product(*(range(1, len(spectrum) + 1) for spectrum in spectra.values()))
    ]
    table = [(cost(choice), captured(spectra, choice)) for choice in every]
    most = lambda budget: max(value for spent, value in table if spent <= budget)
    for budget in every_budget(spectra):
        ranks = P.allocate_ranks(spectra, budget)
        assert cost(ranks) <= budget
        assert all(1 <= ranks[name] <= len(spectrum) for name, spectrum in spectra.items())
        got = captured(spectra, ranks)
        assert got >= most(cost(ranks))
        # What the whole budget could capture is missed by at most a fraction of the next step.
        next_steps = [(name, rank) for name, rank in ranks.items() if rank < len(spectra[name])]
        ratio = lambda step: spectra[step[0]][step[1]] ** 2 / (2 * step[1] + 1)
        best = max(next_steps, key=ratio, default=None)
        missed = 0.0 if best is None else ratio(best) * (budget - cost(ranks))
        assert got >= most(budget) - missed - 1e-9


@given(spectra=SPECTRA)
def test_no_rank_falls_when_the_budget_grows(spectra):
    allocations = [P.allocate_ranks(spectra, budget) for budget in every_budget(spectra)]
    for smaller, larger in itertools.pairwise(allocations):
        assert all(larger[name] >= rank for name, rank in smaller.items())


def test_a_rank_costs_what_it_adds():
    """Three cheap steps of gain 4 each for 9 latents, before one of gain 9 for 7."""
    spectra = {"one": [9.0, 9.0, 9.0, 3.0]} | {name: [9.0, 2.0] for name in "abc"}
    assert P.allocate_ranks(spectra, 21) == {"one": 3, "a": 2, "b": 2, "c": 2}
    # 5^2 for 7 latents before 3^2 for 3.
    assert P.allocate_ranks({"x": [9.0, 9.0, 9.0, 5.0], "y": [9.0, 3.0]}, 17) == {"x": 4, "y": 1}


def test_ranks_by_hand():
    spectra = {"flat": [3.0, 3.0, 3.0], "steep": [9.0, 1.0, 0.1], "dead": [0.0, 0.0, 0.0]}
    assert P.allocate_ranks(spectra, 3) == {"flat": 1, "steep": 1, "dead": 1}
    assert P.allocate_ranks(spectra, 6) == {"flat": 2, "steep": 1, "dead": 1}  # 9/3, before 9/5 and 1/3
    assert P.allocate_ranks(spectra, 13) == {"flat": 3, "steep": 1, "dead": 1}
    assert P.allocate_ranks(spectra, 14) == {"flat": 3, "steep": 2, "dead": 1}
    assert P.allocate_ranks(spectra, 1000) == {"flat": 3, "steep": 3, "dead": 1}  # nothing to gain in the dead one
    assert P.allocate_ranks(spectra, 12, smallest=2) == {"flat": 2, "steep": 2, "dead": 2}
    with pytest.raises(ValueError, match="3 modules rank 2, got budget=11; write budget=12 or more"):
        P.allocate_ranks(spectra, 11, smallest=2)


def test_modules_get_the_rank_their_gradient_asks_for():
    batches = token_batches(24)
    model = prepared(P.Gradient(), 5, "attention", batches, budget=70)
    ranks = {name: len(basis.A) for name, basis in model.adapted.bases.items()}
    spectra = {name: torch.linalg.svdvals(gradient)[:5].tolist() for name, gradient in summed(model, batches).items()}
    assert ranks == P.allocate_ranks(spectra, 70)
    assert len(set(ranks.values())) > 1
    assert model.sites.size == sum(rank**2 for rank in ranks.values()) <= 70


def summed(model, batches):
    """The gradient of the log likelihood by every adapted weight, by plain autograd."""
    weights = {name: module.weight.requires_grad_(True) for name, module in model.modules.items()}
    total = 0.0
    for batch in batches:
        inputs = {k: v for k, v in batch.items() if k != "labels"}
        outputs = torch.func.functional_call(model.network, dict(model.head_start), kwargs=inputs)
        total = total + outputs.logits.log_softmax(-1).gather(1, batch["labels"][:, None]).sum()
    return dict(zip(weights, torch.autograd.grad(total, list(weights.values())), strict=True))


@pytest.mark.filterwarnings("ignore::pyro_lrblora.ScalesNotConverged")
@pytest.mark.parametrize("guide", [lb.guides.LowRankPrecision(2), lb.guides.Diagonal()], ids=repr)
@pytest.mark.parametrize("projection", [P.Gradient(), P.Hybrid((P.SVD(), P.Gradient()), (1, 1))], ids=repr)
def test_ranks_that_differ_go_all_the_way(projection, guide, tmp_path):
    """Fit, sites, covariance, prediction, files and ArviZ with several sites."""
    model = prepared(projection, 4, "attention", budget=60)
    ranks = {len(basis.A) for basis in model.adapted.bases.values()}
    assert len(ranks) > 1
    assert min(ranks) >= (2 if isinstance(projection, P.Hybrid) else 1)
    posterior = lb.fit(model, token_batches(), guide=guide, epochs=2, progress=False)
    draws = posterior.sample(3, seed=0)
    assert {name: value.shape[1:] for name, value in draws.items()} == dict(model.sites.shapes)
    assert set(draws) == {f"R_{rank}" for rank in ranks}
    assert posterior.covariance().variance.shape == (model.sites.size,)
    assert not any((value == 0).all() for value in posterior.mean().values())
    posterior.save(tmp_path)
    loaded = lb.Posterior.load(tmp_path, tiny_bert())
    assert loaded.model.adapter == model.adapter
    expected, found = (lb.predict(p, token_batches(), draws=4, seed=1).logits for p in (posterior, loaded))
    assert torch.equal(expected, found)
    tree = loaded.to_arviz(token_batches(), draws=4)
    for site, modules in model.adapted.members.items():
        assert tree.posterior[site].shape == (1, 4, *model.sites.shapes[site])
        assert tree.posterior[site][f"module_{site}"].values.tolist() == modules


def test_a_budget_below_rank_one_everywhere():
    with pytest.raises(ValueError, match="each of 8 modules rank 1, got budget=7; write budget=8 or more"):
        prepared(P.Gradient(), 4, "attention", budget=7)


@pytest.mark.parametrize(
    "projection",
    [P.SVD(), P.WhitenedSVD(), P.Gradient(label_free=True), P.Hybrid((P.SVD(), P.DCT()), (1, 1))],
    ids=repr,
)
def test_a_budget_needs_summed_gradients(projection):
    with pytest.raises(ValueError, match=r"sums gradients under the labels for budget=100, .*write .*Gradient\(\)"):
        lb.LoRAXS(4, projection, budget=100)
