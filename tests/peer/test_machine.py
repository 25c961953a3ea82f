"""Peers among each other, in whatever order the network and the clock may choose."""

from __future__ import annotations

import math
from collections import deque

import networkx as nx
import torch
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule
from peer_cases import snapshot

from p2pfl.algorithms import dpsgd, push_sum
from p2pfl.errors import RemoteProtocolError
from p2pfl.learning import Quadratics
from p2pfl.learning.optim import sgd
from p2pfl.learning.training import train
from p2pfl.peer.events import (
    PeerDown,
    Received,
    Report,
    Send,
    SetTimer,
    Started,
    Stop,
    TimerFired,
    Train,
    Trained,
)
from p2pfl.peer.plan import Pace
from p2pfl.peer.rounds import Phase
from p2pfl.runtime.setup import Setup
from p2pfl.runtime.simulate import Simulator
from p2pfl.topology import metropolis, push, static, weights

GRAPHS = {
    "triangle": nx.complete_graph(3),
    "chain": nx.path_graph(4),
    "square": nx.cycle_graph(4),
    "one way": nx.cycle_graph(4, create_using=nx.DiGraph),
}


def make_setup(graph: nx.Graph, patience: float, mass: bool, overlap: bool) -> Setup:
    topology, rule = static(graph), push() if mass else metropolis()
    w = weights(topology.links(0), rule)
    return Setup(
        (push_sum if mass else dpsgd)(sgd(0.1)),
        Quadratics(topology.n, 2, noise=0.3, seed=1),
        topology,
        rule,
        Pace(5, patience=patience, evaluate_every=99, overlap=overlap),
        torch.ones_like,
        lambda round: w,
    )


class Network(RuleBasedStateMachine):
    @initialize(
        graph=st.sampled_from(sorted(GRAPHS)),
        patience=st.sampled_from([math.inf, math.inf, 3.0, 0.0]),
        mass=st.booleans(),
        overlap=st.booleans(),
    )
    def begin(self, graph, patience, mass, overlap):
        self.setup = make_setup(GRAPHS[graph], patience, mass, overlap)
        self.patience, n = patience, self.setup.topology.n
        self.peers = [self.setup.peer(i) for i in range(n)]
        self.links = {(i, j): deque() for i in range(n) for j in range(n) if i != j}
        self.delivered = {}
        self.training, self.timers, self.dead = {}, set(), set()
        self.rounds, self.faults = [0] * n, 0
        for i in range(n):
            self.tell(i, Started())

    def tell(self, i, event):  # noqa: C901 - a line or two for each effect
        if not self.listens(i):
            return
        for effect in self.peers[i].handle(event):
            match effect:
                case Train():
                    assert i not in self.training
                    self.training[i] = effect
                case Send(to=to, round=round, degree=degree, score=score, message=message):
                    assert degree >= len(to)  # of a mass each gets its own share
                    for j in to:
                        self.links[i, j].append(Received(i, round, degree, score, message, 1))
                case SetTimer(round=round):
                    self.timers.add((i, round))
                case Report(round=round):
                    assert round == self.rounds[i]
                    self.rounds[i] += 1
                case Stop():
                    for j in range(len(self.peers)):
                        if i != j:
                            self.links[i, j].append(PeerDown(i))

    # What may happen.

    @precondition(lambda self: self.training)
    @rule(data=st.data())
    def finish_training(self, data):
        self.train(data.draw(st.sampled_from(sorted(self.training))))

    def train(self, i):
        asked = self.training.pop(i)
        one, first = torch.tensor([i]), torch.tensor([asked.step])
        count = torch.tensor([asked.count])
        state, loss = train(self.setup.algorithm, self.setup.task, asked.state, one, first, count)
        self.tell(i, Trained(asked.step, state, loss.item()))

    @precondition(lambda self: any(self.links.values()))
    @rule(data=st.data())
    def deliver(self, data):
        self.pass_on(data.draw(st.sampled_from([e for e, queue in self.links.items() if queue])))

    def pass_on(self, link):
        event = self.links[link].popleft()
        if isinstance(event, Received) and self.listens(link[1]):
            self.delivered[link] = event
        self.tell(link[1], event)

    def listens(self, i):
        return i not in self.dead and self.peers[i].phase is not Phase.DONE

    @precondition(lambda self: self.delivered)
    @rule(data=st.data())
    def duplicate(self, data):
        link = data.draw(st.sampled_from(sorted(self.delivered)))
        peer = self.peers[link[1]]
        before = snapshot(peer)
        try:
            peer.handle(self.delivered[link])
        except RemoteProtocolError:
            assert snapshot(peer) == before
        else:
            raise AssertionError("a duplicate was taken")

    @precondition(lambda self: self.timers)
    @rule(data=st.data())
    def fire(self, data):
        self.ring(data.draw(st.sampled_from(sorted(self.timers))))

    def ring(self, timer):
        self.timers.discard(timer)
        before = self.rounds[timer[0]]
        self.tell(timer[0], TimerFired(timer[1]))
        self.faults += self.rounds[timer[0]] > before

    @precondition(lambda self: self.patience < math.inf and any(self.links.values()))
    @rule(data=st.data())
    def lose(self, data):
        full = [e for e, queue in self.links.items() if queue and isinstance(queue[0], Received)]
        if full:
            self.links[data.draw(st.sampled_from(full))].popleft()
            self.faults += 1

    @precondition(lambda self: len(self.dead) < len(self.peers) - 1)
    @rule(data=st.data())
    def kill(self, data):
        if data.draw(st.integers(0, 5)):
            return  # now and then
        i = data.draw(st.sampled_from(range(len(self.peers))))
        if not self.listens(i):
            return
        self.dead.add(i)
        self.training.pop(i, None)
        self.faults += 1
        for j in range(len(self.peers)):
            if i != j:
                self.links[i, j].append(PeerDown(i))

    @rule()
    def rest(self):
        """There is always something to do, even when all is over."""

    # What must hold.

    @invariant()
    def rounds_are_as_reported(self):
        for peer, round in zip(self.peers, self.rounds, strict=True):
            assert peer.round == round <= 5
            assert (peer.phase is Phase.DONE) == (round == 5)
            assert bool(peer.params.isfinite().all())

    @invariant()
    def nobody_who_waits_for_all_runs_away(self):
        if self.faults or self.patience < math.inf:
            return
        for i, peer in enumerate(self.peers):
            for j in self.setup.topology.view(i, 0)[1]:
                assert peer.round <= self.peers[j].round + 1

    def teardown(self):
        """Let everything under way come to its end: nobody may be left waiting."""
        if not hasattr(self, "peers"):
            return
        while True:
            if self.training:
                self.train(min(self.training))
            elif any(self.links.values()):
                self.pass_on(next(e for e, queue in self.links.items() if queue))
            elif self.timers:
                self.ring(min(self.timers))
            else:
                break
        alive = [peer for i, peer in enumerate(self.peers) if i not in self.dead]
        assert all(peer.phase is Phase.DONE for peer in alive)
        if not self.faults and self.patience:
            simulator = Simulator(self.setup)
            for _ in simulator.rounds():
                pass
            params = torch.cat([peer.params for peer in self.peers])
            torch.testing.assert_close(params, simulator.params, rtol=1e-12, atol=1e-13)


TestNetwork = Network.TestCase
TestNetwork.settings = settings(
    max_examples=80,
    stateful_step_count=60,
    deadline=None,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.filter_too_much],
)
