"""What a peer has heard, without laying it side by side first.

To stack the models of the neighbours costs more than to mix them, so the wide fields of an
`Inbox` stay the rows they came as, and are added up one after the other. Nor is a row put
together that has come in pieces.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any, TypeAlias, cast

import torch
from torch import Tensor

from p2pfl.algorithm import Inbox, R
from p2pfl.learning.pieces import Row, blocks, cut, stacked
from p2pfl.learning.tree import wide

WIDE = 2048  # numbers in a row, up to which one product of a block is faster

Field: TypeAlias = Tensor | tuple[Row, ...]  # [senders, d], or rows of [1, d]


@dataclass(frozen=True, slots=True)
class Letters(Inbox[R]):
    """An `Inbox` of one row, whose wide fields may be tuples of rows.

    Such a field is for the methods alone. They add up in the order of the senders.

    Attributes:
        into: where the next sum may be written, ``[1, d]``, if there is anything in the list;
            what is used is taken out.
    """

    into: list[Tensor] = field(default_factory=list)

    def mix(self, field: Field, by: Tensor | None = None) -> Tensor:
        """Return the weighted sum over senders, ``[senders, d] -> [1, d]``; as of `Inbox`."""
        if isinstance(field, Tensor):
            return Inbox.mix(self, field, by)
        own = self.mine(field)
        weights, exact = self.weights, wide(own)
        if by is not None:
            weights = weights.to(exact) * by.to(exact).T
            weights = weights / weights.sum()
        (first, share), *others = zip(field, weights[0].tolist(), strict=True)
        like = (own.shape, exact)
        given = bool(self.into) and (self.into[-1].shape, self.into[-1].dtype) == like
        total = self.into.pop() if given else torch.empty_like(own, dtype=exact)
        for k, (start, stop) in enumerate(blocks(field)):
            part = cut(first, k, start, stop).to(exact)
            block = torch.mul(part, share, out=cut(total, k, start, stop))
            for row, weight in others:
                block.add_(cut(row, k, start, stop), alpha=weight)
        return total.to(own.dtype)

    def mean(self, field: Field, by: Tensor) -> Tensor:
        """Return the mean over the senders in proportion to `by`; as of `Inbox`."""
        return Letters(self._ones(), self.heard, self.own).mix(field, by)

    def mine(self, field: Field) -> Tensor:
        """Return what the others know of the row itself, ``[1, ...]``."""
        if isinstance(field, Tensor):
            return Inbox.mine(self, field)
        return cast(Tensor, field[int(self.own)])  # which has not come over a network

    def gather(self, field: Field) -> tuple[Tensor, Tensor]:
        """Return the row's senders side by side, with their mask; as of `Inbox`."""
        return Inbox.gather(self, field if isinstance(field, Tensor) else stacked(field))


def unstacked(weights: Sequence[float], rows: Sequence[R], own: int) -> Letters[R]:
    """Return what one row has heard.

    Args:
        weights: of each sender.
        rows: what is remembered of each, fields ``[1, ...]``.
        own: where the row itself stands among them.
    """
    fields: list[Any] = [
        column if column[0].numel() > WIDE else torch.cat(column)
        for column in zip(*rows, strict=True)
    ]
    device = rows[0][0].device
    return Letters(_line(tuple(weights), device), type(rows[0])(*fields), _place(own, device))


@lru_cache(maxsize=1024)  # in most graphs many peers, and all their rounds, have the same
def _line(weights: tuple[float, ...], device: torch.device) -> Tensor:
    """Return one line of a mixing matrix, ``[1, senders]``; nobody may write into it."""
    return torch.tensor([weights], dtype=torch.float64, device=device)


@lru_cache(maxsize=1024)
def _place(own: int, device: torch.device) -> Tensor:
    return torch.tensor([own], device=device)
