"""The guide that docs/concepts.md shows, as it stands there."""

from pathlib import Path

import pyro.distributions as dist
import pytest
import torch
from conftest import tiny_bert, token_batches
from test_svi import fit
from test_tutorials import blocks

import pyro_lrblora as lb

pytestmark = pytest.mark.filterwarnings("ignore::pyro_lrblora.ScalesNotConverged")
PAGE = Path(__file__).resolve().parents[1] / "docs/concepts.md"


def test_a_family_of_ones_own():
    (block,) = (block for block in blocks(PAGE, "python") if "class Isotropic" in block)
    names = {"lb": lb, "torch": torch, "dist": dist, "__name__": "concepts"}
    exec(compile(block.replace("posterior = lb.fit", "# "), str(PAGE), "exec"), names)
    posterior = fit(lb.BayesianLoRA(tiny_bert(), lb.LoRAXS(2)), guide=names["Isotropic"])
    assert posterior.covariance().variance.unique().numel() == 1
    assert lb.predict(posterior, token_batches(), draws=3).logits.shape == (3, 40, 3)
