"""Shuffled views: what must hold after every round, and what they are like."""

from __future__ import annotations

import networkx as nx
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from p2pfl.topology import cyclon, in_degrees, out_degrees
from p2pfl.topology.sampling import Views, shuffled, views


def holds_nobody_twice(known):
    ordered = np.sort(known.ids, 1)
    return bool((ordered[:, 1:] != ordered[:, :-1]).all())


def known_by(known):
    return np.bincount(known.ids.ravel(), minlength=len(known.ids))


@given(st.integers(2, 40), st.data(), st.integers(0, 99))
@settings(max_examples=40, deadline=None)
def test_views_stay_what_they_are(n, data, seed):
    width = data.draw(st.integers(1, n - 1))
    at = views(n, width, data.draw(st.integers(1, width)), seed)
    for round in range(12):
        known = at(round)
        assert known.ids.shape == known.ages.shape == (n, width)  # full: no pointer is lost
        assert holds_nobody_twice(known)
        assert not (known.ids == np.arange(n)[:, None]).any()
        assert 0 <= known.ids.min() <= known.ids.max() < n
        assert 0 <= known.ages.min() <= known.ages.max() <= round + 1
        graph = nx.DiGraph((a, int(b)) for a, row in enumerate(known.ids) for b in row)
        assert width < 3 or nx.is_weakly_connected(graph)


def test_a_shuffle_by_hand():
    # Node 0 has not heard of 1 for longest, and is the only one who begins before being asked.
    ids = np.array([[1, 2], [3, 2], [3, 0], [0, 1]])
    ages = np.array([[5, 0], [0, 0], [0, 0], [0, 0]])
    lots = np.tile([0.5, 0.4, 0.5, 0.6, 0.9], (4, 1))
    lots[:, -1] = [0.1, 0.2, 0.3, 0.4]
    known = shuffled(Views(ids, ages), 1, lots)
    assert ids.tolist() == [[1, 2], [3, 2], [3, 0], [0, 1]]  # as it was
    # 0 sends itself for 1, which answers with 3: 0 knows 3 in place of 1, 1 knows 0 in place of 3.
    assert 3 in known.ids[0]
    assert holds_nobody_twice(known)


def test_everybody_is_known_by_about_as_many():
    n, width = 1000, 20
    at = views(n, width, 8, 3)
    for round in range(40):
        known = at(round)
    count = known_by(known)
    at_random = np.sqrt(width * (1 - width / (n - 1)))
    assert count.mean() == width
    assert count.std() < 0.7 * at_random  # narrower than if views were drawn
    assert count.min() > 0
    ring = nx.DiGraph((a, int(b)) for a, row in enumerate(known.ids) for b in row)
    assert nx.is_strongly_connected(ring)
    assert known.ages.max() < 3 * width  # who has not been heard of for long is asked


def test_whom_one_knows_changes():
    at = views(60, 10, 5, 1)
    same = [len(set(at(20).ids[node]) & set(at(50).ids[node])) for node in range(60)]
    assert np.mean(same) < 2 * 10 * 10 / 59  # 1.7 of 10, were they drawn anew


def test_rounds_out_of_order_are_the_same():
    in_order = views(50, 8, 4, 2)
    each = [in_order(round).ids for round in range(40)]
    other = views(50, 8, 4, 2)
    for round in (39, 3, 20, 0, 38, 39):
        assert np.array_equal(other(round).ids, each[round])


def test_a_round_costs_one_round(monkeypatch):
    asked = []
    plain = shuffled
    monkeypatch.setattr("p2pfl.topology.sampling.shuffled", lambda *a: asked.append(1) or plain(*a))
    at = views(20, 5, 3, 0)
    for round in range(30):
        at(round)
        at(max(round - 3, 0))  # somebody is a little behind
    assert len(asked) == 30


def test_everybody_sends_to_s_it_knows():
    topology, at = cyclon(40, 3, view=10, shuffle=5, seed=7), views(40, 10, 5, 7)
    for round in (0, 1, 17):
        links = topology.links(round)
        assert out_degrees(links).tolist() == [3] * 40
        assert int(in_degrees(links).max()) > 3
        for node in range(40):
            assert set(topology.view(node, round)[0]) <= set(at(round).ids[node].tolist())


@pytest.mark.parametrize(("n", "s"), [(2, 1), (5, 4), (8, 4)])
def test_few_nodes_know_all_others(n, s):
    topology = cyclon(n, s)
    assert out_degrees(topology.links(6)).tolist() == [s] * n
