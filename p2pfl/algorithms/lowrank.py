"""Matrix parameters seen from either side, by turns, for `powergossip`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import pad

from p2pfl.learning.spec import Spec

LOST = 1e3  # times the precision: a column of which less is left is a sum of those before it


class Matrix(NamedTuple):
    """Where a matrix lies in the vector of parameters, and which side's basis comes first."""

    start: int
    m: int
    n: int
    right_first: bool

    def sides(self, turn: int) -> tuple[int, int]:
        """Return the length of the side whose basis it is in a turn, and of the other one."""
        return (self.n, self.m) if self.is_right(turn) else (self.m, self.n)

    def is_right(self, turn: int) -> bool:
        """Say whether a turn's basis is of the columns."""
        return (turn % 2 == 1) != self.right_first

    def of(self, x: Tensor, turn: int) -> Tensor:
        """Return a view of it, the side of the basis first, ``[rows, d] -> [rows, a, b]``."""
        matrix = x[:, self.start : self.start + self.m * self.n].view(len(x), self.m, self.n)
        return matrix.transpose(1, 2) if self.is_right(turn) else matrix


class Layout(NamedTuple):
    """Which parameters are compressed, and how their bases lie one after the other.

    What is said in one turn lies as the bases of the next one do.

    Attributes:
        rank: the columns of a basis.
        matrices: what is compressed.
        whole: where all other parameters lie, int64 ``[v]``.
        width: the entries of all bases, in the turn which has more of them.
    """

    rank: int
    matrices: tuple[Matrix, ...]
    whole: Tensor
    width: int

    @classmethod
    def of(cls, spec: Spec, rank: int) -> Layout:
        """Return the layout of a model; kernels are matrices of outputs by all the rest."""
        matrices: list[Matrix] = []
        whole, start, ahead = [torch.empty(0, dtype=torch.int64)], 0, 0
        for shape, size in zip(spec.shapes, spec.sizes, strict=True):
            m = shape[0] if len(shape) > 1 else 1
            n = size // m
            if min(m, n) > rank:
                # The turns come to lengths near each other: the longer one is sent always.
                right_first = ahead * (m - n) > 0
                ahead += n - m if right_first else m - n
                matrices.append(Matrix(start, m, n, right_first))
            else:
                whole.append(torch.arange(start, start + size))
            start += size
        turns = [sum(matrix.sides(turn)[0] for matrix in matrices) for turn in (0, 1)]
        return cls(rank, tuple(matrices), torch.cat(whole), rank * max(turns))

    def bases(self, flat: Tensor, turn: int) -> list[Tensor]:
        """Return the bases of all matrices in a turn, ``[..., width] -> [..., a, rank]`` each."""
        parts, start = [], 0
        for matrix in self.matrices:
            a, _ = matrix.sides(turn)
            part = flat[..., start : start + a * self.rank]
            parts.append(part.reshape(*part.shape[:-1], a, self.rank))
            start += a * self.rank
        return parts

    def joined(self, parts: Sequence[Tensor], like: Tensor) -> Tensor:
        """Return bases one after the other, ``[..., width]``, as of `bases`; zeros behind them."""
        flat = torch.cat([like[..., :0], *(part.flatten(-2) for part in parts)], -1)
        return pad(flat, (0, self.width - flat.shape[-1]))


def orthonormal(block: Tensor, drawn: Tensor) -> Tensor:
    """Return columns made orthonormal one after the other, ``[..., a, r]`` (Gram and Schmidt).

    Those of `drawn`, as large, take the place of columns of which nothing is left.
    """
    columns: list[Tensor] = []
    for column, other in zip(block.unbind(-1), drawn.unbind(-1), strict=True):
        left = _without(column, columns)
        least = LOST * torch.finfo(block.dtype).eps * column.norm(dim=-1, keepdim=True)
        lost = left.norm(dim=-1, keepdim=True) <= least
        left = torch.where(lost, _without(other, columns), left)
        columns.append(left / left.norm(dim=-1, keepdim=True))
    return torch.stack(columns, -1)


def _without(column: Tensor, columns: Sequence[Tensor]) -> Tensor:
    for known in (*columns, *columns):  # twice, for what rounding leaves
        column = column - (column * known).sum(-1, keepdim=True) * known
    return column
