"""The gate of a peer: who may come in, how many, and how much they may bring.

One thread of its own answers when ZeroMQ asks whether a key is allowed, follows the
connections of the sockets it watches, and cuts those that go beyond their limits. So it
works however busy the rest of the process is.
"""

from __future__ import annotations

import itertools
import math
import os
import select
import threading
import time
from collections import deque
from collections.abc import Coroutine, Iterable, Iterator
from contextlib import suppress
from typing import NamedTuple

import zmq
from zmq.auth import Authenticator
from zmq.utils.monitor import parse_monitor_message

from p2pfl.errors import RunError
from p2pfl.security.connections import EXTRA, Connections, Ends
from p2pfl.security.curve import DOMAIN, Socket, require_curve
from p2pfl.security.refusals import Refusals

Context = zmq.Context[Socket]

ALLOWANCE = 1 << 20  # bytes
MOST_NEWS = 10_000
# Seconds between two looks: a connection that brings 1 GB/s gets 30 MB in before it is cut.
REST = 0.03
_OPENED = zmq.EVENT_ACCEPTED | zmq.EVENT_CONNECTED
_FAILED = zmq.EVENT_HANDSHAKE_FAILED_AUTH | zmq.EVENT_HANDSHAKE_FAILED_PROTOCOL
_FAILED |= zmq.EVENT_HANDSHAKE_FAILED_NO_DETAIL
_WATCHED = _OPENED | _FAILED | zmq.EVENT_HANDSHAKE_SUCCEEDED
_WATCHED |= zmq.EVENT_DISCONNECTED | zmq.EVENT_MONITOR_STOPPED


_NUMBERS = itertools.count()


class News(NamedTuple):
    """Something that happened to a socket that dials."""

    link: int  # as given to `watch`
    event: int  # a zmq.EVENT_...
    value: int  # of the event: a descriptor, or the code of a refusal


class _Watched(NamedTuple):
    monitor: Socket
    descriptor: int  # readable when the monitor has news
    link: int | None
    allowance: int


class _Cut(NamedTuple):
    descriptor: int
    reason: str
    ends: Ends | None


class Gate:
    """Guards the sockets of one ZeroMQ context.

    Make it before the first socket is bound, and close it after the sockets it watches: one
    that is still open comes to a halt.
    All methods may be called from any thread.

    Args:
        context: whose sockets it guards.
        allowed: the public keys that may come in.
        most: incoming connections at a time; the newest beyond them is cut.
        strangers: incoming connections at a time of which nothing has been taken yet.

    Raises:
        RunError: ZeroMQ cannot encrypt, or the context has a gate already.
    """

    def __init__(
        self, context: Context, allowed: Iterable[str], most: int = 256, strangers: int = 64
    ) -> None:
        require_curve()
        self._allowed = frozenset(allowed)
        self._lock = threading.Lock()
        self._refused = Refusals()
        self._news: deque[News] = deque(maxlen=MOST_NEWS)
        self._taken: dict[int, tuple[int, str | None]] = {}
        self._orders: deque[_Watched | _Cut | frozenset[str]] = deque()
        self._error: BaseException | None = None
        self._stop = False
        self._asking = ""  # the address of who asks to come in
        self._authenticator = Authenticator(context)
        try:
            self._authenticator.start()
        except zmq.ZMQError as error:
            raise RunError(f"this context has a gate already: {error.strerror}") from error
        self._authenticator.configure_curve_callback(DOMAIN, self)
        self._connections = Connections(most, strangers, self._refuse)
        flags = os.EFD_NONBLOCK | os.EFD_CLOEXEC
        self._wake, self._tell = os.eventfd(0, flags), os.eventfd(0, flags)
        self._monitors: list[_Watched] = []
        self._epoll = select.epoll()
        self._zap = self._authenticator.zap_socket
        for descriptor in (self._wake, self._connections.fileno(), _descriptor(self._zap)):
            self._epoll.register(descriptor, select.EPOLLIN)
        self._thread = threading.Thread(target=self._run, name="p2pfl gate", daemon=True)
        self._thread.start()

    def watch(self, socket: Socket, link: int | None = None, allowance: int = ALLOWANCE) -> None:
        """Follow the connections of a socket, from before it is bound or connected.

        Args:
            socket: it must have no other monitor.
            link: what `news` calls a socket that dials, and no other, not even one that is
                closed; None for the one that listens, of which there are no news.
            allowance: bytes a connection may bring beyond what is `taken`. It must be more than
                honest messages that lie unread can come to, RCVHWM times their size. Without any
                message a connection lasts until its heartbeats add up to so much.
        """
        # By default it is called after the socket's descriptor, which one just closed may have had.
        monitor = socket.get_monitor_socket(_WATCHED, f"inproc://p2pfl-monitor-{next(_NUMBERS)}")
        self._order(_Watched(monitor, _descriptor(monitor), link, allowance))

    def allow(self, keys: Iterable[str]) -> None:
        """Replace the set of allowed keys; connections of a key that is gone are cut."""
        before, self._allowed = self._allowed, frozenset(keys)
        if before - self._allowed:
            self._order(self._allowed)

    def allows(self, key: str | None) -> bool:
        """Say whether a key may come in."""
        return key in self._allowed

    def taken(self, descriptor: int, nbytes: int, key: str | None = None) -> None:
        """Take note that a whole message was read; its sender is no stranger from now on.

        Args:
            descriptor: of its connection: ``frame.get(zmq.SRCFD)``.
            nbytes: of all its frames.
            key: that its sender has proved: `sender_key(frame)`.
        """
        with self._lock:
            sum_, known = self._taken.get(descriptor, (0, None))
            self._taken[descriptor] = (sum_ + nbytes + EXTRA, key or known)

    def cut(self, descriptor: int, reason: str, ends: Ends | None = None) -> None:
        """Break an incoming or outgoing connection, and count why.

        Args:
            descriptor: of the connection.
            reason: in words.
            ends: of it, if the descriptor may be that of another one by now.
        """
        self._order(_Cut(descriptor, reason, ends))

    def refused(self) -> dict[str, int]:
        """Return how often a client or a connection was refused, by address, key and reason."""
        with self._lock:
            return dict(self._refused)

    def fileno(self) -> int:
        """Return a descriptor that is readable when there is news."""
        return self._tell

    def news(self) -> list[News]:
        """Return what has happened since the last call to the sockets that dial.

        Raises:
            RunError: the gate's thread has died, and nobody can come in any more.
        """
        try:
            os.eventfd_read(self._tell)
        except BlockingIOError:
            return []
        if self._error is not None:
            os.eventfd_write(self._tell, 1)  # the next call finds it too
            raise RunError(f"the gate has failed: {self._error!r}") from self._error
        return [self._news.popleft() for _ in range(len(self._news))]

    def forgive(self) -> None:
        """Forget who was refused so far: the self-test, say."""
        with self._lock:
            self._refused = Refusals()

    def close(self) -> None:
        """End the thread; nobody can come in from then on."""
        if not self._stop:
            self._stop = True
            os.eventfd_write(self._wake, 1)
            self._thread.join()
            self._authenticator.stop()
            for one in (*self._monitors, *self._orders):  # some it may not have got round to
                if isinstance(one, _Watched):
                    one.monitor.close(0)
            self._connections.close()
            self._epoll.close()
            os.close(self._wake)
            os.close(self._tell)

    def callback(self, domain: str, key: bytes) -> bool:
        """Say whether a client may come in: called by pyzmq's `Authenticator`, for nobody else."""
        if (text := key.decode()) in self._allowed:
            return True
        who = self._asking  # its key is of its own making, and nothing to tell strangers apart by
        self._refuse(who, f"{who} ({text[:8]}...): a key that is not allowed")
        return False

    def _order(self, order: _Watched | _Cut | frozenset[str]) -> None:
        self._orders.append(order)
        if not self._stop:
            os.eventfd_write(self._wake, 1)

    def _refuse(self, source: str, reason: str) -> None:
        with self._lock:
            self._refused.note(source, reason)

    def _run(self) -> None:
        try:
            bytes_came, again = self._connections.fileno(), math.inf
            while not self._stop:
                left = None if again == math.inf else max(0.0, again - time.monotonic())
                woken = {descriptor for descriptor, _ in self._epoll.poll(left)}
                self._turn(woken)
                if bytes_came in woken:  # a flood of small messages is looked at now and then
                    again = time.monotonic() + REST
                    self._epoll.modify(bytes_came, 0)
                elif time.monotonic() >= again:
                    again = math.inf
                    self._epoll.modify(bytes_came, select.EPOLLIN)
        except BaseException as error:  # whatever it is, somebody has to hear of it
            self._error = error
            os.eventfd_write(self._tell, 1)

    def _turn(self, woken: set[int]) -> None:
        """Do all there is to do, for sockets and connections that have woken us."""
        with suppress(BlockingIOError):
            os.eventfd_read(self._wake)
        orders = [self._orders.popleft() for _ in range(len(self._orders))]
        for order in orders:
            if isinstance(order, _Watched):
                self._monitors.append(order)
                self._epoll.register(order.descriptor, select.EPOLLIN)
        with self._lock:
            taken, self._taken = self._taken, {}
        self._answer()
        # What was ordered or taken is of connections that may have been made since we woke.
        hurried = bool(orders) or not self._connections.knows(taken)
        self._follow([one for one in self._monitors if hurried or one.descriptor in woken])
        for descriptor, (nbytes, key) in taken.items():
            self._connections.taken(descriptor, nbytes, key)
        for order in orders:
            if isinstance(order, frozenset):
                self._connections.keep(order)
            elif isinstance(order, _Cut):
                self._connections.cut(*order)
        self._connections.look(self._untold)

    def _untold(self, descriptor: int) -> int:
        """Return the bytes that the application has taken since this turn began."""
        with self._lock:
            return self._taken.get(descriptor, (0, None))[0]

    def _answer(self) -> None:
        """Answer those who ask to come in."""
        for message in _messages(self._zap):
            self._asking = message[3].decode(errors="replace") if len(message) > 3 else "nobody"
            _finish(self._authenticator.handle_zap_message(message))

    def _follow(self, ready: Iterable[_Watched]) -> None:
        """Take note of connections made and lost."""
        # A descriptor may be closed and used again before we hear of it: what is still open
        # is known only when everything has been read.
        opened: dict[int, _Watched] = {}
        for one in ready:
            for event, value in self._events(one):
                if event & _OPENED:
                    opened[value] = one
                elif event == zmq.EVENT_DISCONNECTED and opened.get(value) is one:
                    del opened[value]
                elif event == zmq.EVENT_DISCONNECTED:
                    self._connections.closed(value, one.link)
        for descriptor, one in opened.items():
            self._connections.opened(descriptor, one.link, one.allowance)

    def _events(self, one: _Watched) -> Iterator[tuple[int, int]]:
        for message in _messages(one.monitor):
            told = parse_monitor_message(message)
            event, value = int(told["event"]), int(told["value"])
            if event == zmq.EVENT_MONITOR_STOPPED:
                self._epoll.unregister(one.descriptor)
                self._monitors.remove(one)
                one.monitor.close(0)
                self._connections.forget(one.link)
                return
            if one.link is not None:
                self._news.append(News(one.link, event, value))
                os.eventfd_write(self._tell, 1)
            yield event, value


def _descriptor(socket: Socket) -> int:
    return int(socket.getsockopt(zmq.FD))


def _messages(socket: Socket) -> Iterator[list[bytes]]:
    while True:
        try:
            yield socket.recv_multipart(zmq.NOBLOCK)
        except zmq.Again:
            return


def _finish(coroutine: Coroutine[None, None, None]) -> None:
    """Run a coroutine that waits for nothing."""
    with suppress(StopIteration):
        coroutine.send(None)
