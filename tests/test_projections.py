"""Projections: orthonormal, spanning what they say, and the data-driven ones against per-row gradients."""

import pytest
import torch
from conftest import tiny_bert, token_batches
from hypothesis import given, settings
from hypothesis import strategies as st

import pyro_lrblora as lb

P = lb.projections
EVERY = [P.SVD(), P.SVD(exact=True), P.Random(), P.Gradient(), P.Gradient(label_free=True)]


@pytest.mark.parametrize("projection", EVERY, ids=repr)
def test_orthonormal(projection):
    model = lb.BayesianLoRA(tiny_bert(), lb.LoRAXS(4, projection, "all-linear")).prepare(token_batches())
    assert len(model.adapted.bases) == 13  # 6 per layer, and the pooler
    for basis in model.adapted.bases.values():
        torch.testing.assert_close(basis.A @ basis.A.T, torch.eye(4), atol=1e-5, rtol=0)
        torch.testing.assert_close(basis.B.T @ basis.B, torch.eye(4), atol=1e-5, rtol=0)


@settings(deadline=None, max_examples=25)
@given(m=st.integers(3, 90), n=st.integers(3, 90), seed=st.integers(0, 50))
def test_svd_spans_the_leading_singular_vectors(m, n, seed):
    g = torch.Generator().manual_seed(seed)
    rank = min(3, m, n)
    u, _ = torch.linalg.qr(torch.randn(m, min(m, n), generator=g))
    v, _ = torch.linalg.qr(torch.randn(n, min(m, n), generator=g))
    weight = u @ torch.diag(0.7 ** torch.arange(min(m, n))) @ v.T
    for exact in (True, False):
        basis = P.SVD(exact=exact)(weight, rank, {}, torch.Generator().manual_seed(0))
        # B B' W A' A is the best rank-r approximation.
        best = u[:, :rank] @ torch.diag(0.7 ** torch.arange(rank)) @ v[:, :rank].T
        torch.testing.assert_close(basis.B @ basis.B.T @ weight @ basis.A.T @ basis.A, best, atol=1e-3, rtol=0)


def test_papers_form_absorbs_the_singular_values():
    weight = torch.randn(9, 7)
    basis = P.SVD(exact=True, absorb_singular_values=True)(weight, 7, {}, torch.Generator())
    torch.testing.assert_close(basis.B @ basis.A, weight, atol=1e-4, rtol=1e-4)


def row_gradients(model, batches, labels):
    """G (m, n) of every row and label by plain autograd on the weight, a row at a time: the slow way."""
    name, module = next(iter(model.modules.items()))
    head = dict(model.head_start)
    rows = []
    for batch in batches:
        for i in range(len(batch["labels"])):
            row = {k: v[i : i + 1] for k, v in batch.items() if k != "labels"}
            for label in labels(batch["labels"][i]):
                module.weight.requires_grad_(True)
                outputs = torch.func.functional_call(model.network, head, kwargs=row)
                log_prob = outputs.logits.log_softmax(-1)[0, label]
                (gradient,) = torch.autograd.grad(log_prob, module.weight)
                rows.append((float(log_prob.detach().exp()), gradient))
    return name, rows


def same_span(a, b):
    """Columns of a and b span the same space."""
    torch.testing.assert_close(a @ a.T, b @ b.T, atol=2e-3, rtol=0)


def test_gradient_is_the_summed_gradient_at_the_probed_head():
    batches = token_batches(24)
    model = lb.BayesianLoRA(tiny_bert(), lb.LoRAXS(2, P.Gradient(), ["query"])).prepare(batches)
    name, rows = row_gradients(model, batches, lambda label: [int(label)])
    u, _, vh = torch.linalg.svd(sum(gradient for _, gradient in rows))
    same_span(model.adapted.bases[name].B, u[:, :2])
    same_span(model.adapted.bases[name].A.T, vh[:2].T)


def test_label_free_gradient_uses_the_models_own_labels():
    batches = token_batches(24)
    model = lb.BayesianLoRA(tiny_bert(), lb.LoRAXS(2, P.Gradient(label_free=True), ["query"])).prepare(batches)
    name, rows = row_gradients(model, batches, lambda _: range(3))
    left = sum(p * gradient @ gradient.T for p, gradient in rows)
    right = sum(p * gradient.T @ gradient for p, gradient in rows)
    same_span(model.adapted.bases[name].B, torch.linalg.eigh(left).eigenvectors[:, -2:])
    same_span(model.adapted.bases[name].A.T, torch.linalg.eigh(right).eigenvectors[:, -2:])
    # ... and the labels of the data do not matter once the head is given.
    shuffled = [batch | {"labels": batch["labels"].flip(0)} for batch in batches]
    again = lb.BayesianLoRA(tiny_bert(), model.adapter, head=lb.FixedHead(model.head_start)).prepare(shuffled)
    same_span(model.adapted.bases[name].A.T, again.adapted.bases[name].A.T)


def test_random_is_uniform_over_directions():
    """The first column of a Haar frame has second moment I / m."""
    g = torch.Generator().manual_seed(0)
    columns = torch.stack([P.Random()(torch.zeros(5, 6), 2, {}, g).B[:, 0] for _ in range(4000)])
    torch.testing.assert_close(columns.T @ columns / 4000, torch.eye(5) / 5, atol=0.02, rtol=0)
    assert columns.mean(0).abs().max() < 0.04


def test_same_seed_same_subspace():
    subspace = lambda seed: lb.BayesianLoRA(tiny_bert(), lb.LoRAXS(3, P.Random())).prepare(token_batches(), seed=seed)
    first, again, other = (subspace(seed).adapted.tensors() for seed in (1, 1, 2))
    assert all(torch.equal(first[k], again[k]) for k in first)
    assert not any(torch.equal(first[k], other[k]) for k in first)


def test_modules_the_logits_do_not_read_are_named():
    """Mean pooling ignores BERT's pooler: a basis all the same, and a warning."""
    from pyro_lrblora.networks import MeanPoolClassifier

    network = MeanPoolClassifier(tiny_bert().bert, 3)
    model = lb.BayesianLoRA(network, lb.LoRAXS(2, P.Gradient(), "all-linear"))
    with pytest.warns(UserWarning, match=r"do not depend on \['encoder.pooler.dense'\]"):
        prepared = model.prepare(token_batches())
    basis = prepared.adapted.bases["encoder.pooler.dense"]
    torch.testing.assert_close(basis.A @ basis.A.T, torch.eye(2))
