from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from p2pfl import rng
from p2pfl.runtime.network import Delivery, NetworkModel

LINK = (3, 7)


def test_a_message_takes_its_transmission_and_the_latency():
    network = NetworkModel(latency=0.25, bandwidth=100.0, uplink=400.0)
    assert network.delivery(LINK, 0, 200, 10.0) == Delivery(10.5, 12.0, 12.25)


def test_a_narrow_uplink_bounds_the_bandwidth():
    network = NetworkModel(latency=0.25, bandwidth=400.0, uplink=100.0)
    assert network.delivery(LINK, 0, 200, 10.0) == Delivery(12.0, 12.0, 12.25)


def test_a_busy_link_makes_messages_queue():
    network = NetworkModel(latency=0.0, bandwidth=100.0)
    assert network.delivery(LINK, 1, 200, 10.0, free=11.0) == Delivery(10.0, 13.0, 13.0)


def test_without_limits_only_latency_counts():
    assert NetworkModel(latency=0.5).delivery(LINK, 0, 10**12, 1.0) == Delivery(1.0, 1.0, 1.5)


def test_a_link_of_its_own_goes_before_the_rest():
    links = {LINK: {"latency": 2.0, "bandwidth": 50.0}, (7, 3): {"loss": 1.0}}
    network = NetworkModel(latency=0.25, links=links)
    assert network.delivery(LINK, 0, 100, 0.0).arrives == 4.0
    assert network.delivery((7, 3), 0, 100, 0.0).arrives == math.inf
    assert network.delivery((3, 8), 0, 100, 0.0).arrives == 0.25


@given(st.integers(0, 500), st.integers(0, 500), st.integers(0, 2**40))
def test_jitter_stretches_the_latency_by_its_range(sender, number, seed):
    network = NetworkModel(latency=2.0, jitter=0.5, compute=1.0, compute_jitter=3.0, seed=seed)
    assert 2.0 <= network.delivery((sender, 1), number, 0, 0.0).arrives <= 3.0
    assert 4.0 <= network.training(sender, number, 4) <= 16.0


SEEDS = st.integers(-(2**63), 2**63 - 1)


@given(SEEDS, st.integers(0, 2**31), st.integers(0, 2**62))
def test_draws_are_those_of_the_random_numbers_of_everything_else(seed, which, number):
    def lot(use: int, which: int) -> float:
        key = rng.fold(rng.keys(seed, torch.tensor([which])), use)
        return rng.uniform(rng.fold(key, number), 1).item()

    network = NetworkModel(latency=1.0, jitter=1.0, compute=1.0, compute_jitter=1.0, seed=seed)
    for _ in range(2):  # what is remembered of a node or a link is the same
        assert network.training(which, number, 1) == 1 + lot(2, which)
        arrives = network.delivery((which, 5), number, 0, 0.0).arrives
        assert arrives == 1 + lot(4, which * 2**31 + 5)


def test_draws_do_not_depend_on_the_order():
    network = NetworkModel(jitter=1.0, loss=0.4, compute_jitter=1.0, seed=5)
    asked = [((a, b), k) for a in range(4) for b in range(4) for k in range(5)]

    def answers(order):
        return {
            q: (network.delivery(q[0], q[1], 9, 0.0), network.training(q[0][0], q[1], 2))
            for q in order
        }

    assert answers(asked) == answers(asked[::-1])
    assert len({d.arrives for d, _ in answers(asked).values()}) > 30
    lost = sum(d.arrives == math.inf for d, _ in answers(asked).values())
    assert 15 < lost < 50  # 32 expected
    assert network.delivery((1, 2), 0, 9, 0.0) != network.delivery((2, 1), 0, 9, 0.0)


def test_slow_nodes_are_slow_at_every_step():
    network = NetworkModel(compute=1.0, slow=0.25, slow_factor=8.0, seed=2, speeds={0: 2.0})
    times = {node: {network.training(node, step, 3) for step in range(5)} for node in range(200)}
    assert all(len(each) == 1 for each in times.values())
    seen = [each.pop() for each in times.values()]
    assert seen[0] in (1.5, 12.0)
    assert set(seen[1:]) == {3.0, 24.0}
    assert 30 < seen.count(24.0) < 70


@pytest.mark.parametrize(
    "wrong",
    [
        {"latency": -1.0},
        {"latency": math.nan},
        {"compute": math.inf},
        {"bandwidth": 0.0},
        {"uplink": math.nan},
        {"loss": 1.5},
        {"slow": -0.1},
        {"slow_factor": 0.0},
    ],
)
def test_impossible_networks_are_refused(wrong):
    (key,) = wrong
    with pytest.raises(ValueError, match=f"{key} = "):
        NetworkModel(**wrong)
