"""The Fisher matrix against dense references."""

import torch
from conftest import LinearGaussian, tiny_bert, token_batches

import pyro_lrblora as lb
from pyro_lrblora.fisher import fisher


def test_fisher_of_a_linear_gaussian_model_is_exact():
    """Against J' J / noise^2, minibatches included."""
    problem = LinearGaussian(rank=4)
    estimated = fisher(problem.model, problem.batches(8), torch.zeros(problem.size), rank=16)
    matrix = (estimated.vectors * estimated.values) @ estimated.vectors.T
    torch.testing.assert_close(matrix.double(), problem.fisher, rtol=1e-3, atol=1e-3 * float(problem.fisher.max()))
    torch.testing.assert_close(estimated.diagonal.double(), problem.fisher.diagonal(), rtol=1e-4, atol=1e-5)


def test_a_part_of_the_rows_is_scaled_up():
    problem = LinearGaussian(rank=2)
    half = fisher(problem.model, problem.batches(8), torch.zeros(problem.size), rank=4, rows=12)
    part = problem.model.with_size(12)
    exact = fisher(part, [{k: v[:12] for k, v in problem.batch.items()}], torch.zeros(problem.size), rank=4)
    torch.testing.assert_close(half.diagonal, 2 * exact.diagonal)


def test_a_predicted_scale_adds_its_own_information():
    """Normal(R x, exp(R x)): the Fisher in (loc, log scale) is diag(1 / scale^2, 2)."""
    from pyro_lrblora.scores import row_gradients

    latents = torch.tensor([[0.3, -0.2], [0.1, 0.5]], requires_grad=True)
    labels = torch.distributions.Normal(latents[:, 0] + latents[:, 1], (2 * latents[:, 1]).exp())
    total = sum(torch.einsum("bd,be->bde", g, g) for g in row_gradients(labels, None, latents))
    loc, log_scale = torch.tensor([1.0, 1.0]), torch.tensor([0.0, 2.0])
    for row, scale in zip(total, labels.scale.detach(), strict=True):
        expected = torch.outer(loc, loc) / scale**2 + 2 * torch.outer(log_scale, log_scale)
        torch.testing.assert_close(row, expected)


def test_fisher_of_a_classifier_is_exact():
    """Enumerated labels: sum_b sum_c p_bc g g' against autograd's Jacobian of the log probabilities."""
    batches = token_batches(16)
    model = lb.BayesianLoRA(tiny_bert(), lb.LoRAXS(2), size=16)
    at = 0.1 * torch.randn(model.sites.size)

    def log_probs(flat, batch):
        return model.outputs(batch, model.sites.split(flat), model.head_start).logits.log_softmax(-1)

    exact = torch.zeros(model.sites.size, model.sites.size)
    for batch in batches:
        jacobian = torch.autograd.functional.jacobian(lambda flat, batch=batch: log_probs(flat, batch), at)
        exact += torch.einsum("bc,bcd,bce->de", log_probs(at, batch).exp(), jacobian, jacobian)
    estimated = fisher(model, batches, at, rank=32)
    torch.testing.assert_close(estimated.diagonal, exact.diagonal(), rtol=1e-3, atol=1e-5)
    torch.testing.assert_close(
        (estimated.vectors * estimated.values) @ estimated.vectors.T,
        exact,
        rtol=1e-2,
        atol=1e-3 * float(exact.max()),
    )
    values = torch.linalg.eigvalsh(exact).flip(0)[:5]
    torch.testing.assert_close(fisher(model, batches, at, rank=5).values, values, rtol=2e-2, atol=0)
