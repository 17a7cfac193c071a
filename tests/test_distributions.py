"""Distributions and their covariances against dense references in float64."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from pyro.distributions import Normal, TransformedDistribution
from pyro.distributions.transforms import ReshapeTransform
from scipy.stats import matrix_normal
from torch.distributions import Categorical, Independent, MixtureSameFamily, MultivariateNormal, kl_divergence

from pyro_lrblora.distributions import (
    Blocks,
    EqualMixture,
    FullRankNormal,
    LowRankNormal,
    LowRankPrecisionNormal,
    MatrixNormal,
    RotatedNormal,
)

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
def test_float32_with_nearly_collinear_columns(family):
    """Eight long columns a thousandth apart: a float32 product with the inverse triangle is off by ten nats here."""
    torch.manual_seed(0)
    factor = 100 * (torch.randn(15_000, 1) + 1e-3 * torch.randn(15_000, 8))
    loc, diagonal = torch.zeros(15_000), torch.rand(15_000) + 0.5
    single, double = family(loc, factor, diagonal), family(loc.double(), factor.double(), diagonal.double())
    x = double.sample((4,)).float()
    assert (single.log_prob(x).double() - double.log_prob(x.double())).abs().max() < 0.3
    torch.testing.assert_close(single.variance.double(), double.variance, rtol=1e-5, atol=0.0)


@pytest.mark.parametrize("family", FAMILIES)
def test_gradients_against_finite_differences(family):
    q = random_normal(family, 5, 2, 1.0, 0)
    parameters = tuple(p.clone().requires_grad_() for p in (q.loc, q._factor, q._diagonal))

    def everything(*parameters):
        q = family(*parameters)
        torch.manual_seed(0)
        return q.log_prob(torch.arange(5.0, dtype=torch.float64)), q.entropy(), q.variance, q.rsample((2,))

    assert torch.autograd.gradcheck(everything, parameters)


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
    with pytest.raises(ValueError, match="expected a diagonal of shape"):
        family(torch.zeros(3), torch.zeros(3, 2), torch.ones(1))
    with pytest.raises(ValueError):
        family(torch.zeros(3), torch.zeros(3, 2), -torch.ones(3), validate_args=True)


# --- normals by their root, blocks, and mixtures


def _tril(new, *shape):
    """Lower triangular with a positive diagonal; well conditioned, for the dense reference's sake."""
    root = new(*shape, shape[-1])
    return 0.3 * root.tril(-1) + torch.diag_embed(root.diagonal(dim1=-2, dim2=-1).exp())


def kron(left, right):
    """Kronecker products of the last two axes."""
    rows, columns = left.shape[-2] * right.shape[-2], left.shape[-1] * right.shape[-1]
    return torch.einsum("...ij,...kl->...ikjl", left, right).reshape(*left.shape[:-2], rows, columns)


def root_normal(family, rows, columns, seed, batch=()):
    """A random member of a family and its covariance, from the family's definition in words, not from its own root."""
    g = torch.Generator().manual_seed(seed)
    new = lambda *shape: torch.randn(*batch, *shape, generator=g, dtype=torch.float64)
    if family is FullRankNormal:
        root = _tril(new, rows * columns)
        return FullRankNormal(new(rows * columns), root), root @ root.mT
    loc = new(rows, columns)
    if family is MatrixNormal:
        row, column = _tril(new, rows), _tril(new, columns)
        return MatrixNormal(loc, row, column), kron(row @ row.mT, column @ column.mT)
    left, right = torch.linalg.qr(new(rows, rows)).Q, torch.linalg.qr(new(columns, columns)).Q
    scale = new(rows, columns).exp()
    basis = kron(left, right)
    return RotatedNormal(loc, left, right, scale), (basis * scale.square().reshape(*batch, 1, -1)) @ basis.mT


def low_rank_blocks(family, rows, columns, seed, batch):
    g = torch.Generator().manual_seed(seed)
    new = lambda *shape: torch.randn(*batch, *shape, generator=g, dtype=torch.float64)
    factor, diagonal = new(rows * columns, 2), new(rows * columns).exp()
    matrix = torch.diag_embed(diagonal) + factor @ factor.mT
    covariance = matrix if family is LowRankNormal else torch.linalg.inv(matrix)
    return family(new(rows * columns), factor, diagonal), covariance


def two_blocks(family, rows, columns, seed):
    """Blocks of three modules of the family and two of LowRankNormal, and their MultivariateNormal."""
    make = low_rank_blocks if family in FAMILIES else root_normal
    first, first_covariance = make(family, rows, columns, seed, batch=(3,))
    second, second_covariance = low_rank_blocks(LowRankNormal, 2, 2, seed + 1, (2,))
    loc = torch.cat([first.loc.flatten(), second.loc.flatten()])
    covariance = torch.block_diag(*first_covariance, *second_covariance)
    return Blocks([first, second]), MultivariateNormal(loc, covariance)


ROOTS = [FullRankNormal, MatrixNormal, RotatedNormal]
close = lambda a, b: torch.testing.assert_close(a, b, rtol=1e-7, atol=1e-7)


def check_against_dense(q, reference, seed):
    """Density, entropy, KL to a diagonal normal and covariance of q, its event axes flattened."""
    size = reference.event_shape[0]
    g = torch.Generator().manual_seed(seed)
    x, y = torch.randn(2, 3, size, generator=g, dtype=torch.float64)
    shaped = lambda value: value.reshape(*value.shape[:-1], *q.event_shape)
    close(q.log_prob(shaped(x)), reference.log_prob(x))
    close(q.entropy(), reference.entropy())
    close(q.mean.flatten(), reference.mean)
    close(q.variance.flatten(), reference.variance)
    scale = 0.3 + y[0].abs()
    diagonal = Independent(Normal(shaped(y[1]), shaped(scale)), len(q.event_shape))
    close(kl_divergence(q, diagonal), kl_divergence(reference, MultivariateNormal(y[1], torch.diag(scale.square()))))
    covariance = q.covariance()
    close(covariance.dense(), reference.covariance_matrix)
    close(covariance.variance, reference.variance)
    several = torch.stack([x, y])
    close(covariance.times(several), several @ reference.covariance_matrix)


sizes = given(rows=st.integers(1, 4), columns=st.integers(1, 4), seed=st.integers(0, 99))


@pytest.mark.parametrize("family", ROOTS)
@settings(deadline=None, max_examples=25)
@sizes
def test_root_normals_match_dense(family, rows, columns, seed):
    q, covariance = root_normal(family, rows, columns, seed)
    check_against_dense(q, MultivariateNormal(q.loc.flatten(), covariance), seed)


@pytest.mark.parametrize("family", [*FAMILIES, *ROOTS])
@settings(deadline=None, max_examples=25)
@sizes
def test_blocks_match_dense(family, rows, columns, seed):
    check_against_dense(*two_blocks(family, rows, columns, seed), seed)


def test_matrix_normal_is_scipys():
    q, _ = root_normal(MatrixNormal, 3, 4, 0)
    row, column = q.row_tril @ q.row_tril.T, q.column_tril @ q.column_tril.T
    reference = matrix_normal(q.loc.numpy(), row.numpy(), column.numpy())
    x = torch.randn(5, 3, 4, dtype=torch.float64)
    close(q.log_prob(x), torch.from_numpy(reference.logpdf(x.numpy())))
    assert float(q.entropy()) == pytest.approx(reference.entropy(), rel=1e-9)


@pytest.mark.parametrize("family", ROOTS)
def test_root_normals_with_shared_parameters(family):
    """One loc for a batch of roots: shapes as if every member had its own."""
    batch, _ = root_normal(family, 2, 3, 0, batch=(4,))
    values = {name: getattr(batch, name) for name in family.arg_constraints}
    shared, own = (family(**(values | {"loc": loc})) for loc in (batch.loc[0], batch.loc[:1].expand_as(batch.loc)))
    x = torch.randn(batch.loc.shape, dtype=torch.float64)
    assert shared.batch_shape == (4,)
    for of in (lambda q: q.variance, lambda q: q.entropy(), lambda q: q.log_prob(x), lambda q: q.log_prob(x[0])):
        close(of(shared), of(own))
    assert shared.rsample((2,)).shape == (2, *x.shape)


def expandable(seed=0):
    for family in ROOTS:
        yield root_normal(family, 2, 3, seed)[0]
        yield two_blocks(family, 2, 3, seed)[0]
    g = torch.Generator().manual_seed(seed)
    new = lambda *shape: torch.randn(*shape, generator=g, dtype=torch.float64)
    yield EqualMixture(new(3, 5), new(3, 5).exp())


@pytest.mark.parametrize("q", list(expandable()), ids=lambda q: type(q).__name__)
def test_a_draw_per_row(q):
    """expand((B,)) and rsample: B draws, all different, each with the density and the moments of q."""
    rows = q.expand((4,))
    draws = rows.rsample()
    assert draws.shape == (4, *q.event_shape)
    assert len(draws.unique(dim=0)) == 4
    assert rows.rsample((2,)).shape == (2, 4, *q.event_shape)
    close(rows.log_prob(draws), q.log_prob(draws))
    close(rows.log_prob(draws[0]), q.log_prob(draws[0]).expand(4))
    assert rows.mean.shape == rows.variance.shape == draws.shape
    close(rows.variance[2], q.variance)
    if not isinstance(q, EqualMixture):
        close(rows.entropy(), q.entropy().expand(4))
        normal = Normal(torch.zeros_like(draws), 1.0).to_event(len(q.event_shape))
        close(kl_divergence(rows, normal), kl_divergence(q, normal)[0].expand(4))


@pytest.mark.parametrize("family", [*FAMILIES, *ROOTS])
def test_draws_of_blocks_have_the_covariance(family):
    q, reference = two_blocks(family, 2, 2, 3)
    draws = q.expand((50_000,)).rsample()
    sd = reference.variance.sqrt()
    bound = 5 * (2**0.5) * sd[:, None] * sd / 50_000**0.5
    assert ((draws.T.cov() - reference.covariance_matrix).abs() < bound).all()
    assert ((draws.mean(0) - reference.mean).abs() < 5 * sd / 50_000**0.5).all()


@pytest.mark.parametrize("family", ROOTS)
def test_root_draws_are_reparameterised(family):
    q, _ = root_normal(family, 2, 2, 0)
    parameters = {name: getattr(q, name).requires_grad_() for name in family.arg_constraints}
    gradients = torch.autograd.grad(family(**parameters).rsample((7,)).square().sum(), list(parameters.values()))
    assert all(gradient.abs().sum() > 0 for gradient in gradients)


@pytest.mark.parametrize("family", ROOTS)
def test_root_normals_in_float32(family):
    """Within 1e-3 nats per latent of float64 at D = 576, standard deviations from e^-4 to e^4."""
    q, _ = root_normal(family, 24, 24, 0)
    shrink = lambda name, value: 0.05 * value.tril(-1) + torch.diag_embed(value.diagonal(dim1=-2, dim2=-1))
    parameters = {name: getattr(q, name) for name in family.arg_constraints}
    parameters = {name: shrink(name, value) if "tril" in name else value for name, value in parameters.items()}
    double, single = family(**parameters), family(**{name: value.float() for name, value in parameters.items()})
    x = double.rsample((4,)).float()
    assert (single.log_prob(x).double() - double.log_prob(x.double())).abs().max() < 0.576
    assert (single.entropy().double() - double.entropy()).abs() < 0.05
    prior = lambda loc: Independent(Normal(torch.zeros_like(loc), 3.0), loc.dim())
    exact = kl_divergence(double, prior(double.loc))
    assert (kl_divergence(single, prior(single.loc)).double() / exact - 1).abs() < 1e-4


@settings(deadline=None, max_examples=25)
@given(components=st.integers(1, 4), dim=st.integers(1, 5), seed=st.integers(0, 99))
def test_mixture_matches_torch(components, dim, seed):
    g = torch.Generator().manual_seed(seed)
    new = lambda *shape: torch.randn(*shape, generator=g, dtype=torch.float64)
    q = EqualMixture(new(components, dim), new(components, dim).exp())
    weights = torch.full((components,), 1 / components, dtype=torch.float64)
    reference = MixtureSameFamily(Categorical(weights), Normal(q.loc, q.scale).to_event(1))
    x = new(6, dim)
    close(q.log_prob(x), reference.log_prob(x))
    close(q.mean, reference.mean)
    close(q.variance, reference.variance)


def test_mixture_draws():
    """The density's moments, and every component its share in any one batch of draws."""
    q = EqualMixture(torch.tensor([[-5.0, 0.0], [0.0, 3.0], [5.0, 0.0]]), torch.tensor([[1.0, 0.1]] * 3))
    draws = q.rsample((30_000,))
    assert ((draws.mean(0) - q.mean).abs() < 4 * (q.variance / 30_000).sqrt()).all()
    torch.testing.assert_close(draws.var(0), q.variance, rtol=0.03, atol=0)
    nearest = lambda draws: torch.cdist(draws, q.loc).argmin(-1).bincount(minlength=3)
    apart = EqualMixture(q.loc, 0.1 * q.scale)
    assert (nearest(apart.expand((9,)).rsample()) == 3).all()
    single = torch.stack([apart.rsample() for _ in range(600)])
    assert ((nearest(single) - 200).abs() < 60).all()


def test_mixture_variance_far_from_zero_in_float32():
    """Subtracting the squared mean from the mean square would leave nothing of it."""
    q = EqualMixture(torch.full((2, 3), 1000.0), torch.full((2, 3), 0.01))
    torch.testing.assert_close(q.variance, torch.full((3,), 1e-4))


def test_a_variance_below_rounding_is_not_zero():
    """As many factors as dimensions, and data 10^9 times as sharp as the prior."""
    q = LowRankPrecisionNormal(torch.zeros(4), 3e4 * torch.eye(4), torch.ones(4))
    assert (q.variance > 0).all()
    assert q.variance.max() < 1e-6
