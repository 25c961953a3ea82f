"""The story of a run of processes: what was done to them, and what they say they noticed.

News come in any order, and a `Chronicle` wants to be told in the order of time.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from operator import itemgetter
from typing import Any

from p2pfl.churn.script import Happening
from p2pfl.membership.members import Status
from p2pfl.membership.swim import Statistics
from p2pfl.runtime.chronicle import Chronicle


class Story:
    """Keeps what has happened, until it is told. Times are monotonic.

    Args:
        absent: who is not there at the outset.
    """

    def __init__(self, absent: Sequence[int]) -> None:
        self._chronicle = Chronicle(absent)
        self._known: list[tuple[float, Callable[[float], None]]] = []

    def happened(self, happening: Happening) -> None:
        """Take note that something was done just now."""
        self._keep(lambda at: self._chronicle.happened(at, happening))

    def ended_round(self, peer: int) -> None:
        """Take note that a peer has ended a round just now."""
        self._keep(lambda at: self._chronicle.ended_round(at, peer))

    def noticed(self, observer: int, peer: int, status: str, at: float) -> None:
        """Take note of what one peer has come to believe of another, and when."""
        believed = Status[status.upper()]
        self._known.append((at, lambda at: self._chronicle.noticed(at, observer, peer, believed)))

    def spoke(self, statistics: Mapping[str, int]) -> None:
        """Take note of what the membership machine of a peer has done in its life."""
        self._chronicle.spoke(Statistics(**statistics))

    def summary(self, began: float) -> dict[str, Any]:
        """Tell it all, which is possible once, and return what a summary says.

        Args:
            began: when time begins to count.
        """
        ended = began
        for ended, tell in sorted(self._known, key=itemgetter(0)):
            tell(ended - began)
        return self._chronicle.summary(ended - began)

    def _keep(self, tell: Callable[[float], None]) -> None:
        self._known.append((time.monotonic(), tell))
