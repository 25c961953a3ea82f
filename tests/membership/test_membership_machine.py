"""Clusters under whatever hypothesis thinks of; what fails is shrunk to a few steps."""

from __future__ import annotations

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, precondition, rule
from swim_invariants import Broken
from swim_swarm import AGREED_BY, NETWORKS, Fault, Plan, Run

from p2pfl.errors import RemoteProtocolError
from p2pfl.membership.timers import Timers

peers = st.integers(0, 4)


class Machine(RuleBasedStateMachine):
    @initialize(n=st.integers(3, 5), seed=st.integers(0, 999), know=st.booleans())
    def begin(self, n, seed, know):
        plan = Plan(seed, n, Timers(), know, (1.0, 0.99, 1.01, 1.0, 1.0)[:n], NETWORKS[0], ())
        self.run = Run(plan)
        for peer in range(n):
            self.run.boot(peer)

    def befall(self, kind, peer=0, seconds=0.0, mask=0):
        run = self.run
        run.befall(Fault(run.cluster.now, kind, peer % run.plan.n, seconds, mask))

    @rule(seconds=st.sampled_from([0.05, 0.3, 1.0, 4.0, 15.0]))
    def pass_time(self, seconds):
        """All that must hold is looked at after each event."""
        self.run.cluster.run(self.run.cluster.now + seconds)

    @rule(peer=peers)
    def crash(self, peer):
        self.befall("crash", peer)

    @rule(peer=peers)
    def restart(self, peer):
        self.befall("restart", peer)

    @rule(peer=peers, seconds=st.sampled_from([0.1, 30.0]))
    def leave(self, peer, seconds):
        self.befall("leave", peer, seconds)

    @rule(peer=peers, seconds=st.sampled_from([0.5, 2.0, 4.0, 12.0]))
    def freeze(self, peer, seconds):
        self.befall("freeze", peer, seconds)

    @rule(mask=st.integers(1, 15), kind=st.sampled_from(["halves", "one way"]))
    def part(self, mask, kind):
        self.befall(kind, mask=mask)

    @rule()
    def meet(self):
        self.befall("heal")

    @rule(which=st.integers(0, len(NETWORKS) - 1))
    def change_network(self, which):
        self.befall("network", mask=which)

    @rule(peer=peers, about=peers)
    def hint(self, peer, about):
        self.befall("hint", peer, mask=about)

    @precondition(lambda self: self.run.cluster.swims())
    @rule(frame=st.binary(max_size=40), data=st.data())
    def send_rubbish(self, frame, data):
        peer = data.draw(st.sampled_from(sorted(self.run.cluster.swims())))
        swim = self.run.cluster.processes[peer].swim
        if peer in self.run.left:
            return
        before = dict(swim.members)
        with pytest.raises(RemoteProtocolError):
            swim.hear(self.run.cluster.now, (peer + 1) % 3, b"\xc1" + frame)
        assert dict(swim.members) == before

    def teardown(self):
        if not hasattr(self, "run"):
            return
        run, cluster = self.run, self.run.cluster
        run.heal()
        healed = cluster.now
        while trouble := run.disagreement():
            if cluster.now > healed + AGREED_BY:
                raise Broken(trouble)
            cluster.run(cluster.now + 1)


TestMachine = Machine.TestCase
TestMachine.settings = settings(
    max_examples=150,
    stateful_step_count=40,
    deadline=None,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.filter_too_much],
)
