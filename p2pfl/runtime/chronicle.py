"""What has happened to the peers of a run, who noticed it when, and what it cost.

The emulator tells it as it goes; of real peers it is put together from what they have written
down. All times are seconds on one clock.
"""

from __future__ import annotations

import itertools
import statistics
from collections import Counter, defaultdict
from collections.abc import Sequence
from typing import Any

from p2pfl.churn.script import Happening
from p2pfl.membership.members import Status
from p2pfl.membership.swim import Statistics
from p2pfl.peer.events import PeerId


class Chronicle:
    """The story of a run.

    Args:
        absent: who is not there at the outset.

    Attributes:
        story: what was done, and when.
    """

    def __init__(self, absent: Sequence[PeerId] = ()) -> None:
        self._down, self._frozen = set(absent), set[PeerId]()
        self._side: dict[PeerId, int] = {}
        self.story: list[tuple[float, Happening]] = []
        self._crash: dict[PeerId, tuple[float, dict[PeerId, float], dict[PeerId, float]]] = {}
        self._back: dict[PeerId, tuple[float, dict[PeerId, float]]] = {}
        self._crashes: list[tuple[dict[PeerId, float], dict[PeerId, float]]] = []
        self._returns: list[dict[PeerId, float]] = []
        self._false: dict[Status, int] = dict.fromkeys(Status, 0)
        self._ends: dict[PeerId, list[float]] = defaultdict(list)
        self._spoken: list[Statistics] = []

    @property
    def is_eventful(self) -> bool:
        """Whether anything has happened."""
        return bool(self.story)

    def happened(self, time: float, happening: Happening) -> None:
        """Take note that something was done to the peers."""
        self.story.append((time, happening))
        match happening.kind:
            case "partition":
                groups = enumerate(happening.groups)
                self._side = {peer: side for side, group in groups for peer in group}
            case "heal":
                self._side = {}
            case kind:
                for peer in happening.nodes:
                    self._happened_to(time, peer, kind)

    def _happened_to(self, time: float, peer: PeerId, kind: str) -> None:
        match kind:
            case "kill":
                self._down.add(peer)
                self._crash[peer] = (time, {}, {})
                self._crashes.append(self._crash[peer][1:])
            case "leave":
                self._down.add(peer)
            case "join" | "restart":
                self._down.discard(peer)
                self._crash.pop(peer, None)
                self._back[peer] = (time, {})
                self._returns.append(self._back[peer][1])
            case "stop":
                self._frozen.add(peer)
            case "cont":
                self._frozen.discard(peer)

    def noticed(self, time: float, observer: PeerId, peer: PeerId, status: Status) -> None:
        """Take note of what one peer has come to believe of another."""
        if status is Status.ALIVE:
            if peer in self._back:
                since, seen = self._back[peer]
                seen.setdefault(observer, time - since)
        elif peer in self._crash:
            since, suspected, dead = self._crash[peer]
            suspected.setdefault(observer, time - since)
            if status is Status.DEAD:
                dead.setdefault(observer, time - since)
        elif status is not Status.LEFT and not self._is_excused(observer, peer):
            self._false[status] += 1

    def _is_excused(self, observer: PeerId, peer: PeerId) -> bool:
        """Say whether one of two cannot be heard by the other."""
        silent = self._frozen | self._down
        apart = self._side.get(observer) != self._side.get(peer)
        return peer in silent or observer in silent or apart

    def ended_round(self, time: float, peer: PeerId) -> None:
        """Take note that a peer has ended a round."""
        self._ends[peer].append(time)

    def spoke(self, statistics: Statistics) -> None:
        """Take note of what a membership machine has done in its life."""
        self._spoken.append(statistics)

    def summary(self, seconds: float) -> dict[str, Any]:
        """Return what a summary says; times in seconds.

        Args:
            seconds: how long the run has taken, on the same clock.
        """
        first = [min(dead.values()) for _, dead in self._crashes if dead]
        last = [max(dead.values()) for _, dead in self._crashes if dead]
        waits = [max(suspected.values()) for suspected, _ in self._crashes if suspected]
        back = [max(seen.values()) for seen in self._returns if seen]
        said = [Statistics(*map(sum, zip(*self._spoken, strict=True)))] if self._spoken else []
        lives = max(1, len(self._ends)) * max(seconds, 1e-9)
        return {
            "happenings": dict(sorted(Counter(one.kind for _, one in self.story).items())),
            "suspected_by_all_s": _spread(waits),
            "first_dead_s": _spread(first),
            "known_dead_to_all_s": _spread(last),
            "known_back_to_all_s": _spread(back),
            "false_suspicions": self._false[Status.SUSPECT],
            "false_deaths": self._false[Status.DEAD],
            "stall_s": _spread([_stall(ends) for ends in self._ends.values() if len(ends) > 1]),
            "membership_messages_per_s": sum(s.messages for s in said) / lives,
            "membership_bytes_per_s": sum(s.bytes for s in said) / lives,
        }


def _stall(ends: Sequence[float]) -> float:
    """Return for how long a peer has stood still: what its rounds took beyond twice the usual."""
    gaps = [b - a for a, b in itertools.pairwise(ends)]
    usual = statistics.median(gaps)
    return sum(max(0.0, gap - 2 * usual) for gap in gaps)


def _spread(values: Sequence[float]) -> dict[str, float] | None:
    """Return the middle and the worst of some numbers."""
    if not values:
        return None
    return {"median": statistics.median(values), "max": max(values)}
