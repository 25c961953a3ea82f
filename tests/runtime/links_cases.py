"""Peers with links in one process, for the tests of what goes on between them."""

from __future__ import annotations

import math
import select
import socket
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from typing import NamedTuple

import torch
import zmq

from p2pfl.errors import RunError, UserError
from p2pfl.membership.timers import Timers
from p2pfl.peer.events import Event, Received, Send
from p2pfl.runtime import chunks, wire
from p2pfl.runtime.chunks import Outgoing
from p2pfl.runtime.endpoint import Endpoint
from p2pfl.runtime.finding import Book
from p2pfl.runtime.handshake import Terms
from p2pfl.runtime.links import Links
from p2pfl.runtime.lookout import Roll
from p2pfl.runtime.wire import Header, Kind

TERMS = Terms({"seed": "1", "algorithm.name": "dpsgd"})
PATIENCE = 20.0  # seconds a test waits for what should take milliseconds
ANYWHERE = "tcp://127.0.0.1:*"
MIB = 1 << 18  # numbers of single precision in one chunk


@contextmanager
def chunks_of(size: int) -> Iterator[None]:
    """Let chunks be of so many bytes."""
    usual = wire.CHUNK
    wire.CHUNK = size
    _forget()
    try:
        yield
    finally:
        wire.CHUNK = usual
        _forget()


def _forget() -> None:
    for cached in (chunks.layout, wire.model_size):
        cached.cache_clear()


class Message(NamedTuple):
    values: torch.Tensor


def model(value: float = 1.0, d: int = 4) -> Message:
    return Message(torch.full((1, d), float(value)))


def send(*to: int, round: int = 0, value: float = 1.0, d: int = 4) -> Send:
    return Send(to, round, len(to), 0.0, model(value, d))


def frames(
    sender: int = 1,
    round: int = 0,
    run: bytes | None = None,
    phase: int = 1,
    message: tuple[torch.Tensor, ...] | None = None,
    checked: bool = True,
) -> list[list[bytes]]:
    """Return the chunks of a model as they travel."""
    header = Header(Kind.CHUNK, run or TERMS.run, phase, sender, round, 1, 0.0)
    outgoing = Outgoing(header, message or model())
    return [[bytes(f) for f in outgoing.chunk(index, checked)] for index in range(len(outgoing))]


def small(kind: Kind, sender: int = 1, phase: int = 1, round: int = 0, number: int = 0) -> bytes:
    """Return the header of a small message."""
    return wire.pack(Header(kind, TERMS.run, phase, sender, round, number=number))


def hello(sender: int, terms: Terms = TERMS, life: int = 5) -> list[bytes]:
    return [
        wire.pack(Header(Kind.HELLO, terms.run, 0, sender, life)),
        wire.pack_terms(terms.items),
    ]


def make_links(
    me: int,
    bind: str,
    addresses: dict[int, str],
    terms: Terms = TERMS,
    descriptor: int | None = None,
    roll: Roll | None = None,
) -> Links:
    endpoint = Endpoint(bind, len(addresses), descriptor=descriptor)
    nodes = 1 + max(me, *addresses, 0)
    try:
        book = Book(nodes, {me: bind, **addresses})
        return Links(me, endpoint, addresses, terms, book, None, roll)
    except BaseException:
        endpoint.close()
        raise


class Stage:
    """Some peers, all neighbours of one another unless a test says otherwise.

    Attributes:
        timers: how they look after each other; None: they do not.
    """

    def __init__(self, stack: ExitStack, n: int) -> None:
        self.stack, self.n = stack, n
        self.timers: Timers | None = None
        self.sockets = [socket.create_server(("127.0.0.1", 0)) for _ in range(n)]
        ports = [held.getsockname()[1] for held in self.sockets]
        self.addresses = {node: f"tcp://127.0.0.1:{port}" for node, port in enumerate(ports)}
        for held in self.sockets:
            stack.callback(held.close)

    def peer(
        self,
        node: int,
        neighbours: tuple[int, ...] | None = None,
        terms: Terms = TERMS,
        again: bool = False,
    ) -> Links:
        """Start a peer; `again`: another process of the same id, listening elsewhere."""
        others = [p for p in self.addresses if p != node] if neighbours is None else neighbours
        if again:
            return self.add(node, ANYWHERE, others, terms)
        held = self.sockets[node]
        near = f"tcp://127.0.0.1:{held.getsockname()[1]}"
        return self.add(node, near, others, terms, held.detach())

    def add(
        self,
        node: int,
        bind: str,
        neighbours: Iterable[int],
        terms: Terms = TERMS,
        descriptor: int | None = None,
    ) -> Links:
        addresses = {p: self.addresses[p] for p in neighbours}
        roll = Roll(5, self.timers, frozenset({node, *addresses})) if self.timers else None
        links = make_links(node, bind, addresses, terms, descriptor, roll)
        self.stack.callback(close_quietly, links)
        return links

    def relay_before(self, node: int) -> Relay:
        """Let others reach a peer that has not been started yet through a relay."""
        relay = Relay(int(self.addresses[node].rsplit(":", 1)[1]))
        self.stack.callback(relay.close)
        self.addresses[node] = relay.address
        return relay

    def all_met(self, d: int = 4, replaceable: bool = True) -> list[Links]:
        peers = [self.peer(node) for node in range(self.n)]
        meet(*peers)
        expect(*peers, d=d, replaceable=replaceable)
        return peers

    @contextmanager
    def scripted(self, d: int = 4) -> Iterator[tuple[Links, ...]]:
        """Yield peer 0 and the last one, which does what the test tells it to; then the others.

        All have met, the others only with peer 0.
        """
        mad = self.n - 1
        honest = [self.peer(node, None if node == 0 else (0,)) for node in range(mad)]
        with zmq.Context() as context:
            listener, dialler = context.socket(zmq.ROUTER), context.socket(zmq.DEALER)
            other = Scripted(mad, listener, dialler)
            with listener, dialler, ThreadPoolExecutor(1) as pool:
                listener.setsockopt(zmq.USE_FD, self.sockets[mad].detach())
                listener.bind(self.addresses[mad])
                dialler.connect(self.addresses[0])
                listener.linger = dialler.linger = 0
                meeting = pool.submit(meet, *honest)
                other.greet()
                meeting.result()
                expect(*honest, d=d)
                yield honest[0], other, *honest[1:]


class Scripted:
    """A neighbour that speaks the protocol, but not by itself."""

    def __init__(self, me: int, listener: zmq.Socket[bytes], dialler: zmq.Socket[bytes]) -> None:
        self.me, self.listener, self.dialler = me, listener, dialler
        self.identity = b""

    def greet(self) -> None:
        self.say(*hello(self.me))
        self.identity, *_ = self.listener.recv_multipart()
        self.serve(small(Kind.WELCOME, self.me))

    def say(self, *frames: bytes) -> None:
        """Send something on the link it has dialled."""
        self.dialler.send_multipart(frames)

    def serve(self, *frames: bytes) -> None:
        """Send something to who has dialled it."""
        self.listener.send_multipart([self.identity, *frames])

    def heard(self) -> list[Header]:
        """Return what it has been told, and forget it."""
        headers = []
        while self.listener.poll(0):
            _, header, *_ = self.listener.recv_multipart()
            headers.append(wire.unpack(header))
        return headers

    def served(self) -> list[Header]:
        """Return what has come back on the link it has dialled."""
        headers = []
        while self.dialler.poll(0):
            headers.append(wire.unpack(self.dialler.recv_multipart()[0]))
        return headers


def expect(*peers: Links, d: int = 4, replaceable: bool = True, phase: int = 1) -> None:
    for links in peers:
        links.expect(phase, chunks.schema(model(d=d)), replaceable)


def close_quietly(links: Links) -> None:
    if not links._endpoint.context.closed:
        links.close("the test is over", 0)


def vanish(links: Links) -> None:
    """End a peer's links without a goodbye, as SIGKILL does."""
    links._endpoint.listener.socket.linger = 0
    links._endpoint.close()


def meet(*peers: Links, timeout: float = PATIENCE) -> None:
    for error in outcomes(*peers, timeout=timeout):
        if error:
            raise error


def outcomes(*peers: Links, timeout: float = PATIENCE) -> list[BaseException | None]:
    """Let peers meet, each in a thread and closing when it fails; return what they raised."""

    def one(links: Links) -> BaseException | None:
        try:
            links.meet(timeout)
        except (UserError, RunError) as error:
            links.close(str(error), 1.0)
            return error
        return None

    with ThreadPoolExecutor(len(peers)) as pool:
        return list(pool.map(one, peers))


def events_until(done: Callable[[list[Event]], bool], *peers: Links) -> list[Event]:
    """Turn the peers' loops until the first of them has seen enough; return what it saw."""
    seen: list[Event] = []
    deadline = time.monotonic() + PATIENCE
    while not done(seen):
        assert time.monotonic() < deadline, f"only {seen} happened"
        for links in peers:
            happened = links.events()
            seen += happened if links is peers[0] else []
        for links in peers[:1]:
            links.poller.poll(5)
    return seen


def rounds_of(events: list[Event]) -> list[int]:
    return [event.round for event in events if isinstance(event, Received)]


def turn(until: Callable[[], bool], *peers: Links) -> list[Event]:
    return events_until(lambda seen: until(), *peers)


def port_of(links: Links) -> int:
    return int(address_of(links).rsplit(":", 1)[1])


def address_of(links: Links) -> str:
    return links._listener.address


@contextmanager
def stranger(address: str, kind: int = zmq.DEALER) -> Iterator[zmq.Socket[bytes]]:
    with zmq.Context() as context, context.socket(kind) as sock:
        sock.linger = 0
        sock.rcvtimeo = 1000 * int(PATIENCE)
        sock.connect(address)
        yield sock


def together(*calls: Callable[[], None]) -> list[float]:
    """Make calls at the same time; return how long each took."""

    def timed(call: Callable[[], None]) -> float:
        started = time.monotonic()
        call()
        return time.monotonic() - started

    with ThreadPoolExecutor(len(calls)) as pool:
        return list(pool.map(timed, calls))


class Relay:
    """Stands between two peers; it can cut the connections it carries.

    Attributes:
        made: how many connections it has carried.
        allowance: bytes it still passes on to who has dialled before it cuts by itself.
    """

    def __init__(self, target: int) -> None:
        self.listener = socket.create_server(("127.0.0.1", 0))
        self.address = f"tcp://127.0.0.1:{self.listener.getsockname()[1]}"
        self.target, self.made, self.cuts = target, 0, 0
        self.allowance = math.inf
        self.pairs: dict[socket.socket, socket.socket] = {}
        self.dialled: set[socket.socket] = set()
        self.commands = socket.socketpair()
        self.thread = threading.Thread(target=self._run)
        self.thread.start()

    def cut(self) -> None:
        self.commands[0].send(b"c")

    def close(self) -> None:
        self.commands[0].send(b"q")
        self.thread.join()

    def _run(self) -> None:
        while True:
            ready, _, _ = select.select([self.listener, self.commands[1], *self.pairs], [], [])
            if self.commands[1] in ready:
                self._hang_up()
                if self.commands[1].recv(1) == b"q":
                    break
                continue
            for sock in ready:
                self._accept() if sock is self.listener else self._pass_on(sock)
        for end in (self.listener, *self.commands):
            end.close()

    def _hang_up(self) -> None:
        self.cuts += 1
        for end in self.pairs:
            end.close()
        self.pairs.clear()

    def _accept(self) -> None:
        near, _ = self.listener.accept()
        far = socket.create_connection(("127.0.0.1", self.target))
        self.pairs |= {near: far, far: near}
        self.dialled.add(far)
        self.made += 1

    def _pass_on(self, sock: socket.socket) -> None:
        if sock not in self.pairs:
            return
        data = sock.recv(65536)
        if sock in self.dialled:
            self.allowance -= len(data)
            if self.allowance < 0:
                self.allowance = math.inf
                self._hang_up()
                return
        self.pairs[sock].sendall(data)
        if not data:
            self.pairs.pop(self.pairs.pop(sock)).close()
            sock.close()
