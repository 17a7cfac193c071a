"""LowRankNormal and LowRankPrecisionNormal against dense references in float64."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from pyro.distributions import TransformedDistribution
from pyro.distributions.transforms import ReshapeTransform
from torch.distributions import Independent, MultivariateNormal, Normal, kl_divergence

from pyro_lrblora.distributions import LowRankNormal, LowRankPrecisionNormal

FAMILIES = [LowRankNormal, LowRankPrecisionNormal]


def dense(q) -> MultivariateNormal:
    """The same distribution from the definition of its family, not from its own covariance."""
    factor, diagonal = q._factor, q._diagonal
    matrix = torch.diag(diagonal) + factor @ factor.T
    if isinstance(q, LowRankNormal):
        return MultivariateNormal(q.loc, covariance_matrix=matrix)
    return MultivariateNormal(q.loc, precision_matrix=matrix)


def random_normal(family, dim, rank, spread, seed):
    g = torch.Generator().manual_seed(seed)
    new = lambda *shape: torch.randn(*shape, generator=g, dtype=torch.float64)
    return family(new(dim), spread * new(dim, rank), new(dim).exp())


cases = given(
    dim=st.integers(1, 12),
    rank=st.integers(1, 14),
    spread=st.sampled_from([0.0, 0.1, 1.0, 30.0]),
    seed=st.integers(0, 99),
)


@pytest.mark.parametrize("family", FAMILIES)
@settings(deadline=None, max_examples=40)
@cases
def test_matches_dense(family, dim, rank, spread, seed):
    q = random_normal(family, dim, rank, spread, seed)
    p = random_normal(family, dim, rank, min(spread, 1.0), seed + 1000)
    reference = dense(q)
    x = torch.randn(3, dim, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    close = lambda a, b: torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-6)
    close(q.log_prob(x), reference.log_prob(x))
    close(q.entropy(), reference.entropy())
    close(q.variance, reference.variance)
    close(q.covariance_matrix, reference.covariance_matrix)
    close(kl_divergence(q, p), kl_divergence(reference, dense(p)))
    diagonal = Normal(x[0], 0.3 + x[1].abs())
    close(
        kl_divergence(q, Independent(diagonal, 1)),
        kl_divergence(reference, MultivariateNormal(x[0], torch.diag(diagonal.variance))),
    )


@pytest.mark.parametrize("family", FAMILIES)
def test_kl_to_itself_is_zero(family):
    q = random_normal(family, 40, 5, 3.0, 0)
    assert abs(float(kl_divergence(q, q))) < 1e-9


@pytest.mark.parametrize("family", FAMILIES)
def test_draws_have_the_covariance(family):
    q = random_normal(family, 5, 2, 1.5, 3)
    draws = q.rsample((200_000,))
    # Four standard errors of a sample covariance entry.
    sd = q.variance.sqrt()
    bound = 4 * (2**0.5) * sd[:, None] * sd / 200_000**0.5
    assert ((draws.T.cov() - q.covariance_matrix).abs() < bound).all()
    assert ((draws.mean(0) - q.loc).abs() < 4 * sd / 200_000**0.5).all()


@pytest.mark.parametrize("family", FAMILIES)
def test_draws_are_reparameterised(family):
    q = random_normal(family, 4, 2, 1.0, 0)
    parameters = [q.loc, q._factor, q._diagonal]
    for parameter in parameters:
        parameter.requires_grad_()
    gradients = torch.autograd.grad(family(*parameters).rsample((7,)).square().sum(), parameters)
    assert all(gradient.abs().sum() > 0 for gradient in gradients)


@pytest.mark.parametrize("family", FAMILIES)
def test_float32_at_fifteen_thousand_dimensions(family):
    """Within 0.1 nat of float64 with a factor of 30 times the diagonal, where torch's own form is off by hundreds."""
    torch.manual_seed(0)
    loc, factor, diagonal = torch.randn(15_000), 30 * torch.randn(15_000, 8), torch.rand(15_000) + 0.5
    single, double = family(loc, factor, diagonal), family(loc.double(), factor.double(), diagonal.double())
    x = double.sample((4,)).float()
    assert (single.log_prob(x).double() - double.log_prob(x.double())).abs().max() < 0.1
    assert (single.entropy().double() - double.entropy()).abs() < 0.1
    prior = lambda z: Independent(Normal(torch.zeros_like(z), torch.full_like(z, 30.0)), 1)
    exact = kl_divergence(double, prior(loc.double()))
    assert (kl_divergence(single, prior(loc)).double() - exact).abs() < 0.1


@pytest.mark.parametrize("family", FAMILIES)
def test_batches_and_expand(family):
    g = torch.Generator().manual_seed(0)
    new = lambda *shape: torch.randn(*shape, generator=g, dtype=torch.float64)
    loc, factor, diagonal = new(3, 5), new(3, 5, 2), new(3, 5).exp()
    batch = family(loc, factor, diagonal)
    x = new(3, 5)
    single = torch.stack([family(loc[i], factor[i], diagonal[i]).log_prob(x[i]) for i in range(3)])
    torch.testing.assert_close(batch.log_prob(x), single)
    one = family(loc[0], factor[0], diagonal[0]).expand((4,))
    assert one.rsample().shape == (4, 5)
    assert one.rsample((2,)).shape == (2, 4, 5)
    assert one.log_prob(x[0]).shape == (4,)
    assert one.entropy().shape == (4,)


def test_reshapes_to_a_site():
    """As one distribution over (L, r, r)."""
    q = random_normal(LowRankNormal, 18, 3, 1.0, 0)
    site = TransformedDistribution(q, ReshapeTransform((18,), (2, 3, 3)))
    draw = site.rsample((4,))
    assert draw.shape == (4, 2, 3, 3)
    torch.testing.assert_close(site.log_prob(draw), q.log_prob(draw.reshape(4, 18)))


@pytest.mark.parametrize("family", FAMILIES)
def test_shapes_that_do_not_fit(family):
    with pytest.raises(ValueError, match="expected a factor of shape"):
        family(torch.zeros(3), torch.zeros(4, 2), torch.ones(3))
    with pytest.raises(ValueError):
        family(torch.zeros(3), torch.zeros(3, 2), -torch.ones(3), validate_args=True)
