"""All the links of a peer: neighbours are met, models go out and come in, losses are noticed.

Every peer binds one ROUTER and dials one DEALER to each neighbour, whatever way models
flow between them. A hello goes out first on every dialled link, and is answered on it; from
then on the link carries models one way. Who sent something is known by the link it came
on, as settled in the handshake: the header only has to agree.
"""

from __future__ import annotations

import contextlib
import math
import time
from collections import Counter
from collections.abc import Callable, Mapping
from typing import NamedTuple

import zmq

from p2pfl.errors import RemoteProtocolError, RunError, UserError
from p2pfl.peer.events import Event, PeerDown, PeerId, Send
from p2pfl.runtime import wire
from p2pfl.runtime.handshake import MOST_REASON, Handshake, NeighbourGone, Terms
from p2pfl.runtime.sockets import Link, Listener, new_context
from p2pfl.runtime.wire import Header, Kind, Schema

# A link that broke is dialled again by ZeroMQ; if that has not helped after so many seconds,
# the peer behind it is taken for dead.
GRACE = 1.0
# What may wait of one neighbour: for it to read, or for a phase we have not reached.
MANY, PLENTY = 8, 1 << 26  # messages of any size; bytes
MOST_REASONS = 100  # reasons of refusal told apart: strangers could make up any number
POLL = 20  # milliseconds between two looks at what wakes no poller


class _Mail(NamedTuple):
    """A message as it came in."""

    identity: bytes  # of the connection
    header: Header
    frames: list[memoryview]  # after the header's


class Links:
    """All the links of one peer.

    Args:
        me: its id; `bind` is where it listens, and `addresses` where its neighbours do.
        terms: what they must agree on.
        largest: bytes of the largest frame that a neighbour has reason to send.
        descriptor: a socket that listens already, to be taken over.

    Attributes:
        poller: wakes up when there is something to do here.
        rejected: how many messages were refused, by reason.

    Raises:
        UserError: an address cannot be used.
        RunError: an address is taken.
    """

    def __init__(
        self,
        me: PeerId,
        bind: str,
        addresses: Mapping[PeerId, str],
        terms: Terms,
        largest: int,
        descriptor: int | None = None,
    ) -> None:
        self.me, self.poller = me, zmq.Poller()
        self.rejected: Counter[str] = Counter()
        self._phase, self._schema, self._replaceable = -1, Schema(tuple, ()), True
        self._handshake = Handshake(me, addresses, terms)
        self._early: list[_Mail] = []
        self._links: dict[PeerId, Link] = {}
        self._context = new_context(len(addresses))
        largest = max(largest, wire.MAX_HELLO)
        self._room = max(MANY, PLENTY // largest)
        try:
            self._listener = Listener(self._context, bind, largest, descriptor)
            for to, address in addresses.items():
                self._links[to] = Link(self._context, address, self._handshake.hello)
        except (UserError, RunError):
            self._context.destroy(0)
            raise
        links = self._links.values()
        for socket in (self._listener.socket, *(s for k in links for s in (k.socket, k.monitor))):
            self.poller.register(socket, zmq.POLLIN)

    def inproc(self, name: str) -> zmq.Socket[bytes]:
        """Return a socket on which other threads of this process can wake the poller."""
        socket = self._context.socket(zmq.PULL)
        socket.bind(f"inproc://{name}")
        self.poller.register(socket, zmq.POLLIN)
        return socket

    def waker(self, name: str) -> zmq.Socket[bytes]:
        """Return the other end of `inproc`, for use in one other thread."""
        socket = self._context.socket(zmq.PUSH)
        socket.connect(f"inproc://{name}")
        return socket

    def meet(self, timeout: float, go_on: Callable[[], bool] = lambda: True) -> bool:
        """Wait until every neighbour has welcomed us and been welcomed, or `go_on` says no.

        Return whether all have met.

        Raises:
            UserError: a neighbour takes part in another run; the message says the difference.
            NeighbourGone: a neighbour cannot take part, and said so.
            RunError: somebody did not turn up within `timeout` seconds.
        """
        deadline = time.monotonic() + timeout
        refused, answered = self._handshake.refused, self._handshake.answered
        while (absent := self._absent()) and go_on():
            left = deadline - time.monotonic()
            # Who does not want us may still have to hear that we do not want them either.
            if refused and (left <= 0 or refused.keys() <= answered):
                raise UserError("; ".join(refused.values()))
            if left <= 0:
                who = ", ".join(map(self._handshake.name, absent))
                raise RunError(f"peer {self.me}: nothing heard within {timeout:g} s of {who}")
            self._tend()
            self.poller.poll(math.ceil(1000 * min(left, 0.2)))
            self._early += self._read()
            self._answers()
            if refused:
                deadline = min(deadline, time.monotonic() + GRACE)
        self._handshake.done = not absent
        return not absent

    def expect(self, phase: int, schema: Schema, replaceable: bool) -> None:
        """Enter a phase: say what its messages look like, and whether the newest is enough.

        Messages of later phases, from neighbours ahead of us, are kept until then.
        """
        self._phase, self._schema, self._replaceable = phase, schema, replaceable

    def events(self) -> list[Event]:
        """Return what has happened on the links: messages first, then losses."""
        self._tend()
        happened: list[Event] = []
        arrived, self._early = self._early + self._read(), []
        kept: Counter[bytes] = Counter()
        for mail in arrived:
            kept[mail.identity] += self._is_early(mail)
            if self._is_early(mail) and kept[mail.identity] <= self._room:
                self._early.append(mail)
            elif event := self._accept(mail):
                happened.append(event)
        self._answers()
        return [*happened, *self._lost()]

    def send(self, send: Send) -> None:
        """Send a model to everybody it is for, without ever waiting.

        A neighbour that does not read gets the newest model when it reads again; where no
        message can be left out, it is given up once too much has piled up.
        """
        about = (self._handshake.run, self._phase, self.me, send.round, send.degree, send.score)
        header = Header(Kind.MODEL, *about)
        frames = wire.dump(header, send.message)
        for to in send.to:
            if link := self._links.get(to):
                if self._replaceable:
                    link.unsent.clear()
                link.unsent.append(frames)
                link.flush()

    def until_due(self, due: float, most: int) -> int:
        """Return how many milliseconds to poll: until the next timer (monotonic), or `most`."""
        links = self._links.values()
        pending = any(link.unsent or link.broken_since is not None for link in links)
        left = math.ceil(1000 * min(due - time.monotonic(), 1000))
        return max(0, min(left, POLL if pending else most))

    def reject(self, error: RemoteProtocolError) -> None:
        """Count a message that was refused."""
        reason = str(error)
        if reason not in self.rejected and len(self.rejected) >= MOST_REASONS:
            reason = "other reasons"
        self.rejected[reason] += 1

    def close(self, reason: str, linger: float) -> None:
        """Say goodbye; wait until the neighbours have read it, `linger` seconds at most.

        Before all have met it is also for neighbours that are only about to turn up.
        """
        kind = Kind.BYE if self._handshake.done else Kind.ABORT
        for link in self._links.values():
            link.unsent.append([self._pack(kind), reason.encode()[:MOST_REASON]])
        deadline = time.monotonic() + linger
        while self._has_listeners() and time.monotonic() < deadline:
            with contextlib.suppress(NeighbourGone):
                self.events()
            self.poller.poll(POLL)
        for peer in list(self._links):
            self._drop(peer)
        self._listener.socket.close()
        self._context.destroy()

    def _has_listeners(self) -> bool:
        """Say whether there is anybody left for whom a goodbye means something."""
        met, refused = self._handshake.done, self._handshake.refused
        return any(k.welcomed or not (met or p in refused) for p, k in self._links.items())

    def _pack(self, kind: Kind) -> bytes:
        return wire.pack(Header(kind, self._handshake.run, max(self._phase, 0), self.me))

    def _absent(self) -> list[PeerId]:
        known = self._handshake.is_known
        return [p for p, link in self._links.items() if not link.welcomed or not known(p)]

    def _tend(self) -> None:
        for link in self._links.values():
            link.watch()
            link.flush()

    def _read(self) -> list[_Mail]:
        """Read what has come; hellos, and goodbyes before the start, are dealt with here."""
        mails = []
        for identity, frames in self._listener.read():
            try:
                if not frames:
                    raise RemoteProtocolError("an empty message")
                header = wire.unpack(frames[0])
                if header.kind is Kind.HELLO:
                    self._handshake.hear(self._listener, identity, frames, self._links)
                elif header.kind is Kind.ABORT and self._is_from(identity, header):
                    self._aborted(identity, header, frames[1:])
                else:
                    mails.append(_Mail(identity, header, frames[1:]))
            except wire.OtherVersion as error:
                self._handshake.refuse_version(self._listener, identity)
                self.reject(error)
            except RemoteProtocolError as error:
                self.reject(error)
        return mails

    def _is_from(self, identity: bytes, header: Header) -> bool:
        known = self._handshake.sender(identity) == header.sender
        return known and header.run == self._handshake.run

    def _is_early(self, mail: _Mail) -> bool:
        return mail.header.phase > self._phase and self._is_from(mail.identity, mail.header)

    def _aborted(self, identity: bytes, header: Header, body: list[memoryview]) -> None:
        self._drop(header.sender)
        self._listener.answer(identity, self._pack(Kind.BYE))
        reason = b"".join(body[:1])[:MOST_REASON].decode(errors="replace")
        raise NeighbourGone(
            f"peer {self.me}: peer {header.sender} gave up before all had met: {reason}"
        )

    def _accept(self, mail: _Mail) -> Event | None:
        identity, header, frames = mail
        try:
            if not self._is_from(identity, header):
                raise RemoteProtocolError("a message from somebody who has not said hello")
            if header.kind is Kind.BYE:
                gone = self._drop(header.sender)
                self._listener.answer(identity, self._pack(Kind.BYE))
                return PeerDown(header.sender) if gone else None
            if header.kind is not Kind.MODEL:
                raise RemoteProtocolError(f"an unexpected {header.kind.name}")
            if header.phase != self._phase:
                raise RemoteProtocolError("a message of another phase")
            return wire.load(header, frames, self._schema)
        except RemoteProtocolError as error:
            self.reject(error)
            return None

    def _answers(self) -> None:
        for peer, link in list(self._links.items()):
            for frames in link.answers():
                try:
                    if self._handshake.hear_answer(peer, link, frames):
                        self._drop(peer)  # our own goodbye has been read
                except RemoteProtocolError as error:
                    self.reject(error)

    def _lost(self) -> list[PeerDown]:
        """Give up neighbours whose link stays broken, or who leave too much unread."""
        now, lost = time.monotonic(), []
        for peer, link in list(self._links.items()):
            broken = link.broken_since is not None and now - link.broken_since > GRACE
            if broken or len(link.unsent) > self._room:
                self._drop(peer)
                lost.append(PeerDown(peer))
        return lost

    def _drop(self, peer: PeerId) -> bool:
        """Close our link to a peer; return whether there was one."""
        link = self._links.pop(peer, None)
        if link:
            self.poller.unregister(link.socket)
            self.poller.unregister(link.monitor)
            link.close()
        return link is not None
