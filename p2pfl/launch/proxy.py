"""Links between real processes that can be cut, slowed down and damaged, without root.

A peer is told not where another listens, but an address of ours that stands for the way from
the one to the other; we dial the other, and pass on what both say. All these addresses are one
socket: 127.1.3.5 is this machine as much as 127.0.0.1 is, and who dials it is peer 3 that wants
peer 5.

Two peers talk on two connections, one dialled by each. A link from a to b, here, is what a says
to b on either.
"""

from __future__ import annotations

import asyncio
import itertools
import math
import resource
import socket
import struct
import threading
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from typing import Self, TypeVar

from p2pfl.errors import RunError, UserError
from p2pfl.launch.faults import Counts, Way, carry
from p2pfl.runtime.sockets import OUT_OF_REACH

Link = tuple[int, int]  # who speaks, who hears it
T = TypeVar("T")

MOST_PEERS = 256  # a peer is one of four numbers of an address
DEVICE = b"lo"  # what comes in elsewhere is not ours
BACKLOG = 4096  # all peers dial at once
RST = struct.pack("ii", 1, 0)  # closing breaks a connection, and the other end is told so


class Proxy:
    """A stand-in for the network between peers of this machine.

    It works within a ``with`` block, in a thread of its own. A method has taken effect when it
    returns, and every one undoes only its own kind of fault.

    Args:
        targets: where each peer listens, host and port by id.
        seed: draws what is lost and what is damaged.
        patience: seconds for which a partition may hold something up until the connection is
            broken, at both ends. It is what peers ask of their kernel, which cannot tell here:
            we acknowledge everything.

    Raises:
        UserError: an id is not between 0 and 255.
        RunError: when entered: there is no way to listen on loopback alone.
    """

    def __init__(
        self,
        targets: Mapping[int, tuple[str, int]],
        seed: int = 0,
        patience: float = OUT_OF_REACH / 1000,
    ) -> None:
        if wrong := [peer for peer in targets if not 0 <= peer < MOST_PEERS]:
            raise UserError(f"no proxy for peer {wrong[0]}: ids go from 0 to {MOST_PEERS - 1}")
        self._targets, self._patience = dict(targets), patience
        self._ways = {pair: Way(seed, *pair) for pair in itertools.permutations(targets, 2)}
        self._connections: dict[asyncio.Task[None], Link] = {}

    def __enter__(self) -> Self:
        self._make_room()
        self._listener = _listen()
        self._port = self._listener.getsockname()[1]
        self._loop, self._over = asyncio.new_event_loop(), asyncio.Event()
        self._thread = threading.Thread(target=self._run, name="proxy", daemon=True)
        self._thread.start()
        return self

    def __exit__(self, *exc: object) -> None:
        self._do(self._over.set)
        self._thread.join()

    def addresses(self, peer: int) -> dict[int, str]:
        """Return what a peer is to be told of where the others are, ``tcp://...`` by id."""
        return {
            other: f"tcp://127.1.{peer}.{other}:{self._port}"
            for other in self._targets
            if other != peer
        }

    def retarget(self, peer: int, host: str, port: int) -> None:
        """Dial a peer elsewhere from now on.

        Raises:
            UserError: there is no peer of that id.
        """
        self._check([peer])
        self._do(lambda: self._targets.__setitem__(peer, (host, port)))

    def partition(self, groups: Sequence[Collection[int]]) -> None:
        """Let nothing pass between groups of peers; who is in none is in one more.

        It is as if a cable was pulled: nobody is told. What was under way is kept, and who dials
        across gets a connection on which nobody speaks. An earlier partition is over.

        Raises:
            UserError: a peer is in two groups, or there is none of that id.
        """
        self._check(peer for group in groups for peer in group)
        of: dict[int, int] = {}
        for number, group in enumerate(groups):
            for peer in group:
                if of.setdefault(peer, number) != number:
                    raise UserError(f"peer {peer} is in two groups of a partition")

        def cut() -> None:
            for (a, b), way in self._ways.items():
                (way.open.set if of.get(a) == of.get(b) else way.open.clear)()

        self._do(cut)

    def heal(self) -> None:
        """End a partition; what it has held up goes on its way."""
        self.partition([])

    def delay(self, links: Iterable[Link] | None, seconds: float) -> None:
        """Let everything on some links, or on all, take so many seconds; 0: no longer.

        No more than 4 MiB are under way on a connection, so a delay limits what passes as well.

        Raises:
            UserError: it is no time, or there is no such link.
        """
        if not 0 <= seconds < math.inf:
            raise UserError(f"a delay of {seconds} is not a finite number >= 0")
        self._set(links, "delay", seconds)

    def limit(self, links: Iterable[Link] | None, rate: float) -> None:
        """Let so many bytes a second pass on each of some links, or of all; ``inf``: any number.

        Raises:
            UserError: it is no rate, or there is no such link.
        """
        if not rate > 0:
            raise UserError(f"a rate of {rate} is not above 0")
        self._set(links, "rate", rate)

    def drop(self, links: Iterable[Link] | None, probability: float) -> None:
        """Lose chunks of some links, or of all, with a probability; 0: no longer.

        A chunk is what is there to be read, 64 KiB at most. TCP sends again what is lost: it
        and all behind it come 0.2 s late, 0.6 s if it is lost twice in a row, 1.4 s, and so on.

        Raises:
            UserError: it is not in [0, 1), or there is no such link.
        """
        if not 0 <= probability < 1:
            raise UserError(f"a loss of {probability} is not in [0, 1)")
        self._set(links, "loss", probability)

    def corrupt(self, links: Iterable[Link] | None, probability: float) -> None:
        """Turn a bit over in chunks of some links, or of all, with a probability; 0: no longer.

        Raises:
            UserError: it is not in [0, 1], or there is no such link.
        """
        if not 0 <= probability <= 1:
            raise UserError(f"a probability of {probability} is not in [0, 1]")
        self._set(links, "damage", probability)

    def reset(self, a: int, b: int) -> None:
        """Break all connections between two peers at both ends; they may dial again at once.

        Raises:
            UserError: there is no peer of that id.
        """
        self._check((a, b))

        def cancel() -> None:
            for task, pair in self._connections.items():
                if {*pair} == {a, b}:
                    task.cancel()

        self._do(cancel)

    def counts(self) -> Counts:
        """Return what has happened so far, on all links together."""

        def add_up() -> Counts:
            total = Counts()
            for way in self._ways.values():
                total.add(way.counts)
            return total

        return self._do(add_up)

    def _set(self, links: Iterable[Link] | None, fault: str, value: float) -> None:
        links = list(self._ways) if links is None else [*links]
        for a, b in links:
            if (a, b) not in self._ways:
                raise UserError(f"there is no link from peer {a} to peer {b}")

        def change() -> None:
            for link in links:
                setattr(self._ways[link], fault, value)

        self._do(change)

    def _check(self, peers: Iterable[int]) -> None:
        if wrong := [peer for peer in peers if peer not in self._targets]:
            raise UserError(f"there is no peer {wrong[0]}")

    def _do(self, what: Callable[[], T]) -> T:
        """Do something in the thread of the loop, and wait for it."""

        async def do() -> T:
            return what()

        return asyncio.run_coroutine_threadsafe(do(), self._loop).result()

    def _make_room(self) -> None:
        """Let the process open files for two connections of each pair, and for as many dead."""
        need = 256 + 4 * len(self._ways)
        soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
        if soft < need:
            resource.setrlimit(resource.RLIMIT_NOFILE, (min(need, hard), hard))

    def _run(self) -> None:
        with asyncio.Runner(loop_factory=lambda: self._loop) as runner, self._listener:
            runner.run(self._until_over())

    async def _until_over(self) -> None:
        accepting = asyncio.create_task(self._accept())
        await self._over.wait()
        accepting.cancel()

    async def _accept(self) -> None:
        while True:
            try:
                near, _ = await self._loop.sock_accept(self._listener)
            except OSError:  # it has gone already, or we may open no more files
                await asyncio.sleep(0.1)
                continue
            *network, dialler, dialled = socket.inet_aton(near.getsockname()[0])
            if network != [127, 1] or (dialler, dialled) not in self._ways:
                near.close()
                continue
            task = self._loop.create_task(self._serve(near, dialler, dialled))
            self._connections[task] = dialler, dialled
            task.add_done_callback(self._connections.pop)

    async def _serve(self, near: socket.socket, dialler: int, dialled: int) -> None:
        """Carry a connection to its end."""
        there, back = self._ways[dialler, dialled], self._ways[dialled, dialler]
        with near, socket.socket() as far:
            far.setblocking(False)
            broken = True
            try:
                await there.open.wait()
                await self._loop.sock_connect(far, self._targets[dialled])
                await carry(near, far, (there, back), self._patience)
                broken = False
            except* OSError:  # one end is gone, or was out of reach for too long
                pass
            finally:
                if broken:
                    there.counts.reset += 1
                    for end in (near, far):
                        end.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, RST)


def _listen() -> socket.socket:
    """Listen on every address of loopback, and on no other."""
    listener = socket.socket()
    try:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_BINDTODEVICE, DEVICE)
        listener.bind(("0.0.0.0", 0))
        listener.listen(BACKLOG)
    except OSError as error:
        listener.close()
        raise RunError(f"cannot listen on all of loopback: {error.strerror}") from error
    listener.setblocking(False)
    return listener
