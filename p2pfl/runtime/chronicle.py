"""What has happened to the peers of a run, who noticed it when, and what it cost.

The emulator tells it as it goes; of real peers it is put together from what they have written
down. All times are seconds on one clock, and everything is told in the order of time.
"""

from __future__ import annotations

import itertools
import math
import statistics
from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

from p2pfl.churn.script import Happening
from p2pfl.membership.members import Status
from p2pfl.membership.swim import Statistics
from p2pfl.peer.events import PeerId

# Seconds for which rumours of what was true until a moment ago may still arrive: a member is
# gossiped about for 0.4 s at most among ten peers, for 1.2 s among a thousand.
AFTERMATH = 2.0


@dataclass
class _Case:
    """A peer was killed, left, or came: since when, and how long it took others to know."""

    kind: str
    since: float
    known: dict[Status, dict[PeerId, float]] = field(
        default_factory=lambda: {status: {} for status in Status}
    )

    def first(self, status: Status) -> float | None:
        return min(self.known[status].values(), default=None)

    def last(self, status: Status) -> float | None:
        return max(self.known[status].values(), default=None)


@dataclass
class _Split:
    """A partition: from when to when, and who was on which side."""

    since: float
    groups: tuple[tuple[PeerId, ...], ...]
    until: float = math.inf

    def __post_init__(self) -> None:
        self._side = {peer: side for side, group in enumerate(self.groups) for peer in group}
        self._most = max(map(len, self.groups))

    def parts(self, a: PeerId, b: PeerId) -> bool:
        return self._side.get(a) != self._side.get(b)

    def cuts_off(self, peer: PeerId) -> bool:
        """Say whether a peer is on a side with fewer peers than another."""
        return peer in self._side and len(self.groups[self._side[peer]]) < self._most


class Chronicle:
    """The story of a run.

    Args:
        absent: who is not there at the outset.

    Attributes:
        story: what was done, and when.
    """

    def __init__(self, absent: Sequence[PeerId] = ()) -> None:
        self.story: list[tuple[float, Happening]] = []
        self._down, self._frozen = set(absent), set[PeerId]()  # down: also who is done
        self._harmed = set(absent)  # to whom anything was ever done
        self._well_since = dict.fromkeys(absent, math.inf)  # able to hear and speak; inf: is not
        self._splits: list[_Split] = []
        self._cases: list[_Case] = []
        self._newest: dict[PeerId, _Case] = {}
        self._accused: list[tuple[float, PeerId, Status]] = []  # of those who could be heard
        self._ends: dict[PeerId, list[float]] = defaultdict(list)
        self._came: dict[PeerId, float] = {}
        self._lived = 0.0  # seconds, of all lives that have ended
        self._spoken: list[Statistics] = []

    def happened(self, time: float, happening: Happening) -> None:
        """Take note that something was done to the peers.

        What cannot happen to a peer as things are, as a kill to one that is down, is no harm.
        """
        self.story.append((time, happening))
        match happening.kind:
            case "partition" | "heal":
                if self._splits:
                    self._splits[-1].until = min(self._splits[-1].until, time)
                if happening.groups:
                    self._splits.append(_Split(time, happening.groups))
            case kind:
                for peer in happening.nodes:
                    self._happened_to(time, peer, kind)

    def _happened_to(self, time: float, peer: PeerId, kind: str) -> None:
        if (peer in self._down) != (kind in ("join", "restart")):
            return
        self._harmed.add(peer)
        match kind:
            case "kill" | "leave":
                self._ended(time, peer)
                self._open(kind, time, peer)
            case "join" | "restart":  # it is well when somebody has heard of it
                self._down.discard(peer)
                self._came[peer] = time
                self._open(kind, time, peer)
            case "stop":
                self._frozen.add(peer)
                self._well_since[peer] = math.inf
            case "cont" if peer in self._frozen:
                self._frozen.discard(peer)
                self._well_since[peer] = time

    def _ended(self, time: float, peer: PeerId) -> None:
        self._down.add(peer)
        self._frozen.discard(peer)
        self._well_since[peer] = math.inf
        self._lived += time - self._came.get(peer, 0.0)

    def _open(self, kind: str, time: float, peer: PeerId) -> None:
        self._newest[peer] = case = _Case(kind, time)
        self._cases.append(case)

    def noticed(self, time: float, observer: PeerId, peer: PeerId, status: Status) -> None:
        """Take note of what one peer has come to believe of another."""
        is_running = peer not in self._down and peer not in self._frozen
        if status is Status.ALIVE and is_running and self._well_since.get(peer) == math.inf:
            self._well_since[peer] = time
        case = self._newest.get(peer)
        if case and self._could_watch(observer, peer, case.since):
            case.known[status].setdefault(observer, time - case.since)
            if status is Status.DEAD:  # graver than a suspicion, which may have been skipped
                case.known[Status.SUSPECT].setdefault(observer, time - case.since)
        since = time - AFTERMATH
        if not self._is_well(peer, since):
            return
        if status is Status.LEFT:  # nobody has told it to: it has come to its end
            self._ended(time, peer)
        elif status is not Status.ALIVE and self._could_watch(observer, peer, since):
            self._accused.append((time, peer, status))

    def _is_well(self, peer: PeerId, since: float) -> bool:
        """Say whether a peer has been there all the time since then, and not frozen."""
        return self._well_since.get(peer, -math.inf) <= since

    def _could_watch(self, observer: PeerId, peer: PeerId, since: float) -> bool:
        """Say whether an observer has been well since then, and not parted from a peer."""
        parted = any(split.until > since and split.parts(observer, peer) for split in self._splits)
        return self._is_well(observer, since) and not parted

    def ended_round(self, time: float, peer: PeerId) -> None:
        """Take note that a peer has ended a round."""
        self._ends[peer].append(time)

    def spoke(self, statistics: Statistics) -> None:
        """Take note of what a membership machine has done in its life."""
        self._spoken.append(statistics)

    def summary(self, seconds: float) -> dict[str, Any]:
        """Return what a summary says.

        Times are in seconds, and those of a `median` and a `max` are null where there is
        nothing to count. How long it took to know something is measured on observers that were
        there all the while, neither frozen nor behind a partition; "all" are those of them that
        came to know it before the run ended or the next thing happened to that peer.

        ==============================  =========================================================
        ``first_s``                     when the first thing happened, from the start of the run
        ``happenings``                  how much happened, by kind
        ``first_suspected_s``           from a kill until the first peer suspected it
        ``suspected_by_all_s``          ... until all did, who stopped waiting for it by that
        ``first_dead_s``                ... until the first took it for dead
        ``known_dead_to_all_s``         ... until all did, who left it out of the topology by that
        ``unnoticed_kills``             kills that nobody suspected in time
        ``known_left_to_all_s``         from a leave until all had heard its goodbye
        ``known_back_to_all_s``         from a restart or join until all knew the peer to be there
        ``false_suspicions``            how often a peer came to suspect one that was there and
                                        that it could hear: not frozen, not behind a partition,
                                        and alive by the proof of a round it ended later; also by
                                        hearsay, as it goes round for a while after a partition
        ``false_deaths``                ... took such a peer for dead
        ``survivors``                   peers to which nothing was done (a partition or a bad link
                                        is not counted for that)
        ``stall_s``                     for how long each of them stood still: what its rounds
                                        took beyond twice its usual (median) time, summed up;
                                        without the time that it was cut off by a partition, on a
                                        side with fewer peers than another
        ``membership_messages_per_s``   sent for membership by each peer, for every second that
                                        it was there
        ``membership_bytes_per_s``      ... bytes; processes that were killed cannot tell theirs
        ==============================  =========================================================

        Args:
            seconds: how long the run has taken, on the same clock.
        """
        kills = [case for case in self._cases if case.kind == "kill"]
        leaves = [case for case in self._cases if case.kind == "leave"]
        returns = [case for case in self._cases if case.kind in ("join", "restart")]
        stalls = self._stalls()
        said = Statistics(*map(sum, zip(*self._spoken, strict=True))) if self._spoken else None
        there = max(self._time_there(seconds), 1e-9)
        return {
            "first_s": self.story[0][0] if self.story else None,
            "happenings": dict(sorted(Counter(one.kind for _, one in self.story).items())),
            "first_suspected_s": _spread(case.first(Status.SUSPECT) for case in kills),
            "suspected_by_all_s": _spread(case.last(Status.SUSPECT) for case in kills),
            "first_dead_s": _spread(case.first(Status.DEAD) for case in kills),
            "known_dead_to_all_s": _spread(case.last(Status.DEAD) for case in kills),
            "unnoticed_kills": sum(not case.known[Status.SUSPECT] for case in kills),
            "known_left_to_all_s": _spread(case.last(Status.LEFT) for case in leaves),
            "known_back_to_all_s": _spread(case.last(Status.ALIVE) for case in returns),
            "false_suspicions": self._falsely(Status.SUSPECT),
            "false_deaths": self._falsely(Status.DEAD),
            "survivors": len(stalls),
            "stall_s": _spread(stalls),
            "membership_messages_per_s": said.messages / there if said else 0.0,
            "membership_bytes_per_s": said.bytes / there if said else 0.0,
        }

    def _falsely(self, status: Status) -> int:
        """Count the accusations of peers that went on to end a round."""
        return sum(
            as_what is status and max(self._ends.get(peer, ()), default=0.0) > time
            for time, peer, as_what in self._accused
        )

    def _stalls(self) -> list[float]:
        """Return for how long each peer to which nothing was done has stood still."""
        stalls = []
        for peer in self._ends.keys() - self._harmed:
            cuts = [(s.since, s.until) for s in self._splits if s.cuts_off(peer)]
            stalls.append(_stall(self._ends[peer], cuts))
        return stalls

    def _time_there(self, seconds: float) -> float:
        """Return for how long peers have been there, all together."""
        there = self._ends.keys() - self._down
        return self._lived + sum(seconds - self._came.get(peer, 0.0) for peer in there)


def _stall(ends: Sequence[float], cuts: Sequence[tuple[float, float]]) -> float:
    """Return for how long a peer has stood still, the time that it was cut off left out."""
    gaps = list(itertools.pairwise(ends))
    usual = statistics.median(b - a for a, b in gaps) if gaps else 0.0
    stall = 0.0
    for a, b in gaps:
        off = sum(max(0.0, min(b, until) - max(a, since)) for since, until in cuts)
        stall += max(0.0, b - a - off - 2 * usual)
    return stall


def _spread(values: Iterable[float | None]) -> dict[str, float] | None:
    """Return the middle and the worst of what is known."""
    known = [value for value in values if value is not None]
    if not known:
        return None
    return {"median": statistics.median(known), "max": max(known)}
