"""Several projections in one basis: shares, spans, overlaps."""

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from test_projections import P, prepared, same_span

import pyro_lrblora as lb
from pyro_lrblora.projections.hybrid import split_rank

SHARES = st.lists(st.floats(0.01, 10), min_size=1, max_size=5)


@given(shares=SHARES, extra=st.integers(0, 60))
def test_shares_split_the_rank(shares, extra):
    rank = len(shares) + extra
    ranks = split_rank(rank, shares)
    quotas = [rank * share / sum(shares) for share in shares]
    assert sum(ranks) == rank
    assert min(ranks) >= 1
    if min(quotas) >= 1:  # nothing was lifted: every part within one of its quota
        assert all(abs(r - q) < 1 + 1e-9 for r, q in zip(ranks, quotas, strict=True))
    assert all(r <= s for (q, r), (p, s) in itertools.permutations(zip(quotas, ranks, strict=True), 2) if q < p - 1e-9)


@pytest.mark.parametrize(
    ("rank", "shares", "expected"),
    [
        (8, (0.5, 0.5), [4, 4]),
        (7, (0.5, 0.3, 0.2), [4, 2, 1]),
        (4, (0.9, 0.1), [3, 1]),
        (3, (98, 1, 1), [1, 1, 1]),
        (7, (3.2, 3.1, 0.1), [3, 3, 1]),
        (6, (3, 2.9, 0.1), [3, 2, 1]),
    ],
)
def test_shares_by_hand(rank, shares, expected):
    assert split_rank(rank, shares) == expected


def span_of(*columns):
    return torch.linalg.qr(torch.cat(columns, 1)).Q


def test_hybrid_spans_what_its_parts_span():
    parts = (P.SVD(exact=True), P.Gradient(), P.DCT())
    hybrid = prepared(P.Hybrid(parts, (0.5, 0.25, 0.25)), 8, ["query"]).adapted.bases
    own = [prepared(part, rank, ["query"]).adapted.bases for part, rank in zip(parts, (4, 2, 2), strict=True)]
    for name, basis in hybrid.items():
        same_span(basis.A.T, span_of(*(bases[name].A.T for bases in own)))
        same_span(basis.B, span_of(*(bases[name].B for bases in own)))


def test_parts_of_a_hybrid_share_one_pass():
    """Inputs that come along with gradients give the whitened SVD that a forward pass gives."""
    alone = prepared(P.WhitenedSVD(), 2, ["query"]).adapted.bases
    hybrid = P.Hybrid((P.WhitenedSVD(), P.Gradient(label_free=True)), (1, 1))
    assert hybrid.statistics == "model"
    for name, basis in prepared(hybrid, 4, ["query"]).adapted.bases.items():
        torch.testing.assert_close(basis.A.T @ (basis.A @ alone[name].A.T), alone[name].A.T, atol=1e-4, rtol=0)
        torch.testing.assert_close(basis.B @ (basis.B.T @ alone[name].B), alone[name].B, atol=1e-4, rtol=0)


class Own:
    """A user's own projection that needs its own sum and spans one direction of it."""

    statistics = "inputs"

    def __init__(self, place):
        self.place = place

    def collect(self, inputs, gradients, mask):
        return {"sum": torch.tensor(self.place)}

    def __call__(self, weight, rank, statistics, generator):
        m, n = weight.shape
        place = int(statistics["sum"])
        return P.Basis(A=torch.eye(n)[place : place + rank], B=torch.eye(m)[:, place : place + rank])


def test_parts_do_not_read_each_others_sums():
    hybrid = P.Hybrid((Own(1), Own(3), P.DCT()), (1, 1, 1))
    statistics = hybrid.collect(torch.zeros(1, 1, 9), None, torch.ones(1, 1))
    basis = hybrid(torch.zeros(8, 9), 3, statistics, torch.Generator())
    constant = torch.full((9, 1), 1 / 3)
    same_span(basis.A.T, span_of(torch.eye(9)[:, [1, 3]], constant))


def test_overlapping_parts_fill_the_rank_with_their_next_directions():
    weight = torch.randn(12, 10)
    same = P.Hybrid((P.SVD(exact=True), P.SVD(exact=True)), (0.5, 0.5))
    basis = same(weight, 6, {}, torch.Generator())
    plain = P.SVD(exact=True)(weight, 6, {}, torch.Generator())
    same_span(basis.A.T, plain.A.T)
    same_span(basis.B, plain.B)


def test_overlapping_parts_take_turns_in_filling():
    """Where the SVD and the DCT agree on two directions, the third of each follows, not the next two of one."""
    cosines = P.DCT()(torch.zeros(12, 10), 3, {}, torch.Generator())
    frame = lambda own, size: span_of(own[:, :2], torch.randn(size, 6))
    u, v = frame(cosines.B, 12), frame(cosines.A.T, 10)
    weight = u @ torch.diag(0.5 ** torch.arange(8.0)) @ v.T
    basis = P.Hybrid((P.SVD(exact=True), P.DCT()), (0.5, 0.5))(weight, 4, {}, torch.Generator())
    same_span(basis.A.T, span_of(v[:, :3], cosines.A.T[:, 2:]))
    same_span(basis.B, span_of(u[:, :3], cosines.B[:, 2:]))


@settings(deadline=None, max_examples=40)
@given(m=st.integers(5, 40), n=st.integers(5, 40), rank=st.integers(3, 5), seed=st.integers(0, 50))
def test_overlapping_parts_stay_orthonormal(m, n, rank, seed):
    """A weight made of cosines: the SVD and the DCT span the same, in A or in both."""
    g = torch.Generator().manual_seed(seed)
    cosines = P.DCT()(torch.zeros(m, n), 4, {}, g)
    weight = cosines.B @ torch.diag(0.5 ** torch.arange(4.0)) @ cosines.A
    weight = weight + 1e-6 * torch.randn(m, n, generator=g)
    basis = P.Hybrid((P.SVD(), P.DCT(), P.Random()), (2, 2, 1))(weight, rank, {}, g)
    torch.testing.assert_close(basis.A @ basis.A.T, torch.eye(rank), atol=1e-5, rtol=0)
    torch.testing.assert_close(basis.B.T @ basis.B, torch.eye(rank), atol=1e-5, rtol=0)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: P.Hybrid((), ()), "one share for each part, got 0 parts"),
        (lambda: P.Hybrid((P.SVD(), P.DCT()), (1.0,)), r"got 2 parts and shares=\(1.0,\)"),
        (lambda: P.Hybrid((P.SVD(), P.DCT()), (1.0, 0.0)), "positive shares"),
        (lambda: P.Hybrid((P.SVD(), P.DCT()), (1.0, float("nan"))), "positive shares"),
        (lambda: P.Hybrid((P.Gradient(), P.Gradient(label_free=True)), (1, 1)), "got both in"),
        (lambda: lb.LoRAXS(1, P.Hybrid((P.SVD(), P.DCT()), (1, 1))), "expected rank >= 2 .*got rank=1"),
        (lambda: split_rank(2, (1, 1, 1)), "got rank=2; write rank=3"),
    ],
)
def test_specs_that_cannot_be(make, message):
    with pytest.raises(ValueError, match=message):
        make()
