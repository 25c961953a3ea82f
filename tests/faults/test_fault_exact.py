"""What averages must come to, worked out beforehand."""

from __future__ import annotations

import pytest
import torch
from fault_plan import Plan, Scattered
from fault_watch import Watched

from p2pfl.churn.script import Happening
from p2pfl.membership.timers import Timers
from p2pfl.peer.plan import Pace
from p2pfl.runtime.network import NetworkModel

N = 12
STEADY = NetworkModel(latency=0.05, compute=0.5)


def plan(topology, faults, **pace):
    paced = Pace(80, **{"patience": 2.0, "evaluate_every": 0, **pace})
    return Plan(
        5, N, "dpsgd", topology, 0.0, paced, Timers(), STEADY, tuple(range(N)), tuple(faults)
    )


def drift(run, since):
    """Return how far the mean of the survivors has gone, in standard deviations."""
    there = sorted(run.peers)
    now = torch.cat([run.setup.algorithm.model(run.state(p)) for p in there])
    return float((now.mean(0) - since[there].mean(0)).norm() / since[there].std())


def start():
    return Scattered(N, 3, seed=5).init(torch.arange(N))


@pytest.mark.parametrize("topology", ["ring", "hubs", "sparse", "regular"])
def test_a_crash_between_two_rounds_does_not_move_the_mean_of_the_others(topology):
    """Models are the initial ones: it dies before anybody has heard it."""
    run = Watched(plan(topology, [Happening("kill", seconds=0.3, nodes=(3,))])).perform()
    assert len(run.peers) == N - 1
    assert sum(run.counted.values()) == 0
    assert drift(run, start()) <= 1e-9


@pytest.mark.parametrize(
    ("topology", "seconds"),
    [
        *[("ring", 0.9), ("ring", 2.9), ("ring", 12.0), ("hubs", 0.9), ("hubs", 2.9)],
        *[("hubs", 12.0), ("matching", 0.9), ("matching", 2.9)],  # who is dead changes all pairs
    ],
)
def test_what_both_ends_leave_out_moves_nothing(topology, seconds):
    """It is frozen while it trains, so it has not spoken in the round that is skipped."""
    faults = [
        Happening("stop", seconds=5.7, nodes=(3,)),
        Happening("cont", seconds=5.7 + seconds, nodes=(3,)),
    ]
    run = Watched(plan(topology, faults)).perform()
    assert sum(run.counted.values()) == 0
    assert len(run.peers) == N
    assert drift(run, start()) <= 1e-9
    if seconds > 2:
        assert run.reached["skip"]
        assert run.reached["jump"]
    finals = torch.cat([run.setup.algorithm.model(run.state(p)) for p in range(N)])
    assert float((finals - finals.mean(0)).norm()) < 0.05 * float(
        (start() - start().mean(0)).norm()
    )
