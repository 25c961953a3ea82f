"""Models between two neighbours: who receives asks, who sends keeps until it is asked.

A receiver gives credit for so many chunks, and more as it takes them in. So a neighbour that
is slow, or frozen, has nothing but credit it does not give: no model of ours piles up on
its way, and the newest is chosen when it is asked for. A model counts as sent once its
receiver has it; if the connection breaks before, it is sent again.
"""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Callable, Sequence
from threading import Condition
from typing import NamedTuple

import zmq

from p2pfl.errors import RemoteProtocolError
from p2pfl.peer.events import Received
from p2pfl.runtime import wire
from p2pfl.runtime.chunks import Arriving, Empty, Outgoing, Schema, check_intact, fresh
from p2pfl.runtime.parts import Parted
from p2pfl.runtime.streams import Stream
from p2pfl.runtime.wire import MOST_CREDIT, Header

BUDGET = 32 << 20  # bytes that may be on their way to us, or wait to be looked at, in all
WINDOW = 12  # chunks of one neighbour, of them: with more, they are out of the cache when they come
PHASES = 8  # phases of which credit is kept

Mark = tuple[int, int]  # (phase, round)


class Outflow:
    """What one neighbour is still to get from us.

    Args:
        checked: whether chunks need a checksum.

    Attributes:
        connection: on which it asks, as the listener calls it; None: it has not said hello.
    """

    def __init__(self, checked: bool = True) -> None:
        self.checked = checked
        self.connection: bytes | None = None
        self._queue: deque[Outgoing] = deque()
        self._at, self._chunk = 0, 0  # what goes out next: which model, and which chunk of it
        self._credit: Counter[int] = Counter()  # by phase

    @property
    def waiting(self) -> int:
        """How many models have not left in whole."""
        return len(self._queue) - self._at

    @property
    def kept(self) -> int:
        """How many models are kept, to be sent or to be sent again."""
        return len(self._queue)

    @property
    def last(self) -> Mark | None:
        """The last model that waits, or has not been acknowledged yet."""
        return (self._queue[-1].phase, self._queue[-1].round) if self._queue else None

    def put(self, message: Outgoing, replaceable: bool) -> None:
        """Take in a model; a replaceable one that has not begun to leave makes room for it."""
        if replaceable:
            self.clear()
        self._queue.append(message)

    def clear(self) -> None:
        """Forget what has not begun to leave."""
        while len(self._queue) > self._at + (self._chunk > 0):
            self._queue.pop()

    def connected(self, connection: bytes) -> None:
        """Begin anew on another connection; what has not been acknowledged goes out again."""
        self.connection, self._at, self._chunk = connection, 0, 0
        self._credit.clear()

    def asked(self, header: Header) -> None:
        """Take note of credit, and of what has been received.

        Raises:
            RemoteProtocolError: it is more than anybody has reason to ask for.
        """
        credit = self._credit[header.phase] + header.number
        phases = self._credit.keys() | {header.phase}
        if credit > MOST_CREDIT or len(phases) > PHASES:
            raise RemoteProtocolError("more credit than is given")
        self._credit[header.phase] = credit
        while self._queue and self._is_settled(header):
            self._queue.popleft()
            self._at = max(0, self._at - 1)

    def _is_settled(self, header: Header) -> bool:
        first = self._queue[0]
        has_left = self._at > 0 or self._chunk == 0
        return has_left and (first.phase, first.round) < (header.phase, header.round)

    def flush(self, hand_over: Callable[[bytes, Sequence[zmq.Frame]], bool]) -> bool:
        """Hand over one chunk if there is one that was asked for; return whether it was taken."""
        if self.connection is None or not self.waiting:
            return False
        message = self._queue[self._at]
        if not self._credit[message.phase]:
            return False
        if not hand_over(self.connection, message.chunk(self._chunk, self.checked)):
            return False
        self._credit[message.phase] -= 1
        self._chunk += 1
        if self._chunk == len(message):
            self._at, self._chunk = self._at + 1, 0
        return True


class Giving:
    """What one peer gets of us on the connection it has dialled, for as long as that stands.

    Attributes:
        outflow: the messages of the rounds.
        offers: models it has asked for because it has come late.
    """

    def __init__(self) -> None:
        self.outflow, self.offers = Outflow(), Outflow()

    @property
    def connection(self) -> bytes | None:
        """On which it asks."""
        return self.outflow.connection

    def connected(self, connection: bytes) -> None:
        """Begin anew on another connection."""
        self.outflow.connected(connection)
        self.offers.connected(connection)

    def guarded(self, is_guarded: bool) -> None:
        """Take note whether nothing is changed on the way to this peer by accident."""
        self.outflow.checked = self.offers.checked = not is_guarded

    def asked(self, connection: bytes, header: Header) -> None:
        """Take note of credit.

        Raises:
            RemoteProtocolError: it is more than anybody has reason to ask for.
        """
        if connection == self.connection:  # else it is for what was on one that is gone
            (self.offers if header.phase == wire.OFFERS else self.outflow).asked(header)


class Inflow:
    """What one neighbour sends us.

    Attributes:
        phase: which we are in; credit is for messages of this phase alone.
        next: the first round that we have not received in whole.
        has_begun: whether anything has come.
    """

    def __init__(self) -> None:
        self.has_begun = False
        self.phase, self.next = -1, 0
        self._expected = Expected(Schema(tuple, ()), 0)
        self._given = 0
        self._arriving: Arriving | Parted | Stream | None = None
        self._streams: list[Stream] = []  # which still hold something of ours
        self._passes_over = False  # what is left of a model, up to the beginning of the next

    def expect(self, phase: int, expected: Expected) -> None:
        """Enter a phase."""
        self.phase, self._expected = phase, expected
        self.next, self._given = 0, 0
        self._arriving, self._passes_over = None, False

    def broken(self) -> None:
        """Take note that the connection was lost, and with it what was on its way."""
        if isinstance(self._arriving, Stream):  # what has been mixed of it stays
            self._arriving.end()
            self.next = self._arriving.round + 1
        self._given, self._arriving = 0, None

    def end(self) -> None:
        """Let nobody wait for what is still to come."""
        for stream in self._streams:
            stream.end()

    def drop_before(self, round: int) -> None:
        """Forget the models of earlier rounds than one, as far as they are not mixed yet."""
        for older in self._streams:
            if older.round < round:
                older.drop()

    def owed(self) -> int:
        """Return how much credit to give now: none until it is worth a message."""
        last = self._arriving
        self._streams = [s for s in self._streams if s.held or s is last]
        room = self._expected.window - sum(one.held for one in self._streams)
        owed = room - self._given
        if last is not None and last.left <= self._given:  # the next is long in coming
            return 0
        if 2 * owed < max(self._expected.window, 2):
            return 0
        self._given = room
        return owed

    @property
    def is_midway(self) -> bool:
        """Whether a model has come in part."""
        return self._arriving is not None

    @property
    def is_mixed(self) -> bool:
        """Whether a model is mixed while it arrives, which makes room for more at any time."""
        return bool(self._streams)

    def has(self, mark: Mark) -> bool:
        """Say whether everything up to a phase and a round has been received."""
        return mark < (self.phase, self.next)

    def take(self, header: Header, frames: Sequence[memoryview]) -> Received | None:
        """Take in a chunk; return the model that is complete with it, or begins with it.

        Raises:
            Damaged: it was changed on its way. The connection must be made again, for the model
                to be sent again.
            RemoteProtocolError: it is not one we have asked for, or not what it should be.
                The rest of that model is passed over.
        """
        check_intact(header, frames)
        if header.phase != self.phase or self._given < 1:
            raise RemoteProtocolError("a chunk nobody has asked for")
        self._given -= 1
        if self._passes_over and header.number:
            return None
        self._passes_over, self.has_begun = False, True
        try:
            return self._took(header, frames)
        except RemoteProtocolError:
            self._give_up(header.round)
            raise

    def _give_up(self, round: int) -> None:
        """Pass over what is left of a model; it counts as received, so that its sender goes on."""
        if isinstance(self._arriving, Stream):
            self._arriving.end()
        if self._arriving is not None:
            round = self._arriving.round
        self.next = max(self.next, round + 1)
        self._arriving, self._passes_over = None, True

    def _took(self, header: Header, frames: Sequence[memoryview]) -> Received | None:
        begins = self._arriving is None
        if begins and header.round < self.next:
            raise RemoteProtocolError(f"round {header.round} again, or out of order")
        model = self._arriving or self._expected.begin(header)
        model.take(header, frames)
        self._arriving = model
        if begins and isinstance(model, Stream):
            self._streams.append(model)
        if not model.left:
            self._arriving, self.next = None, header.round + 1
        if isinstance(model, Stream):
            return model.received() if begins else None
        return None if model.left else model.received()


class Expected(NamedTuple):
    """What is to come of each neighbour in a phase.

    Attributes:
        schema: of its messages.
        window: how many chunks one neighbour may have on its way to us.
        empty: provides memory for models.
        stay: whether they stay in the memory they came in.
        news: if they are even mixed while they arrive: where who mixes them waits.
    """

    schema: Schema
    window: int
    empty: Empty = fresh
    stay: bool = False
    news: Condition | None = None

    def begin(self, header: Header) -> Arriving | Parted | Stream:
        """Return what takes in the model whose first chunk has this header."""
        if self.news is not None:
            return Stream(header, self.schema, self.news)
        if self.stay:
            return Parted(header, self.schema)
        return Arriving(header, self.schema, self.empty)


def window(schema: Schema, neighbours: int) -> int:
    """Return how many chunks each of some neighbours may have on its way to us."""
    chunk = max(1, min(wire.CHUNK, schema.nbytes))
    return max(1, min(WINDOW, BUDGET // (chunk * max(1, neighbours))))
