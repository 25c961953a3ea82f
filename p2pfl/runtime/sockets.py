"""The two kinds of socket a peer has: the one it is dialled on, and one for each it dials.

Both are bounded in what they hold and in what they take in: a neighbour that has stopped
reading must not fill our memory, and neither must a stranger.
"""

from __future__ import annotations

import errno
import math
import resource
import time
from collections import defaultdict, deque
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import NamedTuple

import zmq

from p2pfl.addresses import is_direct
from p2pfl.errors import RunError, UserError
from p2pfl.peer.events import PeerId
from p2pfl.runtime.wire import CHUNK, MOST_CREDIT
from p2pfl.security.connections import Ends, ends_of
from p2pfl.security.curve import HANDSHAKE, LARGEST, secure_dialler, secure_listener, sender_key
from p2pfl.security.gate import Gate
from p2pfl.security.keys import KeyPair

Context = zmq.Context[zmq.Socket[bytes]]
Frames = Sequence[bytes | memoryview | zmq.Frame]

MOST_FRAMES = 16  # of a message; what is beyond is read and dropped
MOST_AT_ONCE = 64  # small messages taken in before anything else gets its turn
FEW_AT_ONCE = 8  # the same of messages that may be large
QUEUE = 64  # messages that lie in a socket: those that dial send small ones, and credit
# limits how many of the others are on their way
UNDER_WAY = (MOST_CREDIT + 1) * CHUNK  # bytes on their way to us that we may have asked for
SLACK = 256  # bytes that encryption adds to a frame, at most
OUT_OF_REACH = 20_000  # milliseconds after which a machine that acknowledges nothing is lost
KEPT = 2  # connections of a peer that has dialled us again and again
TRY_AGAIN = 1.0  # seconds after which a neighbour that has turned us away is dialled again
SOURCE = 2  # ZMQ_SRCFD: the descriptor a message came from
# As plain numbers: pyzmq's flags are sets of names, and slow to put together and to compare.
_NOW, _MORE, _READABLE = int(zmq.NOBLOCK), int(zmq.NOBLOCK | zmq.SNDMORE), int(zmq.POLLIN)
NOT_ADMITTED = "it does not admit our key"
_TURNED_AWAY: dict[int, str] = {
    zmq.EVENT_HANDSHAKE_FAILED_AUTH: NOT_ADMITTED,
    zmq.EVENT_HANDSHAKE_FAILED_PROTOCOL: "it does not prove the key that is listed for it",
    zmq.EVENT_HANDSHAKE_FAILED_NO_DETAIL: "it does not prove the key that is listed for it",
}


def new_context(links: int) -> Context:
    """Return a context with room for so many links, and let the process open as many files."""
    # A link takes a connection each way and three mailboxes, and those that are closed to be
    # dialled again give them back a little later.
    need = 64 + 10 * links
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft < need:
        resource.setrlimit(resource.RLIMIT_NOFILE, (min(need, hard), hard))
    context: Context = zmq.Context()
    context.set(zmq.MAX_SOCKETS, 64 + 8 * links)
    return context


class Dialling(NamedTuple):
    """Whom to dial, and the keys that both ends prove; none: in clear."""

    address: str
    own: KeyPair | None = None
    theirs: str = ""


class Mail(NamedTuple):
    """A small message as it came in."""

    connection: bytes
    descriptor: int  # of that connection
    key: str | None  # that the sender has proved
    frames: list[memoryview]


class Listener:
    """The socket on which a peer is dialled.

    Args:
        context: where it lives.
        gate: which guards it.
        address: where to listen.
        keys: that we prove to those who dial; None: in clear.
        descriptor: a socket that listens there already, to be taken over.

    Raises:
        UserError: it is no address of this machine.
        RunError: somebody else listens there, or the process may open no more files.
    """

    def __init__(
        self,
        context: Context,
        gate: Gate,
        address: str,
        keys: KeyPair | None = None,
        descriptor: int | None = None,
    ) -> None:
        with _opening():
            self.socket = context.socket(zmq.ROUTER)
            gate.watch(self.socket)
        self._gate = gate
        self._connections: defaultdict[PeerId, deque[tuple[int, Ends]]] = defaultdict(deque)
        self.socket.linger = 200  # a refusal should reach whom it is for
        self.socket.rcvhwm, self.socket.sndhwm = 8, QUEUE
        self.socket.setsockopt(zmq.MAXMSGSIZE, LARGEST)  # nobody who dials sends more
        self.socket.setsockopt(zmq.HANDSHAKE_IVL, HANDSHAKE)
        _common(self.socket, address)
        self.socket.setsockopt(zmq.ROUTER_MANDATORY, 1)
        if keys:
            secure_listener(self.socket, keys)
        if descriptor is not None:
            self.socket.setsockopt(zmq.USE_FD, descriptor)
        try:
            _check_port(address)
            self.socket.bind(address)
        except zmq.ZMQError as error:
            self.socket.close(0)
            if error.errno == zmq.EADDRINUSE:
                raise RunError(f"{address} is taken by another program") from error
            raise UserError(f"cannot listen on {address}: {error.strerror}") from error

    @property
    def address(self) -> str:
        """Where it listens."""
        return str(self.socket.get_string(zmq.LAST_ENDPOINT)).rstrip("\0")

    def make_way(self, mail: Mail, peer: PeerId) -> None:
        """Cut the connections of a peer that are older than its last, as another has come in.

        What waits in each is kept in memory. The last may hold words that are still to be read.
        """
        mine, ends = self._connections[peer], ends_of(mail.descriptor)
        if ends and (mail.descriptor, ends) not in mine:
            mine.append((mail.descriptor, ends))
        while len(mine) > KEPT:
            descriptor, ends = mine.popleft()
            self._gate.cut(descriptor, "a later connection of the same peer", ends)

    def read(self) -> Iterator[Mail]:
        """Yield what has come."""
        for _ in range(MOST_AT_ONCE):
            if not _is_readable(self.socket):
                return
            frame = self.socket.recv(copy=False)
            key, descriptor = sender_key(frame), _descriptor(frame)
            frames = _receive(self.socket) if frame.more else []
            self._gate.taken(descriptor, sum(map(len, frames)), key)
            yield Mail(frame.bytes, descriptor, key, frames)

    def hand_over(self, identity: bytes, frames: Frames) -> bool:
        """Send frames on a connection, without a copy; return whether there was room for them."""
        try:
            _send(self.socket, [identity, *frames])
        except zmq.ZMQError as error:
            if error.errno not in (zmq.EAGAIN, zmq.EHOSTUNREACH):
                raise
            return False
        return True

    def answer(self, identity: bytes, *frames: bytes) -> bool:
        """Answer on a connection; return whether it is still there."""
        try:
            _send(self.socket, [identity, *frames])
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
        context: where its socket lives.
        gate: which watches it, and calls it by `number`.
        number: given to no other socket.
        to: where the neighbour listens.
        hello: what goes out first on every connection.

    Raises:
        UserError: it is no address.
        RunError: the process may open no more files.

    Attributes:
        number: of its socket.
        welcomed: whether the neighbour has accepted this connection.
        broken_since: when (monotonic) the last connection was lost, until we are welcome again.
        lost: whether a connection was lost since this was last set to False.
        trouble: why there is no connection, if we have been turned away.
        last_words: the last message that lay unread when a connection was lost; to be cleared.
        unsent: messages that wait for the neighbour to read.
    """

    def __init__(
        self, context: Context, gate: Gate, number: int, to: Dialling, hello: Frames
    ) -> None:
        self.welcomed = self.lost = False
        self.broken_since: float | None = None
        self.trouble = ""
        self.last_words: list[memoryview] = []
        self.unsent: deque[Frames] = deque()
        self._context, self._gate, self._to = context, gate, to
        self._hello, self._hello_due = hello, True
        self._next_try = math.inf
        self._open(number)

    def _open(self, number: int) -> None:
        to = self._to
        with _opening():
            socket = self._context.socket(zmq.DEALER)
            try:
                self._gate.watch(socket, number, UNDER_WAY)
            except zmq.ZMQError:
                socket.close(0)
                raise
        socket.linger = 0
        socket.sndhwm, socket.rcvhwm = QUEUE, QUEUE
        socket.setsockopt(zmq.MAXMSGSIZE, CHUNK + SLACK)
        _common(socket, to.address)
        socket.setsockopt(zmq.RECONNECT_IVL, 50)
        socket.setsockopt(zmq.RECONNECT_IVL_MAX, 400)
        try:
            if to.own:
                secure_dialler(socket, to.own, to.theirs)
            socket.connect(to.address)
        except zmq.ZMQError as error:
            socket.close(0)
            raise UserError(f"cannot dial {to.address}: {error.strerror}") from error
        self.socket, self.number = socket, number

    @property
    def is_guarded(self) -> bool:
        """Whether nothing is changed on the way by accident, or not without being noticed."""
        return self._to.own is not None or is_direct(self._to.address)

    def flush(self) -> None:
        """Hand over what waits, as far as there is room; after a loss the hello comes first."""
        if self._hello_due and self._hand_over(self._hello):
            self._hello_due = False
        while self.unsent and self.broken_since is None and self._hand_over(self.unsent[0]):
            self.unsent.popleft()

    def read(self) -> Iterator[list[memoryview]]:
        """Yield the messages that have come back."""
        for _ in range(FEW_AT_ONCE):
            if not _is_readable(self.socket):  # an exception takes longer
                return
            frame = self.socket.recv(copy=False)
            frames = [frame.buffer, *(_receive(self.socket) if frame.more else [])]
            # What has been taken in does not count as piled up.
            self._gate.taken(_descriptor(frame), sum(map(len, frames)))
            yield frames
            if self.socket.closed:
                return

    def happened(self, event: int) -> None:
        """Take note of what has happened to the connection, a ``zmq.EVENT_...``."""
        if event == zmq.EVENT_DISCONNECTED:
            self.welcomed, self.lost = False, True
            self.broken_since = self.broken_since or time.monotonic()
            # What came before the loss is not taken for something that comes after it. But who
            # refuses us and leaves has said why.
            while unread := list(self.read()):
                self.last_words = unread[-1]
        elif event == zmq.EVENT_HANDSHAKE_SUCCEEDED:
            self.trouble, self._next_try = "", math.inf
            self._hello_due |= self.broken_since is not None
        elif event in _TURNED_AWAY:
            self.trouble = _TURNED_AWAY[event] if self._to.own else "it does not talk in clear"
            self._next_try = time.monotonic() + TRY_AGAIN

    def is_given_up(self) -> bool:
        """Say whether ZeroMQ has stopped trying, as it does when it was turned away."""
        return time.monotonic() > self._next_try

    def dial_again(self, number: int) -> None:
        """Begin anew with another socket, which has a number of its own.

        If it cannot be made now, the last is kept, and the time comes to try again.
        """
        self.welcomed, self.lost = False, True
        self.broken_since = self.broken_since or time.monotonic()
        self._next_try, self._hello_due = math.inf, True
        last = self.socket
        try:
            self._open(number)
        except (RunError, UserError):
            self._next_try = time.monotonic() + TRY_AGAIN
        else:
            last.close(0)

    def accepted(self) -> None:
        """Take note that the neighbour has accepted this connection."""
        self.welcomed, self.broken_since = True, None

    def close(self) -> None:
        """Close it; what was not sent is lost."""
        self.socket.close(0)

    def _hand_over(self, frames: Frames) -> bool:
        try:
            _send(self.socket, frames)
        except zmq.Again:
            return False
        return True


@contextmanager
def _opening() -> Iterator[None]:
    try:
        yield
    except zmq.ZMQError as error:
        raise RunError(f"too many links: {error.strerror} (see `ulimit -n`)") from error


def _common(socket: zmq.Socket[bytes], address: str) -> None:
    """Set what both kinds of socket need."""
    # Else the kernel goes on for a quarter of an hour with a machine that has lost its cable.
    socket.setsockopt(zmq.TCP_MAXRT, OUT_OF_REACH)
    socket.setsockopt(zmq.IPV6, int("[" in address))


def _descriptor(frame: zmq.Frame) -> int:
    try:
        return int(frame.get(SOURCE))
    except zmq.ZMQError:  # who speaks an old version of ZeroMQ's protocol has none: it piles up
        return -1


def _is_readable(socket: zmq.Socket[bytes]) -> bool:
    return bool(int(socket.getsockopt(zmq.EVENTS)) & _READABLE)


def _send(socket: zmq.Socket[bytes], frames: Frames) -> None:
    """Send a message without waiting; what is large is not copied.

    Raises:
        zmq.ZMQError: there is no room for it, or nobody to read it; nothing of it has been sent.
    """
    for frame in frames[:-1]:
        socket.send(frame, _MORE, copy=False)
    socket.send(frames[-1], _NOW, copy=False)


def _receive(socket: zmq.Socket[bytes]) -> list[memoryview]:
    """Receive the frames of a message, as they lie in memory; too many are read and dropped."""
    frames: list[memoryview] = []
    more = True
    while more:
        frame = socket.recv(copy=False)
        more = frame.more
        if len(frames) <= MOST_FRAMES:
            frames.append(frame.buffer)
    return frames


def _check_port(address: str) -> None:
    """Refuse a port that ZeroMQ would take for another: 70000 is 4464 to it.

    Raises:
        ZMQError: there is no such port.
    """
    port = address.rpartition(":")[2]
    if address.startswith("tcp://") and port.isdecimal() and not 0 < int(port) < 2**16:
        raise zmq.ZMQError(errno.EINVAL, f"there is no port {port}")
