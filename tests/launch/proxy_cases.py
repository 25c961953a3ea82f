"""Plain sockets at the ends of a proxy."""

from __future__ import annotations

import contextlib
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from urllib.parse import urlsplit

from p2pfl.launch.proxy import Proxy

LONG = 20.0  # seconds a test waits for what should take milliseconds
SILENCE = 0.3  # seconds in which what is not to come would have come


class Ends:
    """Peers that are nothing but a listening socket each, and a proxy between them."""

    def __init__(self, stack: ExitStack, n: int, seed: int, patience: float) -> None:
        self.stack = stack
        self.listeners = {peer: stack.enter_context(listen()) for peer in range(n)}
        targets = {peer: held.getsockname() for peer, held in self.listeners.items()}
        self.proxy = stack.enter_context(Proxy(targets, seed, patience))

    def dial(self, a: int, b: int) -> socket.socket:
        """Let one peer dial another."""
        return self.stack.enter_context(dial(self.proxy, a, b))

    def accept(self, b: int) -> socket.socket:
        """Let a peer answer."""
        accepted, _ = self.listeners[b].accept()
        accepted.settimeout(LONG)
        return self.stack.enter_context(accepted)

    def connect(self, a: int, b: int) -> tuple[socket.socket, socket.socket]:
        """Return both ends of a connection on which something has been said each way."""
        near, far = self.dial(a, b), self.accept(b)
        for source, sink in ((near, far), (far, near)):
            source.sendall(b"hello")
            assert read(sink, 5) == b"hello"
        return near, far


@contextmanager
def ends(n: int = 2, seed: int = 1, patience: float = LONG) -> Iterator[Ends]:
    with ExitStack() as stack:
        yield Ends(stack, n, seed, patience)


def dial(proxy: Proxy, a: int, b: int) -> socket.socket:
    """Dial one peer as another."""
    address = urlsplit(proxy.addresses(a)[b])
    return socket.create_connection((address.hostname, address.port), LONG)


def listen() -> socket.socket:
    held = socket.create_server(("127.0.0.1", 0))
    held.settimeout(LONG)
    return held


def read(end: socket.socket, size: int) -> bytes:
    """Read so many bytes, or what there is before the end."""
    got = bytearray()
    while len(got) < size and (more := end.recv(size - len(got))):
        got += more
    return bytes(got)


def is_silent(end: socket.socket) -> bool:
    """Say whether nothing comes for a moment, not even an end."""
    end.settimeout(SILENCE)
    try:
        end.recv(1, socket.MSG_PEEK)
    except TimeoutError:
        return True
    finally:
        end.settimeout(LONG)
    return False


def push(end: socket.socket, data: bytes) -> threading.Thread:
    """Send from another thread, for as long as that takes."""
    thread = threading.Thread(target=end.sendall, args=(data,), daemon=True)
    thread.start()
    return thread


def fill(end: socket.socket, most: int) -> int:
    """Send until nothing more is taken, and return how many bytes were."""
    end.settimeout(1.0)
    sent = 0
    with contextlib.suppress(TimeoutError):
        while sent < most:
            sent += end.send(bytes(1 << 20))
    end.settimeout(LONG)
    return sent


def took(source: socket.socket, sink: socket.socket) -> float:
    """Return the seconds that one byte is under way."""
    begun = time.monotonic()
    source.sendall(b"?")
    assert read(sink, 1) == b"?"
    return time.monotonic() - begun
