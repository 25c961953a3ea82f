"""What was heard laid out by neighbour, for methods which keep something of every edge."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor

from p2pfl.algorithm import Inbox, R, Rows


class Edges(NamedTuple):
    """Which of those a row has heard is which of its neighbours."""

    at: Tensor  # [rows, k], int64: where each neighbour stands among those gathered
    there: Tensor  # [rows, k], bool: whether it was heard

    def of(self, block: Tensor) -> Tensor:
        """Return what was gathered, ``[rows, senders, ...]``, by neighbour, ``[rows, k, ...]``.

        Zeros where nothing was heard.
        """
        missing = (1,) * (block.ndim - 2)
        at = self.at.view(*self.at.shape, *missing).expand(-1, -1, *block.shape[2:])
        there = self.there.view(*self.there.shape, *missing)
        return block.gather(1, at).masked_fill(~there, 0)


def by_neighbour(inbox: Inbox[R], senders: Tensor, neighbours: Tensor) -> Edges:
    """Return where the neighbours stand in what `inbox` gathers; a row is none of its own.

    Args:
        inbox: what was heard.
        senders: who has said it, int64 ``[senders, 1]``.
        neighbours: of every row, as of `Rows`.
    """
    ids, mask = inbox.gather(senders)
    known = (neighbours >= 0).unsqueeze(2) & mask.unsqueeze(1)
    found = (ids.transpose(1, 2) == neighbours.unsqueeze(2)) & known
    return Edges(found.byte().argmax(2), found.any(2))


def neighbours_of(rows: Rows) -> Tensor:
    """Return the neighbours of the rows, ``[rows, k]``.

    Raises:
        ValueError: nobody has told them.
    """
    if rows.neighbours is None:
        raise ValueError("this algorithm must be told who the neighbours are (Rows.neighbours)")
    return rows.neighbours
