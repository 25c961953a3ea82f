"""Who knows of whom in the emulator: the membership machine of every peer, or an oracle."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterable
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Protocol

from p2pfl.membership.members import Change, Status, incarnation
from p2pfl.membership.swim import Swim
from p2pfl.membership.timers import Timers
from p2pfl.peer.events import PeerDown, PeerId, PeerSuspected, PeerUp
from p2pfl.runtime.presence import DOUBT, Lives, Presence

if TYPE_CHECKING:
    from p2pfl.runtime.emulate import Emulator


@dataclass(frozen=True, slots=True)
class Told:
    """A letter of one membership machine to another."""

    sender: PeerId
    body: bytes


class Tick:
    """Something may be due in a membership machine, unless another tick has been set since."""


class Rosters(Protocol):
    """How peers find out who is there."""

    def begin(self, founders: Iterable[PeerId]) -> None:
        """Let these be there from the outset."""

    def arrived(self, peer: PeerId, friends: Iterable[PeerId]) -> None:
        """Let a peer come, whose machine has just been made; friends have told it of the others."""

    def crashed(self, peer: PeerId) -> None:
        """Let a peer fall silent."""

    def left(self, peer: PeerId) -> None:
        """Let a peer say that it leaves, because it is done or was told to."""

    def ended_round(self, peer: PeerId, round: int) -> None:
        """Let a peer say from now on how far it is."""

    def introduce(self, one: PeerId, other: PeerId, due: float) -> bool:
        """Let one peer learn in which life another is; return whether it had known."""


class Acquaintance:
    """Who knows in which life whom.

    It shows when a connection is made that another process is behind it than before. So no message
    of an earlier life, or for one, is taken for one of this.
    """

    def __init__(self, emulator: Emulator) -> None:
        self._emulator = emulator
        self._boots: Counter[PeerId] = Counter()
        self._known: dict[PeerId, Lives] = defaultdict(Lives)

    def born(self, peer: PeerId) -> None:
        """Let a peer begin another life, in which it knows nobody."""
        self._boots[peer] += 1
        self._known.pop(peer, None)

    def introduce(self, one: PeerId, other: PeerId, due: float) -> bool:
        """Let one peer learn in which life another is; return whether it had known."""
        news = self._known[one].meet(other, self._boots[other])
        for event in news:
            self._emulator.at(due, one, event)
        return not news


class Oracle(Acquaintance):
    """Everybody is told of everything at once; for runs without membership."""

    def begin(self, founders: Iterable[PeerId]) -> None:
        """Let these be there from the outset."""
        for peer in founders:
            self.born(peer)

    def arrived(self, peer: PeerId, friends: Iterable[PeerId]) -> None:
        """Tell all that a peer is there, and it who is not."""
        emulator = self._emulator
        self.born(peer)
        for other in range(emulator.setup.topology.n):
            if other != peer and other not in emulator.peers:
                emulator.tell(peer, PeerDown(other))
            elif other != peer:
                self._tell(other, PeerUp(peer), emulator.network.latency)

    def crashed(self, peer: PeerId) -> None:
        """Tell all."""
        self._spread(peer, range(self._emulator.setup.topology.n), 0.0)

    def left(self, peer: PeerId) -> None:
        """Tell those who hear it."""
        hear = sorted(self._emulator.setup.topology.contacts(peer)[0])
        self._spread(peer, hear, self._emulator.network.latency)

    def ended_round(self, peer: PeerId, round: int) -> None:
        """Nobody needs to know."""

    def _spread(self, peer: PeerId, others: Iterable[PeerId], after: float) -> None:
        for other in others:
            if other != peer:
                self._tell(other, PeerDown(peer, peer in self._emulator.stopped), after)

    def _tell(self, other: PeerId, event: PeerUp | PeerDown, after: float) -> None:
        """Tell a peer of another; what that one has sent, or was told of it, before comes first."""
        emulator = self._emulator
        due = emulator.post.not_before(event.peer, other, emulator.time + after)
        emulator.at(due, other, event)


class Machines(Acquaintance):
    """Every peer finds out by itself.

    Args:
        emulator: whose peers they belong to.
        timers: of all of them.
        seed: of their lots.
    """

    def __init__(self, emulator: Emulator, timers: Timers, seed: int) -> None:
        super().__init__(emulator)
        self._timers, self._seed = timers, seed
        self._swims: dict[PeerId, Swim] = {}
        self._ticks: dict[PeerId, tuple[float, Tick]] = {}
        self._goodbyes: dict[tuple[PeerId, PeerId], float] = {}  # when they come, by who hears

    def begin(self, founders: Iterable[PeerId]) -> None:
        """Let all founders know of each other."""
        founders = tuple(founders)
        for peer in founders:
            self._boot(peer, founders, ())

    def arrived(self, peer: PeerId, friends: Iterable[PeerId]) -> None:
        """Begin from what the friends know, and tell them; without any, look for anybody."""
        friends = tuple(friends)
        known = {other for friend in friends for other in self._swims[friend].live}
        for other in range(self._emulator.setup.topology.n):
            if other not in known and other != peer:
                self._emulator.tell(peer, PeerDown(other))
        everybody = range(self._emulator.setup.topology.n)
        self._boot(peer, sorted(known), friends or tuple(everybody))

    def crashed(self, peer: PeerId) -> None:
        """Break the connections of a peer, which makes the others have a look."""
        self._stop(peer)
        emulator = self._emulator
        for other in emulator.post.contacts(peer):
            if other in self._swims and not emulator.churning.turmoil.is_cut((peer, other)):
                due = emulator.time + emulator.network.latency
                emulator.at(due, other, lambda other=other: self._probe(other, peer))  # type: ignore[misc]

    def left(self, peer: PeerId) -> None:
        """Say goodbye."""
        if swim := self._swims.get(peer):
            swim.leave(self._emulator.time)
            self._flush(peer)
            self._stop(peer)

    def ended_round(self, peer: PeerId, round: int) -> None:
        """Say how far a peer is with whatever it says next."""
        self._swims[peer].round = round + 1

    def hear(self, peer: PeerId, told: Told) -> None:
        """Take in a letter."""
        if swim := self._swims.get(peer):
            swim.hear(self._emulator.time, told.sender, told.body)
            self._flush(peer)

    def tick(self, peer: PeerId, tick: Tick) -> None:
        """Do what is due."""
        swim = self._swims.get(peer)
        if swim and self._ticks[peer][1] is tick:
            del self._ticks[peer]
            swim.tick(self._emulator.time)
            self._flush(peer)

    def _probe(self, peer: PeerId, other: PeerId) -> None:
        if swim := self._swims.get(peer):
            swim.probe(self._emulator.time, other)
            self._flush(peer)

    def _boot(self, peer: PeerId, others: Iterable[PeerId], contacts: tuple[PeerId, ...]) -> None:
        self.born(peer)
        boot = self._boots[peer]
        known = {other: "" for other in others if other != peer}
        seed = (self._seed << 32) + (peer << 8) + boot
        n = self._emulator.setup.topology.n
        swim = Swim(peer, incarnation(boot), self._timers, known, seed, n=n)
        self._swims[peer] = swim
        swim.start(self._emulator.time)
        if contacts:
            swim.join(self._emulator.time, contacts)
        self._flush(peer)

    def _stop(self, peer: PeerId) -> None:
        self._emulator.churning.chronicle.spoke(self._swims.pop(peer).statistics)
        self._ticks.pop(peer, None)

    def _flush(self, peer: PeerId) -> None:
        """Send what a machine has to say, tell its peer what has changed, and set its timer."""
        emulator, swim = self._emulator, self._swims[peer]
        for to, body in swim.letters():
            due = emulator.post.small(peer, to, emulator.time)
            if due is not None:
                emulator.at(due, to, Told(peer, body))
        for change in swim.changes():
            self._changed(peer, change)
        due = swim.due()
        if peer not in self._ticks or due < self._ticks[peer][0]:
            tick = Tick()
            self._ticks[peer] = due, tick
            emulator.at(due, peer, tick)

    def _changed(self, peer: PeerId, change: Change) -> None:
        emulator = self._emulator
        emulator.churning.chronicle.noticed(emulator.time, peer, change.peer, change.status)
        pair = peer, change.peer
        if change.status is Status.LEFT:  # what it has sent before arrives before
            self._goodbyes[pair] = emulator.post.not_before(change.peer, peer, emulator.time)
        for event in self._known[peer].events(change):
            if isinstance(event, PeerDown) and change.status is Status.LEFT:
                event = PeerDown(event.peer, event.peer in emulator.stopped)
            if isinstance(event, PeerSuspected):
                emulator.at(emulator.time + DOUBT, peer, partial(self._doubt, pair))
            else:
                self._tell(pair, event)

    def _doubt(self, pair: tuple[PeerId, PeerId]) -> None:
        """Tell a peer that it suspects another, if it still does."""
        swim = self._swims.get(pair[0])
        if swim and swim.members[pair[1]].status is Status.SUSPECT:
            self._tell(pair, PeerSuspected(pair[1]))

    def _tell(self, pair: tuple[PeerId, PeerId], event: Presence) -> None:
        """Tell a peer of another, in the order in which it has learned it."""
        emulator = self._emulator
        due = self._goodbyes.get(pair, -1.0)
        if due < emulator.time:
            emulator.tell(pair[0], event)
        else:
            emulator.at(due, pair[0], event)
