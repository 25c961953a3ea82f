"""Neighbours that change from round to round, where not everybody keeps step."""

from __future__ import annotations

import dataclasses
import math

import pytest
import torch
from runtime_cases import CASES, emulated, flat, make, simulated, uneven

from p2pfl.learning import Quadratics
from p2pfl.learning.optim import sgd
from p2pfl.peer.plan import Pace
from p2pfl.topology import el_local, one_peer_exponential, random_matching, weights

N = 12
CHANGING = {
    "random_matching": lambda: random_matching(N, seed=2),
    "el_local": lambda: el_local(N, 2, seed=2),
    "one_peer_exponential": lambda: one_peer_exponential(N),
}


def run(name, pace, case="dpsgd directed"):
    case = CASES[case]._replace(opt=sgd(0.05))
    task = Quadratics(N, 5, noise=0.1, seed=3)
    topology = CHANGING[name]()
    setup = make(case, pace, n=N, task=task, topology=topology)
    each = [weights(topology.links(k), case.rule) for k in range(80)]
    return dataclasses.replace(setup, weights=lambda round: each[round])


@pytest.mark.parametrize("name", CHANGING)
@pytest.mark.parametrize("case", ["dpsgd directed", "push_sum directed"])
def test_in_step_it_is_the_simulator(name, case):
    setup = run(name, Pace(20), case)
    (one, rows), (two, rows_) = simulated(setup), emulated(setup)
    torch.testing.assert_close(one.params, two.ending.params, rtol=1e-10, atol=1e-12)
    losses = [[row.train_loss for row in flat(each)] for each in (rows, rows_)]
    assert losses[0] == pytest.approx(losses[1], rel=1e-10)


@pytest.mark.parametrize("name", CHANGING)
@pytest.mark.parametrize("patience", [0.0, 0.3])
def test_nothing_old_is_mixed_and_no_mail_piles_up(name, patience):
    setup = run(name, Pace(60, patience=patience))
    emulator, _ = emulated(setup, uneven())
    left = [sum(map(len, peer.mail.unopened.values())) for peer in emulator.peers.values()]
    assert max(left) <= N  # what came since the last round, from anybody
    ring = CASES["dpsgd ring"]._replace(opt=sgd(0.05))
    fixed = make(ring, Pace(60, patience=patience), n=N, task=setup.task)
    ends = [emulator.ending.params, emulated(fixed, uneven())[0].ending.params]
    worst = [setup.task.evaluate(params, torch.arange(N)).loss.max() for params in ends]
    assert worst[0] < worst[1]  # better than with the same neighbours throughout


@pytest.mark.parametrize("name", CHANGING)
@pytest.mark.parametrize("patience", [math.inf, 5.0])
def test_whose_time_is_up_is_missed_by_nobody(name, patience):
    setup = run(name, Pace(1000, patience=patience, seconds=9.0))
    emulator, _ = emulated(setup, uneven(seed=4))
    assert emulator.time < 9.0 + 40.0
    assert set(emulator.ending.reason.split(", ")) == {"out of time"}
