from __future__ import annotations

import math
from collections import Counter

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from p2pfl.topology import SCHEDULES, el_local, metropolis, one_peer_exponential, weights
from p2pfl.topology import random_matching as matching
from p2pfl.topology.lots import distinct


@pytest.mark.parametrize("n", [2, 4, 8, 64])
def test_log_n_rounds_average_exactly_if_n_is_a_power_of_two(n):
    topology = one_peer_exponential(n)
    assert topology.period == math.log2(n)
    product = torch.eye(n, dtype=torch.float64)
    for links in topology.rounds():
        assert torch.bincount(links.senders).tolist() == [1] * n
        product = weights(links, metropolis()).to_dense() @ product
    torch.testing.assert_close(product, torch.full((n, n), 1 / n, dtype=torch.float64))


@pytest.mark.parametrize("n", [3, 5, 6, 100])
def test_other_n_average_in_the_long_run(n):
    topology, x = one_peer_exponential(n), torch.arange(n, dtype=torch.float64).unsqueeze(1)
    for round in range(30 * topology.period):
        x = weights(topology.links(round), metropolis()) @ x
    torch.testing.assert_close(x, torch.full_like(x, (n - 1) / 2), rtol=0, atol=1e-6)


@given(st.integers(2, 30), st.integers(0, 100), st.integers(0, 50))
@settings(max_examples=40, deadline=None)
def test_a_matching_is_a_matching(n, seed, round):
    links = matching(n, seed).links(round)
    pairs = set(zip(links.senders.tolist(), links.receivers.tolist(), strict=True))
    assert all((b, a) in pairs for a, b in pairs)
    assert len(pairs) == n // 2 * 2
    assert len({a for a, _ in pairs}) == len(pairs)


def test_everybody_meets_everybody_alike():
    topology = matching(6, seed=1)
    met = Counter(topology.view(0, round)[0] for round in range(500))
    assert len(met) == 5
    assert all(70 < times < 130 for times in met.values())


@given(st.integers(2, 12), st.data(), st.integers(0, 50))
@settings(max_examples=40, deadline=None)
def test_everybody_sends_to_s_others(n, data, round):
    s = data.draw(st.integers(1, n - 1))
    links = el_local(n, s, seed=3).links(round)
    assert torch.bincount(links.senders).tolist() == [s] * n
    assert bool((links.senders != links.receivers).all())


def test_others_are_drawn_alike():
    topology = el_local(5, 2, seed=8)
    heard = Counter(to for round in range(600) for to in topology.view(1, round)[0])
    assert set(heard) == {0, 2, 3, 4}
    assert all(240 < times < 360 for times in heard.values())


@given(st.integers(1, 6), st.integers(0, 99))
@settings(max_examples=30, deadline=None)
def test_distinct_numbers(k, seed):
    lots = torch.rand(50, k, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    found = distinct(lots, 6)
    assert all(len(set(row)) == k for row in found.tolist())
    assert 0 <= int(found.min()) <= int(found.max()) < 6


@pytest.mark.parametrize("name", ["random_matching", "el_local"])
def test_rounds_and_seeds_differ_and_repeat(name):
    build = SCHEDULES[name]
    one, again, other = build(20, seed=1), build(20, seed=1), build(20, seed=2)
    assert one.period is None
    for round in (9, 0, 3):  # in whatever order they are asked for
        assert torch.equal(one.links(round).senders, again.links(round).senders)
    assert one.view(3, 7) == again.view(3, 7)
    assert not torch.equal(one.links(0).senders, one.links(1).senders)
    assert not torch.equal(one.links(0).senders, other.links(0).senders)


@pytest.mark.parametrize("name", SCHEDULES)
def test_one_node_has_nobody(name):
    with pytest.raises(ValueError, match="n = 1 must be at least 2"):
        SCHEDULES[name](1)


@pytest.mark.parametrize("s", [0, 5])
def test_el_local_checks(s):
    with pytest.raises(ValueError, match=f"s = {s} must be 1 to n - 1 = 4"):
        el_local(5, s)
