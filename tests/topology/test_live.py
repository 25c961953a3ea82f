"""Topologies among those who are alive: connected, and the same whoever works them out."""

from __future__ import annotations

import hashlib
import os
import random
import subprocess
import sys
from pathlib import Path

import networkx as nx
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from p2pfl.errors import UserError
from p2pfl.experiment.config import read
from p2pfl.experiment.nodes import as_topology
from p2pfl.experiment.sections import SECTIONS
from p2pfl.topology import (
    Topology,
    chain_graph,
    metropolis,
    one_peer_exponential,
    random_matching,
    ring_graph,
    star_graph,
    static,
    weights,
)
from p2pfl.topology.live import Overlay

from .strategies import connected_graphs, strong_digraphs
from .test_schedule import pairs_of

# Rules by how they stand in a file, and of how many nodes, up to 15, they cannot be.
RULES = {
    "complete": (),
    "ring": (1,),
    "chain": (),
    "star": (1,),
    "binary_tree": (),
    "grid": (1,),
    "grid:cols=4": (1, 2, 3, 5, 6, 7, 9, 10, 11, 13, 14, 15),
    "torus": (1, 2, 3, 4, 5, 6, 7, 8, 10, 11, 13, 14),
    "torus:rows=4,cols=4": tuple(range(1, 16)),
    "hypercube": (1, 3, 5, 6, 7, 9, 10, 11, 12, 13, 14, 15),
    "random_regular:degree=3": (1, 2, 3, 5, 7, 9, 11, 13, 15),
    "erdos_renyi:p=0.4": (1,),
    "watts_strogatz": (1, 2, 3, 4),
    "barabasi_albert": (1, 2),
    "exponential": (1,),
    "el_local": (1, 2, 3, 4),
    "el_oracle": (1, 2, 3, 4),
    "el_oracle:s=3": (1, 2, 3, 5, 7, 9, 11, 13, 15),
    "one_peer_exponential": (1,),
    "one_peer_hypercube": (1, 3, 5, 6, 7, 9, 10, 11, 12, 13, 14, 15),
    "hyper_hypercube:k=2": (1, 5, 7, 10, 11, 13, 14, 15),
    "simple_base": (1,),
    "base:k=2": (1,),
    "base:shuffle=true": (1,),
    "one_factorisation": (1,),
    "random_matching": (1,),
    "equi_static": (1,),
    "u_equi_static": (1,),
    "od_equi_dyn": (1,),
    "ou_equi_dyn": (1,),
    "cyclon": (1, 2, 3, 4),
}


def rule_of(spec):
    section = read("topology", spec, SECTIONS["topology"])
    return lambda k: as_topology(section.build("topology", k), section.name)


def undirected(topology, round=0):
    return {tuple(sorted(pair)) for pair in pairs_of(topology.links(round))}


def subsets(n):
    return st.lists(st.integers(0, n - 1), min_size=1, max_size=n, unique=True).map(tuple)


@st.composite
def topologies(draw):
    """Draw a topology of a few rounds, connected only over all of them."""
    graph = draw(st.one_of(connected_graphs(largest=24), strong_digraphs()))
    edges = list(graph.edges)
    n, period = graph.number_of_nodes(), draw(st.integers(1, 3))
    by_round = draw(st.lists(st.integers(0, period - 1), min_size=len(edges), max_size=len(edges)))
    rounds = []
    for round in range(period):
        part = nx.create_empty_copy(graph)
        part.add_edges_from(e for e, at in zip(edges, by_round, strict=True) if at == round)
        rounds.append(static(part).links(0))
    return Topology(n, lambda round: rounds[round % period], period, "drawn")


def over_a_period(topology):
    graph = nx.DiGraph()
    graph.add_nodes_from(range(topology.n))
    graph.add_edges_from(pair for links in topology.rounds() for pair in pairs_of(links))
    return graph


@given(topologies(), st.data())
@settings(max_examples=150)
def test_what_is_left_is_mended(full, data):
    live = data.draw(subsets(full.n))
    topology = Overlay(full, None).among(live)
    before, after = over_a_period(full), over_a_period(topology)
    assert nx.is_strongly_connected(after.subgraph(live))
    assert after.subgraph(live).number_of_edges() == after.number_of_edges()  # none of the dead
    assert (topology.n, topology.period, topology.name) == (full.n, full.period, full.name)
    assert topology.is_symmetric or not full.is_symmetric
    for node in live:
        neighbours = {*before.predecessors(node), *before.successors(node)}
        assert len({*after.predecessors(node), *after.successors(node)}) <= 2 * len(neighbours)


@given(topologies(), st.data())
@settings(max_examples=60)
def test_links_are_added_only_where_something_is_torn_and_then_in_every_round(full, data):
    live = data.draw(subsets(full.n))
    topology = Overlay(full, None).among(live)
    added = set(over_a_period(topology).edges) - set(over_a_period(full).edges)
    if nx.is_strongly_connected(over_a_period(full).subgraph(live)):
        assert not added
    for round in range(2 * full.period):
        kept = {pair for pair in pairs_of(full.links(round)) if set(pair) <= set(live)}
        now = pairs_of(topology.links(round))
        assert kept | added <= set(now)
        assert now == sorted(now, key=lambda pair: pair[::-1])


@given(topologies(), st.data())
@settings(max_examples=60)
def test_the_order_of_the_live_does_not_matter(full, data):
    live = data.draw(subsets(full.n))
    overlay = Overlay(full, None)
    other = Overlay(full, None).among(data.draw(st.permutations(live)))
    for round in range(full.period):
        assert pairs_of(overlay.among(live).links(round)) == pairs_of(other.links(round))
    assert overlay.among(live[::-1]) is overlay.among((*live, live[0]))


@given(connected_graphs(largest=24), st.data())
@settings(max_examples=60)
def test_the_live_average_among_themselves(graph, data):
    live = data.draw(subsets(len(graph)))
    matrix = weights(Overlay(static(graph), None).among(live).links(0), metropolis()).to_dense()
    ones = torch.ones(len(graph), dtype=torch.float64)
    torch.testing.assert_close(matrix.sum(0), ones)
    torch.testing.assert_close(matrix.sum(1), ones)
    dead = [node for node in graph if node not in live]
    assert torch.equal(matrix[dead], torch.eye(len(graph), dtype=torch.float64)[dead])


@pytest.mark.parametrize("spec", RULES)
def test_the_live_follow_the_rule_where_it_can_be_followed(spec):
    rule = rule_of(spec)
    full, mended = rule(16), []
    overlay = Overlay(full, rule)
    for k in range(1, 16):
        live = tuple(sorted(random.Random(k).sample(range(16), k)))
        topology = overlay.among(live)
        try:
            small = rule(k)
        except UserError:
            mended.append(k)
            other, ids = Overlay(full, None).among(live), range(16)
        else:
            other, ids = small, live
        assert (topology.n, topology.period) == (16, other.period)
        for round in range(topology.period or 5):
            expected = [(ids[s], ids[r]) for s, r in pairs_of(other.links(round))]
            assert pairs_of(topology.links(round)) == expected
    assert tuple(mended) == RULES[spec]


@pytest.mark.parametrize("spec", RULES)
@pytest.mark.parametrize("given_rule", [True, False], ids=["rule", "mended"])
def test_no_topology_loses_anybody_who_is_alive(spec, given_rule):
    rule = rule_of(spec)
    full = rule(16)
    overlay = Overlay(full, rule if given_rule else None)
    for k in range(1, 16):
        live = tuple(sorted(random.Random(k).sample(range(16), k)))
        topology = overlay.among(live)
        links = [topology.links(round) for round in range(topology.period or 40)]
        graph = nx.DiGraph(pair for each in links for pair in pairs_of(each))
        assert set(graph) == (set(live) if k > 1 else set())
        assert k == 1 or nx.is_strongly_connected(graph)
        assert topology.is_symmetric or not full.is_symmetric


def test_a_ring_by_its_rule_stays_a_ring():
    among = Overlay(static(ring_graph(5)), lambda k: static(ring_graph(k))).among
    assert undirected(among((0, 1, 3, 4))) == {(0, 1), (1, 3), (3, 4), (0, 4)}
    assert among((0, 1, 3, 4)).view(1, 9) == ((0, 3), (0, 3))
    assert among((0, 1, 3, 4)).view(2, 9) == ((), ())
    # A rule of which a single node is no example.
    assert among((2,)).view(2, 0) == ((), ())


@pytest.mark.parametrize(
    ("graph", "live", "links"),
    [
        (ring_graph(5), (0, 1, 3, 4), {(0, 1), (3, 4), (0, 4)}),  # connected: nothing is added
        (ring_graph(6), (0, 2, 4, 5), {(0, 2), (4, 5), (0, 5)}),  # one link is enough
        (star_graph(5), (1, 2, 3, 4), {(1, 2), (2, 3), (3, 4), (1, 4)}),
        (star_graph(3), (1, 2), {(1, 2)}),
        (star_graph(3), (0, 2), {(0, 2)}),
        (chain_graph(8), (0, 1, 4, 6, 7), {(0, 1), (1, 4), (4, 6), (6, 7)}),
        (nx.Graph([(0, 1), (2, 3)]), (0, 2), set()),  # was never connected
    ],
)
def test_small_graphs(graph, live, links):
    assert undirected(Overlay(static(graph), None).among(live)) == links


def test_two_cliques_without_their_bridge_join_where_it_stood():
    one, other = nx.complete_graph(4), nx.complete_graph(range(5, 9))
    graph = nx.compose(one, other)
    graph.add_edges_from([(2, 4), (4, 7)])
    among = Overlay(static(graph), None).among((0, 1, 2, 3, 5, 6, 7, 8))
    assert undirected(among) == {*one.edges, *other.edges, (2, 7)}


def test_a_directed_ring_without_a_node():
    ring = nx.DiGraph((node, (node + 1) % 5) for node in range(5))
    links = pairs_of(Overlay(static(ring), None).among((0, 1, 3, 4)).links(0))
    assert set(links) == {(3, 4), (4, 0), (0, 1), (1, 3), (3, 1)}


def test_where_nothing_repeats_a_ring_is_beside_it():
    full = random_matching(9)
    topology = Overlay(full, None).among((1, 4, 6, 8))
    ring = {(1, 4), (4, 6), (6, 8), (1, 8)}
    for round in range(20):
        met = {pair for pair in undirected(full, round) if set(pair) <= {1, 4, 6, 8}}
        assert undirected(topology, round) == ring | met


def test_eight_of_eleven_average_exactly_in_three_rounds():
    live = (0, 1, 3, 4, 6, 7, 9, 10)
    topology = Overlay(one_peer_exponential(11), one_peer_exponential).among(live)
    assert topology.period == 3
    x = torch.randn(11, 1, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    mixed = x
    for links in topology.rounds():
        mixed = weights(links, metropolis()) @ mixed
    rows = list(live)
    torch.testing.assert_close(mixed[rows], x[rows].mean(0).expand(8, 1), rtol=0, atol=1e-15)
    assert torch.equal(mixed[[2, 5, 8]], x[[2, 5, 8]])


def test_everybody_alive_is_the_full_topology_itself():
    full = static(ring_graph(5))
    assert Overlay(full, lambda k: static(chain_graph(k))).among((4, 3, 2, 1, 0)) is full


@pytest.mark.parametrize("live", [(), (5,), (-1, 2)])
def test_nobody_and_strangers_are_refused(live):
    with pytest.raises(ValueError, match=r"must name some of the nodes 0\.\.4"):
        Overlay(static(ring_graph(5)), None).among(live)


def fingerprint():
    """Return what tells links apart, of every topology among some that are alive."""
    digest = hashlib.sha256()
    for spec in RULES:
        full = rule_of(spec)(16)
        for rule in (rule_of(spec), None):
            for live in [(1, 2, 4, 5, 7, 8, 10, 13, 14), (0, 3, 5, 15)]:
                topology = Overlay(full, rule).among(live)
                links = [pairs_of(topology.links(round)) for round in range(3)]
                digest.update(repr(links).encode())
    return digest.hexdigest()


def test_another_process_derives_the_same_links():
    done = subprocess.run(
        [sys.executable, "-c", "from topology.test_live import fingerprint; print(fingerprint())"],
        cwd=Path(__file__).parents[1],
        env=os.environ | {"PYTHONHASHSEED": "12345"},
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout.strip() == fingerprint()
