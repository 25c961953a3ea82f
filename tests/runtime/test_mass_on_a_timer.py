"""Masses that are pushed now and then: none is lost, and none made up."""

from __future__ import annotations

import dataclasses
import math

import pytest
import torch
from runtime_cases import Case, emulated, make, uneven
from torch import Tensor

from p2pfl.algorithms import gosgd, push_sum
from p2pfl.learning import Quadratics
from p2pfl.learning.optim import sgd
from p2pfl.peer.gossiper import Gossiper, Tempo
from p2pfl.topology import exponential_graph, push, ring_graph

N = 10


class Apart(Quadratics):
    """Nodes that do not begin alike."""

    def init(self, nodes: Tensor) -> Tensor:
        return self.b[nodes]


def masses(emulator) -> tuple[Tensor, Tensor]:
    """Return all of x, and of w: of the peers, and on its way between them."""
    states = [emulator.state(peer) for peer in emulator.peers]
    x, w = sum(s.x[0] for s in states), sum(float(s.w) for s in states)
    for sender, peer in emulator.peers.items():
        assert isinstance(peer, Gossiper)
        for to, given in peer.ledger.given.items():
            taken = emulator.peers[to].ledger.taken.get(sender)
            x = x + given.x[0] - (0 if taken is None else taken.x[0])
            w = w + float(given.w) - (0 if taken is None else float(taken.w))
    return x, w


@pytest.mark.parametrize("build", [push_sum, gosgd])
@pytest.mark.parametrize("graph", [ring_graph, exponential_graph])
@pytest.mark.parametrize("loss", [0.0, 0.3])
def test_without_steps_all_come_to_the_mean_whatever_is_lost(build, graph, loss):
    task = Apart(N, 5, seed=4)
    case = Case(build, graph, push(), sgd(0.0))
    setup = make(case, Tempo(1.0, 600, evaluate_every=0), n=N, task=task)
    emulator, _ = emulated(setup, uneven(7, loss=loss))
    x, w = masses(emulator)
    under_way = N - sum(float(emulator.state(peer).w) for peer in emulator.peers)
    assert under_way > 0.01  # else nothing was tested
    assert w == pytest.approx(N, abs=1e-9)
    torch.testing.assert_close(x, task.b.sum(0), rtol=0, atol=1e-9)
    mean = task.b.mean(0).expand(N, 5)
    torch.testing.assert_close(emulator.ending.params, mean, rtol=0, atol=1e-7)


def test_local_steps_move_the_sum_by_what_they_are_and_no_more():
    """They go on while halves are given away; of push-sum's, each counts in whole, once."""
    pulls = torch.zeros(5, dtype=torch.float64)

    class Counting(Apart):
        def grad(self, params, nodes, steps):
            loss, _ = super().grad(params, nodes, steps)
            grads = torch.ones_like(params) * (1.0 + nodes.unsqueeze(1))
            return loss, grads

    task = Counting(N, 5, seed=4)
    setup = make(Case(push_sum, ring_graph, push(), sgd(1e-3)), Tempo(1.0, 40), n=N, task=task)
    setup = dataclasses.replace(setup, pace=setup.pace._replace(evaluate_every=0))
    emulator, _ = emulated(setup, uneven(3, loss=0.2))
    for node, peer in emulator.peers.items():
        pulls -= 1e-3 * (1.0 + node) * peer.step
    x, w = masses(emulator)
    assert w == pytest.approx(N, abs=1e-9)
    torch.testing.assert_close(x, task.b.sum(0) + pulls, rtol=0, atol=1e-9)


def test_steps_on_the_quotient_withstand_weights_that_are_small_for_a_while():
    """Where a step of push-sum is as long as the weight is small."""
    task = Quadratics(8, 5, seed=2)
    for build, good in ((push_sum, False), (gosgd, True)):
        setup = make(Case(build, ring_graph, push(), sgd(0.3)), Tempo(1.0, 300), n=8, task=task)
        setup = dataclasses.replace(setup, pace=setup.pace._replace(evaluate_every=0))
        emulator, _ = emulated(setup, uneven(7, loss=0.3))
        off = float((emulator.ending.params - task.optimum()).norm(dim=1).mean())
        assert (off < 2) is good
        assert math.isfinite(off)
