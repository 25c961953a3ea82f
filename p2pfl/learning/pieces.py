"""Rows that lie in several places: as they came in, when nothing more is done than to mix them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TypeAlias

import torch
from torch import Tensor

Columns: TypeAlias = Sequence[tuple[int, int]]  # where blocks of columns begin and end

BLOCK = 1 << 18  # numbers that are worked on while they are in the cache


class Pieces:
    """A row of d columns that lies in several places.

    Args:
        parts: its columns, ``[1, ...]`` each.
        columns: where each part begins and ends; the same for all rows of a field.
    """

    def __init__(self, parts: Sequence[Tensor], columns: Columns) -> None:
        self.parts, self.columns = parts, columns
        self.dtype, self.device = parts[0].dtype, parts[0].device

    def numel(self) -> int:
        """Return how many columns there are."""
        return self.columns[-1][1]


Row: TypeAlias = Tensor | Pieces


def parts_of(row: Row) -> Sequence[Tensor]:
    """Return the tensors a row consists of."""
    return row.parts if isinstance(row, Pieces) else (row,)


def blocks(rows: Sequence[Row]) -> Columns:
    """Return which columns to work on at a time: as rows have come, or as many as a cache holds."""
    for row in rows:
        if isinstance(row, Pieces):
            return row.columns
    d = rows[0].numel()
    return [(start, min(d, start + BLOCK)) for start in range(0, d, BLOCK)]


def cut(row: Row, k: int, start: int, stop: int) -> Tensor:
    """Return the columns of block `k` of a row, ``[1, stop - start]``; see `blocks`."""
    if isinstance(row, Pieces):
        return row.parts[k]
    return row if stop - start == row.numel() else row[:, start:stop]


def stacked(rows: Sequence[Row]) -> Tensor:
    """Return rows side by side, ``[len(rows), ...]``, in memory of their own."""
    whole = [row for row in rows if isinstance(row, Tensor)]
    if len(whole) == len(rows):
        return torch.cat(whole)
    first = rows[0]
    block = torch.empty((len(rows), first.numel()), dtype=first.dtype, device=first.device)
    for k, (start, stop) in enumerate(blocks(rows)):
        for there, row in zip(block, rows, strict=True):
            there[start:stop] = cut(row, k, start, stop)
    return block
