"""Runtimes in which neighbours are sent different messages: gaps, losses, and what is refused."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from runtime_cases import CASES, N, emulated, make, simulated

from p2pfl.algorithms import dpsgd, gradient_tracking, relay
from p2pfl.attacks import ATTACKS, hostile
from p2pfl.errors import UserError
from p2pfl.learning import Quadratics
from p2pfl.learning.optim import sgd
from p2pfl.peer.addressed import variant
from p2pfl.peer.events import PeerDown, Send, Started, Trained
from p2pfl.peer.plan import Pace
from p2pfl.runtime.network import NetworkModel
from p2pfl.runtime.ranks import Ranks
from p2pfl.runtime.simulate import Simulator

NAMES = [name for name in CASES if name.split()[0] in {"relay", "divshare", "powergossip"}]


def test_who_is_gone_leaves_the_places_of_the_others():
    setup = make("relay", Pace(3))  # a tree: 1 is joined to 0, 3 and 4
    assert setup.rows(torch.arange(N)).neighbours.tolist()[1] == [0, 3, 4]
    peer = setup.peer(1)
    peer.handle(PeerDown(3))
    (train,) = peer.handle(Started())
    heard = torch.arange(15.0, dtype=torch.float64).view(1, 3, 5)  # unlike of each neighbour
    effects = peer.handle(Trained(train.step, train.state._replace(sums=heard), 0.0))
    sent = {one.to: one.message for one in effects if isinstance(one, Send)}
    assert sent.keys() == {(0,), (4,)}
    whole = setup.algorithm.send(peer.state)
    for (to,), message in sent.items():
        for field, expected in zip(message, variant(whole, [0, 3, 4].index(to)), strict=True):
            assert torch.equal(field, expected)


@pytest.mark.parametrize("name", NAMES)
def test_bytes_are_those_of_one_variant_for_each_neighbour(name):
    setup = make(name, Pace(1))
    (rows,) = simulated(setup)[1]
    own = sum(field.nbytes for field in setup.message(0))
    for row in rows:
        to, _ = setup.topology.view(row.node, 0)
        assert own * len(to) < row.bytes_sent < (own + 60) * len(to)


def far_off(build) -> float:
    """Return how far nodes of unlike data are from the optimum, with 2 % of all messages lost."""
    task = Quadratics(N, 5, seed=3)
    case = CASES["relay"]._replace(build=build, opt=sgd(0.05))
    setup = make(case, Pace(400, patience=3.0, evaluate_every=0), task=task)
    lossy = NetworkModel(latency=0.1, compute=1.0, loss=0.02, seed=1)
    emulator, _ = emulated(setup, lossy)
    assert emulator.missed > 20
    return float((emulator.ending.params - task.optimum()).norm(dim=1).mean())


def test_relay_goes_on_when_messages_are_lost():
    ours = far_off(lambda opt: relay(opt, N))
    assert ours < 0.05
    assert far_off(dpsgd) > 5 * ours
    assert far_off(gradient_tracking) > 5 * ours


def test_ranks_of_torchrun_are_refused():
    class Two(Ranks):
        size = 2

    with pytest.raises(UserError, match="torchrun"):
        Simulator(make("divshare", Pace(1)), Two())


def test_a_simulation_goes_on_from_a_snapshot():
    for name in NAMES:
        setup = make(name, Pace(6))
        whole, half = Simulator(setup), Simulator(setup)
        for _ in whole.rounds():
            pass
        for _, _ in zip(range(3), half.rounds(), strict=False):
            pass
        again = Simulator(setup)
        again.vacate()
        again.restore(half.snapshot())
        for _ in again.rounds():
            pass
        assert torch.equal(again.params, whole.params)


def test_attackers_would_have_to_lie_to_each_neighbour():
    with pytest.raises(ValueError, match="every neighbour"):
        hostile(relay(sgd(0.1), N), ATTACKS["sign_flip"](), {1})
    honest = relay(sgd(0.1), N)
    assert hostile(honest, ATTACKS["label_flip"](), {1}) is honest


@pytest.mark.parametrize("name", NAMES)
def test_half_precision_stays_finite(name):
    class Half(Quadratics):
        def init(self, nodes):
            return super().init(nodes).bfloat16()

        def grad(self, params, nodes, steps):
            loss, grads = super().grad(params.double(), nodes, steps)
            return loss, grads.bfloat16()

    setup = make(name, Pace(5, evaluate_every=0))
    setup = dataclasses.replace(setup, task=Half(N, 5, seed=1))
    simulator = Simulator(setup)
    for _ in simulator.rounds():
        pass
    assert simulator.params.dtype == torch.bfloat16
    assert bool(simulator.params.isfinite().all())
