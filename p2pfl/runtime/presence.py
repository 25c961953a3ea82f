"""What a peer is told of who is there: changes in its roster, as events."""

from __future__ import annotations

from typing import TypeAlias

from p2pfl.membership.members import Change, Status, life_of
from p2pfl.peer.events import PeerDown, PeerId, PeerSuspected, PeerUp

Presence: TypeAlias = PeerUp | PeerSuspected | PeerDown


class Lives:
    """Turns changes into events; who was started again unnoticed has died in between."""

    def __init__(self) -> None:
        self._known: dict[PeerId, int] = {}

    def events(self, change: Change) -> list[Presence]:
        """Return what a change means to a peer."""
        peer, life = change.peer, life_of(change.incarnation)
        before = self._known.get(peer, life)
        self._known[peer] = max(before, life)
        match change.status:
            case Status.ALIVE:
                again = [PeerDown(peer)] if life > before else []
                return [*again, PeerUp(peer)]
            case Status.SUSPECT:
                return [PeerSuspected(peer)]
        return [PeerDown(peer)]
