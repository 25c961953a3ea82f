from __future__ import annotations

from dataclasses import replace

import networkx as nx
import pytest
import torch
from hypothesis import given, settings

from p2pfl.topology import (
    Topology,
    chain_graph,
    complete_graph,
    exponential_graph,
    in_degrees,
    links_between,
    out_degrees,
    random_matching,
    random_regular_graph,
    ring_graph,
    schedule,
    static,
    torus_graph,
)

from .strategies import connected_graphs, strong_digraphs


def links_of(n, *pairs):
    senders, receivers = torch.tensor(pairs).reshape(-1, 2).T
    return links_between(n, senders, receivers)


def pairs_of(links):
    return list(zip(links.senders.tolist(), links.receivers.tolist(), strict=True))


# Two rounds on four nodes: pairs of neighbours, then a ring shifted by two. Neither alone
# connects anything, together they do.
EVEN = links_of(4, (0, 1), (1, 0), (2, 3), (3, 2))
ODD = links_of(4, (0, 2), (2, 0), (1, 3), (3, 1))
PAIRS = Topology(4, lambda round: (EVEN, ODD)[round % 2], 2, "pairs")


def test_links_are_sorted_by_receiver_and_lose_self_loops_and_repetitions():
    links = links_of(3, (2, 1), (0, 1), (1, 0), (1, 1), (0, 1))
    assert pairs_of(links) == [(1, 0), (0, 1), (2, 1)]
    assert links.senders.dtype == links.receivers.dtype == torch.int64


def test_links_to_nowhere_are_refused():
    with pytest.raises(ValueError, match=r"outside 0\.\.2"):
        links_of(3, (0, 3))


def test_directed_edges_go_from_sender_to_receiver():
    topology = static(nx.DiGraph([(0, 1), (1, 2), (2, 0), (0, 2)]))
    assert topology.view(0, 0) == ((1, 2), (2,))
    links = topology.links(5)
    assert in_degrees(links).tolist() == [1, 1, 2]
    assert out_degrees(links).tolist() == [2, 1, 1]


def test_nodes_must_be_numbered():
    for graph in (nx.Graph([(1, 2)]), nx.Graph([("a", "b")]), nx.Graph()):
        with pytest.raises(ValueError, match=r"0 \.\. n-1"):
            static(graph)


@given(strong_digraphs())
@settings(max_examples=30, deadline=None)
def test_views_are_the_links_seen_from_a_node(graph):
    topology = static(graph)
    pairs = pairs_of(topology.links(0))
    assert set(pairs) == set(graph.edges)
    assert pairs == sorted(pairs, key=lambda pair: pair[::-1])
    for node in graph:
        sends_to, hears_from = topology.view(node, 3)
        assert sends_to == tuple(sorted(r for s, r in pairs if s == node))
        assert hears_from == tuple(sorted(s for s, r in pairs if r == node))


@given(strong_digraphs())
@settings(max_examples=30, deadline=None)
def test_reach_is_the_diameter(graph):
    assert static(graph).reach() == nx.diameter(graph)
    assert static(graph).is_symmetric == all(graph.has_edge(b, a) for a, b in graph.edges)


@given(connected_graphs())
@settings(max_examples=30, deadline=None)
def test_undirected_edges_go_both_ways(graph):
    topology = static(graph)
    assert topology.is_symmetric
    assert len(topology.links(0).senders) == 2 * graph.number_of_edges()
    assert topology.reach() == nx.diameter(graph)


def test_above_a_size_reach_is_a_bound(monkeypatch):
    graphs = [chain_graph(30), torus_graph(36), exponential_graph(33), random_regular_graph(40, 3)]
    exact = [static(graph).reach() for graph in graphs]
    monkeypatch.setattr(schedule, "EXACT_REACH", 1)
    for graph, diameter in zip(graphs, exact, strict=True):
        assert diameter <= static(graph).reach() <= 2 * diameter
    assert 2 <= replace(PAIRS).reach() <= 4  # of which nothing is known yet


def test_a_schedule_of_two_rounds():
    assert PAIRS.view(0, 0) == ((1,), (1,))
    assert PAIRS.view(0, 7) == ((2,), (2,))
    assert PAIRS.is_symmetric
    assert not PAIRS.is_complete
    assert PAIRS.reach() == 2


def test_the_worst_moment_to_speak_counts():
    rounds = [links_of(3, (1, 2), (2, 0)), links_of(3, (0, 1)), links_of(3)]
    topology = Topology(3, lambda round: rounds[round % 3], 3)
    # Said by 1 before round 1: heard by 2 in round 3, and by 0 only in round 6.
    assert topology.reach() == 6
    assert not topology.is_symmetric


def test_a_topology_without_a_period():
    topology = Topology(4, lambda round: (EVEN, ODD)[(round // 3) % 2], None)
    assert topology.view(0, 3) == ((2,), (2,))
    assert topology.reach() == 4
    assert topology.is_symmetric


@pytest.mark.parametrize("n", [2, 5, 16])
def test_whether_drawn_links_flood(n):
    topology, width = random_matching(n, seed=3), 6
    some = set()
    for start in range(40):
        heard = torch.eye(n, dtype=torch.bool)
        for round in range(start, start + width):
            links = topology.links(round)
            heard[links.receivers] |= heard[links.senders]
        some.add(bool(heard.all()))
        assert topology.floods(start, width) == bool(heard.all())
    assert n == 2 or some == {True, False}
    assert topology.floods(0, topology.reach())
    assert static(ring_graph(n)).floods(7, 1)  # nobody asks where it is certain


@pytest.mark.parametrize("exact", [1, 2000])
def test_what_is_not_strongly_connected_has_no_reach(monkeypatch, exact):
    monkeypatch.setattr(schedule, "EXACT_REACH", exact)
    apart = nx.Graph([(0, 1), (2, 3)])
    one_way = nx.DiGraph([(0, 1), (1, 2)])
    for topology in (static(apart, "apart"), static(one_way), Topology(4, lambda _: EVEN, None)):
        with pytest.raises(ValueError, match="not strongly connected"):
            topology.reach()


def test_complete_and_single():
    assert static(complete_graph(5)).is_complete
    assert static(complete_graph(5)).reach() == 1
    assert static(complete_graph(1)).reach() == 0
    assert static(complete_graph(1)).view(0, 0) == ((), ())
    assert not static(ring_graph(5)).is_complete


def test_ten_thousand_nodes():
    topology = static(torus_graph(10_000))
    assert topology.view(9_999, 12) == ((99, 9_899, 9_900, 9_998),) * 2
    assert 100 <= topology.reach() <= 200


def test_contacts_are_those_of_all_rounds():
    ring = static(nx.DiGraph([(0, 1), (1, 2), (2, 0)]))
    assert ring.contacts(0) == ({1}, {2})
    one = torch.ones(1, dtype=torch.int64)
    turns = Topology(3, lambda k: links_between(3, k % 3 * one, (k + 1) % 3 * one), 3, "turns")
    assert turns.contacts(1) == ({2}, {0})
    drawn = Topology(4, turns.links, None, "drawn")
    assert drawn.contacts(3) == ({0, 1, 2}, {0, 1, 2})
