from __future__ import annotations

import warnings

import numpy as np
import pytest
import torch
from hypothesis import given, settings

from p2pfl.topology import (
    MIXING,
    chain_graph,
    complete_graph,
    exponential_graph,
    metropolis,
    mixing,
    push,
    random_regular_graph,
    ring_graph,
    star_graph,
    static,
    uniform,
    weights,
)

from .strategies import connected_graphs, strong_digraphs

OF_GRAPH = ("best_constant", "fastest", "max_degree")  # see test_mix_rules
EVERY = [make() for name, make in MIXING.items() if name not in OF_GRAPH]
EVERY += [metropolis(lazy=True)]
CLOSE = {"rtol": 0, "atol": 1e-12}


def matrix(graph, rule):
    return weights(static(graph).links(0), rule).to_dense()


def by_hand(graph, rule):
    """Fill the matrix entry by entry."""
    graph = graph.to_directed()
    n = len(graph)
    filled = np.zeros((n, n))
    for sender, receiver in graph.edges:
        filled[receiver, sender] = rule.weight(graph.in_degree(receiver), graph.out_degree(sender))
    return torch.from_numpy(filled + np.diag(1 - filled.sum(1 if rule.conserves == "mean" else 0)))


def spread(x):
    return float(((x - x.mean(0)) ** 2).mean(0).sum())


@given(strong_digraphs())
@settings(max_examples=25, deadline=None)
def test_the_matrix_is_the_rule_link_by_link(graph):
    for rule in EVERY:
        torch.testing.assert_close(matrix(graph, rule), by_hand(graph, rule), **CLOSE)


@given(strong_digraphs())
@settings(max_examples=25, deadline=None)
def test_somebody_s_weights_sum_to_one(graph):
    ones = torch.ones(len(graph), dtype=torch.float64)
    for rule in EVERY:
        along = matrix(graph, rule).sum(1 if rule.conserves == "mean" else 0)
        torch.testing.assert_close(along, ones, **CLOSE)


@given(connected_graphs())
@settings(max_examples=25, deadline=None)
def test_metropolis_is_doubly_stochastic_and_symmetric_on_undirected_graphs(graph):
    ones = torch.ones(len(graph), dtype=torch.float64)
    for rule in (metropolis(), metropolis(lazy=True)):
        mixing_matrix = matrix(graph, rule)
        torch.testing.assert_close(mixing_matrix, mixing_matrix.T, **CLOSE)
        torch.testing.assert_close(mixing_matrix.sum(0), ones, **CLOSE)
        assert (mixing_matrix >= -1e-12).all()
        assert (mixing_matrix.diagonal() >= 1 / (1 + max(d for _, d in graph.degree)) - 1e-12).all()


@given(connected_graphs())
@settings(max_examples=25, deadline=None)
def test_the_mean_is_kept_consensus_is_fixed_and_the_spread_contracts(graph):
    n = len(graph)
    mixing_matrix = matrix(graph, metropolis())
    x = torch.from_numpy(np.random.default_rng(n).normal(size=(n, 3)))
    mixed = mixing_matrix @ x
    assert ((mixed.sum(0) - x.sum(0)).abs() <= 1e-12 * x.abs().sum(0)).all()
    rho = float(torch.linalg.matrix_norm(mixing_matrix - 1 / n, 2))
    assert spread(mixed) <= rho**2 * spread(x) + 1e-12
    agreed = torch.full((n, 1), 0.1, dtype=torch.float64)
    for rule in (metropolis(), uniform()):
        torch.testing.assert_close(matrix(graph, rule) @ agreed, agreed, rtol=1e-14, atol=0)


def test_lazy_is_half_of_the_identity():
    graph = star_graph(9)
    half = (torch.eye(9, dtype=torch.float64) + matrix(graph, metropolis())) / 2
    torch.testing.assert_close(matrix(graph, metropolis(lazy=True)), half, **CLOSE)


def test_the_limit_of_uniform_weights_is_not_the_mean():
    x = torch.arange(16, dtype=torch.float64)
    limit = torch.linalg.matrix_power(matrix(star_graph(16), uniform()), 200) @ x
    torch.testing.assert_close(limit, torch.full_like(x, 5.21739), rtol=0, atol=1e-5)
    regular = torch.linalg.matrix_power(matrix(ring_graph(16), uniform()), 1000) @ x
    torch.testing.assert_close(regular, torch.full_like(x, 7.5), rtol=0, atol=1e-9)


def test_push_sum_finds_the_mean_of_a_star():
    mass = torch.linalg.matrix_power(matrix(star_graph(16), push()), 200)
    x = torch.arange(16, dtype=torch.float64)
    torch.testing.assert_close(mass @ x / mass.sum(1), torch.full_like(x, 7.5), **CLOSE)


@pytest.mark.parametrize(
    "graph", [ring_graph(80), exponential_graph(80), random_regular_graph(80, 3)]
)
@pytest.mark.parametrize("rule", EVERY, ids=lambda rule: rule.name)
def test_dense_and_sparse_agree(monkeypatch, graph, rule):
    links = static(graph).links(0)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        sparse = weights(links, rule)
    monkeypatch.setattr(mixing, "DENSE_NODES", 80)
    dense = weights(links, rule)
    assert sparse.layout is torch.sparse_csr
    assert dense.layout is torch.strided
    assert torch.equal(sparse.to_dense(), dense)
    x = torch.from_numpy(np.random.default_rng(0).normal(size=(80, 2)))
    torch.testing.assert_close(sparse @ x, dense @ x, **CLOSE)
    start, columns = sparse.crow_indices().tolist(), sparse.col_indices().tolist()
    for row in range(80):
        line = columns[start[row] : start[row + 1]]
        assert line == sorted(set(line))
        assert row in line


def test_layout_and_dtype():
    assert weights(static(chain_graph(64)).links(0), push()).layout is torch.strided
    assert weights(static(complete_graph(100)).links(0), push()).layout is torch.strided
    sparse = weights(static(chain_graph(100)).links(0), push(), dtype=torch.float32)
    assert sparse.dtype is torch.float32
    assert sparse.layout is torch.sparse_csr


def test_a_weight_is_asked_for_once_per_pair_of_degrees():
    asked = []

    def weight(taking, giving):
        asked.append((taking, giving))
        return 0.1

    weights(static(chain_graph(50)).links(0), mixing.Mixing(weight, "mean", "spy"))
    assert sorted(asked) == [(1, 2), (2, 1), (2, 2)]


def test_a_single_node_keeps_everything():
    for rule in EVERY:
        assert weights(static(complete_graph(1)).links(0), rule).tolist() == [[1.0]]
