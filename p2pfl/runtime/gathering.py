"""Rows wait here until every live peer has ended their round, to be compared."""

from __future__ import annotations

from collections import Counter

import torch
from torch import Tensor

from p2pfl.peer.events import PeerId
from p2pfl.runtime.setup import Row
from p2pfl.runtime.sketch import distances


class Gathering:
    """The rounds that not all peers have ended yet.

    Peers end rounds in ascending order, but may leave some out.

    Args:
        live: the peers which are waited for.
    """

    def __init__(self, live: set[PeerId]) -> None:
        self._last = dict.fromkeys(sorted(live), -1)  # round of each live peer
        self._count = Counter(self._last.values())
        self._floor = -1  # the last round that everybody has ended
        self._rows: dict[int, dict[PeerId, tuple[Row, Tensor | None]]] = {}

    def add(self, row: Row) -> None:
        """Take in a row."""
        self._rows.setdefault(row.round, {})[row.node] = (row, None)
        if row.node in self._last:
            self._count[self._last[row.node]] -= 1
            self._last[row.node] = row.round
            self._count[row.round] += 1

    def join(self, peer: PeerId, round: int) -> None:
        """Wait for one more peer, whose first round is to be this one."""
        self.leave(peer)
        self._last[peer] = round - 1
        self._count[round - 1] += 1

    def leave(self, peer: PeerId) -> None:
        """Wait for this peer no longer; what it has reported stays."""
        if peer in self._last:
            self._count[self._last.pop(peer)] -= 1

    def marked(self, peer: PeerId, round: int, mark: Tensor) -> None:
        """Write down the sketch of a model."""
        row, _ = self._rows[round][peer]
        self._rows[round][peer] = (row, mark)

    def evaluated(self, peer: PeerId, round: int, loss: float, acc: float) -> None:
        """Write down how good a model was."""
        row, mark = self._rows[round][peer]
        self._rows[round][peer] = (row._replace(eval_loss=loss, eval_acc=acc), mark)

    def complete(self) -> list[int]:
        """Return the rounds which all peers have ended since this was last asked, in order."""
        if self._count[self._floor] or not self._rows:
            return []
        ended = min(self._last.values(), default=max(self._rows))
        self._floor = max(self._floor, ended)
        return sorted(round for round in self._rows if round <= ended)

    def rest(self) -> list[int]:
        """Return the rounds which some peers never ended, in order."""
        return sorted(self._rows)

    def compared(self, round: int) -> list[Row]:
        """Hand over the rows of a round; with distances if all its models were sketched."""
        held = self._rows.pop(round)
        rows = [row for row, _ in held.values()]
        marks = [mark for _, mark in held.values() if mark is not None]
        if len(marks) == len(rows):
            far = distances(torch.cat(marks)).tolist()
            rows = [
                row._replace(consensus_distance=one) for row, one in zip(rows, far, strict=True)
            ]
        return sorted(rows, key=lambda row: row.node)
