"""Weights that suit a whole graph, against values computed elsewhere and against each other."""

from __future__ import annotations

import sys
from math import cos, pi

import networkx as nx
import pytest
import torch
from hypothesis import given, settings

from p2pfl.topology import (
    GRAPHS,
    analyse,
    best_constant,
    chain_graph,
    complete_graph,
    exponential_graph,
    fastest,
    in_shares,
    links_between,
    max_degree,
    metropolis,
    one_peer_exponential,
    push,
    read_network,
    ring_graph,
    star_graph,
    static,
    uniform,
    weights,
)
from p2pfl.topology.live import Overlay
from p2pfl.topology.mixing import link_weights
from p2pfl.topology.spectral import is_doubly_stochastic

from .strategies import connected_graphs, strong_digraphs
from .test_files import TOPOLOGIES

RULES = [best_constant(), max_degree(), max_degree(lazy=True)]
EVEN = ("best_constant", "max_degree")  # whose weights are 1 / n to the last digits
SOLVED = [fastest(), fastest(nonnegative=True)]
TABLE = [  # graph, arguments, Metropolis, best constant, FDLA
    ("chain", {}, 0.98719, 0.98079, 0.98079),
    ("ring", {}, 0.94925, 0.92667, 0.92667),
    ("grid", {}, 0.86864, 0.84198, 0.82439),
    ("torus", {}, 0.6, 0.6, 0.6),
    ("hypercube", {}, 0.6, 0.6, 0.6),
    ("star", {}, 0.9375, 0.88235, 0.88235),
    ("erdos_renyi", {"p": 0.3, "seed": 1}, 0.88250, 0.84750, 0.75776),
    ("barabasi_albert", {"attach": 2, "seed": 1}, 0.90625, 0.84526, 0.78032),
    ("watts_strogatz", {"degree": 4, "rewire": 0.2, "seed": 1}, 0.88605, 0.83712, 0.78366),
    ("random_regular", {"degree": 4, "seed": 1}, 0.72218, 0.67449, 0.58632),
]
FILES = [
    ("two_cliques.edges", 0.97731, 0.95917, 0.93541),
    ("karate.graphml", 0.96876, 0.94964, 0.92459),
    ("davis.json", 0.91790, 0.89156, 0.82930),
]


def links_of(graph):
    return static(graph).links(0)


def matrix(graph, rule):
    return weights(links_of(graph), rule).to_dense()


def rho(graph, rule):
    return analyse(static(graph), rule).rho


@pytest.mark.parametrize(("name", "arguments", "plain", "constant", "best"), TABLE)
def test_rates_on_sixteen_nodes(name, arguments, plain, constant, best):
    graph = GRAPHS[name](16, **arguments)
    found = [rho(graph, rule) for rule in (metropolis(), best_constant(), fastest())]
    assert found == pytest.approx([plain, constant, best], abs=6e-6)


@pytest.mark.parametrize(("file", "plain", "constant", "best"), FILES)
def test_rates_of_the_shipped_files(file, plain, constant, best):
    graph = read_network(TOPOLOGIES / file).graph
    found = [rho(graph, rule) for rule in (metropolis(), best_constant(), fastest())]
    assert found == pytest.approx([plain, constant, best], abs=6e-6)


@pytest.mark.parametrize("n", [4, 5, 9, 16, 33, 64])
def test_best_constant_in_closed_form(n):
    assert rho(chain_graph(n), best_constant()) == pytest.approx(cos(pi / n), abs=1e-11)
    assert rho(star_graph(n), best_constant()) == pytest.approx((n - 1) / (n + 1), abs=1e-11)
    low, high = 2 - 2 * cos(2 * pi / n), 2 - 2 * cos(2 * pi * (n // 2) / n)
    ring = (high - low) / (high + low)
    assert rho(ring_graph(n), best_constant()) == pytest.approx(ring, abs=1e-11)
    assert rho(complete_graph(n), best_constant()) == pytest.approx(0, abs=1e-11)


@pytest.mark.parametrize("graph", [ring_graph(9), star_graph(8), complete_graph(6)])
def test_where_all_links_are_alike_the_fastest_is_the_best_constant(graph):
    assert rho(graph, fastest()) == pytest.approx(rho(graph, best_constant()), abs=1e-6)


def test_the_fastest_chain_on_a_star_may_not_take_from_the_centre():
    # Boyd, Diaconis and Xiao (2004): 1 / (n - 1) for every link.
    assert rho(star_graph(16), fastest(nonnegative=True)) == pytest.approx(1 - 1 / 15, abs=1e-6)
    assert matrix(star_graph(16), fastest())[0, 0] < -0.7
    assert matrix(star_graph(16), best_constant())[0, 0] == pytest.approx(1 - 30 / 17, abs=1e-11)


@given(connected_graphs())
@settings(max_examples=25, deadline=None)
def test_constant_weights_are_symmetric_and_doubly_stochastic(graph):
    for rule in RULES:
        made = matrix(graph, rule)
        assert torch.equal(made, made.T)
        assert is_doubly_stochastic(made)
    assert float(matrix(graph, max_degree()).min()) >= 0
    assert float(torch.linalg.eigvalsh(matrix(graph, max_degree(lazy=True)))[0]) >= -1e-12
    best, plain = rho(graph, best_constant()), rho(graph, max_degree())
    assert best <= plain + 1e-11


@given(connected_graphs(largest=12))
@settings(max_examples=20, deadline=None)
def test_nothing_symmetric_is_faster_than_the_fastest(graph):
    best, positive = (rho(graph, rule) for rule in SOLVED)
    for rule in SOLVED:
        made = matrix(graph, rule)
        assert torch.equal(made, made.T)
        assert is_doubly_stochastic(made)
    assert float(matrix(graph, fastest(nonnegative=True)).min()) >= 0
    assert best <= rho(graph, best_constant()) + 1e-6
    assert best <= positive + 1e-6
    assert positive <= min(rho(graph, metropolis()), rho(graph, max_degree())) + 1e-6


@given(strong_digraphs())
@settings(max_examples=25, deadline=None)
def test_max_degree_keeps_consensus_on_directed_graphs(graph):
    made = matrix(graph, max_degree())
    torch.testing.assert_close(made.sum(1), torch.ones(len(graph)).double(), rtol=0, atol=1e-12)
    assert float(made.min()) >= -1e-12
    assert is_doubly_stochastic(matrix(exponential_graph(9), max_degree()))


def test_who_is_gone_and_parts_torn_apart_do_not_count():
    """Isolated nodes, as of peers that are gone, and several parts at once."""
    whole = static(ring_graph(9))
    left = Overlay(whole, lambda k: static(ring_graph(k))).among((0, 2, 3, 5, 6, 8))
    for rule in (best_constant(), *SOLVED):
        made, small = weights(left.links(0), rule), matrix(ring_graph(6), rule)
        torch.testing.assert_close(made[[0, 2, 3]][:, [0, 2, 3]], small[:3, :3], rtol=0, atol=1e-6)
        assert made[1, 1] == 1
        pairs = links_between(4, torch.tensor([0, 1, 2, 3]), torch.tensor([1, 0, 3, 2]))
        torch.testing.assert_close(
            link_weights(pairs, rule), torch.full((4,), 0.5).double(), rtol=0, atol=1e-6
        )
        assert weights(links_of(nx.empty_graph(3)), rule).tolist() == torch.eye(3).tolist()


@pytest.mark.parametrize("rule", [*RULES[:2], *SOLVED], ids=lambda rule: rule.name)
def test_where_all_hear_all_the_matrix_is_one_row(rule):
    n = 12
    made = weights(links_of(complete_graph(n)), rule)
    assert torch.equal(made, torch.full((n, n), 1 / n, dtype=torch.float64)) == (rule.name in EVEN)
    torch.testing.assert_close(made, torch.full((n, n), 1 / n).double(), rtol=0, atol=1e-7)


def test_weights_are_rounded_and_the_same_at_both_ends():
    for rule, digits in ((best_constant(), 12), (fastest(), 9)):
        values = link_weights(links_of(GRAPHS["erdos_renyi"](16, p=0.3, seed=1)), rule)
        assert all(value == round(value, digits + 1) for value in values.tolist())


def test_in_shares_is_the_same_matrix_where_rows_and_columns_sum_to_one():
    graph = star_graph(7)
    for rule in (metropolis(), metropolis(lazy=True), max_degree(), fastest(nonnegative=True)):
        shared = in_shares(rule)
        assert shared.conserves == "mass"
        torch.testing.assert_close(matrix(graph, shared), matrix(graph, rule), rtol=0, atol=1e-12)
    for rule in (uniform(), best_constant()):  # which ask more of the centre than it has
        shared = matrix(graph, in_shares(rule))
        torch.testing.assert_close(shared.sum(0), torch.ones(7).double(), rtol=0, atol=1e-12)
        assert float(shared.min()) >= -1e-15
        assert float(matrix(graph, rule)[0, 0]) < 0 or rule.name == "uniform"
    assert torch.equal(matrix(graph, in_shares(push())), matrix(graph, push()))


def test_what_cannot_be_worked_out_is_refused(monkeypatch):
    directed, long = links_of(exponential_graph(5)), links_of(ring_graph(65))
    for rule in (best_constant(), *SOLVED):
        with pytest.raises(ValueError, match="both ways"):
            weights(directed, rule)
        with pytest.raises(ValueError, match="both ways"):
            weights(one_peer_exponential(8).links(0), rule)
    with pytest.raises(ValueError, match="up to 64 nodes, not 65"):
        weights(long, fastest())
    with pytest.raises(ValueError, match="up to 2000 nodes, not 2001"):
        weights(links_of(ring_graph(2001)), best_constant())
    monkeypatch.setitem(sys.modules, "cvxpy", None)
    with pytest.raises(ValueError, match=r"pip install 'p2pfl-gossip\[optimal\]'"):
        fastest()
