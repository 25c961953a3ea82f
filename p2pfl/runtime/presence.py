"""What a peer is told of who is there: changes in its roster, as events."""

from __future__ import annotations

from typing import TypeAlias

from p2pfl.membership.members import Change, Status, life_of
from p2pfl.peer.events import PeerDown, PeerId, PeerSuspected, PeerUp

Presence: TypeAlias = PeerUp | PeerSuspected | PeerDown

# Seconds that a suspect is still waited for. Most objections come sooner, above all where a peer
# was only too busy to answer; and a round without it gives other numbers.
DOUBT = 0.5


class Lives:
    """In which life each of the others is; who was started again has died in between."""

    def __init__(self) -> None:
        self._known: dict[PeerId, int] = {}
        self._shown: dict[PeerId, int] = {}

    def meet(self, peer: PeerId, life: int) -> list[Presence]:
        """Take note of the life a peer has shown it is in; return what follows if it is a new one.

        What was told of lives after that is not true, and hides no new one.
        """
        known = self._known.get(peer, life)
        shown = self._shown.get(peer, known)
        self._shown[peer], self._known[peer] = max(shown, life), max(known, life)
        return _started_again(peer) if life > shown and life != known else []

    def events(self, change: Change) -> list[Presence]:
        """Return what a change means to a peer."""
        peer = change.peer
        life = life_of(change.incarnation)
        before = self._known.get(peer, life)
        self._known[peer] = max(before, life)
        again = _started_again(peer) if life > before else []
        match change.status:
            case Status.ALIVE:
                return again or [PeerUp(peer)]
            case Status.SUSPECT:
                return [*again, PeerSuspected(peer)]
        return [*again, PeerDown(peer)]


def _started_again(peer: PeerId) -> list[Presence]:
    return [PeerDown(peer), PeerUp(peer, anew=True)]
