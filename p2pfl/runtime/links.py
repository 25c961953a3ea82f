"""A peer's sockets: one that listens, one dialled to each neighbour, and the handshake.

Every peer binds one ROUTER and dials one DEALER to each neighbour, whatever way models
flow between them. A hello goes out on every dialled link; the listener answers WELCOME, or
REFUSE with the difference, on the same link. From then on a link carries models one way.
Who sent something is known by the link it came on, as settled in the handshake: the header
only has to agree.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import zmq
from zmq.utils.monitor import recv_monitor_message

from p2pfl.errors import RemoteProtocolError, RunError, UserError
from p2pfl.peer.events import Event, PeerDown, PeerId, Send
from p2pfl.runtime import wire
from p2pfl.runtime.wire import Header, Kind, Schema

Frames = Sequence[bytes | memoryview]

# A link that broke is dialled again by ZeroMQ; if that has not helped after so many seconds,
# the peer behind it is taken for dead.
GRACE = 1.0
_WATCHED = zmq.EVENT_DISCONNECTED | zmq.EVENT_HANDSHAKE_SUCCEEDED


@dataclass(frozen=True)
class Terms:
    """What both ends of a link must agree on, spelled out so that a difference has a name."""

    items: Mapping[str, str]

    @property
    def run(self) -> bytes:
        """The digest which stands for the terms in every header."""
        return wire.digest(self.items)


class _Link:
    """What one peer knows of its way to another."""

    def __init__(self, context: zmq.Context[zmq.Socket[bytes]], address: str) -> None:
        self.socket = context.socket(zmq.DEALER)
        self.socket.linger = 0
        # Two models: rounds in step never need more, and a neighbour that stopped reading
        # must not fill our memory.
        self.socket.sndhwm = 2
        self.socket.setsockopt(zmq.RECONNECT_IVL, 50)
        self.socket.setsockopt(zmq.RECONNECT_IVL_MAX, 1000)
        self.monitor = self.socket.get_monitor_socket(_WATCHED)
        self.socket.connect(address)
        self.welcomed = False
        self.broken_since: float | None = None
        self.unsent: list[Frames] = []

    def close(self, linger: int) -> None:
        self.socket.disable_monitor()
        self.socket.close(linger)


class Links:
    """All the links of one peer.

    Attributes:
        rejected: how many messages were refused, by reason.
    """

    def __init__(
        self, me: PeerId, bind: str, addresses: Mapping[PeerId, str], terms: Terms, largest: int
    ) -> None:
        self.me, self.terms = me, terms
        self.rejected: Counter[str] = Counter()
        self._phase, self._schema, self._replaceable = -1, Schema(tuple, ()), True
        self._addresses = dict(addresses)
        self._context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
        self._context.set(zmq.MAX_SOCKETS, 16384)
        self._listener = self._listen(bind, max(largest, wire.MAX_HELLO))
        self._links = {to: _Link(self._context, address) for to, address in addresses.items()}
        self._senders: dict[bytes, PeerId] = {}  # by routing id, as settled in the handshake
        self._early: list[tuple[bytes, Header, list[memoryview]]] = []
        self.poller = zmq.Poller()
        self.poller.register(self._listener, zmq.POLLIN)
        for link in self._links.values():
            self.poller.register(link.socket, zmq.POLLIN)
            self.poller.register(link.monitor, zmq.POLLIN)

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

    def meet(self, timeout: float, go_on: Callable[[], bool] = lambda: True) -> None:
        """Wait until every neighbour has welcomed us and been welcomed.

        Raises:
            UserError: a neighbour takes part in another run; the message says the difference.
            RunError: somebody did not turn up within `timeout` seconds.
        """
        hello = [wire.pack(self._header(Kind.HELLO)), wire.pack_terms(self.terms.items)]
        for link in self._links.values():
            link.socket.send_multipart(hello)
        deadline = time.monotonic() + timeout
        while self._absent() and go_on():
            left = deadline - time.monotonic()
            if left <= 0:
                who = ", ".join(f"{p} at {self._addresses[p]}" for p in self._absent())
                raise RunError(f"peer {self.me}: nothing heard within {timeout:g} s of peer {who}")
            self.poller.poll(round(1000 * min(left, 0.2)))
            self._answers()
            self._early += self._read()
            self._watch()

    def expect(self, phase: int, schema: Schema, replaceable: bool) -> None:
        """Enter a phase: say what its messages look like, and whether the newest is enough.

        Messages of later phases, from neighbours ahead of us, are kept until then.
        """
        self._phase, self._schema, self._replaceable = phase, schema, replaceable

    def events(self) -> list[Event]:
        """Return what has happened on the links: messages first, then losses."""
        self._flush()
        happened: list[Event] = []
        arrived, self._early = self._early + self._read(), []
        for identity, header, frames in arrived:
            if header.phase > self._phase and identity in self._senders:
                self._early.append((identity, header, frames))
            elif event := self._accept(identity, header, frames):
                happened.append(event)
        self._answers()
        return happened + [PeerDown(peer) for peer in self._watch()]

    def send(self, send: Send) -> None:
        """Send a model to everybody it is for, without ever waiting.

        A neighbour that does not read gets the newest model when it reads again; where no
        message can be left out, it is given up once too much has piled up.
        """
        header = self._header(Kind.MODEL, send.round, send.degree, send.score)
        frames = wire.dump(header, send.message)
        for to in send.to:
            link = self._links.get(to)
            if link:
                link.unsent = [frames] if self._replaceable else [*link.unsent, frames]
        self._flush()

    def until_due(self, due: float | None) -> int | None:
        """Return how many milliseconds to poll, given when (monotonic) the next timer is due."""
        pending = any(link.unsent or link.broken_since for link in self._links.values())
        limit = 20 if pending else None
        if due is None:
            return limit
        left = max(0, round(1000 * (due - time.monotonic())))
        return left if limit is None else min(left, limit)

    def close(self, reason: str, linger: float) -> None:
        """Say goodbye; wait until the neighbours have read it, `linger` seconds at most."""
        bye: Frames = [wire.pack(self._header(Kind.BYE)), reason.encode()[:200]]
        for link in self._links.values():
            link.unsent.append(bye)
        deadline = time.monotonic() + linger
        while any(link.welcomed for link in self._links.values()) and time.monotonic() < deadline:
            self.events()
            self.poller.poll(20)
        for peer in list(self._links):
            self._drop(peer)
        self._listener.close(200)
        self._context.destroy()

    def _listen(self, address: str, largest: int) -> zmq.Socket[bytes]:
        socket = self._context.socket(zmq.ROUTER)
        socket.linger = 200  # a refusal should reach whom it is for
        socket.rcvhwm = 8
        socket.setsockopt(zmq.MAXMSGSIZE, largest)
        try:
            socket.bind(address)
        except zmq.ZMQError as error:
            self._context.destroy(linger=0)
            if error.errno == zmq.EADDRINUSE:
                raise RunError(f"{address} is taken by another program") from error
            raise UserError(f"cannot listen on {address}: {error.strerror}") from error
        return socket

    def _header(
        self, kind: Kind, round: int = 0, degree: int = 0, score: float = float("-inf")
    ) -> Header:
        return Header(kind, self.terms.run, max(self._phase, 0), self.me, round, degree, score)

    def _absent(self) -> list[PeerId]:
        known = set(self._senders.values())
        return [p for p, link in self._links.items() if not link.welcomed or p not in known]

    def _read(self) -> list[tuple[bytes, Header, list[memoryview]]]:
        """Read everything there is on the listener; hellos and goodbyes are dealt with here."""
        models: list[tuple[bytes, Header, list[memoryview]]] = []
        while True:
            try:
                identity, *frames = self._listener.recv_multipart(zmq.NOBLOCK, copy=False)
            except zmq.Again:
                return models
            views = [frame.buffer for frame in frames]
            try:
                if not views:
                    raise RemoteProtocolError("empty message")
                header = wire.unpack(views[0])
                if header.kind is Kind.HELLO:
                    self._hello(identity.bytes, header, views[1:])
                else:
                    models.append((identity.bytes, header, views[1:]))
            except RemoteProtocolError as error:
                self.rejected[str(error)] += 1

    def _hello(self, identity: bytes, header: Header, body: list[memoryview]) -> None:
        terms = wire.unpack_terms(body[0]) if len(body) == 1 else {}
        reason = wire.difference(self.terms.items, terms)
        if header.sender not in self._links:
            reason = reason or f"peer {header.sender} is no neighbour of peer {self.me}"
        if header.sender in self._senders.values():
            reason = reason or f"there is a peer {header.sender} already"
        answer = self._header(Kind.REFUSE if reason else Kind.WELCOME)
        body_out = [reason.encode()[:1000]] if reason else []
        self._listener.send_multipart([identity, wire.pack(answer), *body_out], zmq.NOBLOCK)
        if reason:
            raise RemoteProtocolError(f"hello refused: {reason}")
        self._senders[identity] = header.sender

    def _accept(self, identity: bytes, header: Header, frames: list[memoryview]) -> Event | None:
        try:
            if self._senders.get(identity) != header.sender:
                raise RemoteProtocolError("a message from somebody who has not said hello")
            if header.run != self.terms.run:
                raise RemoteProtocolError("a message of another run")
            if header.kind is Kind.BYE:
                self._drop(header.sender)
                answer = wire.pack(self._header(Kind.BYE))
                self._listener.send_multipart([identity, answer], zmq.NOBLOCK)
                return PeerDown(header.sender)
            if header.kind is not Kind.MODEL:
                raise RemoteProtocolError(f"an unexpected {header.kind.name}")
            if header.phase != self._phase:
                raise RemoteProtocolError(f"a message of phase {header.phase}")
            return wire.load(header, frames, self._schema)
        except RemoteProtocolError as error:
            self.rejected[str(error)] += 1
            return None

    def _answers(self) -> None:
        for peer, link in list(self._links.items()):
            while not link.socket.closed and _is_readable(link.socket):
                frames = link.socket.recv_multipart()
                try:
                    header = wire.unpack(frames[0])
                except RemoteProtocolError as error:
                    self.rejected[str(error)] += 1
                    continue
                if header.kind is Kind.WELCOME:
                    link.welcomed = True
                elif header.kind is Kind.BYE:  # our own goodbye has been read
                    self._drop(peer)
                elif header.kind is Kind.REFUSE and not link.welcomed:
                    reason = frames[1][:1000].decode(errors="replace") if frames[1:] else ""
                    raise UserError(
                        f"peer {peer} at {self._addresses[peer]} refused peer {self.me}"
                        f" ('here' is peer {peer}): {reason}"
                    )

    def _watch(self) -> list[PeerId]:
        """Look after broken links; return the peers given up."""
        now = time.monotonic()
        given_up = []
        for peer, link in list(self._links.items()):
            while _is_readable(link.monitor):
                event = recv_monitor_message(link.monitor)["event"]
                broken = event == zmq.EVENT_DISCONNECTED
                link.broken_since = now if broken else None
            if link.welcomed and link.broken_since and now - link.broken_since > GRACE:
                given_up.append(peer)
                self._drop(peer)
        return given_up

    def _flush(self) -> None:
        for link in self._links.values():
            while link.unsent:
                try:
                    link.socket.send_multipart(link.unsent[0], zmq.NOBLOCK, copy=False)
                except zmq.Again:
                    break
                link.unsent.pop(0)

    def _drop(self, peer: PeerId) -> None:
        link = self._links.pop(peer, None)
        if link:
            self.poller.unregister(link.socket)
            self.poller.unregister(link.monitor)
            link.close(0)


def _is_readable(socket: zmq.Socket[bytes]) -> bool:
    return bool(int(socket.getsockopt(zmq.EVENTS)) & zmq.POLLIN)
