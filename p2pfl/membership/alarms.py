"""What is to be done, and when."""

from __future__ import annotations

import heapq
import math
from collections.abc import Callable
from itertools import count
from typing import TypeAlias

SLACK = 64  # alarms called off that may stay in the heap, besides as many as are set

Alarm: TypeAlias = tuple[Callable[[float, int], None], int]  # what to call, and about whom


class Alarms:
    """Alarms, each set for one moment; those of the same moment go off in the order they were set.

    An alarm that is set again moves. Its old place in the heap is skipped when its turn comes;
    when most places are old, the heap is made anew.
    """

    def __init__(self) -> None:
        self._heap: list[tuple[float, int, Alarm]] = []
        self._current: dict[Alarm, int] = {}
        self._serial = count()

    def __contains__(self, alarm: Alarm) -> bool:
        return alarm in self._current

    def __len__(self) -> int:
        return len(self._current)

    def set(self, at: float, action: Callable[[float, int], None], about: int = 0) -> None:
        """Call `action(now, about)` at this time, and not when it was set for before."""
        self._current[action, about] = serial = next(self._serial)
        heapq.heappush(self._heap, (at, serial, (action, about)))
        if len(self._heap) > 2 * len(self._current) + SLACK:
            self._heap = [one for one in self._heap if self._current.get(one[2]) == one[1]]
            heapq.heapify(self._heap)

    def cancel(self, action: Callable[[float, int], None], about: int = 0) -> None:
        """Call it off, if it is set."""
        self._current.pop((action, about), None)

    def clear(self) -> None:
        """Call everything off."""
        self._current.clear()
        self._heap.clear()

    def due(self) -> float:
        """Return when the next goes off; infinite if none is set."""
        while self._heap and self._current.get(self._heap[0][2]) != self._heap[0][1]:
            heapq.heappop(self._heap)
        return self._heap[0][0] if self._heap else math.inf

    def ring(self, now: float) -> None:
        """Let everything go off that is due, also what is set for no later than now meanwhile."""
        while self.due() <= now:
            _, _, (action, about) = heapq.heappop(self._heap)
            del self._current[action, about]
            action(now, about)
