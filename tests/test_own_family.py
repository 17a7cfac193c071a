"""The guide that docs/concepts.md shows."""

import pyro.distributions as dist
import pytest
import torch
from conftest import tiny_bert, token_batches
from test_svi import fit

import pyro_lrblora as lb

pytestmark = pytest.mark.filterwarnings("ignore::pyro_lrblora.ScalesNotConverged")


def test_a_family_of_ones_own():
    """What docs/concepts.md shows: a guide in fifteen lines, through fit, sample and predict."""

    class Isotropic(lb.guides.LatentGuide):
        symmetric = True

        def __init__(self, model):
            super().__init__(model)
            self.loc = torch.nn.Parameter(self.starting_point(model)[0])
            self.log_scale = torch.nn.Parameter(torch.tensor(-3.0))

        def distribution(self):
            return dist.Normal(self.loc, self.log_scale.exp()).to_event(1)

        def begin(self, curvature):
            self.loc.data.copy_(curvature.loc)
            self.log_scale.data.copy_(curvature.diagonal.rsqrt().log().mean())

    posterior = fit(lb.BayesianLoRA(tiny_bert(), lb.LoRAXS(2)), guide=Isotropic)
    assert posterior.covariance().variance.unique().numel() == 1
    assert lb.predict(posterior, token_batches(), draws=3).logits.shape == (3, 40, 3)
