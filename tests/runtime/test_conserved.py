"""What exchanges should leave as it is, the mean of all models or the mass, and what churn does."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from runtime_cases import N, make, simulated, uneven

from p2pfl.algorithm import Inbox
from p2pfl.algorithms import dpsgd
from p2pfl.algorithms.averaging import Params
from p2pfl.churn.script import Happening, Script
from p2pfl.learning import Quadratics
from p2pfl.learning.optim import sgd
from p2pfl.membership.timers import swim
from p2pfl.peer.gossiper import Tempo
from p2pfl.peer.plan import Pace
from p2pfl.runtime.conserved import Drift, mean_drift, watched
from p2pfl.runtime.emulate import Emulator
from p2pfl.runtime.network import NetworkModel
from p2pfl.topology import exponential_graph, ring_graph, static
from p2pfl.topology.live import Overlay

QUICK = NetworkModel(latency=0.005, compute=0.05)
KILL = Happening("kill", seconds=1.02, nodes=(2,))
FREEZE = Happening("stop", seconds=1.02, nodes=(2,))
THAW = Happening("cont", seconds=2.02, nodes=(2,))
LATER = Happening("cont", seconds=7.02, nodes=(2,))  # it has been taken for dead by then


def test_what_an_exchange_moves_is_added_up_until_it_is_asked_for():
    drift, x = Drift(), torch.tensor([[1.0, 4.0], [3.0, 0.0]], dtype=torch.float64)
    algorithm = drift.watch(dpsgd(sgd(0.1)))
    states = make("dpsgd ring", Pace(1), task=Quadratics(2, 2), n=2).fresh(torch.arange(2))
    own = torch.arange(2)
    for line in ([0.5, 0.5], [0.25, 0.75]):
        weights = torch.tensor([line, [0.5, 0.5]], dtype=torch.float64)
        algorithm.receive(states._replace(x=x), Inbox(weights, Params(x), own))
        moved = weights @ x - x
        taken = drift.take()
        torch.testing.assert_close(taken[:2], moved.sum(0))
        after = weights @ x
        due = moved.mean(0).norm() / after.mean(0).norm()
        assert mean_drift(taken, after) == pytest.approx(float(due))
        assert not drift.take().any()


def test_nobody_watches_where_the_mean_is_not_to_be_kept():
    setup = make("dpsgd ring", Pace(1))
    script = Script("", N, tuple(range(N)), (KILL,))
    assert watched(setup) is None
    assert watched(dataclasses.replace(setup, churn=script)) is not None
    for name in ("gosgd", "fedavg", "diloco"):
        assert watched(dataclasses.replace(make(name, Pace(1)), churn=script)) is None


def emulated(name, happenings, pace=None, **more):
    whole = static(ring_graph(N))
    setup = dataclasses.replace(
        make(name, pace or Pace(150, **more)),
        topology=whole,
        among=Overlay(whole, lambda k: static(ring_graph(k))).among,
        churn=Script("", N, tuple(range(N)), tuple(happenings)),
        membership=swim(),
    )
    emulator = Emulator(setup, QUICK)
    for _ in emulator.rounds():
        pass
    return emulator


@pytest.mark.parametrize("patience", [0.0, 0.2, 30.0])
@pytest.mark.parametrize(
    "happenings", [[KILL], [FREEZE, THAW], [FREEZE, LATER]], ids=["killed", "frozen", "for long"]
)
def test_who_is_dead_or_frozen_takes_no_mass_along(happenings, patience):
    """Twenty rounds go by until it is suspected, and in each it would be given a third of all."""
    emulator = emulated("push_sum examples", happenings, patience=patience)
    mass = emulator.ending.mass
    assert len(emulator.ending.nodes) == N - (happenings == [KILL])
    # Who does not wait ends while a third is on its way.
    assert (0.99 if patience else 0.5) < mass.held / mass.begun < 1.01
    assert all(float(emulator.state(peer).w) > 0.1 for peer in emulator.peers)
    models = emulator.ending.params
    if patience:  # else who was frozen is alone at last
        assert float((models - models.mean(0)).norm() / models.mean(0).norm()) < 0.5


def test_nor_on_a_timer():
    """Half of what its neighbours have would go to it with every push, for twenty periods."""
    emulator = emulated("push_sum examples", [KILL], Tempo(0.02, 400, steps=0, evaluate_every=0))
    mass = emulator.ending.mass
    assert mass.held / mass.begun > 0.2  # much of it is on its way at any time


def test_the_mean_moves_when_only_one_end_mixes():
    still = emulated("dpsgd ring", [Happening("slow", seconds=0.0, nodes=(0,), value=1.0)])
    assert mean_drift(still.drift.take(), still.ending.params) < 1e-12
    # It has spoken, and dies before it hears the others.
    killed = emulated("dpsgd ring", [dataclasses.replace(KILL, seconds=1.042)])
    assert 1e-6 < mean_drift(killed.drift.take(), killed.ending.params) < 0.2


@pytest.mark.parametrize("name", ["choco identity", "choco top_k"])
def test_what_is_remembered_of_the_dead_pulls_at_nobody(name):
    emulator = emulated(name, [KILL], patience=0.2)
    assert mean_drift(emulator.drift.take(), emulator.ending.params) < 0.2


@pytest.mark.parametrize("name", ["dpsgd ring", "push_sum examples", "choco top_k", "qg"])
def test_who_was_frozen_goes_on_in_the_round_of_the_others(name):
    """Else it would be behind for long, and at last alone."""
    emulator = emulated(name, [FREEZE, THAW], patience=0.2)
    assert len(emulator.ending.nodes) == N
    left_out = N * 150 - emulator.updates  # a local step in each round
    assert 10 < left_out < 20


def test_nobody_leaps_where_links_go_one_way():
    """Whom a peer hears there may well be ahead of it, and has left nobody out."""
    setup = make("push_sum directed", Pace(40), n=8)
    among = Overlay(setup.topology, lambda k: static(exponential_graph(k))).among
    emulator = Emulator(dataclasses.replace(setup, among=among, membership=swim()), uneven(3))
    for _ in emulator.rounds():
        pass
    assert emulator.updates == 8 * 40
    expected = simulated(setup)[0].ending.params
    torch.testing.assert_close(emulator.ending.params, expected, rtol=1e-10, atol=1e-12)
