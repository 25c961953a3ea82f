"""The two kinds of socket a peer has: the one it is dialled on, and one for each it dials.

Both are bounded in what they hold and in what they take in: a neighbour that has stopped
reading must not fill our memory, and neither must a stranger.
"""

from __future__ import annotations

import errno
import resource
import time
from collections import deque
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import zmq
from zmq.utils.monitor import recv_monitor_message

from p2pfl.errors import RunError, UserError

Context = zmq.Context[zmq.Socket[bytes]]
Frames = Sequence[bytes | memoryview]

MOST_FRAMES = 16  # of a message; what is beyond is read and dropped
MOST_AT_ONCE = 64  # messages taken in before anything else gets its turn
MOST_ANSWER = 4096  # bytes of a frame of an answer
# Two models lie in a socket: rounds in step never need more.
QUEUE = 2
_WATCHED = zmq.EVENT_DISCONNECTED | zmq.EVENT_HANDSHAKE_SUCCEEDED


def new_context(links: int) -> Context:
    """Return a context with room for so many links, and let the process open as many files."""
    need = 64 + 6 * links  # a link takes a connection each way, and mailboxes
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft < need:
        resource.setrlimit(resource.RLIMIT_NOFILE, (min(need, hard), hard))
    context: Context = zmq.Context()
    context.set(zmq.MAX_SOCKETS, 64 + 4 * links)
    return context


class Listener:
    """The socket on which a peer is dialled.

    Args:
        context: where it lives.
        address: where to listen.
        largest: bytes of the largest frame that anybody has reason to send.
        descriptor: a socket that listens there already, to be taken over.

    Raises:
        UserError: it is no address of this machine.
        RunError: somebody else listens there, or the process may open no more files.
    """

    def __init__(
        self, context: Context, address: str, largest: int, descriptor: int | None = None
    ) -> None:
        with _opening():
            self.socket = context.socket(zmq.ROUTER)
        self.socket.linger = 200  # a refusal should reach whom it is for
        self.socket.rcvhwm = 8
        self.socket.setsockopt(zmq.MAXMSGSIZE, largest)
        self.socket.setsockopt(zmq.ROUTER_MANDATORY, 1)
        if descriptor is not None:
            self.socket.setsockopt(zmq.USE_FD, descriptor)
        try:
            _check(address)
            self.socket.bind(address)
        except zmq.ZMQError as error:
            self.socket.close(0)
            if error.errno == zmq.EADDRINUSE:
                raise RunError(f"{address} is taken by another program") from error
            raise UserError(f"cannot listen on {address}: {error.strerror}") from error

    def read(self) -> Iterator[tuple[bytes, list[memoryview]]]:
        """Yield what has come: from which connection, and the frames of the message."""
        for _ in range(MOST_AT_ONCE):
            try:
                frame = self.socket.recv(zmq.NOBLOCK, copy=False)
            except zmq.Again:
                return
            identity = frame.bytes
            frames: list[memoryview] = []
            while frame.more:
                frame = self.socket.recv(copy=False)
                if len(frames) <= MOST_FRAMES:
                    frames.append(frame.buffer)
            yield identity, frames

    def answer(self, identity: bytes, *frames: bytes) -> bool:
        """Answer on a connection; return whether it is still there."""
        try:
            self.socket.send_multipart([identity, *frames], zmq.NOBLOCK)
        except zmq.Again:  # it does not read its answers
            return True
        except zmq.ZMQError as error:
            if error.errno != zmq.EHOSTUNREACH:
                raise
            return False
        return True


class Link:
    """Our way to a neighbour.

    Args:
        context: where its sockets live.
        address: where the neighbour listens.
        hello: what goes out first on every connection.

    Raises:
        UserError: it is no address.
        RunError: the process may open no more files.

    Attributes:
        welcomed: whether the neighbour has accepted this connection.
        broken_since: when (monotonic) the last connection was lost, until we are welcome again.
        unsent: messages that wait for the neighbour to read.
    """

    def __init__(self, context: Context, address: str, hello: Frames) -> None:
        self.welcomed = False
        self.broken_since: float | None = None
        self.unsent: deque[Frames] = deque()
        self._hello, self._hello_due = hello, True
        with _opening():
            self.socket = context.socket(zmq.DEALER)
            self.monitor = self.socket.get_monitor_socket(_WATCHED)
        self.socket.linger = 0
        self.socket.sndhwm, self.socket.rcvhwm = QUEUE, QUEUE
        self.socket.setsockopt(zmq.MAXMSGSIZE, MOST_ANSWER)
        self.socket.setsockopt(zmq.RECONNECT_IVL, 50)
        self.socket.setsockopt(zmq.RECONNECT_IVL_MAX, 400)
        try:
            _check(address)
            self.socket.connect(address)
        except zmq.ZMQError as error:
            self.close()
            raise UserError(f"cannot dial {address}: {error.strerror}") from error

    def flush(self) -> None:
        """Hand over what waits, as far as there is room; after a loss the hello comes first."""
        if self._hello_due and self._hand_over(self._hello):
            self._hello_due = False
        while self.unsent and self.broken_since is None and self._hand_over(self.unsent[0]):
            self.unsent.popleft()

    def answers(self) -> Iterator[list[bytes]]:
        """Yield what the neighbour has answered."""
        for _ in range(MOST_AT_ONCE):
            if self.socket.closed or not _is_readable(self.socket):
                return
            yield self.socket.recv_multipart()[: MOST_FRAMES + 1]

    def watch(self) -> None:
        """Take note of connections lost and made."""
        while _is_readable(self.monitor):
            event = recv_monitor_message(self.monitor)["event"]
            if event == zmq.EVENT_DISCONNECTED:
                self.welcomed = False
                self.broken_since = self.broken_since or time.monotonic()
            elif self.broken_since is not None:
                self._hello_due = True

    def accepted(self) -> None:
        """Take note that the neighbour has accepted this connection."""
        self.welcomed, self.broken_since = True, None

    def close(self) -> None:
        """Close both sockets; what was not sent is lost."""
        self.socket.disable_monitor()
        self.monitor.close(0)
        self.socket.close(0)

    def _hand_over(self, frames: Frames) -> bool:
        try:
            self.socket.send_multipart(frames, zmq.NOBLOCK, copy=False)
        except zmq.Again:
            return False
        return True


@contextmanager
def _opening() -> Iterator[None]:
    try:
        yield
    except zmq.ZMQError as error:
        raise RunError(f"too many links: {error.strerror} (see `ulimit -n`)") from error


def _check(address: str) -> None:
    """Refuse a port that ZeroMQ would take for another: 70000 is 4464 to it."""
    port = address.rpartition(":")[2]
    if address.startswith("tcp://") and port.isdecimal() and not 0 < int(port) < 2**16:
        raise zmq.ZMQError(errno.EINVAL, f"there is no port {port}")


def _is_readable(socket: zmq.Socket[bytes]) -> bool:
    return bool(int(socket.getsockopt(zmq.EVENTS)) & zmq.POLLIN)
