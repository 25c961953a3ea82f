"""Two honest peers that train, and a third one that has a key and means harm."""

from __future__ import annotations

import socket
import time
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
import zmq
from runtime_cases import CASES, make
from torch import Tensor

from p2pfl.learning import Quadratics
from p2pfl.peer.plan import Pace
from p2pfl.runtime import wire
from p2pfl.runtime.chunks import Outgoing
from p2pfl.runtime.endpoint import Endpoint, Keyring
from p2pfl.runtime.finding import Book
from p2pfl.runtime.handshake import Terms
from p2pfl.runtime.links import Links
from p2pfl.runtime.serve import TRAINING, Server
from p2pfl.runtime.setup import Ending, Row, Setup
from p2pfl.runtime.wire import Header, Kind
from p2pfl.security.curve import secure_dialler, secure_listener
from p2pfl.security.gate import Gate
from p2pfl.security.keys import KeyPair, make_keys
from p2pfl.topology import star_graph, static

VICTIM, HONEST, MAD = range(3)  # the victim is everybody's neighbour, the others only its own
TERMS = Terms({})
SOON = 20.0  # seconds for what should take one
PATIENCE = 0.4  # seconds in which a round waits for a neighbour
ROUNDS = 40
D = 140_000  # parameters: a model has two chunks
VALUE = 1.2345678


class Constant(Quadratics):
    """All start from one number, and nobody ever moves: whatever is else has come in wrong."""

    def __init__(self, n: int, d: int, seconds: float) -> None:
        super().__init__(n, 1)
        self._size, self._seconds = d, seconds

    @property
    def d(self) -> int:
        return self._size

    def init(self, nodes: Tensor) -> Tensor:
        return torch.full((len(nodes), self._size), VALUE, dtype=torch.float64)

    def grad(self, params: Tensor, nodes: Tensor, steps: Tensor) -> tuple[Tensor, Tensor]:
        time.sleep(self._seconds)
        return params.new_zeros(len(params)), torch.zeros_like(params)

    def evaluate(self, params: Tensor, nodes: Tensor) -> Any:
        return super().evaluate(params[:, :1], nodes)


def constant(
    n: int = 3,
    rounds: int = ROUNDS,
    d: int = D,
    seconds: float = 0.01,
    patience: float = PATIENCE,
    case: str = "dpsgd ring",
) -> Setup:
    """Return a run that takes at least `rounds` times `seconds`."""
    pace = Pace(rounds, patience=patience, evaluate_every=rounds)
    task, topology = Constant(n, d, seconds), static(star_graph(n))
    return make(CASES[case], pace, n, task, topology=topology)


class Told(NamedTuple):
    """How a peer has ended."""

    ending: Ending
    rounds: int
    received: int  # bytes of models
    rejections: dict[str, int]
    neighbours: set[int]  # whom it has not given up


class Peers:
    """Peers of a run, as threads.

    Args:
        setup: what they run; the last of three is left to the test.
        keyed: whether links are encrypted.

    Attributes:
        reached: where each is dialled by the others, which a test may change.
        rounds: how many each has behind it.
        received: bytes of models that each has received.
    """

    def __init__(self, setup: Setup, keyed: bool = True) -> None:
        self.setup, n = setup, setup.topology.n
        self.keys = [make_keys() for _ in range(n)] if keyed else []
        self.sockets = [socket.create_server(("127.0.0.1", 0)) for _ in range(n)]
        self.ports = [held.getsockname()[1] for held in self.sockets]
        self.reached = [f"tcp://127.0.0.1:{port}" for port in self.ports]
        self.rounds, self.received = [0] * n, [0] * n

    def ring(self, node: int) -> Keyring | None:
        of = {k: keys.public for k, keys in enumerate(self.keys)}
        return Keyring(self.keys[node], of) if self.keys else None

    def take_part(self, node: int) -> Told:
        """Be one peer, to the end."""
        ids = self.setup.topology.view(node, 0)[0]
        near = f"tcp://127.0.0.1:{self.ports[node]}"
        book = Book(self.setup.topology.n, {p: self.reached[p] for p in ids})
        held = self.sockets[node].detach()
        endpoint = Endpoint(near, len(ids), self.ring(node), held)
        links = Links(node, endpoint, ids, TERMS, book)
        reason = "failed"
        try:
            links.meet(SOON)
            server = Server(self.setup, node, links)
            ending = server.run(lambda row, mark: self._count(node, row))
            reason = ending.reason
            refused = links.report()["rejections"]
            return Told(
                ending, self.rounds[node], self.received[node], refused, set(links._neighbours)
            )
        finally:
            links.close(reason, 1.0)

    def _count(self, node: int, row: Row) -> None:
        self.rounds[node] += 1
        self.received[node] += row.bytes_received

    @contextmanager
    def running(self, nodes: Iterable[int]) -> Iterator[list[Future[Told]]]:
        nodes = list(nodes)
        with ThreadPoolExecutor(len(nodes)) as pool:
            yield [pool.submit(self.take_part, node) for node in nodes]
        for held in self.sockets:
            held.close()


class Mad:
    """The neighbour that means harm: it speaks the protocol as the test wants it to."""

    def __init__(self, port: int, near: int, keys: list[KeyPair]) -> None:
        self.context = zmq.Context()
        self.gate = Gate(self.context, [one.public for one in keys])
        self.listener, self.dialler = map(self.context.socket, (zmq.ROUTER, zmq.DEALER))
        self.listener.linger = self.dialler.linger = 0
        self.listener.sndtimeo = self.dialler.sndtimeo = 1000
        if keys:
            secure_dialler(self.dialler, keys[MAD], keys[VICTIM].public)
        self.listen(near, keys)
        self.dialler.connect(f"tcp://127.0.0.1:{port}")
        self.identity = b""

    def listen(self, port: int, keys: list[KeyPair]) -> None:
        if keys:
            secure_listener(self.listener, keys[MAD])
        self.listener.bind(f"tcp://127.0.0.1:{port}")

    def greet(self) -> None:
        """Let the victim in and be let in."""
        self.say(*self.hello())
        assert self.listener.poll(1000 * int(SOON))
        self.identity, *_ = self.listener.recv_multipart()
        self.serve(self.small(Kind.WELCOME))

    def hello(self, sender: int = MAD, life: int = 5) -> tuple[bytes, bytes]:
        header = Header(Kind.HELLO, TERMS.run, 0, sender, life)
        return wire.pack(header), wire.pack_terms(TERMS.items)

    def small(self, kind: Kind, round: int = 0, number: int = 0, phase: int = TRAINING) -> bytes:
        return wire.pack(Header(kind, TERMS.run, phase, MAD, round, number=number))

    def chunks(
        self,
        round: int,
        value: float = VALUE,
        sender: int = MAD,
        size: int = D,
        examples: float | None = None,
    ) -> list[list[bytes]]:
        """Return a model as it travels."""
        message: tuple[Tensor, ...] = (torch.full((1, size), value, dtype=torch.float64),)
        if examples is not None:
            message = (*message, torch.full((1, 1), examples, dtype=torch.float64))
        out = Outgoing(Header(Kind.CHUNK, TERMS.run, TRAINING, sender, round, 1, 0.0), message)
        return [[bytes(frame) for frame in out.chunk(k, False)] for k in range(len(out))]

    def say(self, *frames: bytes) -> None:
        """Send something small to the victim."""
        self.dialler.send_multipart(frames)

    def serve(self, *frames: bytes) -> None:
        """Send something where models come from."""
        self.listener.send_multipart([self.identity, *frames])

    def credit(self, wanted: int = 1) -> None:
        """Wait until the victim has asked for chunks."""
        deadline = time.monotonic() + SOON
        while wanted > 0:
            assert self.listener.poll(1000 * max(0.0, deadline - time.monotonic()))
            header = wire.unpack(self.listener.recv_multipart()[1])
            wanted -= header.number if header.kind is Kind.CREDIT else 0

    def close(self) -> None:
        self.listener.close()
        self.dialler.close()
        self.gate.close()
        self.context.destroy(0)


@contextmanager
def attacked(peers: Peers, attack: Callable[[Mad], None]) -> Iterator[list[Told]]:
    """Let two train while the third does something; yield how they have ended."""
    with peers.running((VICTIM, HONEST)) as honest:
        peers.sockets[MAD].close()
        mad = Mad(peers.ports[VICTIM], peers.ports[MAD], peers.keys)
        try:
            mad.greet()
            attack(mad)
            yield [peer.result(SOON) for peer in honest]
        finally:
            mad.close()
