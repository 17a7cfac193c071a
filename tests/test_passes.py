"""Long passes over the data show a bar, short ones and those that were asked to be silent do not."""

import pytest
from conftest import token_batches

import pyro_lrblora as lb
from pyro_lrblora import evidence, passes
from pyro_lrblora.guides import Diagonal


@pytest.fixture
def fitted(bert):
    """A posterior, and the rows it was fitted to."""
    rows = token_batches(16)
    model = lb.BayesianLoRA(bert, lb.LoRAXS(2))
    return lb.fit(model, rows, guide=Diagonal(), epochs=1, warm_start=False, progress=False), rows


CALLS = {
    "predict": lambda posterior, rows, **how: lb.predict(posterior, rows, draws=2, **how),
    "linearised": lambda posterior, rows, **how: lb.predict(posterior, rows, method="linearised", **how),
    "elbo": lambda posterior, rows, **how: evidence.elbo(posterior, rows, draws=2, **how),
    "diagnose": lambda posterior, rows, **how: lb.diagnose(
        posterior, rows, train=rows, validation=rows, outside=rows, draws=8, evidence_draws=30, **how
    ),
    "compare": lambda posterior, rows, **how: lb.compare(
        {"a": posterior}, rows, train=rows, validation=rows, draws=2, evidence_draws=30, **how
    ),
}


@pytest.mark.parametrize("name", CALLS)
def test_a_long_pass_has_a_bar_that_can_be_left_out(fitted, name, capsys, monkeypatch):
    monkeypatch.setattr(passes, "_SHOWN_AFTER", 1e6)
    CALLS[name](*fitted)
    assert capsys.readouterr().err == ""
    monkeypatch.setattr(passes, "_SHOWN_AFTER", 0)
    CALLS[name](*fitted)
    assert "batch" in capsys.readouterr().err
    CALLS[name](*fitted, progress=False)
    assert capsys.readouterr().err == ""
