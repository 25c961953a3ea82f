"""Asking peers whether they are there, one after the other, and for others as well."""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass, field

from p2pfl.membership.alarms import Alarms
from p2pfl.membership.members import Roster, Status
from p2pfl.membership.messages import Kind, Message
from p2pfl.membership.timers import Timers

MOST_HEALTH = 7
MOST_RELAYS = 256  # probes for others at a time: whoever asks for more gets no answer
NACK_IN = 0.8  # of the time that is left for indirect probes, so that a NACK comes before the end


@dataclass(slots=True)
class Probe:
    """One that has not been answered yet."""

    number: int
    asked: list[int] = field(default_factory=list)  # to probe it as well
    silent: list[int] = field(default_factory=list)  # those of them we have not heard from


@dataclass(frozen=True, slots=True)
class Relay:
    """A probe for somebody else."""

    origin: int  # who asked
    number: int  # the origin's
    target: int


class Prober:
    """Probes each live peer in turn, in an order drawn anew for every pass.

    Args:
        roster: whom there is to probe.
        timers: how often, and how long an answer may take.
        rng: draws the order.
        alarms: calls back.
        send: sends a message of some kind to somebody, with a number and a target.
        accuse: is called with the time and a peer that has not answered.

    Attributes:
        health: how much reason there is to doubt ourselves, 0 (none) to 7; probes come
            1 + health times as slowly and wait as much longer.
        rescued: how many probes were answered through others only.
    """

    def __init__(
        self,
        roster: Roster,
        timers: Timers,
        rng: random.Random,
        alarms: Alarms,
        send: Callable[[int, Kind, int, int], None],
        accuse: Callable[[float, int], None],
    ) -> None:
        self._roster, self._timers, self._rng = roster, timers, rng
        self._alarms, self._send, self._accuse = alarms, send, accuse
        self._order: list[int] = []
        self._number = 0
        self.probes: dict[int, Probe] = {}  # by target
        self.relays: dict[int, Relay] = {}  # by our number
        self.health = self.rescued = 0

    def start(self, now: float) -> None:
        """Begin, at a moment of our own: peers that were started together should not probe so."""
        self._alarms.set(now + self._rng.random() * self._timers.probe, self._next)

    def add(self, peer: int) -> None:
        """Take in somebody who is live again, or new, before this pass is over."""
        if peer not in self._order:
            self._order.insert(self._rng.randrange(len(self._order) + 1), peer)

    def worry(self, by: int) -> None:
        """Doubt ourselves more, or less."""
        self.health = min(MOST_HEALTH, max(0, self.health + by))

    def forget(self) -> None:
        """Drop all probes: we have been away, and answers may have been lost on us."""
        for peer in list(self.probes):
            self._end(peer)
        for number in list(self.relays):
            del self.relays[number]
            self._alarms.cancel(self._nack, number)

    def probe(self, now: float, peer: int) -> None:
        """Probe somebody now, unless that is being done."""
        if peer in self.probes or not self._is_live(peer):
            return
        self._number += 1
        self.probes[peer] = Probe(self._number)
        self._send(peer, Kind.PING, self._number, 0)
        self._alarms.set(now + self._timers.timeout, self._ask, peer)
        self._alarms.set(now + self._interval, self._verdict, peer)

    def answer(self, now: float, sender: int, message: Message) -> None:
        """Do what a message asks for, if it is about probes."""
        kind, number, target = message[:3]
        match kind:
            case Kind.PING:
                self._send(sender, Kind.ACK, number, self._roster.me)
            case Kind.ACK:
                self._acked(sender, number, target)
            case Kind.PREQ:
                self._relay(now, sender, number, target)
            case Kind.NACK:
                self._nacked(sender, number, target)

    def _acked(self, sender: int, number: int, target: int) -> None:
        """Hear that somebody is there."""
        probe = self.probes.get(target)
        if probe and probe.number == number and (sender == target or sender in probe.asked):
            self._end(target)
            self.worry(-1)
            self.rescued += sender != target
        relay = self.relays.get(number)
        if relay and relay.target == sender:
            del self.relays[number]
            self._alarms.cancel(self._nack, number)
            self._send(relay.origin, Kind.ACK, relay.number, relay.target)

    def _nacked(self, sender: int, number: int, target: int) -> None:
        """Hear that somebody else has no answer either: so we are heard, and hear, ourselves."""
        probe = self.probes.get(target)
        if probe and probe.number == number and sender in probe.silent:
            probe.silent.remove(sender)

    def _relay(self, now: float, origin: int, number: int, target: int) -> None:
        """Probe somebody for somebody else."""
        if len(self.relays) >= MOST_RELAYS:
            return
        self._number += 1
        self.relays[self._number] = Relay(origin, number, target)
        self._send(target, Kind.PING, self._number, 0)
        left = self._timers.probe - self._timers.timeout
        self._alarms.set(now + NACK_IN * left, self._nack, self._number)

    @property
    def _interval(self) -> float:
        return self._timers.probe * (1 + self.health)

    def _is_live(self, peer: int) -> bool:
        one = self._roster.members.get(peer)
        return peer != self._roster.me and one is not None and one.status <= Status.SUSPECT

    def _next(self, now: float, _: int) -> None:
        self._alarms.set(now + self._interval, self._next)
        for _ in range(len(self._order)):
            peer = self._order.pop()
            if self._is_live(peer) and peer not in self.probes:
                self.probe(now, peer)
                return
        self._order = self._roster.others
        self._rng.shuffle(self._order)
        while self._order and (peer := self._order.pop()) not in self.probes:
            self.probe(now, peer)
            return

    def _ask(self, now: float, target: int) -> None:
        members = self._roster.members
        others = [k for k in self._roster.others if k != target]
        able = [k for k in others if members[k].status is Status.ALIVE]
        probe = self.probes[target]
        probe.asked = self._rng.sample(able, min(self._timers.indirect, len(able)))
        probe.silent = list(probe.asked)
        for peer in probe.asked:
            self._send(peer, Kind.PREQ, probe.number, target)

    def _verdict(self, now: float, target: int) -> None:
        probe = self._end(target)
        # Who was asked and says nothing may be gone; more likely it is our own link or time.
        self.worry(len(probe.silent) if probe.asked else 1)
        self._accuse(now, target)

    def _nack(self, now: float, number: int) -> None:
        relay = self.relays.pop(number)
        self._send(relay.origin, Kind.NACK, relay.number, relay.target)

    def _end(self, target: int) -> Probe:
        self._alarms.cancel(self._ask, target)
        self._alarms.cancel(self._verdict, target)
        return self.probes.pop(target)
