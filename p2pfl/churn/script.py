"""What happens to peers and links in a run, checked and spelled out: the same for every runtime."""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Any, Literal

Kind = Literal[
    "kill",
    "stop",
    "cont",
    "leave",
    "join",
    "restart",
    "partition",
    "heal",
    "slow",
    "drop",
    "delay",
    "corrupt",
]


@dataclass(frozen=True, slots=True)
class Happening:
    """One thing that happens, at one moment; what lasts is ended by another happening.

    Attributes:
        kind: what happens.
        seconds: when, since the run began; None if it is by round.
        round: in which round, counted from 0; None if it is by time.
        nodes: who is concerned: kill, stop, cont, leave, join, restart, slow.
        groups: of a partition. Every node is in exactly one; those that the script does not
            name are together in the last.
        links: directed, ``(from, to)``: drop, delay, corrupt; None: all.
        value: slow: how many times slower, 1 ends it; drop, corrupt: the probability for a
            message; delay: seconds. Each replaces the value before it, and 0 ends a drop, delay
            or corrupt.
        line: where it stands in the file; 0 when drawn by a generator or taken from a trace.
    """

    kind: Kind
    seconds: float | None = None
    round: int | None = None
    nodes: tuple[int, ...] = ()
    groups: tuple[tuple[int, ...], ...] = ()
    links: tuple[tuple[int, int], ...] | None = None
    value: float = 0.0
    line: int = 0

    def about(self) -> dict[str, Any]:
        """Return all that is not as it is by default, by name."""
        told = ((field, getattr(self, field.name)) for field in fields(self))
        return {field.name: value for field, value in told if value != field.default}


@dataclass(frozen=True)
class Script:
    """All that happens in a run.

    Attributes:
        source: the file, or ``"churn"``; for messages.
        nodes: how many peers there are, founders and others.
        founders: who is there from the start.
        timed: what happens by time, in that order.
        by_round: what happens by round, in that order.
        remarks: what could not be checked beforehand, one line each.
    """

    source: str
    nodes: int
    founders: tuple[int, ...]
    timed: tuple[Happening, ...] = ()
    by_round: tuple[Happening, ...] = ()
    remarks: tuple[str, ...] = ()

    @property
    def happenings(self) -> tuple[Happening, ...]:
        """All of them: those by time, then those by round."""
        return self.timed + self.by_round
