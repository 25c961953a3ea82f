"""Who is there: what may happen to a peer in which state, and what becomes of it.

A peer has two states. One follows the written events alone: by it they are checked, so that a
script is right or wrong whatever a generator draws. The other is what comes of it together with
the outages that were generated: a peer is there when the events and all generators say so.
"""

from __future__ import annotations

from collections.abc import Container, Iterable
from typing import Literal, NamedTuple

from p2pfl.churn.outages import How
from p2pfl.churn.script import Kind

State = Literal["up", "frozen", "killed", "left", "absent"]

THERE: tuple[State, ...] = ("up", "frozen")
# In which states something may happen to a peer, and which state comes of it.
MOVES: dict[Kind, tuple[tuple[State, ...], State]] = {
    "kill": (("up", "frozen"), "killed"),
    "stop": (("up",), "frozen"),
    "cont": (("frozen",), "up"),
    "leave": (("up",), "left"),
    "join": (("left", "absent"), "up"),
    "restart": (("killed",), "up"),
}
# How one that is away comes back.
BACK: dict[State, Kind] = {"killed": "restart", "left": "join", "absent": "join"}
_TOLD: dict[State, str] = {
    "up": "is there",
    "frozen": "is stopped",
    "killed": "has been killed",
    "left": "has left",
    "absent": "is not there yet",
}


class Move(NamedTuple):
    """What really happens to some peers."""

    kind: Kind
    nodes: tuple[int, ...]


class Lives:
    """The states of all peers.

    Attributes:
        there: how many are there, running or stopped.
    """

    def __init__(self, n: int, late: Container[int]) -> None:
        """Begin with n peers, of which those that are `late` join by an event."""
        self._written: list[State] = ["absent" if node in late else "up" for node in range(n)]
        self._real = list(self._written)
        self._outages = [0] * n
        self.there = self._real.count("up")

    def is_there(self, node: int) -> bool:
        """Say whether a node is there, running or stopped."""
        return self._real[node] in THERE

    @property
    def anybody_runs(self) -> bool:
        """Whether somebody is there that is not stopped."""
        return "up" in self._real

    def objection(self, kind: Kind, node: int) -> str | None:
        """Return why, by what is written, something cannot happen to a node; None: it can."""
        state = self._written[node]
        if kind not in MOVES or state in MOVES[kind][0]:
            return None
        hint = f"; let it {BACK[state]}" if kind in ("join", "restart") and state in BACK else ""
        return f"node {node} {_TOLD[state]}{hint}"

    def can(self, kind: Kind) -> list[int]:
        """Return to whom, all considered, something can happen and has an effect."""
        everybody = range(len(self._real))
        if kind not in MOVES:
            return [node for node in everybody if self.is_there(node)]
        before = MOVES[kind][0]
        back = kind in ("join", "restart")
        return [
            node
            for node in everybody
            if self._written[node] in before and (back or self._real[node] in before)
        ]

    def write(self, kind: Kind, nodes: Iterable[int]) -> list[Move]:
        """Let a written event happen, which nothing speaks against; return what comes of it."""
        before, after = MOVES[kind]
        moves: list[Move] = []
        for node in nodes:
            self._written[node] = after
            if kind in ("join", "restart"):
                moves += self._come(node)
            elif self._real[node] in before:
                moves.append(self._go(kind, node))
        return moves

    def is_last(self, node: int) -> bool:
        """Say whether nobody would be there without this node."""
        return self.is_there(node) and self.there == 1

    def begin_outage(self, node: int, how: How, at: float) -> list[Move]:
        """Take a node away; at time 0 it has never been there."""
        self._outages[node] += 1
        if not self.is_there(node):
            return []
        if at == 0:
            self._set(node, "absent")
            return []
        return [self._go(how if self._real[node] == "up" else "kill", node)]  # frozen: no goodbye

    def end_outage(self, node: int) -> list[Move]:
        """Bring a node back, if nothing else keeps it away."""
        self._outages[node] -= 1
        return self._come(node)

    def _come(self, node: int) -> list[Move]:
        state = self._real[node]
        if self._outages[node] or self._written[node] not in THERE or state in THERE:
            return []
        self._set(node, "up")
        return [Move(BACK[state], (node,))]

    def _go(self, kind: Kind, node: int) -> Move:
        self._set(node, MOVES[kind][1])
        return Move(kind, (node,))

    def _set(self, node: int, state: State) -> None:
        self.there += (state in THERE) - (self._real[node] in THERE)
        self._real[node] = state


def joined(moves: list[Move]) -> list[Move]:
    """Put moves of the same kind into one."""
    kinds = dict.fromkeys(move.kind for move in moves)
    return [
        Move(kind, tuple(node for move in moves if move.kind == kind for node in move.nodes))
        for kind in kinds
    ]
