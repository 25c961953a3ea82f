"""From what is written and generated to what happens: one walk through all of it, in order.

The walk goes through the events in the order of the file. Before each it lets happen what is
due by the same clock: the ends of what lasts, and the outages that were generated. On the way it
draws who is meant by "random 2", and refuses what cannot be.
"""

from __future__ import annotations

import heapq
import math
from collections.abc import Iterable
from typing import NamedTuple

from p2pfl.churn.lives import MOVES, Lives, Move, joined
from p2pfl.churn.outages import Outage, lots
from p2pfl.churn.reading import Event, blamed_on
from p2pfl.churn.script import Happening, Kind, Script
from p2pfl.churn.values import Clock
from p2pfl.errors import UserError

MOST_LINKS = 1_000_000
_EVENTS = 1 << 20  # tells the lots of events from those of generators
_ENDS: dict[Kind, Kind] = {"kill": "restart", "stop": "cont", "leave": "join", "partition": "heal"}
_MIXED = (
    "some happens by time and some by round; which comes first is not known before the run: checked"
    " in the order of the file, generators and traces last"
)
Links = tuple[tuple[int, int], ...]


class Target(NamedTuple):
    """Whom or what an event is about, once everybody is drawn."""

    nodes: tuple[int, ...] = ()
    groups: tuple[tuple[int, ...], ...] = ()
    links: Links | None = None


class Lasting(NamedTuple):
    """What an event has done, and when it ends by itself."""

    event: Event
    target: Target
    end: float

    def told(self) -> str:
        """Return what it is and until when, for messages."""
        until = f"round {self.end:g}" if self.event.clock == "round" else f"{self.end:g} s"
        return f"the {self.event.kind} of {self.event.place.where} lasts until {until}"


def expand(
    source: str, n: int, seed: int, events: list[Event], outages: Iterable[Outage]
) -> Script:
    """Return what happens.

    Args:
        source: the file, for messages.
        n: how many peers there are.
        seed: draws who is meant.
        events: in the order of the file.
        outages: as generated, in any order. One that would leave nobody is left out.

    Raises:
        UserError: an event cannot be; the message says where it stands, and why.
    """
    late = _late(events)
    if len(late) == n:
        raise UserError(f"{source}: all {n} peers join later; nobody is there to begin with")
    walk = _Walk(n, seed, late, outages)
    founders = tuple(node for node in range(n) if walk.lives.is_there(node))
    timeless = walk.is_timeless and all(event.clock == "round" for event in events)
    for number, event in enumerate(events):
        with blamed_on(event.place):
            walk.take(event, number)
            if timeless and not walk.lives.anybody_runs:
                raise ValueError(f"{event.text} would stop the last one: no further round comes")
    walk.finish()
    mixed = bool(walk.by_round) and bool(walk.timed)
    remarks = (_MIXED,) if mixed else ()
    return Script(source, n, founders, tuple(walk.timed), tuple(walk.by_round), remarks)


def _late(events: list[Event]) -> set[int]:
    """Return those who join before anything else happens to them."""
    first: dict[int, Kind] = {}
    for event in events:
        if event.kind in MOVES and event.nodes is not None:
            for node in event.nodes.named or ():
                first.setdefault(node, event.kind)
    return {node for node, kind in first.items() if kind == "join"}


class _Walk:
    """How far we are, and what is in force there."""

    def __init__(self, n: int, seed: int, late: set[int], outages: Iterable[Outage]) -> None:
        self.timed: list[Happening] = []
        self.by_round: list[Happening] = []
        self.lives = Lives(n, late)
        self._n, self._seed = n, seed
        self._now: dict[Clock, float] = {"time": 0.0, "round": 0.0}
        self._lasting: list[Lasting] = []
        self._partition: Event | None = None
        self._outages = sorted(outages, reverse=True)  # the next one stands last
        self._returns: list[tuple[float, int]] = []  # a heap: when outages end, and whose
        self._let_happen("time", 0.0)

    def take(self, event: Event, number: int) -> None:
        """Let an event happen, after all that is due by then."""
        if event.at < self._now[event.clock]:
            unit = "s" if event.clock == "time" else "rounds"
            before = f"{self._now[event.clock]:g}"
            raise ValueError(
                f"at = {event.at:g} {unit} is before the event above it, at {before}; expected"
                " events in the order of time"
            )
        self._let_happen(event.clock, event.at)
        target = self._target(event, number)
        for other in self._of_family(event):
            if _overlap(event, target, other.target):
                raise ValueError(f"{event.text}: {other.told()}")
        self._check(event)
        self._do(event.kind, event, target, event.value, event.at)
        if not self.lives.there:
            raise ValueError(f"{event.text} would leave nobody")
        if event.lasting is not None:
            self._lasting.append(Lasting(event, target, event.at + event.lasting))

    @property
    def is_timeless(self) -> bool:
        """Whether nothing was generated, which happens by time."""
        return not (self._outages or self._returns)

    def finish(self) -> None:
        """Let happen what is still to come."""
        self._let_happen("round", math.inf)
        self._let_happen("time", math.inf)

    def _target(self, event: Event, number: int) -> Target:
        nodes = self._nodes(event, number)
        if event.kind == "partition":
            groups = event.groups or (nodes,)
            named = {node for group in groups for node in group}
            rest = tuple(node for node in range(self._n) if node not in named)
            groups += (rest,) if rest else ()
            if len(groups) < 2:
                raise ValueError(f"{event.text} cuts nobody off")
            return Target(groups=groups)
        if event.kind in ("drop", "delay", "corrupt"):
            return Target(links=event.links if event.nodes is None else self._links_of(nodes))
        return Target(nodes)

    def _nodes(self, event: Event, number: int) -> tuple[int, ...]:
        """Return who is meant; draw them if the event leaves it open."""
        if event.nodes is None:
            return ()
        named, count = event.nodes
        if named is not None:
            return named
        busy = {node for other in self._of_family(event) for node in other.target.nodes}
        can = tuple(node for node in self.lives.can(event.kind) if node not in busy)
        if len(can) < (count or 1):
            raise ValueError(f"{event.text}: there are only {len(can)} to whom that can happen")
        return lots(self._seed, _EVENTS + number, 0, can, count or len(can))

    def _links_of(self, nodes: tuple[int, ...]) -> Links:
        """Return all links from and to some nodes."""
        if (count := 2 * len(nodes) * self._n) > MOST_LINKS:
            raise ValueError(f"these are about {count:,} links; expected links = 'all'")
        theirs = set(nodes)
        everybody = range(self._n)
        return tuple(
            (a, b) for a in everybody for b in everybody if a != b and (a in theirs or b in theirs)
        )

    def _of_family(self, event: Event) -> list[Lasting]:
        """Return what lasts and concerns the same: lives, the partition, speeds, drops ..."""
        return [one for one in self._lasting if _family(one.event.kind) == _family(event.kind)]

    def _check(self, event: Event) -> None:
        """Refuse what cannot happen in the state that the events before have made."""
        for node in (event.nodes and event.nodes.named) or ():
            if objection := self.lives.objection(event.kind, node):
                raise ValueError(f"{event.text}: {objection}")
        if event.kind == "heal" and self._partition is None:
            raise ValueError("heal: there is no partition")
        if event.kind == "partition" and self._partition is not None:
            raise ValueError(f"partition: that of {self._partition.place.where} has not healed")

    def _do(self, kind: Kind, event: Event, target: Target, value: float, at: float) -> None:
        """Let something happen, as an event says or because what it began is over."""
        line = event.place.line
        if kind in MOVES:
            self._note(event.clock, at, self.lives.write(kind, target.nodes), line)
            return
        if kind in ("partition", "heal"):
            self._partition = event if kind == "partition" else None
        self._found(event.clock).append(_at(event.clock, at, kind, target, value, line))

    def _let_happen(self, clock: Clock, to: float) -> None:
        """Go on by one clock, and let happen what is due until then, that moment included."""
        while (due := self._due(clock)) <= to and due < math.inf:
            for one in [o for o in self._lasting if o.event.clock == clock and o.end == due]:
                self._lasting.remove(one)
                kind = one.event.kind
                ended = float(kind == "slow")
                target = one.target if kind != "partition" else Target()
                self._do(_ENDS.get(kind, kind), one.event, target, ended, due)
            if clock == "time":
                self._note(clock, due, self._change(due), 0)
        self._now[clock] = to

    def _due(self, clock: Clock) -> float:
        """Return when the next thing happens by itself."""
        times = [one.end for one in self._lasting if one.event.clock == clock]
        if clock == "time" and self._returns:
            times.append(self._returns[0][0])
        if clock == "time" and self._outages:
            times.append(self._outages[-1].start)
        return min(times, default=math.inf)

    def _change(self, now: float) -> list[Move]:
        """End and begin outages; first those that end, so that there is always somebody."""
        moves: list[Move] = []
        while self._returns and self._returns[0][0] == now:
            moves += self.lives.end_outage(heapq.heappop(self._returns)[1])
        while self._outages and self._outages[-1].start == now:
            outage = self._outages.pop()
            if not self.lives.is_last(outage.node):
                moves += self.lives.begin_outage(outage.node, outage.how, now)
                heapq.heappush(self._returns, (outage.end, outage.node))
        return moves

    def _note(self, clock: Clock, at: float, moves: list[Move], line: int) -> None:
        for kind, nodes in joined(moves):
            self._found(clock).append(_at(clock, at, kind, Target(nodes), 0.0, line))

    def _found(self, clock: Clock) -> list[Happening]:
        return self.timed if clock == "time" else self.by_round


def _at(clock: Clock, at: float, kind: Kind, target: Target, value: float, line: int) -> Happening:
    seconds, round = (at, None) if clock == "time" else (None, int(at))
    return Happening(kind, seconds, round, *target, value, line)


def _family(kind: Kind) -> str:
    if kind in MOVES:
        return "life"
    return "partition" if kind == "heal" else kind


def _overlap(event: Event, one: Target, other: Target) -> bool:
    """Say whether two targets of the same family of events have something in common."""
    if event.kind in MOVES or event.kind == "slow":
        return not set(one.nodes).isdisjoint(other.nodes)
    if one.links is None or other.links is None:  # all links; or partitions, which concern all
        return True
    return not set(one.links).isdisjoint(other.links)
