"""What there is to tell, and how often it was told."""

from __future__ import annotations

import heapq
import math

from p2pfl.membership.members import Claim

TOLD = 4  # times, and again for every tenfold of peers


def times(peers: int) -> int:
    """Return how often a claim is told by each of so many peers."""
    return TOLD * math.ceil(math.log10(peers + 1))


class Rumours:
    """Claims that are still to be told, at most one about each member: the latest."""

    def __init__(self) -> None:
        self._left: dict[int, tuple[Claim, int]] = {}

    def __len__(self) -> int:
        return len(self._left)

    def add(self, claim: Claim, peers: int) -> None:
        """Tell this from now on, among so many peers."""
        self._left.pop(claim.peer, None)
        self._left[claim.peer] = claim, times(peers)

    def take(self, most: int) -> list[Claim]:
        """Return what to tell now, what was told least first, then the latest; count it as told."""
        latest = reversed(self._left.values())
        fresh = heapq.nsmallest(most, latest, key=lambda entry: -entry[1])
        for claim, left in fresh:
            if left > 1:
                self._left[claim.peer] = claim, left - 1
            else:
                del self._left[claim.peer]
        return [claim for claim, _ in fresh]
