"""What averaging tends to: the mean of all, the weighted mean, or neither."""

from __future__ import annotations

import networkx as nx
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from p2pfl.topology import (
    in_shares,
    max_degree,
    metropolis,
    one_peer_exponential,
    push,
    ring_graph,
    star_graph,
    static,
    uniform,
    weights,
)

from .strategies import connected_graphs


def ramp(n):
    return torch.arange(n, dtype=torch.float64)


def far(matrix, x, rounds=1 << 14):
    return torch.linalg.matrix_power(matrix.to_dense(), rounds) @ x


def quotient(topology, rule, x, counts, rounds):
    """Mix ``(n x, n)`` and divide, as push_sum with weight = 'examples' does."""
    block = torch.stack([counts * x, counts], 1)
    for round in range(rounds):
        block = weights(topology.links(round), rule) @ block
    return block[:, 0] / block[:, 1]


@given(connected_graphs(largest=24))
@settings(max_examples=25, deadline=None)
def test_uniform_weights_count_everybody_by_its_degree(graph):
    n, x = len(graph), ramp(len(graph))
    share = torch.tensor([graph.degree(node) + 1.0 for node in range(n)]).double()
    limit = far(weights(static(graph).links(0), uniform()), x)
    biased = (share @ x / share.sum()).expand(n)
    torch.testing.assert_close(limit, biased, rtol=0, atol=1e-6)


def test_the_star_s_limit_is_biased_and_the_ring_s_is_not():
    star = far(weights(static(star_graph(16)).links(0), uniform()), ramp(16))
    torch.testing.assert_close(
        star, torch.full((16,), 240 / 46, dtype=torch.float64), rtol=0, atol=1e-9
    )
    assert float(star[0]) == pytest.approx(5.21739, abs=5e-6)
    even = far(weights(static(ring_graph(16)).links(0), uniform()), ramp(16))
    torch.testing.assert_close(even, torch.full((16,), 7.5).double(), rtol=0, atol=1e-9)


@given(connected_graphs(largest=16), st.data())
@settings(max_examples=25, deadline=None)
def test_counts_in_the_matrix_have_a_biased_limit(graph, data):
    """What is often called weighted FedAvg: W_ij = n_j / (those of i's neighbourhood)."""
    n = len(graph)
    counts = torch.tensor(data.draw(st.lists(st.integers(1, 9), min_size=n, max_size=n))).double()
    near = torch.from_numpy(nx.to_numpy_array(graph, nodelist=range(n))) + torch.eye(n).double()
    around = near @ counts
    limit = far(near * counts / around[:, None], ramp(n))
    share = counts * around
    expected = (share @ ramp(n) / share.sum()).expand(n)
    torch.testing.assert_close(limit, expected, rtol=0, atol=1e-6)


@given(connected_graphs(largest=16), st.data())
@settings(max_examples=25, deadline=None)
def test_a_ratio_of_means_is_the_weighted_mean(graph, data):
    n, x = len(graph), ramp(len(graph))
    counts = torch.tensor(data.draw(st.lists(st.integers(1, 99), min_size=n, max_size=n))).double()
    right = (counts @ x / counts.sum()).expand(n)
    for rule in (in_shares(metropolis()), in_shares(max_degree()), push()):
        power = torch.linalg.matrix_power(weights(static(graph).links(0), rule).to_dense(), 1 << 14)
        found = power @ (counts * x) / (power @ counts)
        torch.testing.assert_close(found, right, rtol=0, atol=1e-6)


@pytest.mark.parametrize("n", [8, 16, 32])
def test_one_period_of_an_exact_schedule_is_the_weighted_mean(n):
    topology, counts, x = one_peer_exponential(n), 1 + ramp(n) ** 2 % 7, ramp(n)
    right = (counts @ x / counts.sum()).expand(n)
    for rule in (push(), in_shares(metropolis())):
        found = quotient(topology, rule, x, counts, topology.period)
        torch.testing.assert_close(found, right, rtol=0, atol=1e-12)
        early = quotient(topology, rule, x, counts, topology.period - 1)
        assert float((early - right).abs().max()) > 0.01


def test_the_naive_mean_is_right_where_all_hear_all():
    counts, x = 1 + ramp(7), ramp(7)
    limit = far((counts / counts.sum()).expand(7, 7), x)
    torch.testing.assert_close(limit, (counts @ x / counts.sum()).expand(7), rtol=0, atol=1e-12)
