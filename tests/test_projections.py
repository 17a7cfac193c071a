"""Projections: orthonormal, spanning what they say, and the data-driven ones against per-row gradients."""

import numpy as np
import pytest
import scipy.fft
import torch
from conftest import tiny_bert, tiny_reviews, tiny_tokenizer, token_batches
from hypothesis import given, settings
from hypothesis import strategies as st
from test_tasks import tiny_t5, tiny_texts

import pyro_lrblora as lb
from pyro_lrblora.adapters.statistics import sum_statistics
from pyro_lrblora.networks import builtin_base

P = lb.projections
EVERY = [
    P.SVD(),
    P.SVD(exact=True),
    P.WhitenedSVD(),
    P.Random(),
    P.DCT(),
    P.Gradient(),
    P.Gradient(label_free=True),
    P.Hybrid((P.SVD(), P.Gradient()), (0.5, 0.5)),
    P.Hybrid((P.WhitenedSVD(), P.SVD(), P.DCT()), (0.5, 0.25, 0.25)),
    P.Hybrid((P.Random(), P.Hybrid((P.WhitenedSVD(), P.Gradient(label_free=True)), (1, 1))), (1, 3)),
]


def prepared(projection, rank=4, targets="all-linear", batches=None, seed=0, **options):
    adapter = lb.LoRAXS(rank, projection, targets, **options)
    return lb.BayesianLoRA(tiny_bert(), adapter).prepare(batches or token_batches(), seed=seed)


@pytest.mark.parametrize("projection", EVERY, ids=repr)
def test_orthonormal(projection):
    model = prepared(projection)
    assert len(model.adapted.bases) == 13  # 6 per layer, and the pooler
    for basis in model.adapted.bases.values():
        assert basis.A.dtype == basis.B.dtype == torch.float32
        torch.testing.assert_close(basis.A @ basis.A.T, torch.eye(4), atol=1e-5, rtol=0)
        torch.testing.assert_close(basis.B.T @ basis.B, torch.eye(4), atol=1e-5, rtol=0)


@pytest.mark.parametrize("projection", EVERY, ids=repr)
def test_two_prepares_agree_bit_for_bit(projection):
    """Whatever the global random state is."""
    subspaces = []
    for state in (5, 6):
        model = lb.BayesianLoRA(tiny_bert(), lb.LoRAXS(4, projection, "all-linear"))
        torch.manual_seed(state)
        subspaces.append(model.prepare(token_batches(), seed=3).adapted.tensors())
    first, again = subspaces
    assert first.keys() == again.keys()
    assert all(torch.equal(first[name], again[name]) for name in first)


def test_earlier_passes_over_shuffled_batches_change_nothing():
    rows = lb.Batches(tiny_reviews(40), tiny_tokenizer(), batch_size=8, shuffle=0)
    prepared = []
    for _ in range(2):
        model = lb.BayesianLoRA(tiny_bert(), lb.LoRAXS(2, lb.projections.Gradient())).prepare(rows)
        prepared.append(model.adapted.tensors() | model.head_start)
        list(rows)
    first, again = prepared
    assert all(torch.equal(first[name], again[name]) for name in first)


@pytest.mark.filterwarnings("ignore::pyro_lrblora.ScalesNotConverged")
@pytest.mark.parametrize("projection", EVERY, ids=repr)
def test_survives_the_file(projection, tmp_path):
    model = prepared(projection, targets=["query", "value"])
    posterior = lb.fit(model, token_batches(), guide=lb.guides.Diagonal(), epochs=1, progress=False)
    posterior.save(tmp_path)
    loaded = lb.Posterior.load(tmp_path, tiny_bert())
    assert loaded.model.adapter == model.adapter
    assert hash(loaded.model.adapter.projection) == hash(projection)
    kept = loaded.model.adapted.tensors()
    assert all(torch.equal(kept[name], value) for name, value in model.adapted.tensors().items())


@settings(deadline=None, max_examples=25)
@given(m=st.integers(3, 260), n=st.integers(3, 260), seed=st.integers(0, 50))
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


EYE_OF_3 = torch.diag_embed(torch.cat([torch.ones(3), torch.zeros(197)]))  # in exact arithmetic: no rounding errors


@pytest.mark.parametrize("weight", [0, 2, 9, EYE_OF_3], ids=["0", "2", "9", "eye of 3"])
def test_svd_of_a_weight_of_lower_rank_is_still_orthonormal(weight):
    if isinstance(weight, int):
        weight = torch.randn(240, weight) @ torch.randn(weight, 200)
    basis = P.SVD()(weight, 8, {}, torch.Generator().manual_seed(0))
    for columns in (basis.B, basis.A.T):
        torch.testing.assert_close(columns.T @ columns, torch.eye(8), atol=1e-5, rtol=0)
    kept = basis.B @ basis.B.T @ weight @ basis.A.T @ basis.A
    left = torch.linalg.svdvals(weight)[8:].norm()
    torch.testing.assert_close((weight - kept).norm(), left, atol=1e-3, rtol=1e-3)


@pytest.mark.parametrize(("true_rank", "factorised"), [(2, [200]), (30, []), (200, [])])
def test_svd_factorises_the_weight_itself_only_where_its_rank_is_low(true_rank, factorised, monkeypatch):
    weight = torch.randn(240, true_rank) @ torch.randn(true_rank, 200)
    whole, found = torch.linalg.svd, []
    recorded = lambda matrix, **options: found.append(min(matrix.shape)) or whole(matrix, **options)
    monkeypatch.setattr(torch.linalg, "svd", recorded)
    P.SVD()(weight, 8, {}, torch.Generator().manual_seed(0))
    assert found == factorised


def test_svd_finds_the_directions_of_trained_weights():
    """Their singular values lie close together; sklearn's TruncatedSVD with ten iterations is held to the same."""
    network, _ = builtin_base(2)
    for name in ("attention.self.query", "attention.output.dense", "intermediate.dense", "output.dense"):
        for layer in network.encoder.encoder.layer:
            weight = layer.get_submodule(name).weight.detach()
            exact = torch.linalg.svd(weight, full_matrices=False)
            basis = P.SVD()(weight, 8, {}, torch.Generator().manual_seed(0))
            assert (weight @ basis.A.T).norm() > 0.999 * exact.S[:8].norm()
            assert torch.linalg.svdvals(exact.Vh[:8] @ basis.A.T).min() > 0.9


def test_svd_keeps_what_noise_hides():
    """On noise alone, where singular values hardly fall, the subspace still has 97% of the best one's norm."""
    weight = torch.randn(400, 300, generator=torch.Generator().manual_seed(0))
    basis = P.SVD()(weight, 8, {}, torch.Generator().manual_seed(0))
    assert (weight @ basis.A.T).norm() > 0.97 * torch.linalg.svdvals(weight)[:8].norm()


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


# --- whitened SVD


def second_moments(network, batches, names):
    """The second moment of the inputs of every module over unpadded tokens, a row and a token at a time."""
    inputs = {}
    modules = {name: network.get_submodule(name) for name in names}
    hooks = [m.register_forward_pre_hook(lambda _, a, n=name: inputs.update({n: a[0]})) for name, m in modules.items()]
    totals = dict.fromkeys(names, 0.0)
    for batch in batches:
        with torch.no_grad():
            network(**{k: v for k, v in batch.items() if k != "labels"})
        for name, value in inputs.items():
            for row, mask in zip(value, batch["attention_mask"], strict=True):
                for token in row[mask.bool()].double():
                    totals[name] = totals[name] + torch.outer(token, token)
    for hook in hooks:
        hook.remove()
    return totals


def padded_batches(filler: int):
    """Rows of 3 to 7 tokens, padded with any token: the mask hides it from the network."""
    batches = token_batches(24)
    for batch in batches:
        lengths = torch.arange(len(batch["labels"])) % 5 + 3
        batch["attention_mask"] = (torch.arange(7) < lengths[:, None]).long()
        batch["input_ids"] = torch.where(batch["attention_mask"].bool(), batch["input_ids"], filler)
    return batches


def test_whitened_svd_uses_the_inputs_of_unpadded_tokens():
    batches = padded_batches(filler=5)
    model = prepared(P.WhitenedSVD(ridge=0), 3, "mlp", batches)
    for name, moment in second_moments(model.network, batches, list(model.modules)).items():
        values, vectors = torch.linalg.eigh(moment)
        weight = model.modules[name].weight.detach().double()
        u, _, vh = torch.linalg.svd(weight @ vectors @ values.sqrt().diag() @ vectors.T)
        rows = vh[:3] @ vectors @ values.rsqrt().diag() @ vectors.T  # V' C^(-1/2), as the definition says
        same_span(model.adapted.bases[name].B.double(), u[:, :3])
        same_span(model.adapted.bases[name].A.T.double(), torch.linalg.qr(rows.T).Q)


def test_what_the_padding_holds_does_not_matter():
    first, second = (prepared(P.WhitenedSVD(), 3, "all-linear", padded_batches(filler)) for filler in (5, 44))
    for name, basis in first.adapted.bases.items():
        same_span(basis.A.T, second.adapted.bases[name].A.T)
        same_span(basis.B, second.adapted.bases[name].B)


@settings(deadline=None, max_examples=40)
@given(m=st.integers(3, 60), n=st.integers(3, 60), tokens=st.integers(1, 90), seed=st.integers(0, 50))
def test_whitened_svd_loses_the_least_output(m, n, tokens, seed):
    """Eckart-Young for W0 X: no rank-r matrix is closer in output, singular second moments included."""
    g = torch.Generator().manual_seed(seed)
    weight = torch.randn(m, n, generator=g, dtype=torch.float64)
    scales = torch.logspace(0, -2, n, dtype=torch.float64)
    inputs = torch.randn(1, tokens, n, generator=g, dtype=torch.float64) * scales
    projection, rank = P.WhitenedSVD(), 2
    statistics = projection.collect(inputs, None, torch.ones(1, tokens))
    basis = projection(weight, rank, statistics, torch.Generator().manual_seed(0))
    a, b = basis.A.double(), basis.B.double()
    torch.testing.assert_close(a @ a.T, torch.eye(rank, dtype=torch.float64), atol=1e-5, rtol=0)
    torch.testing.assert_close(b.T @ b, torch.eye(rank, dtype=torch.float64), atol=1e-5, rtol=0)
    outputs = weight @ inputs[0].T
    left = (outputs - b @ b.T @ weight @ a.T @ a @ inputs[0].T).square().sum().sqrt()
    least = torch.linalg.svdvals(outputs)[rank:].square().sum().sqrt()
    assert float(left) <= 1.02 * float(least) + 1e-3 * float(outputs.norm())


def test_whitened_svd_without_inputs_is_the_svd():
    weight = torch.randn(9, 7)
    unseen = P.WhitenedSVD().collect(torch.zeros(1, 1, 7), None, torch.zeros(1, 1))
    whitened = P.WhitenedSVD()(weight, 3, unseen, torch.Generator())
    plain = P.SVD(exact=True)(weight, 3, {}, torch.Generator())
    same_span(whitened.A.T, plain.A.T)
    same_span(whitened.B, plain.B)


def test_whitened_svd_needs_no_gradient(monkeypatch):
    monkeypatch.setattr(torch.autograd, "grad", lambda *_, **__: pytest.fail("a backward pass"))
    model = lb.BayesianLoRA(tiny_bert(), lb.LoRAXS(2, P.WhitenedSVD()))
    assert model.prepare(token_batches(), probe=False).sites.size == 8 * 4


# --- DCT


@pytest.mark.parametrize("size", [4, 7, 16])
def test_dct_rows_are_scipys(size):
    reference = torch.from_numpy(scipy.fft.dct(np.eye(size), type=2, norm="ortho", axis=0)).float()
    basis = P.DCT()(torch.zeros(size, size + 3), 4, {}, torch.Generator())
    torch.testing.assert_close(basis.B.T, reference[:4], atol=1e-6, rtol=0)
    wider = torch.from_numpy(scipy.fft.dct(np.eye(size + 3), type=2, norm="ortho", axis=0)).float()
    torch.testing.assert_close(basis.A, wider[:4], atol=1e-6, rtol=0)


def test_labels_drawn_for_a_projection_are_those_of_the_seed():
    """Above 10 classes the network's own labels are drawn: from prepare's seed, and nothing else moves."""
    bases, model = [], lb.BayesianLoRA(tiny_bert(12), lb.LoRAXS(2, P.Gradient(label_free=True)))
    for _ in range(2):
        before = torch.get_rng_state()
        prepared_ = model.prepare(token_batches(), probe=False)
        assert torch.equal(before, torch.get_rng_state())
        torch.rand(3)
        bases.append(prepared_.adapted.tensors())
    assert all(torch.equal(bases[0][name], bases[1][name]) for name in bases[0])


def test_whitened_svd_of_a_decoder_leaves_its_own_padding_out():
    """The rows of an encoder-decoder one by one, where nothing is padded, and in batches whose two texts are padded."""
    texts, network = tiny_texts(8), tiny_t5()
    options = {"prompt": "prompt", "decoder": network}
    sums = []
    for size in (1, 8):
        model = lb.BayesianLoRA(
            network, lb.LoRAXS(2, P.WhitenedSVD(), "attention"), likelihood=lb.likelihoods.NextToken()
        )
        sums.append(sum_statistics(model, lb.data.Texts(texts, tiny_tokenizer(), batch_size=size, **options)))
    assert any("decoder" in name for name in sums[0])
    for name, alone in sums[0].items():
        torch.testing.assert_close(sums[1][name], alone, rtol=1e-4, atol=1e-4)
