"""One peer's part in knowing who is there: SWIM with the rules of Lifeguard, as a state machine.

The runtime hands in what was heard and the time, and takes out letters and changes. It hands in
all input that has arrived before it lets timers fire: a peer that has been frozen would
otherwise accuse others whose answers lie in its own mailbox.
"""

from __future__ import annotations

import random
from collections.abc import Iterable, Mapping
from types import MappingProxyType
from typing import NamedTuple

from p2pfl.errors import RemoteProtocolError
from p2pfl.membership import messages
from p2pfl.membership.alarms import Alarms
from p2pfl.membership.members import (
    MOST_ADDRESS,
    MOST_INCARNATION,
    MOST_MEMBERS,
    MOST_ROUND,
    Change,
    Claim,
    Member,
    Roster,
    Status,
)
from p2pfl.membership.messages import Kind
from p2pfl.membership.probing import Prober
from p2pfl.membership.suspicion import Suspicion
from p2pfl.membership.telling import Teller
from p2pfl.membership.timers import Timers


class Statistics(NamedTuple):
    """What has happened so far.

    Attributes:
        suspicions: how often somebody became a suspect here.
        refuted: how many of them objected: the suspicion was false.
        refutations: how often we objected ourselves.
        rescued: probes that were answered through others only: some direct link is bad.
        stalls: how often our own timers fired late.
        messages: sent.
        bytes: of these.
    """

    suspicions: int = 0
    refuted: int = 0
    refutations: int = 0
    rescued: int = 0
    stalls: int = 0
    messages: int = 0
    bytes: int = 0


class Swim:
    """What one peer knows of all, and what it does about it.

    Args:
        me: who we are.
        incarnation: of this life, higher than in any before (`members.incarnation`).
        timers: the same at all peers.
        others: addresses (empty: not known) of those taken to be alive at the outset. Whatever
            they say themselves outbids that.
        seed: of all that is drawn.
        address: where we listen, for the others.
        n: how many peers there can be: all ids are below.

    Raises:
        ValueError: an argument is out of range.
    """

    def __init__(  # noqa: PLR0913 - all that a machine needs
        self,
        me: int,
        incarnation: int,
        timers: Timers,
        others: Mapping[int, str],
        seed: int,
        address: str = "",
        n: int = MOST_MEMBERS,
    ) -> None:
        timers.check()
        _check(me, incarnation, others, address, n)
        own = Claim(me, Status.ALIVE, incarnation, 0, address, me)
        self.me, self._n, self._timers, self._alarms = me, n, timers, Alarms()
        rng = random.Random(seed)
        self._roster = Roster(own, {k: where for k, where in others.items() if k != me})
        self._teller = Teller(self._roster, timers, rng, self._alarms)
        send = self._teller.send
        self._prober = Prober(self._roster, timers, rng, self._alarms, send, self._accuse)
        self._suspicions: dict[int, Suspicion] = {}
        self._counted = Statistics()

    @property
    def members(self) -> Mapping[int, Member]:
        """Everybody ever heard of, oneself included."""
        return MappingProxyType(self._roster.members)

    @property
    def live(self) -> tuple[int, ...]:
        """The ids of those who are ALIVE or SUSPECT, oneself included, ascending."""
        return self._roster.live

    @property
    def round(self) -> int:
        """How far we are; all messages say so. To be set by the runtime."""
        return self._roster.own.round

    @round.setter
    def round(self, round: int) -> None:
        if not 0 <= round <= MOST_ROUND:
            raise ValueError(f"round = {round} is out of range")
        self._roster.reach(round)

    @property
    def statistics(self) -> Statistics:
        """What has happened so far."""
        teller, prober = self._teller, self._prober
        return self._counted._replace(
            rescued=prober.rescued, messages=teller.messages, bytes=teller.bytes
        )

    def letters(self) -> list[tuple[int, bytes]]:
        """Take out what is to be sent: to whom, and what."""
        letters, self._teller.letters = self._teller.letters, []
        return letters

    def changes(self) -> list[Change]:
        """Take out what has become of the others, in order."""
        changes, self._roster.changes = self._roster.changes, []
        return changes

    def start(self, now: float) -> None:
        """Begin to look after the others, from this time on."""
        self._roster.start(now)
        self._prober.start(now)
        self._teller.start(now)

    def join(self, now: float, contacts: Iterable[int]) -> None:
        """Tell some peers all we know, and ask them for the same, until we have heard of them."""
        if self._roster.has_left:
            return
        self._teller.contacts = tuple(peer for peer in contacts if peer != self.me)
        for peer in self._teller.contacts:
            self._teller.tell_all(peer, ask=True)

    def hear(self, now: float, sender: int, body: bytes | memoryview) -> None:
        """Take in what another peer has sent.

        Raises:
            RemoteProtocolError: it is malformed, or about nobody; nothing has changed.
        """
        if self._roster.has_left:
            return
        message = messages.decode(body, self._n)
        if sender == self.me:
            raise RemoteProtocolError("a message about members from ourselves")
        if message.kind is Kind.PREQ and message.target == self.me:
            raise RemoteProtocolError("we are asked to probe ourselves")
        own = self._roster.own.incarnation
        number, round, address = message.incarnation, message.round, message.address
        self._believe(now, Claim(sender, Status.ALIVE, number, round, address, sender))
        known = self.members.get(sender)
        gone = known is not None and known.status > Status.SUSPECT
        for claim in message.claims:
            if self._roster.is_credible(claim, sender):
                self._believe(now, self._soften(claim) if message.kind is Kind.EXCHANGE else claim)
        self._prober.answer(now, sender, message)
        # Two who take each other for gone must not go on telling so if one cannot object.
        told = any(claim.peer == self.me for claim in message.claims)
        objected = self._roster.own.incarnation > own
        if message.kind is Kind.EXCHANGE and message.number:
            self._teller.answer(now, sender)
        elif gone and message.kind is not Kind.PING and (objected or not told):
            self._teller.send(sender, Kind.GOSSIP)

    def tick(self, now: float) -> None:
        """Do what is due, once all input has been handed in."""
        late = now - self._alarms.due()
        if late > self._timers.tolerance:
            self._thaw(now, late)
        self._alarms.ring(now)

    def due(self) -> float:
        """Return when `tick` is to be called next; infinite if never."""
        return self._alarms.due()

    def probe(self, now: float, peer: int) -> None:
        """Probe somebody at once because its link broke, say; that alone proves nothing."""
        if not self._roster.has_left:
            self._prober.probe(now, peer)

    def leave(self, now: float) -> None:
        """Tell some that we go, who tell the others; nothing more is done or said after that."""
        if self._roster.has_left:
            return
        farewell = self._roster.claim(self.me, self.me)._replace(status=Status.LEFT)
        self._roster.believe(now, farewell)
        self._teller.say_goodbye(farewell)
        self._alarms.clear()

    # What is believed.

    def _believe(self, now: float, claim: Claim) -> None:
        known, news = self.members.get(claim.peer), self._roster.is_news(claim)
        if claim.peer == self.me:
            if news:
                self._refute(now, claim)
            return
        if news:
            self._roster.believe(now, claim)
            self._follow(now, known, claim)
            self._teller.spread(now, claim)
        elif known is not None and self._suspicions.get(claim.peer) and _same(known, claim):
            self._confirm(now, claim)
        self._roster.progress(now, claim)

    def _follow(self, now: float, known: Member | None, claim: Claim) -> None:
        """Do what a change of somebody's status calls for."""
        peer, counted = claim.peer, self._counted
        suspected = self._suspicions.pop(peer, None)
        self._alarms.cancel(self._condemn, peer)
        if claim.status is Status.SUSPECT:
            suspicion = Suspicion(now, claim.by, len(self.live), self._timers)
            self._suspicions[peer] = suspicion
            self._alarms.set(suspicion.deadline, self._condemn, peer)
            self._counted = counted._replace(suspicions=counted.suspicions + 1)
        elif claim.status is Status.ALIVE and suspected:
            self._counted = counted._replace(refuted=counted.refuted + 1)
        if claim.status <= Status.SUSPECT and (known is None or known.status > Status.SUSPECT):
            self._prober.add(peer)

    def _confirm(self, now: float, claim: Claim) -> None:
        suspicion = self._suspicions[claim.peer]
        if suspicion.confirm(claim.by):
            self._alarms.set(max(now, suspicion.deadline), self._condemn, claim.peer)
            self._teller.spread(now, claim)

    def _soften(self, claim: Claim) -> Claim:
        """Return what to make of a claim in an exchange, which may be old, and is hearsay.

        It accuses in our name, so that it counts once with what we find ourselves. Nobody we
        know dies of it; of somebody new it is as good as anything.
        """
        if claim.peer not in self.members or claim.status not in (Status.SUSPECT, Status.DEAD):
            return claim
        return claim._replace(status=Status.SUSPECT, by=self.me)

    def _accuse(self, now: float, peer: int) -> None:
        if self.members[peer].status <= Status.SUSPECT:
            claim = self._roster.claim(peer, self.me)
            self._believe(now, claim._replace(status=Status.SUSPECT))

    def _condemn(self, now: float, peer: int) -> None:
        self._believe(now, self._roster.claim(peer, self.me)._replace(status=Status.DEAD))

    def _refute(self, now: float, claim: Claim) -> None:
        """Outbid what was said of us, and doubt ourselves: it has been somewhat true."""
        self._prober.worry(1)
        counted = self._counted
        self._counted = counted._replace(refutations=counted.refutations + 1)
        self._renew(now, claim.incarnation)
        if self._roster.is_misled:
            self._teller.speak_up(now)

    def _renew(self, now: float, said: int) -> None:
        number = min(max(self._roster.own.incarnation, said) + 1, MOST_INCARNATION)
        claim = self._roster.claim(self.me, self.me)._replace(incarnation=number)
        self._roster.believe(now, claim)
        self._teller.spread(now, claim)

    def _thaw(self, now: float, late: float) -> None:
        """Take note that we were frozen: what we believe is old, so nobody is accused.

        Others may suspect us by now, so after a long time we object before we hear of it.
        """
        self._counted = self._counted._replace(stalls=self._counted.stalls + 1)
        self._prober.forget()
        for peer, suspicion in self._suspicions.items():
            suspicion.postpone(late + self._timers.probe)
            self._alarms.set(suspicion.deadline, self._condemn, peer)
        if late > 2 * self._timers.probe:
            self._renew(now, 0)


def _same(known: Member, claim: Claim) -> bool:
    return (known.status, known.incarnation) == (claim.status, claim.incarnation)


def _check(me: int, incarnation: int, others: Mapping[int, str], address: str, n: int) -> None:
    for peer in (me, *others):
        if not 0 <= peer < n:
            raise ValueError(f"peer {peer} is not in 0..{n - 1}")
    if not 0 < incarnation < MOST_INCARNATION:
        raise ValueError(f"incarnation = {incarnation} is out of range")
    for where in (address, *others.values()):
        if len(where.encode()) > MOST_ADDRESS:
            raise ValueError(f"an address of more than {MOST_ADDRESS} bytes: {where[:80]}...")
