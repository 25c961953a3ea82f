"""How often something is done for somebody who may ask for it without end."""

from __future__ import annotations


class Ration:
    """So many at once for each, and then one more only now and then.

    Args:
        most: how many at once.
        every: seconds until there is one more.
    """

    def __init__(self, most: int, every: float) -> None:
        self._saved, self._every = (most - 1) * every, every
        self._until: dict[int, float] = {}  # when each has all again

    def wait(self, now: float, who: int) -> float:
        """Return how many seconds somebody has to wait for the next."""
        return max(0.0, self._until.get(who, now) - self._saved - now)

    def take(self, now: float, who: int) -> None:
        """Count one as taken."""
        self._until[who] = max(now, self._until.get(who, now)) + self._every
