"""The connections of a peer's sockets, and how much of what they bring lies in ZeroMQ.

ZeroMQ limits the frames of a message and the messages that wait, but not how many frames one
unfinished message has: they pile up where neither limit counts them. So what has come in on a
connection, as the kernel counts it, is compared with what the application has taken from it.

Descriptors are ZeroMQ's: they are never closed or duplicated here.
"""

from __future__ import annotations

import fcntl
import select
import socket
import struct
import termios
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import TypeAlias

# What a message may cost beyond its own bytes: framing, encryption, heartbeats since the last.
EXTRA = 1 << 14  # bytes
SILENT = 10.0  # seconds after which a stranger who has said nothing makes room for another
_AT_ONCE = struct.pack("ii", 1, 0)  # closing sends nothing that is left, but a reset
_BYTES_RECEIVED = 128  # where it stands in the kernel's tcp_info


Ends: TypeAlias = tuple[object, object]
"""The addresses of both ends: no two connections have the same, but those through files."""


@dataclass(slots=True)
class Connection:
    """One TCP connection (or one through a file, whose bytes cannot be counted)."""

    descriptor: int
    ends: Ends  # the descriptor may be somebody else's one day
    link: int | None  # which we have dialled; None: it came in
    allowance: int  # bytes
    since: float  # monotonic
    credit: int = 0  # bytes of what has come in that the application has taken
    known: bool = False  # whether the application has taken anything of it
    key: str | None = None  # that its other end has proved


class Connections:
    """All connections, by descriptor. Not safe to share between threads.

    Args:
        most: incoming connections at a time.
        strangers: incoming connections at a time of which the application has taken nothing.
        refused: called whenever a connection is cut, with whose it was and the reason.
    """

    def __init__(self, most: int, strangers: int, refused: Callable[[str, str], None]) -> None:
        self.most, self.strangers, self._refused = most, strangers, refused
        self._open: dict[int, Connection] = {}
        self._epoll = select.epoll()

    def fileno(self) -> int:
        """Return a descriptor that is readable when bytes have come in on a connection."""
        return self._epoll.fileno()

    def close(self) -> None:
        """Forget all connections; they go on."""
        self._open.clear()
        self._epoll.close()

    def opened(self, descriptor: int, link: int | None, allowance: int) -> None:
        """Take in a new connection, or cut it if there are too many."""
        try:
            ends = _ends(descriptor)
            with suppress(FileExistsError):
                self._epoll.register(descriptor, select.EPOLLIN | select.EPOLLET)
        except OSError:  # it is gone already
            return
        now = time.monotonic()
        self._open[descriptor] = one = Connection(descriptor, ends, link, allowance, now)
        if link is not None:
            return
        guests = [other for other in self._open.values() if other.link is None]
        unknown = [other for other in guests if not other.known]
        if len(guests) > self.most:
            self._cut(one, "too many connections")
        elif len(unknown) > self.strangers:
            first = unknown[0]  # the oldest, as dicts keep their order
            silent = now - first.since > SILENT
            self._cut(first if silent else one, "too many connections of strangers")

    def closed(self, descriptor: int, link: int | None) -> None:
        """Forget a connection that ZeroMQ has closed."""
        one = self._open.get(descriptor)
        if one and one.link == link:  # else the descriptor is used again already
            del self._open[descriptor]

    def forget(self, link: int | None) -> None:
        """Forget the connections of a link; None: those that came in."""
        for one in list(self._open.values()):
            self.closed(one.descriptor, link)

    def knows(self, descriptors: Iterable[int]) -> bool:
        """Say whether all of these are connections."""
        return all(descriptor in self._open for descriptor in descriptors)

    def taken(self, descriptor: int, nbytes: int, key: str | None) -> None:
        """Take note that the application has taken so many bytes, whole messages and extra."""
        if one := self._open.get(descriptor):
            one.credit += nbytes
            one.known, one.key = True, key or one.key

    def look(self, untold: Callable[[int], int]) -> None:
        """Cut the connections that have just brought more than they may.

        Args:
            untold: returns how many bytes of a descriptor's connection the application has
                taken of which `taken` was not told yet.
        """
        for descriptor, _ in self._epoll.poll(0):
            if one := self._open.get(descriptor):
                self._look(one, untold)

    def cut(self, descriptor: int, reason: str, ends: Ends | None = None) -> None:
        """Cut a connection, if it is still there, and still has these ends if some are given."""
        one = self._open.get(descriptor)
        if one and ends in (None, one.ends):
            self._cut(one, reason)

    def keep(self, keys: frozenset[str]) -> None:
        """Cut what came in from others than these, and who may be others: they dial again."""
        for one in list(self._open.values()):
            if one.link is None and one.key not in keys:
                self._cut(one, "a key that is no longer allowed" if one.key else "a new list")

    def _look(self, one: Connection, untold: Callable[[int], int]) -> None:
        try:
            with _borrowed(one.descriptor) as connection:
                info = connection.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, 256)
        except OSError:  # not TCP, or gone
            return
        (received,) = struct.unpack_from("=Q", info, _BYTES_RECEIVED)
        one.credit = min(one.credit, received)  # none is saved up
        if received - one.credit > one.allowance:
            # What still lies in the kernel is limited there, and the program may be slow to read.
            with suppress(OSError):
                received -= _unread(one.descriptor)
            # Asked last: what came before we counted may have been taken since.
            if received - one.credit - untold(one.descriptor) > one.allowance:
                self._cut(one, f"{one.allowance} bytes without a whole message")

    def _cut(self, one: Connection, reason: str) -> None:
        del self._open[one.descriptor]
        with suppress(OSError):
            if _ends(one.descriptor) != one.ends:
                return
            self._refused(host := _host(one), f"{host}: {reason}")
            with _borrowed(one.descriptor) as connection:
                # ZeroMQ sees the end and closes it, which resets the connection: without, one
                # who sends for ever might not notice for minutes.
                connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, _AT_ONCE)
                connection.shutdown(socket.SHUT_RDWR)


@contextmanager
def _borrowed(descriptor: int) -> Iterator[socket.socket]:
    connection = socket.socket(socket.AF_INET, socket.SOCK_STREAM, 0, fileno=descriptor)
    try:
        yield connection
    finally:
        connection.detach()  # or Python would close it


def ends_of(descriptor: int) -> Ends | None:
    """Return the ends of a connection; None: it is gone, or goes through a file."""
    try:
        ends = _ends(descriptor)
    except OSError:
        return None
    return ends if isinstance(ends[1], tuple) else None


def _ends(descriptor: int) -> Ends:
    with _borrowed(descriptor) as connection:
        return connection.getsockname(), connection.getpeername()


def _unread(descriptor: int) -> int:
    (number,) = struct.unpack("i", fcntl.ioctl(descriptor, termios.FIONREAD, bytes(4)))
    return int(number)


def _host(one: Connection) -> str:
    far = one.ends[1]
    host = str(far[0]) if isinstance(far, tuple) else "this machine"
    return f"{host} ({one.key[:8]}...)" if one.key else host
