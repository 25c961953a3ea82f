"""All that goes on between a peer and one of its neighbours."""

from __future__ import annotations

import statistics
import time
from collections import deque
from collections.abc import Callable

from p2pfl.errors import RemoteProtocolError
from p2pfl.runtime import wire
from p2pfl.runtime.flows import Inflow, Mark, Outflow
from p2pfl.runtime.sockets import Link
from p2pfl.runtime.wire import MOST_CREDIT, Header, Kind

HEARTBEAT = 2.0  # seconds between two
UNANSWERED = 10.0  # seconds after which no answer is expected any more
LATE = 3.0  # seconds after which an address that leads nowhere may be the wrong one
MOST_OFFENCES = 100  # messages that may have to be refused before a neighbour is given up
FORGIVEN = 60.0  # seconds after which one of them counts no more: in weeks, accidents add up


class Neighbour:
    """A neighbour: our link to it, what it gets of us and we of it.

    Attributes:
        link: on which small messages go to it, and chunks of models come back.
        round_trips: seconds that heartbeats took, of the last few.
        outflow: what it gets of us.
        inflow: what we get of it.
        is_done: whether it has said goodbye because it has come to its end.
        is_unwanted: whether its key is not to be trusted any more.
        offences: messages of it that were refused, and are not forgiven yet.
    """

    def __init__(self, link: Link, outflow: Outflow, inflow: Inflow) -> None:
        self.link, self.outflow, self.inflow = link, outflow, inflow
        self.is_unwanted, self.offences = False, 0.0
        self.round_trips: deque[float] = deque(maxlen=64)
        self._goodbye: tuple[bytes, Mark] | None = None
        self.is_done = False
        self._since = self._offended = time.monotonic()
        self._pinged: float | None = None  # when, if the answer is still out
        self._next_ping = 0.0
        self._broken = False

    @property
    def seems_wrong(self) -> bool:
        """Whether it may be somebody else, or nobody, who is at the address that was dialled."""
        late = not self.link.welcomed and time.monotonic() > self._since + LATE
        return late or bool(self.link.trouble)

    @property
    def is_busy(self) -> bool:
        """Whether there may be something to do even if nothing has come of it."""
        return bool(self.link.unsent) or self.outflow.waiting > 0 or self.inflow.is_mixed

    def has_broken(self) -> bool:
        """Say, once for every time, whether the link has broken."""
        broken, self._broken = self._broken, False
        return broken

    def is_cut_off(self, grace: float) -> bool:
        """Say whether its link has been broken for more than so many seconds."""
        since = self.link.broken_since
        return since is not None and time.monotonic() - since > grace

    def offend(self) -> None:
        """Count a message that was refused."""
        now = time.monotonic()
        self.offences = max(0.0, self.offences - (now - self._offended) / FORGIVEN) + 1
        self._offended = now

    def tell(self, *frames: bytes) -> None:
        """Send a small message."""
        self.link.unsent.append(frames)
        self.link.flush()

    def tend(self, about: Header) -> None:
        """Take note of a connection that was lost, and send a heartbeat if it is time."""
        if self.link.lost:
            self.link.lost, self._pinged, self._broken = False, None, True
            self.inflow.broken()
        now = time.monotonic()
        can_answer = self.outflow.connection is not None  # it does so on the link it has dialled
        # Of interest is how long models take; who is there is asked elsewhere.
        models = self.inflow.has_begun or self.outflow.kept > 0
        due = models and self.link.welcomed and can_answer and now > self._next_ping
        if self._pinged is not None and now > self._pinged + UNANSWERED:
            self._pinged = None  # it may have been busy, or not have known us yet
        if due and self._pinged is None:
            self._pinged, self._next_ping = now, now + HEARTBEAT
            self.tell(wire.pack(about._replace(kind=Kind.PING)))
        self.link.flush()

    def hear(self, connection: bytes, header: Header, pong: Header) -> None:
        """Take in a small message.

        Raises:
            RemoteProtocolError: it is none that a neighbour sends.
        """
        match header.kind:
            case Kind.BYE | Kind.ABORT:  # it leaves once we have all it has sent
                self._goodbye = connection, (header.phase, header.round - 1)
                self.is_done = bool(header.degree)
            case Kind.PING if not self.link.unsent:  # else it does not read what we say
                self.tell(wire.pack(pong))
            case Kind.PING:
                pass
            case Kind.PONG:
                self._answered()
            case _:
                raise RemoteProtocolError(f"an unexpected {header.kind.name}")

    def _answered(self) -> None:
        if self._pinged is not None:
            self.round_trips.append(time.monotonic() - self._pinged)
            self._pinged = None

    @property
    def round_trip(self) -> float | None:
        """The median seconds of a heartbeat there and back."""
        return statistics.median(self.round_trips) if self.round_trips else None

    def ask(self, about: Callable[[Kind], Header]) -> None:
        """Give credit, if it is due."""
        if self.link.welcomed and self.inflow.phase >= 0 and (owed := self.inflow.owed()):
            phase, round = self.inflow.phase, self.inflow.next
            asked = about(Kind.CREDIT)._replace(phase=phase, round=round, number=owed)
            self.tell(wire.pack(asked))

    def say_goodbye(self, about: Header, reason: bytes) -> None:
        """Tell the neighbour that we leave, once it has the last model we have sent."""
        phase, round = self.outflow.last or (0, -1)
        self.link.unsent.append([wire.pack(about._replace(phase=phase, round=round + 1)), reason])

    def has_left(self, leaving: bool) -> bytes | None:
        """Return the connection on which to answer a goodbye, once nothing is under way.

        Who is leaving as well has no use for what is.
        """
        if self._goodbye is None:
            return None
        connection, last = self._goodbye
        return connection if leaving or last[1] < 0 or self.inflow.has(last) else None

    def is_lost(self, grace: float, room: int) -> bool:
        """Say whether to give it up.

        Args:
            grace: seconds for which its link may be broken.
            room: models it may leave unasked for.
        """
        hopeless = (
            self.is_cut_off(grace)
            or self.outflow.waiting > room
            or self.outflow.kept > room + MOST_CREDIT
        )
        return hopeless or self.is_unwanted or self.offences > MOST_OFFENCES
