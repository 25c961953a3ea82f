"""All the links of a peer: neighbours are met, models go out and come in, losses are noticed.

Every peer binds one ROUTER and dials one DEALER to each neighbour, whatever way models
flow between them. On a dialled link small messages go out: a hello first, then credit,
heartbeats and a goodbye. What comes back on it are answers to the hello, and chunks of
models. So nobody who dials can be big, and no heartbeat stands behind a model. Who sent
something is known by the link it came on, as settled in the handshake: the header only has
to agree.
"""

from __future__ import annotations

import contextlib
import math
import time
from collections.abc import Callable, Iterable, Mapping
from threading import Condition
from typing import Any

import zmq
from torch import Tensor

from p2pfl.addresses import is_wildcard
from p2pfl.errors import RunError, UserError
from p2pfl.learning.scratch import Pool
from p2pfl.peer.events import (
    Event,
    PeerId,
    Send,
    Skip,
)
from p2pfl.runtime import flows, wire
from p2pfl.runtime.attendance import GRACE, Attendance
from p2pfl.runtime.chunks import Outgoing, Schema
from p2pfl.runtime.endpoint import Endpoint
from p2pfl.runtime.finding import Book, Finder
from p2pfl.runtime.flows import Expected
from p2pfl.runtime.handshake import Handshake, NeighbourGone, Terms
from p2pfl.runtime.lookout import Lookout, Roll
from p2pfl.runtime.meeting import Meeting
from p2pfl.runtime.neighbour import Neighbour
from p2pfl.runtime.reader import Asked, Reader
from p2pfl.runtime.streams import Stream
from p2pfl.runtime.wire import MOST_REASON, OFFERS, TRAINING, Header, Kind

KEPT = 1 << 28  # bytes of memory for models that are kept to be used again
# What may wait for one neighbour to ask for it.
MANY, PLENTY = 8, 1 << 26  # messages of any size; bytes
MOST_UNSENT = 64  # small messages that may wait for a link that is broken
FRIENDS = 3  # neighbours that who comes late needs to know
POLL = 20  # milliseconds between two looks at what wakes no poller
ALL = 0.05  # seconds between two looks at all there is, also at those who say nothing


class Links:
    """All the links of one peer.

    Args:
        me: its id.
        endpoint: its sockets, which are closed with the links.
        neighbours: whom it talks to.
        terms: what they must agree on.
        book: who listens where, as far as we know; others may ask for it.
        finder: where else to look for addresses; it is closed with the links.
        roll: how it finds out who is there; None: a neighbour whose link breaks is gone.

    Attributes:
        poller: wakes up when there is something to do here.
        rejected: how many messages were refused, by sender and reason.
        reject: counts one more.
        pool: memory for models.

    Raises:
        UserError: an address cannot be used, or a key is not listed.
    """

    def __init__(  # noqa: PLR0913 - all that links need
        self,
        me: PeerId,
        endpoint: Endpoint,
        neighbours: Iterable[PeerId],
        terms: Terms,
        book: Book,
        finder: Finder | None = None,
        roll: Roll | None = None,
    ) -> None:
        self.me, self.poller, self._roll, self._book = me, endpoint.poller, roll, book
        neighbours = frozenset(neighbours)
        self._endpoint, self._listener = endpoint, endpoint.listener
        keys = endpoint.keyring.of if endpoint.keyring else None
        life, awaited = (roll.life, roll.founders & neighbours) if roll else (0, neighbours)
        self._handshake = Handshake(me, neighbours, terms, keys, life, roll is not None)
        self._meeting = Meeting(me, endpoint, awaited, self._handshake, book, finder)
        self._meeting.prepare = self._prepare
        self._neighbours = self._meeting.neighbours
        self._expected: Expected | None = None
        self._reader = Reader(endpoint, self._meeting, self._about)
        self.rejected, self.reject = self._reader.rejected, self._reader.reject
        self._phase, self._replaceable, self._room = -1, True, MANY
        self.pool = Pool(KEPT)
        self._attendance = Attendance(self._meeting, self._listener, self._about)
        self._next_look = 0.0
        self._readable: set[Any] | None = None  # sockets, of the last poll
        self._meeting.find()

    def inproc(self, name: str) -> zmq.Socket[bytes]:
        """Return a socket on which other threads of this process can wake the poller."""
        socket = self._endpoint.context.socket(zmq.PULL)
        socket.bind(f"inproc://{name}")
        self.poller.register(socket, zmq.POLLIN)
        return socket

    def waker(self, name: str) -> zmq.Socket[bytes]:
        """Return the other end of `inproc`, for use in one other thread."""
        socket = self._endpoint.context.socket(zmq.PUSH)
        socket.connect(f"inproc://{name}")
        return socket

    def meet(self, timeout: float, go_on: Callable[[], bool] = lambda: True) -> bool:
        """Wait until every neighbour has welcomed us and been welcomed, or `go_on` says no.

        Return whether all have met; or, if they had met before, whether some have welcomed us.

        Raises:
            UserError: a neighbour takes part in another run; the message says the difference.
            NeighbourGone: a neighbour cannot take part, and said so.
            RunError: somebody did not turn up within `timeout` seconds.
        """
        deadline = time.monotonic() + timeout
        refused, answered = self._handshake.refused, self._handshake.answered
        while (absent := self._missing()) and go_on():
            left = deadline - time.monotonic()
            # Who does not want us may still have to hear that we do not want them either.
            if refused and (left <= 0 or refused.keys() <= answered):
                raise UserError("; ".join(refused.values()))
            if left <= 0:
                who = ", ".join(map(self._meeting.described, absent))
                raise RunError(f"peer {self.me}: nothing heard within {timeout:g} s of {who}")
            self._meeting.find()
            self._endpoint.tend()
            self._tend(self._neighbours.values())
            self._poll(math.ceil(1000 * min(left, 0.2)))
            self._reader.small()
            self._reader.models(self._ready())
            if refused and not self._handshake.is_late:
                deadline = min(deadline, time.monotonic() + GRACE)
        if not absent:
            self._meeting.over()
            if not self.friends:
                self.look_out()
        return not absent

    def _missing(self) -> list[PeerId]:
        """Return who must be met yet: who comes late does with a few."""
        absent = self._meeting.absent()
        if not self._handshake.is_late:
            return absent
        there = [p for p, one in self._neighbours.items() if one.link.welcomed]
        return absent if len(there) < min(FRIENDS, len(absent)) else []

    @property
    def friends(self) -> tuple[PeerId, ...]:
        """Those who had met before we came, and have let us in; empty if we were in time."""
        there = [p for p, one in sorted(self._neighbours.items()) if one.link.welcomed]
        return tuple(there) if self._handshake.is_late else ()

    @property
    def lookout(self) -> Lookout | None:
        """Who is there, once all have met; None: nobody asks."""
        return self._attendance.lookout

    def refusing(self) -> list[PeerId]:
        """Return who does not admit our key any more, once until it lets us in again."""
        found, self._attendance.refusing = self._attendance.refusing, []
        return found

    def look_out(self) -> None:
        """Begin to look after the others, which is to be there for them."""
        if self._roll is None:
            return
        founders = () if self.friends else self._roll.founders - {self.me}
        addresses = self._book.addresses
        others = {peer: addresses.get(peer, "") for peer in sorted(founders)}
        address = "" if is_wildcard(addresses[self.me]) else addresses[self.me]
        roll, n = self._roll, self._book.nodes
        lookout = Lookout(self.me, roll.life, roll.timers, others, address, n)
        for peer, life in self._handshake.lives.items():
            lookout.meet(peer, life)
        self._reader.lookout = self._attendance.lookout = lookout
        if self.friends:
            lookout.join(self.friends)

    def expect(
        self,
        phase: int,
        schema: Schema,
        replaceable: bool = False,
        stay: bool = False,
        news: Condition | None = None,
        heard: int | None = None,
    ) -> None:
        """Enter a phase.

        Args:
            phase: messages of other phases are refused.
            schema: what its messages look like.
            replaceable: whether a newer message makes an unsent older one worthless.
            stay: whether models stay in the memory they came in, large fields as `Pieces`.
            news: if they are even mixed while they arrive: where who mixes them waits.
            heard: of how many neighbours messages come at the same time; None: of all.
        """
        self._phase, self._replaceable = phase, replaceable
        self._reader.is_training = phase >= TRAINING
        self._room = max(MANY, PLENTY // max(1, schema.nbytes))
        window = flows.window(schema, len(self._neighbours) if heard is None else heard)
        self._expected = Expected(schema, window, self.pool.empty, stay, news)
        for one in self._neighbours.values():
            self._prepare(one)
        self._ask(self._neighbours.values())

    def _prepare(self, one: Neighbour) -> None:
        """Tell a neighbour's end what is to come of it."""
        if self._expected is not None and one.inflow.phase != self._phase:
            one.inflow.expect(self._phase, self._expected)

    def wait(self, due: float, most: int) -> None:
        """Wait until something happens, the next timer is `due` (monotonic), or `most` ms."""
        self._poll(self.until_due(due, most))

    def _poll(self, most: int) -> None:
        self._readable = {socket for socket, _ in self.poller.poll(most)}

    def _ready(self) -> set[Any]:
        """Return the sockets on which something has come in: to look at all takes long."""
        if self._readable is None:
            self._poll(0)
        readable, self._readable = self._readable or set(), None
        return readable

    def events(self) -> list[Event | Asked]:
        """Return what has happened on the links: messages first, then who is there."""
        readable, now = self._ready(), time.monotonic()
        # A chunk wakes us when a megabyte has just been decrypted, and nothing else is in the
        # cache. So while only chunks and credit come, the rest is looked at now and then.
        short = bool(readable) and now < self._next_look
        short = short and self._endpoint.gate.fileno() not in readable
        everybody = not short and self._look(now)
        is_told = not short or self._listener.socket in readable
        asked = self._reader.small() if is_told else []
        happened: list[Event | Asked] = [*self._reader.models(readable), *asked]
        busy, stirred = self._busy(everybody), not short or self._reader.unusual
        self._reader.begin_anew()
        self._ask(busy.values())
        self._pass_on()
        return [*happened, *(self._attendance.changes(busy, self._room) if stirred else [])]

    def _look(self, now: float) -> bool:
        """Take note of connections made and lost; return whether to look at every neighbour."""
        everybody = self._endpoint.tend() or now >= self._next_look
        if everybody:
            self._next_look = now + ALL
        self._tend(self._busy(everybody).values())
        return everybody

    def _busy(self, everybody: bool) -> dict[PeerId, Neighbour]:
        """Return those with whom something may have happened: of many, most say nothing."""
        heard = self._reader.heard
        among = self._neighbours.items()
        return {p: one for p, one in among if everybody or p in heard or one.is_busy}

    def skip(self, skip: Skip) -> None:
        """Tell peers that a round has gone by without them."""
        for peer in skip.to:
            one = self._neighbours.get(peer)
            if one and len(one.link.unsent) < MOST_UNSENT:  # else it hears nothing of us anyway
                about = self._about(Kind.SKIP)
                one.tell(wire.pack(about._replace(round=skip.round, degree=int(skip.kept))))

    def pull(self, peers: Iterable[PeerId]) -> None:
        """Ask some for their models."""
        for peer in peers:
            if one := self._neighbours.get(peer):
                one.tell(wire.pack(self._about(Kind.PULL)))

    def offer(self, to: PeerId, round: int, message: tuple[Tensor, ...], elapsed: float) -> None:
        """Give somebody what it has asked for, `elapsed` seconds after the run began."""
        header = Header(Kind.CHUNK, self._handshake.run, OFFERS, self.me, round, 0, elapsed)
        self._meeting.giving[to].offers.put(Outgoing(header, message), replaceable=True)
        self._pass_on()

    def send(self, send: Send) -> None:
        """Send a model to everybody it is for, without ever waiting.

        A neighbour that does not ask for it gets the newest model when it asks again; where
        no message can be left out, it is given up once too much has piled up.
        """
        about = (self._handshake.run, self._phase, self.me, send.round, send.degree, send.score)
        kind = Kind.ANEW if send.fresh else Kind.CHUNK
        message = Outgoing(Header(kind, *about), send.message)
        for to in send.to:
            giving = self._meeting.giving[to]
            # Who has come late may ask before we know where it listens.
            if to in self._neighbours or (giving.connection and self._replaceable):
                giving.outflow.put(message, self._replaceable)
        self._pass_on()

    def begin(self, streams: Iterable[Stream]) -> None:
        """Take note that streams are mixed now, so that older ones of their senders never will."""
        for stream in streams:
            if one := self._neighbours.get(stream.sender):
                one.inflow.drop_before(stream.round)

    def make_way(self, peers: Iterable[PeerId], round: int) -> None:
        """Have older streams of some dropped, behind which what they send in a round would wait."""
        for peer in peers:
            if one := self._neighbours.get(peer):
                one.inflow.drop_before(round)
                one.ask(self._about)

    def end_streams(self) -> None:
        """Let nobody wait for the rest of a model any more."""
        for one in self._neighbours.values():
            one.inflow.end()

    def until_due(self, due: float, most: int) -> int:
        """Return how many milliseconds to poll: until the next timer (monotonic), or `most`."""
        links = [one.link for one in self._neighbours.values()]
        pending = any(link.unsent or link.broken_since is not None for link in links)
        due = min(due, self.lookout.due) if self.lookout else due
        left = math.ceil(1000 * min(due - time.monotonic(), 1000))
        return max(0, min(left, POLL if pending else most))

    def report(self) -> dict[str, Any]:
        """Return what a summary says of the links."""
        trips = {peer: one.round_trip for peer, one in self._neighbours.items()}
        return {
            "encrypted": self._endpoint.keyring is not None,
            "round_trip_ms": {str(p): round(1000 * t, 3) for p, t in trips.items() if t},
            "rejections": {
                **self.rejected,
                **self._endpoint.gate.refused(),
                **self._meeting.undialled,
            },
        }

    def allow(self, keys: Mapping[PeerId, str]) -> None:
        """Take in a new list of keys; whose key is not on it any more is given up."""
        self._endpoint.allow(keys)
        for peer in self._handshake.allow(keys):
            if one := self._neighbours.get(peer):
                one.is_unwanted = True

    def close(self, reason: str, linger: float, done: bool = False) -> None:
        """Say goodbye, and wait until the neighbours have everything.

        Args:
            reason: why we leave, in words.
            linger: seconds to wait at most.
            done: whether we have come to our end.

        Before all have met it is also for neighbours that are only about to turn up.
        """
        kind = Kind.BYE if self._handshake.done else Kind.ABORT
        self._attendance.leave()
        for one in self._neighbours.values():
            about = self._about(kind)._replace(degree=int(done))
            one.say_goodbye(about, reason.encode()[:MOST_REASON])
        deadline = time.monotonic() + linger
        try:
            while self._has_listeners() and time.monotonic() < deadline:
                with contextlib.suppress(NeighbourGone):
                    self.events()
                self._poll(POLL)
        finally:
            self._meeting.close()

    def _has_listeners(self) -> bool:
        """Say whether there is anybody left for whom a goodbye means something."""
        met, refused = self._handshake.done, self._handshake.refused
        known = self._neighbours.items()
        return any(one.link.welcomed or not (met or p in refused) for p, one in known)

    def _about(self, kind: Kind) -> Header:
        return Header(kind, self._handshake.run, max(self._phase, 0), self.me)

    def _tend(self, neighbours: Iterable[Neighbour]) -> None:
        about = self._about(Kind.PING)
        for one in neighbours:
            one.tend(about)

    def _ask(self, neighbours: Iterable[Neighbour]) -> None:
        """Give credit to those who may send more."""
        for one in neighbours:
            one.ask(self._about)

    def _pass_on(self) -> None:
        """Send chunks to those who have asked for some, to each in turn."""
        all_ = self._meeting.giving.values()
        waiting = [flow for one in all_ for flow in (one.outflow, one.offers) if flow.waiting]
        while waiting:  # as many as there is credit for: a few MB
            waiting = [outflow for outflow in waiting if outflow.flush(self._listener.hand_over)]
