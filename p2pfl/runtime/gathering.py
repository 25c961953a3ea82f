"""Rows wait here until every live peer has ended their round, to be compared."""

from __future__ import annotations

import torch
from torch import Tensor

from p2pfl.peer.events import PeerId
from p2pfl.runtime.setup import Row
from p2pfl.runtime.sketch import distances


class Gathering:
    """The rounds that not all peers have ended yet.

    Args:
        live: the peers which are waited for.
    """

    def __init__(self, live: set[PeerId]) -> None:
        self._live = live
        self._rows: dict[int, dict[PeerId, tuple[Row, Tensor | None]]] = {}
        self._touched: set[int] = set()  # rounds which may have become complete

    def add(self, row: Row, mark: Tensor | None) -> None:
        """Take in a row with the sketch of its model, if there is one."""
        rows = self._rows.setdefault(row.round, {})
        rows[row.node] = (row, mark)
        if len(rows) >= len(self._live):
            self._touched.add(row.round)

    def leave(self, peer: PeerId) -> None:
        """Wait for this peer no longer; what it has reported stays."""
        self._live.discard(peer)
        self._touched.update(self._rows)

    def evaluated(self, peer: PeerId, round: int, loss: float, acc: float) -> None:
        """Write down how good a model was."""
        row, mark = self._rows[round][peer]
        self._rows[round][peer] = (row._replace(eval_loss=loss, eval_acc=acc), mark)

    def complete(self) -> list[int]:
        """Return the rounds which all peers have ended since this was last asked, in order."""
        if not self._touched:
            return []
        touched, self._touched = sorted(self._touched), set()
        return [round for round in touched if self._live <= self._rows[round].keys()]

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
