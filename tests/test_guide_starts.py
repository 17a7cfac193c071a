"""Where each family begins: the prior, the base, another posterior, the curvature's best. And a step at D = 15,000."""

import pytest
import torch
from conftest import LinearGaussian, LinearNetwork, label, tiny_bert, token_batches
from pyro.infer.autoguide import AutoNormal
from torch import nn
from torch.distributions import Independent, Normal, kl_divergence

import pyro_lrblora as lb
from pyro_lrblora.distributions import LowRankNormal, LowRankPrecisionNormal
from pyro_lrblora.fisher import Fisher, fisher
from pyro_lrblora.guides import Curvature
from pyro_lrblora.guides.matrix_normal import kronecker_roots

G = lb.guides
GAUSSIAN = [
    G.Diagonal(start_scale=1.0),
    G.LowRank(2, start_scale=1.0),
    G.LowRankPrecision(2, start_scale=1.0),
    G.BlockLowRank(2, start_scale=1.0),
    G.BlockLowRank(2, "covariance", start_scale=1.0),
    G.FullRank(start_scale=1.0),
    G.FullRank(per_module=True, start_scale=1.0),
    G.MatrixNormal(start_scale=1.0),
    G.RotatedDiagonal(start_scale=1.0),
]
STANDING = lb.Rates(0, 0, 0, 0)


@pytest.fixture(scope="module")
def problem():
    return LinearGaussian(rank=2, modules=2)


def untrained(problem, guide, **options):
    return lb.fit(problem.model, [problem.batch], guide=guide, steps=1, rates=STANDING, progress=False, **options)


def test_a_fisher_matrix_with_many_more_columns_than_latents():
    """Seventy columns of a sketch for eight latents: all but eight are zero."""
    network = LinearNetwork(3, modules=2)
    model = lb.BayesianLoRA(network, lb.LoRAXS(2, lb.projections.Random(), "all-linear"), size=9)
    for seed in range(20):
        g = torch.Generator().manual_seed(seed)
        x, labels = torch.randn(9, 7, generator=g), torch.randint(3, (9,), generator=g)
        batches = [{"x": x[i : i + 4], "labels": labels[i : i + 4]} for i in (0, 4, 8)]
        found = fisher(model, batches, torch.zeros(8), rank=64)
        whole = fisher(model, [{"x": x, "labels": labels}], torch.zeros(8), rank=8)
        assert found.vectors.shape[1] <= 8
        first, second = ((f.vectors * f.values) @ f.vectors.T for f in (found, whole))
        torch.testing.assert_close(first, second, rtol=1e-3, atol=1e-4)


def exact_curvature(problem, at=None):
    """All of the Fisher matrix, by its eigenvectors."""
    values, vectors = torch.linalg.eigh(problem.fisher)
    values, vectors = values.clamp(min=0).flip(0).float(), vectors.flip(1).float()
    loc = torch.zeros(problem.size) if at is None else at
    fisher = Fisher((vectors.square() * values).sum(-1), vectors, values)
    return Curvature(loc, torch.full((problem.size,), 1 / 0.7**2), fisher)


@pytest.mark.parametrize("spec", [*GAUSSIAN, G.Flow(start_scale=1.0)], ids=label)
def test_start_scale_one_is_the_prior(problem, spec):
    posterior = untrained(problem, spec, warm_start=False)
    q, prior = posterior.guide.distribution(), Independent(Normal(torch.zeros(8), 0.7), 1)
    if isinstance(spec, G.Flow):
        x = prior.sample((50,))
        torch.testing.assert_close(q.log_prob(x), prior.log_prob(x))
    else:
        # A low-rank factor begins at 0.01, not at zero, where all columns would have one gradient.
        assert abs(kl_divergence(q, prior)) < 1e-5
        assert kl_divergence(untrained(problem, spec).guide.distribution(), prior) > 1


@pytest.mark.parametrize("spec", [*GAUSSIAN, G.Mixture(2), G.Mixture(2, "delta"), G.Flow()], ids=label)
@pytest.mark.parametrize("warm_start", [True, False], ids=["warm", "cold"])
def test_without_init_the_centre_is_the_base(problem, spec, warm_start):
    guide = untrained(problem, spec, warm_start=warm_start).guide
    centre = guide.loc if guide.loc.dim() == 1 else guide.loc.mean(0)
    assert centre.abs().max() < 1e-7


def test_a_chain_of_families_in_one_line_each(problem):
    """Delta, Diagonal, LowRank, LowRankPrecision: each starts at the last one's mean, as wide as it was."""
    delta = lb.fit(problem.model, [problem.batch], guide=G.Delta(), epochs=20, progress=False)
    diagonal = lb.fit(problem.model, [problem.batch], guide=G.Diagonal(), epochs=5, init=delta, progress=False)
    low_rank = untrained(problem, G.LowRank(2), init=diagonal, warm_start=False)
    precision = untrained(problem, G.LowRankPrecision(2), init=low_rank, warm_start=False)
    for before, after in ((diagonal, low_rank), (low_rank, precision)):
        assert torch.equal(before.mean()["R"], after.mean()["R"])
        torch.testing.assert_close(after.covariance().variance, before.covariance().variance, rtol=1e-3, atol=0)
    assert not torch.equal(untrained(problem, G.Diagonal(), init=delta).mean()["R"], torch.zeros(2, 2, 2))


@pytest.mark.parametrize("spec", [*GAUSSIAN, G.Flow(), G.Mixture(2)], ids=label)
def test_without_a_warm_start_the_widths_are_inits(problem, spec):
    """Far from the prior, some above it, and an outer product per module, which is all that MatrixNormal has."""
    init = untrained(problem, G.Diagonal())
    widths = torch.tensor([0.05, 0.1, 0.3, 0.6, 0.75, 1.5, 0.1, 0.2])
    init.guide.scale = widths
    init.guide.loc.data = torch.linspace(-1, 1, 8)
    started = untrained(problem, spec, init=init, warm_start=False)
    if isinstance(spec, G.Flow | G.Mixture):
        found = started.guide.scale.reshape(-1, 8)
        torch.testing.assert_close(found, widths.expand_as(found))
        return
    assert torch.equal(started.guide.loc, init.guide.loc)
    torch.testing.assert_close(started.covariance().variance, widths.square(), rtol=1e-3, atol=0)


@pytest.mark.parametrize("method", [AutoNormal, "laplace", "sgld"], ids=label)
def test_the_widths_of_any_init_are_kept(problem, method):
    data, options = [problem.batch], {"progress": False}
    if method == "laplace":
        init = lb.infer.laplace(problem.model, data, steps=5, **options)
    elif method == "sgld":
        init = lb.infer.sgld(problem.model.with_head("frozen"), data, draws=100, **options)
    else:
        init = lb.fit(problem.model, data, guide=method, steps=50, **options)
    started = lb.fit(
        init.model, data, guide=G.Diagonal(), init=init, warm_start=False, steps=1, rates=STANDING, **options
    )
    torch.testing.assert_close(started.covariance().variance, init.covariance().variance)


@pytest.mark.parametrize("guide", [G.Diagonal(), G.LowRankPrecision(2)], ids=label)
def test_scales_and_a_bayesian_head_start_where_init_left_them(guide):
    model = lb.BayesianLoRA(tiny_bert(), lb.LoRAXS(2), lb.priors.LayerScale(0.1), head="bayesian")
    data, moving = token_batches(16), lb.Rates(0.1, 0.1, 0.1, 0.1)
    init = lb.fit(model, data, guide=G.Diagonal(), rates=moving, steps=20, progress=False)
    again = lb.fit(init.model, data, guide=guide, init=init, steps=1, rates=STANDING, progress=False)
    before, after = init.guide.extra.state_dict(), again.guide.extra.state_dict()
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)
    point = lb.fit(model, data, guide=G.Delta(), rates=moving, steps=20, progress=False)
    again = lb.fit(point.model, data, guide=guide, init=point, steps=1, rates=STANDING, progress=False)
    values = again.guide.extra.median()
    torch.testing.assert_close(values["classifier.weight"], point.mean()["classifier.weight"])
    assert (point.mean()["R_scale"] < 0.08).all()
    torch.testing.assert_close(values["R_scale"], torch.full_like(values["R_scale"], 0.1))  # the prior's median


@pytest.mark.parametrize("guide", [G.Diagonal(), AutoNormal], ids=label)
def test_a_bayesian_head_of_another_number_of_classes_stays_behind(guide):
    fit = lambda classes, **options: lb.fit(
        lb.BayesianLoRA(tiny_bert(classes), lb.LoRAXS(2), head="bayesian"), token_batches(16, classes=classes),
        steps=1, progress=False, **options,
    )  # fmt: skip
    init = fit(3)
    started = fit(2, init=init, guide=guide, rates=STANDING)
    assert started.mean()["classifier.weight"].shape == (2, 16)
    torch.testing.assert_close(started.mean()["R"], init.mean()["R"])


@pytest.mark.parametrize("rank", [2, 4, 6])
def test_low_rank_precision_carries_over_whole(problem, rank):
    """Not its variances alone; more columns than before stay next to nothing."""
    init = untrained(problem, G.LowRankPrecision(2))
    init.guide.factor.data = torch.randn(8, 2)
    started = untrained(problem, G.LowRankPrecision(rank), init=init, warm_start=False)
    torch.testing.assert_close(started.covariance().dense(), init.covariance().dense(), rtol=1e-2, atol=1e-4)


@pytest.mark.parametrize("form", ["precision", "covariance"])
def test_more_columns_than_a_module_has_latents(problem, form):
    """Four latents per module: four columns say it all, and five do not hurt."""
    posterior = untrained(problem, G.BlockLowRank(5, form))
    assert posterior.guide.factor.shape == (8, 5)
    blocks = torch.block_diag(*(torch.linalg.inv(problem.precision[w, w]) for w in problem.model.sites.modules()))
    if form == "precision":
        torch.testing.assert_close(posterior.covariance().dense().double(), blocks, rtol=1e-2, atol=1e-3)


def test_full_rank_begins_at_the_inverse_of_the_curvature(problem):
    guide = G.FullRank()(problem.model)
    curvature = exact_curvature(problem, at=torch.linspace(-1, 1, 8))
    torch.testing.assert_close(curvature.dense(), problem.precision, rtol=1e-4, atol=1e-3)
    guide.begin(curvature)
    exact = torch.linalg.inv(curvature.dense())
    torch.testing.assert_close(guide.distribution().covariance().dense().double(), exact, rtol=1e-4, atol=1e-6)
    assert torch.equal(guide.distribution().mean, curvature.loc)
    per_module = G.FullRank(per_module=True)(problem.model)
    per_module.begin(curvature)
    blocks = torch.block_diag(*(torch.linalg.inv(problem.precision[w, w]) for w in problem.model.sites.modules()))
    dense = per_module.distribution().covariance().dense().double()
    torch.testing.assert_close(dense, blocks, rtol=1e-3, atol=1e-5)


def best_kronecker_kl(precision, rows, columns) -> float:
    """Least reverse KL of a Kronecker covariance to Normal(0, precision^-1), up to a constant, by L-BFGS."""
    best = float("inf")
    for seed in range(4):
        g = torch.Generator().manual_seed(seed)
        roots = [torch.randn(n, n, generator=g).double().requires_grad_() for n in (rows, columns)]
        optimiser = torch.optim.LBFGS(roots, max_iter=500, line_search_fn="strong_wolfe")

        def closure(optimiser=optimiser, roots=roots):
            optimiser.zero_grad()
            loss = kronecker_kl(precision, *roots)
            loss.backward()
            return loss

        best = min(best, float(optimiser.step(closure).detach()), float(closure().detach()))
    return best


def kronecker_kl(precision, row_root, column_root):
    covariance = torch.kron(row_root @ row_root.T, column_root @ column_root.T)
    half_log_det = len(column_root) * torch.linalg.slogdet(row_root).logabsdet
    half_log_det = half_log_det + len(row_root) * torch.linalg.slogdet(column_root).logabsdet
    return 0.5 * (precision * covariance).sum() - half_log_det


@pytest.mark.parametrize("spread", [0.1, 0.5])
def test_components_of_a_mixture_start_as_far_apart_as_asked_for(problem, spread):
    guide = G.Mixture(200, spread=spread)(problem.model)
    sd = guide.distribution().loc.std(0)
    torch.testing.assert_close(sd, torch.full_like(sd, spread * 0.7), rtol=0.2, atol=0)


@pytest.mark.parametrize(("rows", "columns", "rank"), [(3, 3, 2), (4, 2, 8), (2, 5, 3)])
def test_kronecker_roots_reach_the_least_kl(rows, columns, rank):
    size = rows * columns
    vectors, _ = torch.linalg.qr(torch.randn(size, rank))
    values = torch.linspace(40, 5, rank)
    diagonal = (vectors.square() * values).sum(-1) + torch.linspace(0, 2, size)
    # Prior precisions far apart, in no order of rows and columns, so that the diagonal part counts too.
    prior = torch.logspace(-1, 1.5, size)[torch.randperm(size)]
    curvature = Curvature(torch.zeros(size), prior, Fisher(diagonal, vectors, values))
    reached = float(kronecker_kl(curvature.dense(), *kronecker_roots(curvature, rows, columns)))
    best = best_kronecker_kl(curvature.dense(), rows, columns)
    assert best - 1e-6 < reached < best + 1e-5
    identity = float(kronecker_kl(curvature.dense(), torch.eye(rows).double(), torch.eye(columns).double()))
    assert identity > best + 1


@pytest.mark.parametrize("rank", [2, 8])
def test_low_rank_families_begin_at_the_laplace_approximation(problem, rank):
    """With a column per latent the precision is exact; with fewer, its diagonal still is."""
    guide = G.LowRankPrecision(rank)(problem.model)
    guide.begin(exact_curvature(problem))
    q = guide.distribution()
    assert isinstance(q, LowRankPrecisionNormal)
    precision = (torch.diag(q.precision_diag) + q.precision_factor @ q.precision_factor.T).double()
    torch.testing.assert_close(precision.diagonal(), problem.precision.diagonal(), rtol=1e-3, atol=1e-3)
    if rank == 8:
        torch.testing.assert_close(precision, problem.precision, rtol=1e-3, atol=1e-2)
    guide = G.LowRank(rank)(problem.model)
    guide.begin(exact_curvature(problem))
    assert isinstance(guide.distribution(), LowRankNormal)
    scale = problem.precision.diagonal().rsqrt()
    torch.testing.assert_close(guide.scale.detach().double(), scale, rtol=1e-4, atol=0)


# --- D = 15,000


class Wide(nn.Module):
    """Many Linear(64, 64) side by side: many latents, and a forward that costs nothing."""

    def __init__(self, modules: int = 235):
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(64, 64, bias=False) for _ in range(modules))

    def forward(self, x):
        return sum(layer(x) for layer in self.layers)[:, :3]


@pytest.fixture(scope="module")
def wide():
    torch.manual_seed(0)
    return lb.BayesianLoRA(Wide(), lb.LoRAXS(8, lb.projections.Random(), "all-linear"), size=2)


@pytest.mark.parametrize(
    "spec",
    [
        G.Diagonal(),
        G.LowRank(10),
        G.LowRankPrecision(10),
        G.BlockLowRank(4),
        G.BlockLowRank(4, "covariance"),
        G.FullRank(per_module=True),
        G.MatrixNormal(),
        G.RotatedDiagonal(),
        G.Flow(hidden=8),
        G.Mixture(3),
        G.Dropout(),
    ],
    ids=label,
)
def test_a_step_at_fifteen_thousand_latents(wide, spec):
    """No family but FullRank keeps more than its few vectors of length D; none makes a D x D matrix (0.9 GB)."""
    batch = {"x": torch.randn(2, 64), "labels": torch.tensor([0, 2])}
    largest = []
    with LargestTensor(largest):
        posterior = lb.fit(wide, [batch], guide=spec, steps=1, draws="shared", warm_start_rows=2, progress=False)
    assert wide.sites.size == 15_040
    assert torch.isfinite(torch.tensor(posterior.history[-1]["elbo"]))
    assert posterior.parameter_counts()["posterior"] <= 66 * 15_040
    assert max(largest) <= 15_040 * 512


class LargestTensor(torch.overrides.TorchFunctionMode):
    """Notes the number of elements of every tensor made."""

    def __init__(self, sizes: list[int]):
        super().__init__()
        self.sizes = sizes

    def __torch_function__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        if isinstance(result, torch.Tensor):
            self.sizes.append(result.untyped_storage().nbytes() // result.element_size())
        return result


def test_a_full_covariance_over_too_many_latents_is_refused(wide):
    with pytest.raises(ValueError, match=r"D=15040 .* needs 8\.1 GB; write FullRank\(per_module=True\).* 0\.035 GB"):
        G.FullRank()(wide)
    with pytest.raises(ValueError, match="D=15040"):
        lb.infer.laplace(wide, [{"x": torch.randn(2, 64), "labels": torch.tensor([0, 2])}], structure="full", steps=1)


@pytest.mark.parametrize("guide", [G.LowRankPrecision(2), G.Diagonal(), AutoNormal], ids=label)
@pytest.mark.parametrize("size", [1.0, 100.0])
def test_a_bayesian_head_starts_as_wide_as_its_prior_says(guide, size):
    """Features a hundred times as large are the same problem with weights a hundredth as large."""
    network = tiny_bert()
    network.bert.pooler.activation = nn.Hardtanh(-size, size)
    network.bert.pooler.dense.weight.data *= size
    model = lb.BayesianLoRA(network, lb.LoRAXS(2), head="bayesian").prepare(token_batches())
    posterior = lb.fit(model, token_batches(), guide=guide, steps=1, rates=STANDING, progress=False)
    draws = posterior.sample(2000, seed=0)
    for name, prior in posterior.model.head_prior().items():
        shares = draws[name].std(0) / prior.scale
        torch.testing.assert_close(shares, torch.full_like(shares, 0.1), rtol=0.1, atol=0)
