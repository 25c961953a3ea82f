"""Schedules that are drawn: exact expectations against many draws."""

from __future__ import annotations

import math
from collections import Counter
from itertools import permutations

import networkx as nx
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from p2pfl.topology import (
    analyse,
    cyclon,
    el_local,
    el_oracle,
    equi_static,
    in_degrees,
    metropolis,
    od_equi_dyn,
    one_factorisation,
    one_peer_exponential,
    ou_equi_dyn,
    out_degrees,
    push,
    random_matching,
    u_equi_static,
    uniform,
    weights,
)

from .schedule_checks import curve, is_doubly_stochastic, matrix, z_score
from .test_schedule import pairs_of

DRAWS = 500


def spiky(n):
    """A vector of mean zero whose contraction depends on who meets whom."""
    x = torch.randn(n, dtype=torch.float64, generator=torch.Generator().manual_seed(n)) ** 3
    return x - x.mean()


def contractions(topology, rule=None, draws=DRAWS):
    x = spiky(topology.n)
    each = [matrix(topology, round, rule) @ x for round in range(draws)]
    return [float(y.square().sum() / x.square().sum()) for y in each]


@pytest.mark.parametrize(
    ("topology", "expected"),
    [
        (random_matching(16, seed=1), 0.46667),
        (random_matching(64, seed=1), 0.49206),
        (el_oracle(16, 1, seed=1), 0.46667),
        (el_oracle(16, 2, seed=1), 0.28889),
        (el_oracle(16, 4, seed=1), 0.14667),
        (el_oracle(64, 4, seed=1), 0.18730),
        (el_oracle(96, 7, seed=1), 0.11579),
        (od_equi_dyn(16, 16 / 30, seed=1), 0.46667),  # half is taken of what is heard
    ],
    ids=lambda value: value if isinstance(value, float) else f"{value.name} {value.n}",
)
def test_how_much_a_round_leaves_of_a_disagreement(topology, expected):
    assert z_score(contractions(topology), expected) < 4


@pytest.mark.parametrize(
    ("n", "s", "expected"),
    [(16, 1, 0.60175), (16, 2, 0.38268), (16, 4, 0.18158), (64, 2, 0.42070), (96, 7, 0.13224)],
)
def test_el_local_around_the_old_mean(n, s, expected):
    assert z_score(contractions(el_local(n, s, seed=3), uniform()), expected) < 4


@pytest.mark.parametrize("eta", [0.3, 0.5, 1.0])
@pytest.mark.parametrize("n", [5, 16])
def test_a_random_shift(n, eta):
    b = eta * (n - 1) / n
    expected = 1 - 2 * b * (1 - b) * n / (n - 1)
    assert z_score(contractions(od_equi_dyn(n, eta, seed=5)), expected) < 4


def test_el_local_moves_the_mean_but_not_on_average():
    x = spiky(16)
    for s, variance in ((1, 0.0061), (4, 0.0017)):
        topology = el_local(16, s, seed=2)
        moved = [float((matrix(topology, k, uniform()) @ x).mean()) for k in range(2000)]
        assert z_score(moved, 0.0) < 4
        spread = torch.tensor(moved).square().mean() / x.square().mean()
        assert float(spread) == pytest.approx(variance, rel=0.2)


def test_el_local_is_picked_by_s_on_average():
    n, s = 20, 3
    heard = torch.stack([in_degrees(el_local(n, s, seed=1).links(k)) for k in range(400)]).double()
    assert all(float(each.mean()) == s for each in heard)
    assert float(heard.var()) == pytest.approx(s * (1 - s / (n - 1)), rel=0.1)


@given(st.integers(2, 20), st.data(), st.integers(0, 99))
@settings(max_examples=60, deadline=None)
def test_el_oracle_is_regular_and_averages(n, data, round):
    s = data.draw(st.integers(1, n - 1).filter(lambda s: n * s % 2 == 0))
    topology = el_oracle(n, s, seed=4)
    links = topology.links(round)
    assert in_degrees(links).tolist() == out_degrees(links).tolist() == [s] * n
    assert topology.is_symmetric
    w = matrix(topology, round)
    assert is_doubly_stochastic(w)
    assert float(w[w > 0].min()) == pytest.approx(1 / (s + 1))


def test_el_oracle_draws_all_regular_graphs_alike():
    # Of 6 nodes with 2 neighbours each there are 60 circles and 10 pairs of triangles.
    topology, circles = el_oracle(6, 2, seed=0), 0
    for round in range(2000):
        circles += nx.is_connected(nx.Graph(pairs_of(topology.links(round))))
    assert abs(circles - 2000 * 6 / 7) < 4 * math.sqrt(2000 * 6 / 49)


@pytest.mark.parametrize("n", [2, 3, 4, 7, 10, 33])
def test_in_a_tournament_everybody_meets_everybody_once(n):
    topology = one_factorisation(n)
    assert topology.period == n - 1 + n % 2
    met = Counter(pair for links in topology.rounds() for pair in pairs_of(links))
    assert met == Counter(permutations(range(n), 2))
    for links in topology.rounds():
        assert int(in_degrees(links).max()) == 1
        assert int(in_degrees(links).sum()) == n // 2 * 2
    assert pairs_of(topology.links(1 + 3 * topology.period)) == pairs_of(topology.links(1))


@pytest.mark.parametrize(
    ("n", "rho"), [(6, 0.2165), (25, 0.1921), (48, 0.2069), (63, 0.0156), (100, 0.1916)]
)
def test_one_peer_exponential_is_not_exact_on_other_numbers(n, rho):
    found = analyse(one_peer_exponential(n), metropolis())
    assert found.exact_after is None
    assert found.rho == pytest.approx(rho, abs=6e-5)
    assert n != 25 or found.rounds_to_1e_6 == 44


def test_one_peer_exponential_in_any_order():
    topology = one_peer_exponential(16)
    each = [matrix(topology, round) for round in range(4)]
    assert float(torch.linalg.matrix_norm(each[0] - 1 / 16, 2)) == pytest.approx(0.98079, abs=6e-6)
    for a, b, c, d in permutations(each):
        assert float((a @ b @ c @ d - 1 / 16).abs().max()) < 1e-15
    assert curve(topology, 4)[3] == pytest.approx(0.51, abs=0.03)


@pytest.mark.parametrize("build", [equi_static, u_equi_static])
@pytest.mark.parametrize(("n", "m"), [(2, 1), (3, 4), (9, 1), (16, 3), (70, 5), (100, 12)])
def test_equi_static(build, n, m):
    topology = build(n, m, seed=2)
    w = matrix(topology, 0)
    assert topology.period == 1
    assert is_doubly_stochastic(w)
    assert torch.allclose(w.diagonal(), torch.tensor(1 / n, dtype=torch.float64), atol=1e-12)
    assert topology.is_symmetric or build is equi_static
    assert 0 <= analyse(topology, metropolis()).rho < 1
    # A circulant matrix: every row is the one above, one further on.
    assert torch.allclose(w, w.roll((1, 1), (0, 1)), atol=1e-15)


def test_undirected_is_half_each_way():
    one, both = matrix(equi_static(30, 4, seed=6), 0), matrix(u_equi_static(30, 4, seed=6), 0)
    torch.testing.assert_close(both, (one + one.T) / 2)


def test_enough_shifts_mix_as_fast_as_is_promised():
    n, p, rho = 100, 0.01, 0.9
    m = math.ceil(8 / 3 * math.log(2 * n / p) / rho**2)
    found = [analyse(equi_static(n, m, seed=seed), metropolis()).rho for seed in range(30)]
    assert max(found) < rho


@pytest.mark.parametrize("build", [od_equi_dyn, ou_equi_dyn])
@given(st.integers(2, 40), st.floats(0.05, 1.0), st.integers(0, 999))
@settings(max_examples=40, deadline=None)
def test_equi_dyn_is_doubly_stochastic(build, n, eta, round):
    topology = build(n, eta, seed=3)
    links, w = topology.links(round), matrix(topology, round)
    assert is_doubly_stochastic(w)
    torch.testing.assert_close(links.weights, torch.full_like(links.weights, eta * (n - 1) / n))
    assert int(in_degrees(links).max()) == int(out_degrees(links).max()) == 1
    if build is ou_equi_dyn:
        assert torch.equal(w, w.T)
        # Whoever is left over had nobody free a shift ahead or behind.
        assert 3 * int(in_degrees(links).sum()) >= 2 * n
    else:
        assert len(links.senders) == n


def test_push_takes_the_weights_of_directed_links_too():
    topology = od_equi_dyn(7, 0.4, seed=1)
    torch.testing.assert_close(matrix(topology, 3, push()), matrix(topology, 3))


DRAWN = {
    "cyclon": lambda seed: cyclon(30, 3, seed=seed),
    "el_oracle": lambda seed: el_oracle(30, 3, seed=seed),
    "od_equi_dyn": lambda seed: od_equi_dyn(30, seed=seed),
    "ou_equi_dyn": lambda seed: ou_equi_dyn(30, seed=seed),
}


@pytest.mark.parametrize("name", DRAWN)
def test_drawn_rounds_repeat_and_seeds_differ(name):
    one, again, other = DRAWN[name](1), DRAWN[name](1), DRAWN[name](2)
    assert one.period is None
    for round in (9, 0, 3, 25, 4):  # in whatever order they are asked for
        assert pairs_of(one.links(round)) == pairs_of(again.links(round))
    in_order = DRAWN[name](1)
    each = [pairs_of(in_order.links(round)) for round in range(26)]
    assert each[25] == pairs_of(one.links(25))
    assert len({tuple(pairs) for pairs in each}) > 10
    assert each[:5] != [pairs_of(other.links(round)) for round in range(5)]


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: el_oracle(5, 3), "s = 3 with n = 5 is an odd number of ends"),
        (lambda: el_oracle(5, 5), "s = 5 must be 1 to n - 1 = 4"),
        (lambda: equi_static(5, 0), "m = 0 must be at least 1"),
        (lambda: u_equi_static(5, -1), "m = -1 must be at least 1"),
        (lambda: equi_static(5, 10**12), "m = 1000000000000 of n = 5 are more than 100,000,000"),
        (lambda: u_equi_static(5, 10**30), "of n = 5 are more than 100,000,000 links"),
        (lambda: od_equi_dyn(5, 0.0), "eta = 0.0 must be above 0"),
        (lambda: ou_equi_dyn(5, 1.5), "eta = 1.5 must be above 0"),
        (lambda: od_equi_dyn(5, math.nan), "eta = nan must be above 0"),
        (lambda: cyclon(30, 9, view=8), "s = 9 must be 1 to 8"),
        (lambda: cyclon(30, 2, view=5, shuffle=6), "shuffle = 6 must be 1 to 5"),
        (lambda: cyclon(30, 2, view=0), "view = 0"),
    ],
)
def test_what_cannot_be_drawn(build, message):
    with pytest.raises(ValueError, match=message):
        build()


def test_weights_of_a_round_are_what_a_node_takes():
    topology = ou_equi_dyn(9, 0.5, seed=2)
    w = weights(topology.links(5), metropolis())
    for node in range(9):
        sends_to, hears_from = topology.view(node, 5)
        given, taken = topology.view_weights(node, 5)
        assert [float(w[node, other]) for other in hears_from] == list(taken)
        assert [float(w[other, node]) for other in sends_to] == list(given)
    assert random_matching(9).view_weights(0, 5) is None
