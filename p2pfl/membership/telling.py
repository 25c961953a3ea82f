"""Telling the others: letters, rumours that ride on them, and exchanges of all that is known."""

from __future__ import annotations

import random

from p2pfl.membership import messages
from p2pfl.membership.alarms import Alarms
from p2pfl.membership.members import Claim, Roster, Status
from p2pfl.membership.messages import RIDING, Kind, Message
from p2pfl.membership.ration import Ration
from p2pfl.membership.rumours import Rumours, times
from p2pfl.membership.timers import Timers

ANSWERS = 10  # to one peer, at once and in the time between two exchanges; who asks more waits


class Teller:
    """Writes all letters of a peer, and tells the others what is new.

    Args:
        roster: what we know.
        timers: how often others are told.
        rng: draws whom.
        alarms: calls back.

    Attributes:
        letters: written and not yet taken out: to whom, and what.
        contacts: who is to be asked until we have heard of them.
        messages: how many were written.
        bytes: how long these were.
    """

    def __init__(self, roster: Roster, timers: Timers, rng: random.Random, alarms: Alarms) -> None:
        self._roster, self._timers, self._rng, self._alarms = roster, timers, rng, alarms
        self._rumours = Rumours()
        self.letters: list[tuple[int, bytes]] = []
        self.contacts: tuple[int, ...] = ()
        self.messages = self.bytes = 0
        self._answers = Ration(ANSWERS, timers.exchange / ANSWERS)

    def start(self, now: float) -> None:
        """Begin to exchange what is known, each at a moment of its own."""
        self._alarms.set(now + self._timers.exchange * self._rng.random(), self._exchange)
        self._alarms.set(now + self._timers.recontact * self._rng.random(), self._recontact)

    def send(self, to: int, kind: Kind, number: int = 0, target: int = 0) -> None:
        """Send a message with what is new, and above all with our doubts about whom it goes to."""
        known = self._roster.members.get(to)
        doubted = known is not None and known.status is not Status.ALIVE
        claims = [self._roster.claim(to, self._roster.me)] if doubted else []
        claims += self._rumours.take(RIDING - len(claims))
        self._write(to, kind, number, target, tuple(claims))

    def tell_all(self, to: int, ask: bool) -> None:
        """Send all we know, and perhaps ask for the same in return."""
        me = self._roster.me
        claims = [self._roster.claim(k, me) for k in self._roster.members if k != me]
        *first, last = messages.parts(claims)
        for part in first:
            self._write(to, Kind.EXCHANGE, 0, 0, part)
        self._write(to, Kind.EXCHANGE, int(ask), 0, last)

    def answer(self, now: float, asker: int) -> None:
        """Send all we know, which is far more than was asked with: not without end at once."""
        if not (wait := self._answers.wait(now, asker)):
            self._answer(now, asker)
        elif (self._answer, asker) not in self._alarms:
            self._alarms.set(now + wait, self._answer, asker)

    def speak_up(self, now: float) -> None:
        """Tell all ourselves that we are there: others might not be believed."""
        if (self._speak, 0) not in self._alarms:
            self._alarms.set(now + self._timers.gossip, self._speak)

    def spread(self, now: float, claim: Claim) -> None:
        """Tell this to all, by and by."""
        self._rumours.add(claim, len(self._roster.live))
        if (self._gossip, 0) not in self._alarms:
            self._alarms.set(now + self._timers.gossip * self._rng.random(), self._gossip)

    def say_goodbye(self, claim: Claim) -> None:
        """Tell our last claim at once, to as many as hear any claim from one peer."""
        others = self._roster.others
        for peer in self._rng.sample(others, min(times(len(others)), len(others))):
            self._write(peer, Kind.GOSSIP, 0, 0, (claim,))

    def _answer(self, now: float, asker: int) -> None:
        self._answers.take(now, asker)
        self.tell_all(asker, ask=False)

    def _speak(self, now: float, _: int) -> None:
        for peer in self._roster.others + [one.id for one in self._roster.dead]:
            self.send(peer, Kind.GOSSIP)

    def _gossip(self, now: float, _: int) -> None:
        if not self._rumours:
            return
        self._alarms.set(now + self._timers.gossip, self._gossip)
        recent = now - self._timers.to_dead
        hearers = self._roster.others + [k.id for k in self._roster.dead if k.since > recent]
        for peer in self._rng.sample(hearers, min(self._timers.fanout, len(hearers))):
            self.send(peer, Kind.GOSSIP)

    def _exchange(self, now: float, _: int) -> None:
        later = self._timers.exchange * (0.5 + self._rng.random())
        self._alarms.set(now + later, self._exchange)
        if others := self._roster.others:
            self.tell_all(self._rng.choice(others), ask=True)

    def _recontact(self, now: float, _: int) -> None:
        """Try one of the dead, or two halves that have lost each other would never meet again."""
        later = self._timers.recontact * (0.5 + self._rng.random())
        self._alarms.set(now + later, self._recontact)
        missing = [one.id for one in self._roster.dead]
        missing += [k for k in self.contacts if k not in self._roster.members]
        if missing and self._rng.random() < len(missing) / len(self._roster.live):
            self.tell_all(self._rng.choice(missing), ask=True)

    def _write(
        self, to: int, kind: Kind, number: int, target: int, claims: tuple[Claim, ...]
    ) -> None:
        own = self._roster.own
        message = Message(kind, number, target, own.incarnation, own.round, own.address, claims)
        body = messages.encode(message)
        self.letters.append((to, body))
        self.messages += 1
        self.bytes += len(body)
