"""Random graphs for property tests."""

from __future__ import annotations

import networkx as nx
from hypothesis import strategies as st


@st.composite
def connected_graphs(draw: st.DrawFn, largest: int = 64) -> nx.Graph:
    """Draw a random tree and some edges on top of it."""
    n = draw(st.integers(2, largest))
    graph = nx.Graph()
    graph.add_nodes_from(range(n))
    graph.add_edges_from((node, draw(st.integers(0, node - 1))) for node in range(1, n))
    pairs = st.tuples(st.integers(0, n - 1), st.integers(0, n - 1))
    graph.add_edges_from((a, b) for a, b in draw(st.lists(pairs, max_size=2 * n)) if a != b)
    return graph


@st.composite
def strong_digraphs(draw: st.DrawFn, largest: int = 24) -> nx.DiGraph:
    """Draw a directed ring and some links on top of it."""
    n = draw(st.integers(2, largest))
    graph = nx.DiGraph((node, (node + 1) % n) for node in range(n))
    pairs = st.tuples(st.integers(0, n - 1), st.integers(0, n - 1))
    graph.add_edges_from((a, b) for a, b in draw(st.lists(pairs, max_size=2 * n)) if a != b)
    return graph
