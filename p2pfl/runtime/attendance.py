"""Who of the neighbours is there: as they say goodbye, as links break, and as others tell."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping

from p2pfl.errors import RunError
from p2pfl.peer.events import PeerDown, PeerId, PeerSuspected, PeerUp
from p2pfl.runtime import wire
from p2pfl.runtime.handshake import STARTED_LATER
from p2pfl.runtime.lookout import Lookout
from p2pfl.runtime.meeting import Meeting
from p2pfl.runtime.neighbour import Neighbour
from p2pfl.runtime.presence import Presence
from p2pfl.runtime.sockets import NOT_ADMITTED, Listener
from p2pfl.runtime.wire import Header, Kind

# A link that broke is dialled again by ZeroMQ; if that has not helped after so many seconds,
# the peer behind it is taken for dead.
GRACE = 1.0

Busy = Mapping[PeerId, Neighbour]  # those with whom something may have happened


class Attendance:
    """Takes note of who comes and goes.

    Args:
        meeting: the neighbours, and the links to them.
        listener: on which goodbyes are answered.
        about: the header of a small message of ours.

    Attributes:
        lookout: who is there, as others tell; None: nobody asks.
        leaving: whether we leave ourselves, and have no use for what is under way.
        refusing: who does not admit our key any more; to be taken out.
    """

    def __init__(
        self, meeting: Meeting, listener: Listener, about: Callable[[Kind], Header]
    ) -> None:
        self._meeting, self._listener, self._about = meeting, listener, about
        self.lookout: Lookout | None = None
        self.leaving = False
        self.refusing: list[PeerId] = []
        self._refused: set[PeerId] = set()  # by whom we were, and have not been let in since
        self._unreachable: set[PeerId] = set()

    def changes(self, busy: Busy, room: int) -> list[Presence]:
        """Return what has changed.

        Args:
            busy: whom to look at.
            room: models that a neighbour may leave unasked for before it is given up.

        Raises:
            RunError: most others say that another process of ours was started later.
        """
        self._note_refusals(busy)
        return [*self._left(busy), *self._lost(busy, room), *self._looked_out(busy)]

    def leave(self) -> None:
        """Say to all that we leave."""
        self.leaving = True
        if self.lookout:
            self.lookout.leave(self._tell)

    def _note_refusals(self, busy: Busy) -> None:
        for peer, one in busy.items():
            if one.link.welcomed:
                self._refused.discard(peer)
            elif one.link.trouble == NOT_ADMITTED and peer not in self._refused:
                self._refused.add(peer)
                self.refusing.append(peer)

    def _left(self, busy: Busy) -> list[PeerDown]:
        """Take leave of those who have said goodbye and have nothing more on its way."""
        left = []
        for peer, one in busy.items():
            if connection := one.has_left(self.leaving):
                self._meeting.drop(peer)
                self._meeting.giving.pop(peer, None)
                self._meeting.departed.add(peer)
                self._listener.answer(connection, wire.pack(self._about(Kind.BYE)))
                left.append(PeerDown(peer, one.is_done))
        return left

    def _lost(self, busy: Busy, room: int) -> list[PeerDown]:
        """Give up neighbours who are out of reach, or are to be kept out."""
        # Where there is a lookout, it says who is gone; a link to somebody who is not there
        # for it was only a try.
        grace = math.inf if self.lookout else GRACE
        there = {p: one for p, one in busy.items() if self._meeting.neighbours.get(p) is one}
        lost = [p for p, one in there.items() if one.is_lost(grace, room)]
        if self.lookout:
            lost += [
                peer
                for peer in self.lookout.strangers(there)
                if there[peer].seems_wrong and peer not in lost
            ]
        for peer in lost:
            self._lose(peer)
        return [PeerDown(peer) for peer in lost]

    def _looked_out(self, busy: Busy) -> list[Presence]:
        """Return what is new of who is there, as it was heard and as links have broken."""
        if self.lookout is None:
            return []
        refused, known = self._meeting.handshake.refused, self._meeting.neighbours
        replaced = [why for why in refused.values() if STARTED_LATER in why]
        if 2 * len(replaced) > len(known):  # one alone may lie
            raise RunError(replaced[0])
        for peer, one in busy.items():
            if one.has_broken():
                self.lookout.probe(peer)
        met, self._meeting.met = self._meeting.met, {}
        again = [event for peer, life in met.items() for event in self.lookout.meet(peer, life)]
        events = [*again, *self._cut_off(busy), *self.lookout.tend(self._tell)]
        for event in events:
            if isinstance(event, PeerDown) and event not in again:
                self._lose(event.peer)
        # One lie can give somebody a hundred lives: whatever they are, it is dialled once.
        there = {e.peer: isinstance(e, PeerUp) for e in events if not isinstance(e, PeerSuspected)}
        for peer in [peer for peer, is_up in there.items() if is_up]:
            self._meeting.reach(peer, self.lookout.address(peer))
        # Others may say again that it is there; as long as we do not reach it, we do not wait.
        up = [event.peer for event in events if isinstance(event, PeerUp)]
        return [*events, *(PeerSuspected(peer) for peer in up if peer in self._unreachable)]

    def _lose(self, peer: PeerId) -> None:
        """Hang up on a peer that is gone; one that still listens to us may yet be back."""
        self._meeting.drop(peer)
        if not self._meeting.handshake.is_connected(self._listener, peer):
            self._meeting.giving.pop(peer, None)

    def _cut_off(self, busy: Busy) -> list[Presence]:
        """Say who is there, as others tell, and cannot be reached by us: it is not waited for."""
        events: list[Presence] = []
        for peer, one in busy.items():
            if one.is_cut_off(GRACE) and peer not in self._unreachable:
                self._unreachable.add(peer)
                events.append(PeerSuspected(peer))
            elif one.link.welcomed and peer in self._unreachable:
                self._unreachable.discard(peer)
                if self.lookout and self.lookout.believes(peer):
                    events.append(PeerUp(peer))
        return events

    def _tell(self, peer: PeerId, body: bytes, address: str) -> None:
        """Pass on what our membership machine has to say; if a link is clogged it is lost."""
        one = self._meeting.reach(peer, address)
        if one and not one.link.unsent:
            one.tell(wire.pack(self._about(Kind.MEMBERS)), body)
