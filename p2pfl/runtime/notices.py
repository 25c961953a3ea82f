"""What a peer writes down of the others: all that becomes of them, but of nobody without end."""

from __future__ import annotations

from typing import TypeAlias

from p2pfl.membership.members import Status
from p2pfl.membership.ration import Ration
from p2pfl.peer.events import PeerId

MOST, EVERY = 10, 1.0  # of one peer at once, and seconds until there is one more

Notice: TypeAlias = tuple[float, PeerId, Status]  # when (monotonic), who, and what it has become


class Notices:
    """What has become of the others. Who changes too often is written down as it is at last.

    A peer that lies can make any other change as often as it likes, and a disk has an end.
    """

    def __init__(self) -> None:
        self._ration = Ration(MOST, EVERY)
        self._ready: list[Notice] = []
        self._late: dict[PeerId, Notice] = {}

    def note(self, notice: Notice) -> None:
        """Take note of a change."""
        now, peer, _ = notice
        self._late[peer] = notice
        if not self._ration.wait(now, peer):
            self._write(now, peer)

    def take(self, now: float) -> list[Notice]:
        """Take out what is to be written down by now."""
        for peer in [peer for peer in self._late if not self._ration.wait(now, peer)]:
            self._write(now, peer)
        ready, self._ready = self._ready, []
        return ready

    def _write(self, now: float, peer: PeerId) -> None:
        self._ration.take(now, peer)
        self._ready.append(self._late.pop(peer))
