"""What a churn script has done so far: who runs, who is frozen, and what the links are like."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable

from p2pfl.churn.script import Happening, Script
from p2pfl.peer.events import PeerId
from p2pfl.runtime.network import NetworkModel

Ends = tuple[PeerId, PeerId]  # from, to

_LOST, _CORRUPTED = 5, 6  # tell lots apart from one another, and from those of the network


class Turmoil:
    """The faults that are in force in the emulator.

    Args:
        script: what is going to happen.
        network: draws what is lost.

    Attributes:
        down: who is not running: killed, gone, or not here yet.
        frozen: who is stopped, and since when.
    """

    def __init__(self, script: Script, network: NetworkModel) -> None:
        self._network = network
        self.down = set(range(script.nodes)) - set(script.founders)
        self.frozen: dict[PeerId, float] = {}
        self._is_calm = True  # whether nothing at all has befallen links so far
        self._slow: dict[PeerId, float] = {}
        self._side: dict[PeerId, int] = {}  # of a partition
        self._links: dict[str, _PerLink] = {
            kind: _PerLink() for kind in ("drop", "delay", "corrupt")
        }
        self._number: Counter[tuple[int, Ends]] = Counter()
        self.timed = list(script.timed)
        self._by_round = list(script.by_round)

    def due_by_round(self, round: int) -> Iterable[Happening]:
        """Take out what happens once somebody has come to a round."""
        due = [one for one in self._by_round if one.round is not None and one.round <= round]
        self._by_round = [one for one in self._by_round if one not in due]
        return due

    def set_links(self, happening: Happening) -> None:
        """Change what the links are like: partition, heal, drop, delay, corrupt, slow."""
        self._is_calm = False
        match happening.kind:
            case "partition":
                groups = enumerate(happening.groups)
                self._side = {peer: side for side, group in groups for peer in group}
            case "heal":
                self._side = {}
            case "slow":
                self._slow |= dict.fromkeys(happening.nodes, happening.value)
            case kind:
                self._links[kind].set(happening.links, happening.value)

    def slowness(self, peer: PeerId) -> float:
        """Return how many times slower than usual a peer computes."""
        return self._slow.get(peer, 1.0)

    def arrival(self, link: Ends, usual: float) -> float:
        """Draw when a message arrives that would at its usual time; ``inf``: it never does."""
        if self._is_calm or usual == math.inf:
            return usual
        lost = self.is_cut(link) or self._draw(_LOST, link, self._links["drop"].of(link))
        return math.inf if lost else usual + self._links["delay"].of(link)

    def corrupts(self, link: Ends) -> bool:
        """Draw whether a message is changed on its way, which its receiver notices."""
        return not self._is_calm and self._draw(_CORRUPTED, link, self._links["corrupt"].of(link))

    def is_cut(self, link: Ends) -> bool:
        """Say whether a partition lies between two peers."""
        return bool(self._side) and self._side.get(link[0]) != self._side.get(link[1])

    def _draw(self, use: int, link: Ends, share: float) -> bool:
        if not share:
            return False
        self._number[use, link] += 1
        return self._network.lot(use, link, self._number[use, link]) < share


class _PerLink:
    """A number for every link: some have one of their own."""

    def __init__(self) -> None:
        self._all, self._own = 0.0, dict[Ends, float]()

    def set(self, links: Iterable[Ends] | None, value: float) -> None:
        if links is None:
            self._all, self._own = value, {}
        else:
            self._own |= dict.fromkeys(links, value)

    def of(self, link: Ends) -> float:
        return self._own.get(link, self._all)
