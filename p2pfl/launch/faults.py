"""What may happen to the bytes that one peer sends to another."""

from __future__ import annotations

import asyncio
import math
import socket
from dataclasses import dataclass, fields
from hashlib import blake2b

Chunks = asyncio.Queue[tuple[float, bytes]]  # when each is due, in seconds of the loop's clock

RETRY = 0.2  # seconds until TCP sends anew what was lost; twice as many when that is lost again
CHUNK = 1 << 16  # bytes read at once
UNDER_WAY = 64  # chunks, 4 MiB, in each direction of a connection: what a window of TCP holds
MOST_LOST = 6  # times in a row: 12.6 s, and after 20 s a peer's kernel gives a connection up


@dataclass
class Counts:
    """What has happened so far.

    Attributes:
        passed: bytes that got through.
        held: bytes that a partition has held up.
        lost: how many times a chunk was lost.
        corrupted: chunks in which a bit was turned over.
        reset: connections that were broken, by us or because one end was gone.
    """

    passed: int = 0
    held: int = 0
    lost: int = 0
    corrupted: int = 0
    reset: int = 0

    def add(self, other: Counts) -> None:
        """Add what has happened elsewhere."""
        for field in fields(self):
            setattr(self, field.name, getattr(self, field.name) + getattr(other, field.name))


class Way:
    """The way of one peer's bytes to another, over whichever connections.

    Bytes come in chunks, as they happen to be read. What befalls the n-th chunk follows from
    `seed`, the two peers and n.

    Args:
        seed: draws losses and damage.
        sender: whose bytes they are.
        receiver: whom they are for.

    Attributes:
        open: whether anything passes.
        delay: seconds a chunk is under way.
        rate: bytes a second that pass.
        loss: probability that a chunk is lost.
        damage: probability that a bit of a chunk is turned over.
        counts: what has happened.
    """

    def __init__(self, seed: int, sender: int, receiver: int) -> None:
        self.open = asyncio.Event()
        self.open.set()
        self.delay = self.loss = self.damage = 0.0
        self.rate = math.inf
        self.counts = Counts()
        self._name = f"{seed} {sender} {receiver}"
        self._number = 0  # of chunks
        self._free = 0.0  # when there is room for the next byte

    def enter(self, chunk: bytes) -> tuple[float, bytes]:
        """Return for how many seconds a chunk is under way, and what becomes of it.

        A stream cannot lose anything: a lost chunk comes late, and so does what follows it.
        """
        self._number += 1
        if not chunk or not (self.loss or self.damage):
            return self.delay, chunk
        late, hit, where = self._draw()
        lost = min(MOST_LOST, int(math.log(late) / math.log(self.loss))) if self.loss else 0
        self.counts.lost += lost
        if hit <= self.damage:
            chunk = _turned_over(chunk, int(where * 8 * len(chunk)))
            self.counts.corrupted += 1
        return self.delay + RETRY * (2**lost - 1), chunk

    async def leave(self, size: int, patience: float) -> None:
        """Wait until so many bytes may pass.

        Raises:
            TimeoutError: nothing has passed for `patience` seconds.
        """
        if self.rate < math.inf:
            now = asyncio.get_running_loop().time()
            self._free = max(now, self._free) + size / self.rate
            await asyncio.sleep(self._free - now)
        if not self.open.is_set():
            self.counts.held += size
            async with asyncio.timeout(patience):
                await self.open.wait()
        self.counts.passed += size

    def _draw(self) -> tuple[float, ...]:
        """Return three numbers in (0, 1) for the chunk at hand."""
        digest = blake2b(f"{self._name} {self._number}".encode(), digest_size=18).digest()
        parts = (digest[at : at + 6] for at in range(0, 18, 6))
        return tuple((int.from_bytes(part) + 0.5) * 2.0**-48 for part in parts)


def _turned_over(chunk: bytes, bit: int) -> bytes:
    changed = bytearray(chunk)
    changed[bit // 8] ^= 1 << bit % 8
    return bytes(changed)


async def carry(
    near: socket.socket, far: socket.socket, ways: tuple[Way, Way], patience: float
) -> None:
    """Tell each of two ends what the other says, until neither has more to say.

    Args:
        near: one end of a connection, not blocking.
        far: the other.
        ways: from near to far, and back.
        patience: seconds for which a way may be cut.

    Raises:
        ExceptionGroup: of an `OSError`: the connection is broken.
    """
    async with asyncio.TaskGroup() as group:
        for way, source, sink in zip(ways, (near, far), (far, near), strict=True):
            sink.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            chunks = Chunks(UNDER_WAY)
            group.create_task(_read(way, source, chunks))
            group.create_task(_write(way, sink, chunks, patience))


async def _read(way: Way, source: socket.socket, chunks: Chunks) -> None:
    """Read what one end says, the empty chunk with which it ends included."""
    loop = asyncio.get_running_loop()
    chunk = b" "
    while chunk:
        late, chunk = way.enter(await loop.sock_recv(source, CHUNK))
        await chunks.put((loop.time() + late, chunk))


async def _write(way: Way, sink: socket.socket, chunks: Chunks, patience: float) -> None:
    """Tell the other end, in the same order, each when it is due."""
    loop = asyncio.get_running_loop()
    chunk = b" "
    while chunk:
        due, chunk = await chunks.get()
        if (late := due - loop.time()) > 0:
            await asyncio.sleep(late)
        await way.leave(len(chunk), patience)
        await loop.sock_sendall(sink, chunk)
    sink.shutdown(socket.SHUT_WR)
