"""A script laid out along one clock, for people to look at: who is there when, what is broken."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Literal, NamedTuple

from p2pfl.churn.lives import MOVES
from p2pfl.churn.script import Happening, Script
from p2pfl.churn.values import Clock

Look = Literal["up", "slow", "stopped", "away"]
LOOKS: tuple[Look, ...] = ("up", "slow", "stopped", "away")  # from good to bad
_LOOKS: dict[str, Look] = {"frozen": "stopped", "killed": "away", "left": "away"}
LINKS = ("drop", "delay", "corrupt")


class Span(NamedTuple):
    """From one moment to another, seconds or rounds, something looked like this."""

    start: float
    end: float
    look: str


class Track(NamedTuple):
    """A script along one clock.

    Attributes:
        clock: by time or by round.
        end: where it ends, in seconds or rounds.
        peers: for each node its spans, whose looks are those of `LOOKS`; they cover everything.
        faults: what is broken, by kind; each look says how. Only what is ever broken.
        there: when the number of peers that are there changes, and to what.
    """

    clock: Clock
    end: float
    peers: tuple[tuple[Span, ...], ...]
    faults: dict[str, tuple[Span, ...]]
    there: tuple[tuple[float, int], ...]


def tracks(script: Script, until: float | None = None) -> list[Track]:
    """Lay a script out along each clock it goes by; by time if nothing happens.

    Args:
        script: what happens.
        until: where the track by time ends, in seconds; by default after the last happening.
    """
    found = [_track(script, "round", script.by_round, None)] if script.by_round else []
    if script.timed or not found:
        found.insert(0, _track(script, "time", script.timed, until))
    return found


def _track(
    script: Script, clock: Clock, happenings: Iterable[Happening], until: float | None
) -> Track:
    moments = [(_when(one), one) for one in happenings]
    last = moments[-1][0] if moments else 0.0
    end = until or (last + 1 if clock == "round" else last * 1.05 or 60.0)
    moments = [(when, one) for when, one in moments if when < end]
    founders = set(script.founders)
    life: list[Look] = ["up" if node in founders else "away" for node in range(script.nodes)]
    slow = [False] * script.nodes
    peers = [_Line(look, end) for look in life]
    there = {0.0: len(founders)}
    for when, one in moments:
        for node in one.nodes:
            if one.kind == "slow":
                slow[node] = one.value > 1
            else:
                life[node] = _LOOKS.get(MOVES[one.kind][1], "up")
            peers[node].change(when, "slow" if slow[node] and life[node] == "up" else life[node])
        if one.kind in MOVES:
            there[when] = sum(look != "away" for look in life)
    return Track(
        clock,
        end,
        tuple(line.spans() for line in peers),
        _faults(moments, end),
        tuple(there.items()),
    )


def _faults(moments: list[tuple[float, Happening]], end: float) -> dict[str, tuple[Span, ...]]:
    lines = {kind: _Line("", end) for kind in ("partition", *LINKS)}
    strengths = {kind: _Strength() for kind in LINKS}
    for when, one in moments:
        if one.kind == "partition":
            lines["partition"].change(when, "|".join(str(len(group)) for group in one.groups))
        elif one.kind == "heal":
            lines["partition"].change(when, "")
        elif one.kind in LINKS:
            worst = strengths[one.kind].change(one)
            text = f"{worst:g} s" if one.kind == "delay" else f"{worst:.3g}"
            lines[one.kind].change(when, text if worst else "")
    spans = {kind: tuple(s for s in line.spans() if s.look) for kind, line in lines.items()}
    return {kind: found for kind, found in spans.items() if found}


def _when(one: Happening) -> float:
    return float(one.round) if one.seconds is None else one.seconds  # type: ignore[arg-type]


class _Line:
    """Spans, one after the other, until the end."""

    def __init__(self, look: str, end: float) -> None:
        self._end = end
        self._changes = [(0.0, look)]

    def change(self, when: float, look: str) -> None:
        if look != self._changes[-1][1]:
            self._changes.append((when, look))

    def spans(self) -> tuple[Span, ...]:
        ends = [when for when, _ in self._changes[1:]] + [self._end]
        return tuple(
            Span(start, end, look)
            for (start, look), end in zip(self._changes, ends, strict=True)
            if start < end
        )


class _Strength:
    """How badly links are broken: all of them, and those that are set by themselves."""

    def __init__(self) -> None:
        self._all = 0.0
        self._single: dict[tuple[int, int], float] = {}

    def change(self, one: Happening) -> float:
        """Take note of a change, and return the worst there now is."""
        if one.links is None:
            self._all, self._single = one.value, {}
        else:
            self._single.update(dict.fromkeys(one.links, one.value))
        return max([self._all, *self._single.values()])
