"""A peer's membership machine on the real clock: who is there, by all that is heard."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable, Mapping
from typing import Any, NamedTuple

from p2pfl.membership.members import Status, incarnation
from p2pfl.membership.swim import Swim
from p2pfl.membership.timers import Timers
from p2pfl.peer.events import PeerId, PeerSuspected
from p2pfl.runtime.notices import Notice, Notices
from p2pfl.runtime.presence import DOUBT, Lives, Presence

Tell = Callable[[PeerId, bytes, str], None]  # whom, what, and where it listens if that is known


class Roll(NamedTuple):
    """How a peer finds out who is there.

    Attributes:
        life: tells this process from earlier ones of the same peer: the larger is the later.
        timers: of its membership machine.
        founders: who is there from the start.
    """

    life: int
    timers: Timers
    founders: frozenset[PeerId]


class Lookout:
    """Who is there, as one peer sees it.

    Args:
        me: who we are.
        life: tells this process from earlier ones of the same peer: the larger is the later.
        timers: of the membership machine.
        others: those who are there at the outset, and where they listen.
        address: where we listen, for the others.
        n: how many peers there can be: all ids are below.

    Attributes:
        noticed: what has changed, to be written down; to be taken out.
    """

    def __init__(
        self,
        me: PeerId,
        life: int,
        timers: Timers,
        others: Mapping[PeerId, str],
        address: str,
        n: int,
    ) -> None:
        self._lives = Lives()
        self._doubted: dict[PeerId, float] = {}  # suspects, and when to tell of it
        self._swim = Swim(me, incarnation(life), timers, others, life ^ me, address, n)
        self._swim.start(time.monotonic())
        self._notices = Notices()
        self.noticed: list[Notice] = []

    @property
    def due(self) -> float:
        """When (monotonic) there is something to do."""
        return min(self._swim.due(), *self._doubted.values(), math.inf)

    @property
    def live(self) -> tuple[PeerId, ...]:
        """Who is there, ourselves included."""
        return self._swim.live

    def join(self, contacts: tuple[PeerId, ...]) -> None:
        """Ask some for all they know."""
        self._swim.join(time.monotonic(), contacts)

    def hear(self, sender: PeerId, body: bytes | memoryview) -> None:
        """Take in what another says of the members.

        Raises:
            RemoteProtocolError: it is none of that.
        """
        self._swim.hear(time.monotonic(), sender, body)

    def meet(self, peer: PeerId, life: int) -> list[Presence]:
        """Take note of the life that a peer says it is in; return what follows."""
        return self._lives.meet(peer, life)

    def believes(self, peer: PeerId) -> bool:
        """Say whether a peer is there beyond doubt."""
        member = self._swim.members.get(peer)
        return member is not None and member.status is Status.ALIVE

    def address(self, peer: PeerId) -> str:
        """Return where a peer says that it listens; empty if it has not."""
        member = self._swim.members.get(peer)
        return member.address if member else ""

    def strangers(self, peers: Iterable[PeerId]) -> list[PeerId]:
        """Return who of some peers is not there."""
        members = self._swim.members
        there = (Status.ALIVE, Status.SUSPECT)
        return [p for p in peers if p not in members or members[p].status not in there]

    def probe(self, peer: PeerId) -> None:
        """Have a look at somebody whose link has broken."""
        self._swim.probe(time.monotonic(), peer)

    def ended_round(self, round: int) -> None:
        """Say from now on how far we are."""
        self._swim.round = round + 1

    def tend(self, tell: Tell) -> list[Presence]:
        """Do what is due, all input being read; return what has changed.

        Who has left is not among the changes: it says so itself, when it has sent everything.
        """
        now = time.monotonic()
        if self._swim.due() <= now:
            self._swim.tick(now)
        for to, body in self._swim.letters():
            tell(to, body, self.address(to))
        events: list[Presence] = []
        for change in self._swim.changes():
            self._notices.note((now, change.peer, change.status))
            self._doubted.pop(change.peer, None)
            if change.status is not Status.LEFT:
                events += self._lives.events(change)
        self.noticed += self._notices.take(now)
        for event in [one for one in events if isinstance(one, PeerSuspected)]:
            events.remove(event)
            self._doubted[event.peer] = now + DOUBT
        for peer in [peer for peer, due in self._doubted.items() if due <= now]:
            del self._doubted[peer]
            events.append(PeerSuspected(peer))
        return events

    def leave(self, tell: Tell) -> None:
        """Say goodbye."""
        self._swim.leave(time.monotonic())
        self.tend(tell)

    def report(self) -> dict[str, Any]:
        """Return what has been counted."""
        return self._swim.statistics._asdict()
