"""Cliques by labels: what they are made of, and what is read."""

from __future__ import annotations

import json
from itertools import chain, pairwise

import networkx as nx
import numpy as np
import pytest

from p2pfl.errors import UserError
from p2pfl.experiment.config import read
from p2pfl.experiment.sections import SECTIONS
from p2pfl.topology import d_cliques_graph
from p2pfl.topology.cliques import label_shares, skew, swapped


def table(counts):
    rows = [dict(enumerate(row)) for row in counts]
    return {"nodes": [{"node": i, "examples": sum(c.values()), **c} for i, c in enumerate(rows)]}


@pytest.fixture
def one_label(tmp_path):
    """Forty nodes that hold one of ten labels each."""
    file = tmp_path / "counts.json"
    file.write_text(json.dumps(table(np.eye(10, dtype=int)[np.arange(40) // 4].tolist())))
    return file


def uneven(n=50, labels=6):
    return np.random.default_rng(1).dirichlet(np.full(labels, 0.3), n)


def test_skew_never_grows_and_falls_far():
    shares = uneven()
    total = []
    for swaps in range(0, 300, 10):
        cliques = swapped(shares, 10, seed=2, swaps=swaps)
        assert sorted(chain(*cliques)) == list(range(50))
        total.append(sum(skew(shares, clique) for clique in cliques))
    assert all(after <= before + 1e-12 for before, after in pairwise(total))
    assert total[-1] < 0.4 * total[0]


def test_a_clique_of_every_label_is_found(one_label):
    shares = label_shares(str(one_label), 40)
    cliques = swapped(shares, 10, seed=0)
    assert sum(skew(shares, clique) for clique in cliques) < 1e-9
    # Each clique then averages what one would on everybody's data.
    for clique in cliques:
        assert shares[clique].mean(0).tolist() == pytest.approx(shares.mean(0).tolist())


@pytest.mark.parametrize(
    ("links", "between"), [("ring", 10), ("fully_connected", 45), ("fractal", 6 + 6 + 1 + 3)]
)
def test_one_edge_between_two_cliques(one_label, links, between):
    graph = d_cliques_graph(40, str(one_label), size=4, links=links)
    assert nx.is_connected(graph)
    assert graph.number_of_edges() == 10 * 6 + between
    assert max(map(len, nx.find_cliques(graph))) == 4
    outside = [degree - 3 for _, degree in graph.degree]
    assert max(outside) <= {"ring": 1, "fully_connected": 3, "fractal": 2}[links]


def test_sizes_differ_by_one_at_most():
    sizes = [len(clique) for clique in swapped(uneven(23), 5, seed=1)]
    assert sorted(sizes) == [4, 4, 5, 5, 5]


def test_one_clique_is_complete(one_label):
    graph = d_cliques_graph(40, str(one_label), size=50)
    assert graph.number_of_edges() == 40 * 39 // 2


def test_who_holds_nothing_counts_as_everybody(tmp_path):
    file = tmp_path / "counts.json"
    file.write_text(json.dumps(table([[3, 1], [0, 0], [1, 3]])))
    assert label_shares(str(file), 3).tolist() == [[0.75, 0.25], [0.5, 0.5], [0.25, 0.75]]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "is not what"),
        ("[]", "is not what"),
        ('{"nodes": []}', "is not what"),
        ('{"nodes": [1, 2]}', "is not what"),
        ('{"nodes": [{"node": 0, "a": 1}, {"node": 1}]}', "is not what"),
        ("[" * 100_000, "is not what"),
        ('{"nodes": [{"node": 0, "examples": 3, "a": 3}]}', "is about 1 nodes, not 0 to 1"),
        ('{"nodes": [{"node": 0, "a": 1}, {"node": 0, "a": 1}]}', "is about 2 nodes, not 0 to 1"),
        ('{"nodes": [{"node": 0, "a": 1}, {"node": 1, "a": -1}]}', "no counts of labels"),
        ('{"nodes": [{"node": 0, "a": 1.5}, {"node": 1, "a": 1}]}', "no counts of labels"),
        ('{"nodes": [{"node": 0, "a": true}, {"node": 1, "a": 1}]}', "no counts of labels"),
        ('{"nodes": [{"node": 0, "examples": 3}, {"node": 1, "examples": 1}]}', "no counts"),
    ],
)
def test_files_that_say_something_else(tmp_path, text, message):
    file = tmp_path / "counts.json"
    file.write_text(text)
    with pytest.raises(ValueError, match=message):
        d_cliques_graph(2, str(file))


def test_a_file_that_is_not_there(tmp_path):
    section = read("topology", f"d_cliques:path={tmp_path}/no.json", SECTIONS["topology"])
    with pytest.raises(UserError, match=r"topology: .*no.json cannot be read: No such file"):
        section.build("topology", 4)


@pytest.mark.parametrize("values", [{"size": 1}, {"n": 1}])
def test_cliques_that_cannot_be(one_label, values):
    with pytest.raises(ValueError, match="must be at least 2"):
        d_cliques_graph(**{"n": 40, "path": str(one_label), **values})
