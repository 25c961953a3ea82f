"""Rates of convergence against closed forms and values computed elsewhere."""

from __future__ import annotations

from math import cos, pi

import pytest
import torch

from p2pfl.topology import (
    GRAPHS,
    Topology,
    analyse,
    complete_graph,
    exponential_graph,
    links_between,
    metropolis,
    push,
    read_network,
    ring_graph,
    rounds_to,
    spectral,
    star_graph,
    static,
    torus_graph,
    uniform,
)

from .test_files import TOPOLOGIES
from .test_schedule import PAIRS


def graph_of(name, n, **arguments):
    return static(GRAPHS[name](n, **arguments), name)


def shift(n, by):
    nodes = torch.arange(n)
    return links_between(n, nodes, (nodes + by) % n)


def one_peer(n):
    jumps = [1 << j for j in range((n - 1).bit_length())]
    return Topology(n, lambda t: shift(n, jumps[t % len(jumps)]), len(jumps), "one peer")


@pytest.mark.parametrize(
    ("name", "arguments", "rho"),
    [
        ("chain", {}, 0.98719),
        ("ring", {}, 0.94925),
        ("grid", {}, 0.86864),
        ("torus", {}, 0.6),
        ("hypercube", {}, 0.6),
        ("star", {}, 0.9375),
        ("erdos_renyi", {"p": 0.3, "seed": 1}, 0.88250),
        ("barabasi_albert", {"attach": 2, "seed": 1}, 0.90625),
        ("watts_strogatz", {"degree": 4, "rewire": 0.2, "seed": 1}, 0.88605),
        ("random_regular", {"degree": 4, "seed": 1}, 0.72218),
    ],
)
def test_known_rates_on_sixteen_nodes(name, arguments, rho):
    assert analyse(graph_of(name, 16, **arguments), metropolis()).rho == pytest.approx(
        rho, abs=6e-6
    )


@pytest.mark.parametrize(
    ("file", "rho"),
    [("two_cliques.edges", 0.97731), ("karate.graphml", 0.96876), ("davis.json", 0.91790)],
)
def test_known_rates_of_the_shipped_files(file, rho):
    topology = static(read_network(TOPOLOGIES / file).graph)
    assert analyse(topology, metropolis()).rho == pytest.approx(rho, abs=6e-6)


CLOSED = {
    "complete": lambda n: 0.0,
    "ring": lambda n: (1 + 2 * cos(2 * pi / n)) / 3,
    "chain": lambda n: (1 + 2 * cos(pi / n)) / 3,
    "torus": lambda n: (3 + 2 * cos(2 * pi / n**0.5)) / 5,
    "hypercube": lambda n: (n.bit_length() - 2) / n.bit_length(),
    "star": lambda n: 1 - 1 / n,
    "exponential": lambda n: (n.bit_length() - 2) / n.bit_length(),
}


@pytest.mark.parametrize("name", CLOSED)
@pytest.mark.parametrize("n", [16, 64])
def test_closed_forms(name, n):
    found = analyse(graph_of(name, n), metropolis())
    assert found.rho == pytest.approx(CLOSED[name](n), abs=1e-12)
    assert found.slem == pytest.approx(found.rho, abs=1e-12)
    assert found.gap == pytest.approx(1 - CLOSED[name](n), abs=1e-12)
    assert found.doubly_stochastic
    assert not found.approximate


EVERY_N = {
    "complete": range(2, 40),
    "ring": range(4, 90, 3),
    "chain": range(3, 90, 3),
    "torus": [m * m for m in range(4, 12)],
    "hypercube": [2**d for d in range(1, 8)],
    "star": range(3, 90, 3),
    "exponential": [2**d for d in range(1, 8)],
}


@pytest.mark.parametrize("name", EVERY_N)
def test_closed_forms_for_many_numbers_of_nodes(name):
    for n in EVERY_N[name]:
        topology = graph_of(name, n)
        found = analyse(topology, metropolis())
        assert found.rho == pytest.approx(CLOSED[name](n), abs=1e-11)
        assert found.nodes == n
        assert found.exact_after == (1 if found.rho == 0 else None)
        lazy = analyse(topology, metropolis(lazy=True))
        values = torch.linalg.eigvals(spectral.weights(topology.links(0), metropolis()).to_dense())
        second = max(abs(1 + v) / 2 for v in values.tolist() if abs(v - 1) > 1e-9)
        assert lazy.slem == pytest.approx(second, abs=1e-9)


@pytest.mark.parametrize("n", [6, 10, 12, 14, 18, 20, 24, 26, 30, 34, 48, 62, 66, 100])
def test_exponential_graphs_of_even_numbers(n):
    """Proposition 1 of Ying et al. (2021)."""
    hops = (n - 1).bit_length()
    found = analyse(static(exponential_graph(n)), metropolis()).rho
    assert found == pytest.approx((hops - 1) / (hops + 1), abs=1e-12)


@pytest.mark.parametrize(("n", "rho"), [(25, 0.51086), (33, 0.60780), (63, 0.61087)])
def test_odd_exponential_graphs_are_faster(n, rho):
    assert analyse(static(exponential_graph(n)), metropolis()).rho == pytest.approx(rho, abs=6e-6)


@pytest.mark.parametrize(("n", "rho"), [(16, 0.974627), (64, 0.998395)])
def test_lazy_rings(n, rho):
    found = analyse(static(ring_graph(n)), metropolis(lazy=True))
    assert found.rho == pytest.approx(rho, abs=1e-6)
    assert found.lambda_min == pytest.approx(1 / 3, abs=1e-12)


@pytest.mark.parametrize(
    ("name", "n", "rounds"),
    [
        ("ring", 16, 261),
        ("ring", 64, 4220),
        ("chain", 16, 1072),
        ("torus", 16, 27),
        ("torus", 64, 110),
        ("hypercube", 16, 28),
        ("hypercube", 64, 42),
        ("star", 16, 213),
        ("complete", 16, 1),
    ],
)
def test_rounds_to_a_millionth(name, n, rounds):
    assert analyse(graph_of(name, n), metropolis()).rounds_to_1e_6 == rounds


def test_shape_of_the_graph():
    star = analyse(static(star_graph(16)), metropolis())
    assert (star.nodes, star.edges, star.directed, star.period, star.degree_max) == (
        16,
        15,
        False,
        1,
        15,
    )
    directed = analyse(static(exponential_graph(8)), metropolis())
    assert (directed.edges, directed.directed, directed.degree_max) == (24, True, 3)
    assert directed.lambda_min is None


def test_uniform_weights_of_a_star_are_no_average_but_agree():
    found = analyse(static(star_graph(16)), uniform())
    assert not found.doubly_stochastic
    assert found.rho > 1
    assert found.slem == pytest.approx(0.5, abs=1e-12)
    assert found.rounds_to_1e_6 == 20


@pytest.mark.parametrize("n", [4, 8, 16, 32])
def test_one_peer_exponential_is_exact_after_a_period(n):
    found = analyse(one_peer(n), metropolis())
    assert found.exact_after == n.bit_length() - 1 == found.period
    assert found.rho == pytest.approx(0, abs=1e-12)
    assert rounds_to(one_peer(n), metropolis(), 1e-9) == found.exact_after


def test_one_peer_exponential_is_not_exact_on_other_numbers():
    found = analyse(one_peer(6), metropolis())
    assert found.exact_after is None
    assert 0 < found.rho < 1


def test_exact_after_is_not_mistaken_for_convergence():
    assert analyse(static(complete_graph(9)), metropolis()).exact_after == 1
    assert analyse(static(complete_graph(1)), metropolis()).exact_after == 0
    assert analyse(graph_of("random_regular", 64, degree=60), metropolis()).exact_after is None
    assert analyse(PAIRS, metropolis()).exact_after == 2
    assert analyse(PAIRS, metropolis()).edges == 4


@pytest.mark.parametrize(
    "topology",
    [static(ring_graph(12)), static(exponential_graph(13)), static(star_graph(9)), one_peer(11)],
)
@pytest.mark.parametrize("rule", [metropolis(), uniform(), push()], ids=lambda rule: rule.name)
def test_rounds_to_is_enough_and_one_less_is_not(topology, rule):
    tolerance = 1e-4
    rounds = rounds_to(topology, rule, tolerance)
    product = torch.eye(topology.n, dtype=torch.float64)
    for round in range(rounds + 1):
        estimates = product / product.sum(1, keepdim=True)
        left = float(torch.linalg.matrix_norm(estimates - estimates.mean(0), 2))
        assert (left <= tolerance * (1 + 1e-9)) == (round == rounds)
        product = spectral.weights(topology.links(round), rule) @ product


def test_rounds_to_of_special_graphs():
    assert rounds_to(static(complete_graph(9)), metropolis(), 1e-9) == 1
    assert rounds_to(static(complete_graph(1)), metropolis(), 1e-9) == 0
    with pytest.raises(ValueError, match="tolerance = 2"):
        rounds_to(static(complete_graph(3)), metropolis(), 2)
    apart = Topology(4, lambda _: PAIRS.links(0), 1, "apart")
    for rule in (metropolis(), push()):
        with pytest.raises(ValueError, match=r"apart with .* never agrees"):
            rounds_to(apart, rule, 1e-3)
    assert analyse(apart, metropolis()).rounds_to_1e_6 is None


def test_without_a_period_only_what_happens_is_known():
    topology = Topology(7, lambda round: shift(7, 1 + round % 5), None, "endless")
    found = analyse(topology, metropolis())
    assert (found.period, found.rho, found.slem, found.gap) == (None, None, None, None)
    assert found.rounds_to_1e_6 is not None
    assert 5 < found.rounds_to_1e_6 <= rounds_to(topology, metropolis(), 1e-6) < 500


@pytest.mark.parametrize(
    ("topology", "rule"),
    [
        (static(torus_graph(64)), metropolis()),
        (static(exponential_graph(100)), metropolis()),
        (static(star_graph(70)), uniform()),
        (one_peer(72), metropolis()),
    ],
)
def test_large_networks_are_judged_alike(monkeypatch, topology, rule):
    exact, rounds = analyse(topology, rule), rounds_to(topology, rule, 1e-6)
    monkeypatch.setattr(spectral, "DENSE", 10)
    rough = analyse(topology, rule)
    assert rough.approximate
    assert rough.rho == pytest.approx(exact.rho, abs=1e-6)
    assert rough.slem == pytest.approx(exact.slem, abs=1e-2)
    assert rough.lambda_min == (exact.lambda_min and pytest.approx(exact.lambda_min, abs=1e-4))
    assert rough.rounds_to_1e_6 == exact.rounds_to_1e_6
    assert rounds <= rounds_to(topology, rule, 1e-6) <= 1.6 * rounds + 1


def test_slow_large_networks_are_extrapolated(monkeypatch):
    ring = static(ring_graph(128))
    exact = analyse(ring, metropolis()).rounds_to_1e_6
    monkeypatch.setattr(spectral, "DENSE", 10)
    assert analyse(ring, metropolis()).rounds_to_1e_6 == pytest.approx(exact, rel=0.01)
