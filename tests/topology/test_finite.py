"""Schedules that average exactly, against the lengths and errors worked out independently."""

from __future__ import annotations

import math
from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from p2pfl.topology import (
    Topology,
    analyse,
    base,
    hyper_hypercube,
    in_degrees,
    links_between,
    metropolis,
    one_peer_exponential,
    one_peer_hypercube,
    push,
    ring_graph,
    simple_base,
    static,
    uniform,
    weights,
)

from .schedule_checks import curve, is_doubly_stochastic, matrix

NODES = (3, 5, 6, 7, 9, 10, 12, 16, 20, 24, 25, 32, 48, 50, 63, 64, 96, 97, 100)
# Rounds of base, and in brackets of simple_base where it takes more (Takezawa et al. 2023).
LENGTHS = {
    1: "3 5 4(5) 5 7 6(7) 5(7) 4 7(9) 6(9) 9 5 7(11) 10(11) 11 6 8(13) 13 11(13)",
    2: "1 3 2 4 2 4(5) 3 4 5(6) 4 6 5 5 7 6(8) 6 6 9 8(9)",
    3: "1 3 2 3 2 4 2 2 4(5) 3 5 3 3 6 5(6) 3 4 7 6(7)",
    4: "1 1 2 3 2 2 2 2 2 3 2 3 3 3 5(6) 3 4 6 3",
}
CURVES = {
    (25, 1): (
        [1, 0.997690, 0.988394, 0.950304, 0.840330, 0.448678, 0.397522, 0.368485, 0.353072, 0]
    ),
    (6, 1): [1, 0.971008, 0.910259, 0.878310, 0],
    (5, 1): [1, 0.948683, 0.707107, 0.547723, 0.316228, 0],
    (25, 2): [1, 0.997690, 0.972704, 0.783483, 0.226248, 0.137118, 0],
    (25, 4): [1, 0.980581, 0],
}


def product_before_and_after(topology):
    product = torch.eye(topology.n, dtype=torch.float64)
    for round in range(topology.period):
        before, product = product, matrix(topology, round) @ product
    return before, product


@pytest.mark.parametrize("k", [1, 2, 3, 4])
def test_exact_for_every_n_after_the_last_round_and_not_before(k):
    for n in range(2, 101):
        for topology in (base(n, k), simple_base(n, k)):
            for round in range(topology.period):
                links, w = topology.links(round), matrix(topology, round)
                assert is_doubly_stochastic(w)
                assert torch.equal(w, w.T)
                assert int(in_degrees(links).max()) <= k
            before, after = product_before_and_after(topology)
            assert float((after - 1 / n).abs().max()) < 1e-12, (n, k)
            assert float((before - 1 / n).abs().max()) > 1e-3, (n, k)
            assert topology.period <= 2 * math.log(n, k + 1) + 2


@pytest.mark.parametrize("k", LENGTHS)
def test_lengths(k):
    for n, cell in zip(NODES, LENGTHS[k].split(), strict=True):
        short, _, simple = cell.rstrip(")").partition("(")
        assert (base(n, k).period, simple_base(n, k).period) == (int(short), int(simple or short))


@pytest.mark.parametrize(("n", "k"), CURVES)
def test_error_after_every_round(n, k):
    assert curve(base(n, k), len(CURVES[n, k]) - 1) == pytest.approx(CURVES[n, k], abs=6e-7)


def test_others_are_not_there_yet():
    assert curve(one_peer_exponential(25), 9)[9] == pytest.approx(0.0685, abs=6e-5)
    assert curve(static(ring_graph(25)), 9)[9] == pytest.approx(0.6732, abs=6e-5)


@pytest.mark.parametrize("build", [base, simple_base])
def test_what_analyse_says_of_them(build):
    for n, k in [(6, 1), (7, 2), (25, 1), (100, 4)]:
        topology = build(n, k)
        found = analyse(topology, metropolis())
        assert found.exact_after == found.period == found.rounds_to_1e_6 == topology.period
        assert (found.rho, found.doubly_stochastic, found.directed) == (0, True, False)


@pytest.mark.parametrize("rule", [metropolis(), uniform(), push()], ids=lambda rule: rule.name)
def test_their_weights_go_before_those_of_a_rule(rule):
    topology = base(7)
    for round in range(topology.period):
        assert torch.equal(matrix(topology, round, rule), matrix(topology, round))
    lazy = matrix(topology, 4, metropolis(lazy=True))
    eye = torch.eye(7, dtype=torch.float64)
    torch.testing.assert_close(lazy, (eye + matrix(topology, 4)) / 2)


def test_weights_are_kept_in_large_sparse_matrices():
    topology = base(97)
    for round in range(topology.period):
        sparse = weights(topology.links(round), metropolis())
        assert sparse.layout is torch.sparse_csr
        assert is_doubly_stochastic(sparse.to_dense())


@pytest.mark.parametrize(("n", "k", "period"), [(16, 1, 4), (12, 2, 3), (36, 5, 2), (30, 4, 3)])
def test_hyper_hypercubes_take_as_many_rounds_as_factors(n, k, period):
    topology = hyper_hypercube(n, k)
    assert topology.period == period
    found = analyse(topology, metropolis())
    assert (found.exact_after, found.degree_max) == (period, max(found.degree_max, 1))
    assert found.degree_max <= k
    assert float((product_before_and_after(topology)[0] - 1 / n).abs().max()) > 1e-3


def test_as_few_factors_as_there_are():
    assert hyper_hypercube(12, 5).period == 2  # 6 * 2; 5 does not divide it
    assert hyper_hypercube(72, 8).period == 2  # 9 * 8
    assert hyper_hypercube(24, 5).period == 2  # 6 * 4
    assert hyper_hypercube(48, 7).period == 2  # 8 * 6


@pytest.mark.parametrize("n", [2, 4, 32])
def test_the_one_peer_hypercube_is_a_bit_a_round(n):
    topology = one_peer_hypercube(n)
    assert topology.period == math.log2(n)
    for round in range(2 * topology.period):
        for node in range(n):
            other = (node ^ 1 << round % topology.period,)
            assert topology.view(node, round) == (other, other)
    assert analyse(topology, metropolis()).exact_after == topology.period


@pytest.mark.parametrize(
    "build",
    [
        lambda **more: base(25, 2, **more),
        lambda **more: simple_base(13, **more),
        lambda **more: hyper_hypercube(24, 2, **more),
        lambda **more: one_peer_hypercube(16, **more),
    ],
)
def test_shuffled_cycles_are_exact_each_in_another_order(build):
    plain, topology, other = build(), build(shuffle=True, seed=4), build(shuffle=True, seed=5)
    n, length = plain.n, plain.period
    assert topology.period is None
    for cycle in (0, 1, 6):
        product = torch.eye(n, dtype=torch.float64)
        for round in range(cycle * length, (cycle + 1) * length):
            product = matrix(topology, round) @ product
        assert float((product - 1 / n).abs().max()) < 1e-12
    first = [topology.links(round).senders.tolist() for round in (0, length)]
    assert first[0] != first[1]
    assert first[0] != other.links(0).senders.tolist()
    assert first[0] == build(shuffle=True, seed=4).links(0).senders.tolist()


@pytest.mark.parametrize("build", [base, simple_base, hyper_hypercube])
@pytest.mark.parametrize("n", [2, 5, 12])
def test_more_others_than_there_are_make_no_difference(build, n):
    most, more = build(n, n - 1), build(n, 10**18)
    assert more.period == most.period == 1
    assert torch.equal(matrix(more, 0), matrix(most, 0))


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: one_peer_hypercube(12), "n = 12 is not a power of two; nearest: 8, 16"),
        (lambda: hyper_hypercube(14, 3), r"n = 14 has a prime factor above k \+ 1 = 4, in 7"),
        (lambda: base(5, 0), "k = 0 must be at least 1"),
        (lambda: simple_base(5, -1), "k = -1 must be at least 1"),
        (lambda: base(1), "n = 1 must be at least 2"),
    ],
)
def test_what_cannot_be(build, message):
    with pytest.raises(ValueError, match=message):
        build()


@given(st.integers(2, 400), st.integers(1, 9))
@settings(max_examples=40, deadline=None)
def test_values_are_averaged_exactly_whatever_they_are(n, k):
    x = torch.randn(n, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(n))
    mean = x.mean(0)
    topology = base(n, k)
    for round in range(topology.period):
        x = weights(topology.links(round), metropolis()) @ x
    assert float((x - mean).abs().max()) < 1e-12


@given(st.integers(2, 9), st.data())
@settings(max_examples=60, deadline=None)
def test_weights_follow_their_links_when_those_are_sorted(n, data):
    node = st.integers(0, n - 1)
    ends = data.draw(st.lists(st.tuples(node, node), max_size=30))
    senders, receivers = (torch.tensor([e[i] for e in ends], dtype=torch.int64) for i in (0, 1))
    values = torch.arange(1, len(ends) + 1, dtype=torch.float64)
    links = links_between(n, senders, receivers, values)
    expected = torch.zeros(n, n, dtype=torch.float64)
    for (sender, receiver), value in zip(ends, values.tolist(), strict=True):
        expected[receiver, sender] += value
    expected.fill_diagonal_(0)
    found = torch.zeros_like(expected)
    found[links.receivers, links.senders] = links.weights
    assert torch.equal(found, expected)
    keys = (links.receivers * n + links.senders).tolist()
    assert all(one < other for one, other in pairwise(keys))


def test_weights_that_differ_each_way_are_not_symmetric():
    one, other = torch.tensor([0, 1]), torch.tensor([1, 0])
    for values, same in (([0.3, 0.3], True), ([0.3, 0.2], False)):
        links = links_between(2, one, other, torch.tensor(values, dtype=torch.float64))
        assert Topology(2, lambda round, links=links: links, 1).is_symmetric == same
