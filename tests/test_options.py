"""Options that are handed on must arrive: each changes what it is said to change."""

import pytest
import torch
from conftest import LinearGaussian, tiny_bert, tiny_tokenizer, token_batches
from test_generation import wide_posterior
from test_tasks import tiny_llama

import pyro_lrblora as lb
from pyro_lrblora.evidence import importance
from pyro_lrblora.infer.swag import swag
from pyro_lrblora.prior_predictive import prior_predictive

pytestmark = pytest.mark.filterwarnings("ignore::pyro_lrblora.ScalesNotConverged")

STILL = lb.Rates(0, 0, 0, 0)


@pytest.fixture(scope="module")
def prepared():
    torch.manual_seed(0)
    model = lb.BayesianLoRA(tiny_bert(), lb.LoRAXS(2), lb.priors.Normal(0.5), tokenizer=tiny_tokenizer())
    return model.prepare(token_batches())


def mean_of(posterior):
    return posterior.model.sites.join(posterior.mean())


# --- of the point fit that comes first


@pytest.mark.parametrize(
    "option",
    [
        {"schedule": "constant"},
        {"warmup": 0.9},
        {"clip": 0.01},
        {"accumulate": 2},
        {"precision": "bf16"},
        {"rates": lb.Rates(loc=0.05)},
    ],
    ids=lambda option: next(iter(option)),
)
def test_the_point_epochs_before_a_fit_are_a_point_fit_with_its_options(prepared, option):
    ours = {"epochs": 1, "warm_start": False, "progress": False} | option
    point = lb.fit(
        prepared, token_batches(), guide=lb.guides.Delta(), epochs=3, warm_start=False, progress=False, **option
    )
    staged = lb.fit(prepared, token_batches(), map_epochs=3, **ours)
    by_hand = lb.fit(prepared, token_batches(), init=point, **ours)
    assert torch.equal(mean_of(staged), mean_of(by_hand))
    plain = lb.fit(prepared, token_batches(), guide=lb.guides.Delta(), epochs=3, warm_start=False, progress=False)
    assert not torch.equal(mean_of(point), mean_of(plain))


def test_the_warm_start_sees_as_many_rows_as_it_is_told(prepared):
    def scales(rows):
        posterior = lb.fit(
            prepared, token_batches(), guide=lb.guides.Diagonal(), steps=1, rates=STILL, warm_start_rows=rows,
            progress=False,
        )  # fmt: skip
        return posterior.covariance().variance

    assert torch.equal(scales(40), scales(None))
    assert not torch.equal(scales(8), scales(None))


@pytest.mark.parametrize("burn_in", [0, 2])
def test_swag_clips_while_it_fits_and_while_it_collects(burn_in):
    model, batches = LinearGaussian(rank=2).model, LinearGaussian(rank=2).batches(8)
    shared = {"columns": 2, "snapshots": 2, "every": 1, "rates": lb.Rates(loc=0.1), "progress": False}
    loose, tight = (swag(model, batches, clip=clip, burn_in=burn_in, **shared) for clip in (None, 1e-30))
    # Adam forgets the length of a gradient, unless it is below its epsilon.
    assert mean_of(loose).norm() > 0.1
    assert mean_of(tight).norm() < 1e-6


# --- precision


def test_evidence_in_another_precision_is_another_number(prepared):
    posterior = lb.fit(prepared, token_batches(), progress=False)
    full, half = (importance(posterior, token_batches(), 4, precision=precision) for precision in ("fp32", "bf16"))
    assert torch.equal(full.log_q, half.log_q)
    assert not torch.equal(full.log_likelihood, half.log_likelihood)
    assert (full.log_likelihood - half.log_likelihood).abs().max() < 0.1


def test_prior_predictions_in_another_precision_are_other_numbers(prepared):
    full, half = (
        prior_predictive(prepared, token_batches(), draws=3, precision=each).logits for each in ("fp32", "bf16")
    )
    assert not torch.equal(full, half)
    assert (full - half).abs().max() < 0.1


def test_text_is_written_in_the_precision_asked_for():
    posterior = wide_posterior(tiny_llama())
    full, half = (
        lb.generate(posterior, torch.tensor([[2, 3, 4]]), draws=2, max_new_tokens=3, precision=each)
        for each in ("fp32", "bf16")
    )
    assert not torch.equal(full.entropy, half.entropy)
    assert (full.entropy[:, 0] - half.entropy[:, 0]).abs().max() < 0.1


def test_validation_is_in_the_precision_of_the_fit(prepared):
    def nll(precision):
        return lb.fit(
            prepared, token_batches(), guide=lb.guides.Delta(), validation=token_batches(seed=1), epochs=1,
            rates=STILL, precision=precision, progress=False,
        ).history[0]["validation_nll"]  # fmt: skip

    assert nll("bf16") != nll("fp32")
    assert nll("bf16") == pytest.approx(nll("fp32"), abs=0.05)
