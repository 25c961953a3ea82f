"""Wrong rules: the swarm must find each of them, or it would not find a mistake either."""

from __future__ import annotations

import pytest
from swim_swarm import draw, fails, report, shrink

from p2pfl.membership.members import Status
from p2pfl.membership.swim import Swim

PLANS = [plan for plan in map(draw, range(300)) if plan.n <= 5]  # few peers are enough, and fast


class AliveAtTheSameIncarnation(Swim):
    def _believe(self, now, claim):
        known = self.members.get(claim.peer)
        if known and claim.peer != self.me and claim.status is Status.ALIVE:
            same = claim.incarnation == known.incarnation
            if same and known.status is not Status.ALIVE:
                self._roster.believe(now, claim)
                self._follow(now, known, claim)
        super()._believe(now, claim)


class RefutesWithoutOutbidding(Swim):
    def _renew(self, now, said):
        self._teller.spread(now, self._roster.claim(self.me, self.me))


class NeverRecontacts(Swim):
    def __init__(self, *args):
        super().__init__(*args)
        self._teller._recontact = lambda now, _: None


class DiesOfHearsay(Swim):
    def _soften(self, claim):
        if claim.peer == self.me and claim.status is Status.DEAD:
            self._roster.believe(0.0, claim)
        return claim


class OldIncarnationsKill(Swim):
    def _believe(self, now, claim):
        known = self.members.get(claim.peer)
        if known and claim.peer != self.me and claim.status is Status.DEAD > known.status:
            self._roster.believe(now, claim)
            self._follow(now, known, claim)
        super()._believe(now, claim)


class LeavesProbesBehind(Swim):
    def __init__(self, *args):
        super().__init__(*args)
        end, prober = self._prober._end, self._prober

        def leaky(target):
            probe = end(target)
            prober.probes[1000 + probe.number] = probe
            return probe

        prober._end = leaky


class ForgetsTheDead(Swim):
    def tick(self, now):
        super().tick(now)
        for one in self._roster.dead:
            if now - one.since > 15:
                del self._roster.members[one.id]


class KeepsTheFirstSuspicion(Swim):
    """The time of a suspicion that was refuted runs on, and counts for the next."""

    def __init__(self, *args):
        super().__init__(*args)
        self._first = {}

    def _follow(self, now, known, claim):
        super()._follow(now, known, claim)
        if claim.status is Status.SUSPECT:
            begun = self._first.setdefault(claim.peer, self._suspicions[claim.peer])
            self._suspicions[claim.peer] = begun
            self._alarms.set(max(now, begun.deadline), self._condemn, claim.peer)


class NoTimeToObject(Swim):
    def _accuse(self, now, peer):
        super()._accuse(now, peer)
        if peer in self._suspicions:
            self._condemn(now, peer)


class ConfirmationsAddUpForever(Swim):
    """Every claim counts, also from who has accused before, below the shortest time."""

    def _confirm(self, now, claim):
        self._suspicions[claim.peer].postpone(-0.5)
        deadline = self._suspicions[claim.peer].deadline
        self._alarms.set(max(now, deadline), self._condemn, claim.peer)


class BelievesItIsDead(Swim):
    def _refute(self, now, claim):
        self._roster.believe(now, claim)


class RaisesOthersIncarnations(Swim):
    def _accuse(self, now, peer):
        claim = self._roster.claim(peer, self.me)
        number = claim.incarnation + 1
        self._believe(now, claim._replace(status=Status.SUSPECT, incarnation=number))


class SpeaksAfterLeaving(Swim):
    def leave(self, now):
        super().leave(now)
        self._prober.start(now)


class ConfusedByNacks(Swim):
    def __init__(self, *args):
        super().__init__(*args)
        prober = self._prober

        def nacked(sender, number, target):
            prober.health -= 1

        prober._nacked = nacked


class DoesNotRelayWhatItHears(Swim):
    """Only what one has found out oneself is told; exchanges are not made either."""

    def _believe(self, now, claim):
        spread, self._teller.spread = self._teller.spread, lambda now, claim: None
        super()._believe(now, claim)
        self._teller.spread = spread

    def __init__(self, *args):
        super().__init__(*args)
        self._teller._exchange = self._teller._recontact = lambda now, _: None


class LeaversDie(Swim):
    """Whoever has left may be called dead later."""

    def _follow(self, now, known, claim):
        super()._follow(now, known, claim)
        if claim.status is Status.LEFT:
            dead = claim._replace(status=Status.DEAD)
            self._roster.believe(now, dead)


MUTANTS = [
    AliveAtTheSameIncarnation,
    RefutesWithoutOutbidding,
    NeverRecontacts,
    DiesOfHearsay,
    OldIncarnationsKill,
    LeavesProbesBehind,
    ForgetsTheDead,
    KeepsTheFirstSuspicion,
    NoTimeToObject,
    ConfirmationsAddUpForever,
    BelievesItIsDead,
    RaisesOthersIncarnations,
    SpeaksAfterLeaving,
    ConfusedByNacks,
    DoesNotRelayWhatItHears,
    LeaversDie,
]


@pytest.mark.parametrize("mutant", MUTANTS, ids=lambda mutant: mutant.__name__)
def test_the_swarm_finds(mutant):
    assert any(fails(plan, mutant) for plan in PLANS)


def test_a_failure_is_told_with_the_least_that_leads_to_it():
    long = (plan for plan in PLANS if len(plan.faults) > 10)
    plan = next(plan for plan in long if fails(plan, SpeaksAfterLeaving))
    told = report(plan, "trouble", SpeaksAfterLeaving)
    assert f"--swarm-seed {plan.seed}" in told
    (fault,) = shrink(plan, SpeaksAfterLeaving).faults
    assert fault.kind == "leave"
    assert str(fault) in told
