from __future__ import annotations

import inspect
import math

import networkx as nx
import pytest

from p2pfl.topology import (
    GRAPHS,
    barabasi_albert_graph,
    binary_tree_graph,
    chain_graph,
    complete_graph,
    erdos_renyi_graph,
    exponential_graph,
    grid_graph,
    hypercube_graph,
    random_regular_graph,
    ring_graph,
    star_graph,
    torus_graph,
    watts_strogatz_graph,
)

REQUIRED = {"random_regular": {"degree": 4}, "erdos_renyi": {"p": 0.4}}


@pytest.mark.parametrize("name", GRAPHS)
def test_every_graph_is_connected_and_numbered_in_order(name):
    graph = GRAPHS[name](16, **REQUIRED.get(name, {}))
    assert list(graph) == list(range(16))
    assert graph.is_directed() == (name == "exponential")
    assert nx.is_connected(nx.Graph(graph))
    assert nx.number_of_selfloops(graph) == 0


@pytest.mark.parametrize("name", GRAPHS)
def test_every_factory_can_be_a_section(name):
    parameters = inspect.signature(GRAPHS[name]).parameters
    assert next(iter(parameters)) == "n"
    assert {p.annotation for p in parameters.values()} <= {"int", "float", "int | None"}


@pytest.mark.parametrize(
    ("graph", "reference"),
    [
        (ring_graph(7), nx.cycle_graph(7)),
        (ring_graph(2), nx.path_graph(2)),
        (binary_tree_graph(15), nx.balanced_tree(2, 3)),
        (grid_graph(12), nx.grid_2d_graph(3, 4)),
        (grid_graph(12, rows=6), nx.grid_2d_graph(6, 2)),
        (torus_graph(12), nx.grid_2d_graph(3, 4, periodic=True)),
        (torus_graph(16), nx.hypercube_graph(4)),
        (hypercube_graph(8), nx.hypercube_graph(3)),
        (random_regular_graph(10, 9), nx.complete_graph(10)),
    ],
)
def test_graphs_are_those_of_networkx(graph, reference):
    assert nx.is_isomorphic(graph, reference)


@pytest.mark.parametrize("make", [complete_graph, chain_graph, binary_tree_graph])
def test_a_single_node_has_no_edges(make):
    assert list(make(1)) == [0]
    assert make(1).number_of_edges() == 0


@pytest.mark.parametrize("degree", [2, 3, 7, 12, 14])
def test_random_regular_graphs_are_regular(degree):
    graph = random_regular_graph(16, degree, seed=3)
    assert {d for _, d in graph.degree} == {degree}
    assert nx.is_connected(graph)


@pytest.mark.parametrize("n", [2, 3, 6, 16, 25])
def test_exponential_degrees(n):
    graph = exponential_graph(n)
    assert {d for _, d in graph.out_degree} == {math.ceil(math.log2(n))}
    assert {d for _, d in graph.in_degree} == {math.ceil(math.log2(n))}


def test_a_seed_gives_the_same_graph_and_another_another():
    first, again, other = (random_regular_graph(20, 3, seed=seed) for seed in (5, 5, 6))
    assert set(first.edges) == set(again.edges) != set(other.edges)


def test_erdos_renyi_draws_until_connected():
    lonely = [
        seed for seed in range(20) if not nx.is_connected(nx.gnp_random_graph(16, 0.15, seed))
    ]
    assert lonely
    assert all(nx.is_connected(erdos_renyi_graph(16, 0.15, seed)) for seed in lonely)


def test_large_erdos_renyi_graphs_have_the_right_number_of_edges():
    graph = erdos_renyi_graph(2000, 0.01)
    assert graph.number_of_edges() == pytest.approx(0.01 * 2000 * 1999 / 2, rel=0.05)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: complete_graph(0), "n = 0 is too small; it must be at least 1"),
        (lambda: ring_graph(1), "n = 1 is too small; it must be at least 2"),
        (lambda: star_graph(1), "n = 1 is too small"),
        (lambda: hypercube_graph(6), "n = 6 is not a power of two; nearest: 4, 8"),
        (
            lambda: grid_graph(12, rows=5),
            "rows = 5 does not fit n = 12; possible: 1 x 12, 2 x 6, 3 x 4",
        ),
        (lambda: grid_graph(12, cols=0), "cols = 0 is too small"),
        (lambda: grid_graph(12, rows=3, cols=3), "rows = 3 times cols = 3 is 9, but n = 12"),
        (lambda: torus_graph(8), "n = 8 has no two sides of at least 3; nearest n: 9"),
        (lambda: torus_graph(13), "n = 13 has no two sides of at least 3; nearest n: 12, 15"),
        (lambda: torus_graph(12, rows=2), "rows = 2 is too small; it must be at least 3"),
        (lambda: torus_graph(12, rows=6), "rows = 6 does not fit n = 12; possible: 3 x 4"),
        (lambda: random_regular_graph(8, 8), "degree = 8 must be below n = 8"),
        (
            lambda: random_regular_graph(7, 3),
            "degree = 3 with n = 7 needs 7 * 3 half edges, an odd",
        ),
        (lambda: random_regular_graph(8, 0), "degree = 0 is too small"),
        (lambda: random_regular_graph(8, 1), "degree = 1 cannot connect n = 8 nodes"),
        (lambda: erdos_renyi_graph(8, 0), "p = 0 is not a probability"),
        (lambda: erdos_renyi_graph(8, 1.5), "p = 1.5 is not a probability"),
        (lambda: erdos_renyi_graph(50, 0.001), "p = 0.001 with n = 50 gave no connected graph"),
        (lambda: erdos_renyi_graph(50, 0.001), "try p >= 1.5 ln n / n = 0.117"),
        (lambda: watts_strogatz_graph(8, 3), "degree = 3 is odd"),
        (lambda: watts_strogatz_graph(4), "degree = 4 must be below n = 4"),
        (lambda: watts_strogatz_graph(8, 4, -1), "rewire = -1 is not a probability"),
        (lambda: barabasi_albert_graph(8, 8), "attach = 8 must be below n = 8"),
        (lambda: exponential_graph(1), "n = 1 is too small"),
    ],
)
def test_impossible_arguments_say_what_would_do(call, message):
    with pytest.raises(ValueError) as error:  # noqa: PT011 - the message is compared below
        call()
    assert message in str(error.value)
