"""How long a suspect has to object."""

from __future__ import annotations

import math
from collections.abc import Sequence

from p2pfl.membership.timers import Timers


def scale(peers: int) -> float:
    """Return how much longer things take to reach all of so many peers."""
    return max(1.0, math.log10(peers))


class Suspicion:
    """One suspect's time: long while one peer accuses it, shorter with every other that does.

    Who accuses somebody alone is likely to have a problem itself. Few peers have nobody who
    could agree, and there the shortest time holds at once.

    Args:
        now: when it began.
        accuser: who began it.
        peers: how many are live, the suspect included.
        timers: sets the shortest and the longest time.

    Attributes:
        accusers: those who were counted.
        deadline: when the suspect is dead unless it objects.
    """

    def __init__(self, now: float, accuser: int, peers: int, timers: Timers) -> None:
        self._start = now
        self._shortest = timers.suspicion_mult * timers.probe * scale(peers)
        self._longest = timers.suspicion_max * self._shortest
        wanted = timers.suspicion_mult - 2
        self._wanted = wanted if 0 < wanted <= peers - 2 else 0
        self.accusers: Sequence[int] = (accuser,)

    @property
    def deadline(self) -> float:
        """When the suspect is dead unless it objects."""
        if not self._wanted:
            return self._start + self._shortest
        agreed = math.log(len(self.accusers)) / math.log(self._wanted + 1)
        return self._start + self._longest - agreed * (self._longest - self._shortest)

    def confirm(self, accuser: int) -> bool:
        """Count another accuser; return whether that was one more."""
        if accuser in self.accusers or len(self.accusers) > self._wanted:
            return False
        self.accusers = (*self.accusers, accuser)
        return True

    def postpone(self, seconds: float) -> None:
        """Give the suspect more time: we could not have heard it."""
        self._start += seconds
