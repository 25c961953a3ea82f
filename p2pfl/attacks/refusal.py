"""What real peers refuse when it arrives, where rows meet without a network."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from p2pfl.algorithm import Inbox, R
from p2pfl.learning.pieces import Row, parts_of, stacked


def without_non_finite(inbox: Inbox[R], back: bool) -> Inbox[R]:
    """Return an inbox without the senders of numbers which are not finite.

    Rows cannot do without themselves: of what they know of themselves zeros are left.

    Args:
        inbox: what some rows have heard.
        back: whether the weight of such a sender goes back to the row, or is lost.
    """
    fields: tuple[Any, ...] = inbox.heard
    broken = torch.stack([_broken(field) for field in fields]).any(0)
    if not bool(broken.any()):
        return inbox
    kept = [_zeroed(field, broken) for field in fields]
    weights = _moved(inbox.weights, broken, inbox.own, back)
    return replace(inbox, weights=weights, heard=type(inbox.heard)(*kept))


def _broken(field: Tensor | tuple[Row, ...]) -> Tensor:
    """Say which senders' values are not all finite, ``[senders]``."""
    if isinstance(field, Tensor):
        return ~field.isfinite().flatten(1).all(1)
    each = ([part.isfinite().all() for part in parts_of(row)] for row in field)
    return torch.stack([~torch.stack(parts).all() for parts in each])


def _zeroed(field: Tensor | tuple[Row, ...], broken: Tensor) -> Any:  # noqa: ANN401
    if isinstance(field, Tensor):
        return field.masked_fill(broken.view(-1, *[1] * (field.ndim - 1)), 0)
    return tuple(
        torch.zeros_like(stacked((row,))) if bad else row
        for row, bad in zip(field, broken.tolist(), strict=True)
    )


def _moved(weights: Tensor, broken: Tensor, own: Tensor, back: bool) -> Tensor:
    """Take the weights of some senders away; they go back to the rows, or are lost."""
    if weights.layout is not torch.sparse_csr:
        rows = torch.arange(len(weights), device=weights.device)
        lost = weights * broken
        lost[rows, own] = 0
        weights = weights - lost
        if back:
            weights[rows, own] += lost.sum(1)
        return weights
    start, columns, values = weights.crow_indices(), weights.col_indices(), weights.values()
    rows = torch.arange(len(weights), device=values.device).repeat_interleave(start.diff())
    mine = columns == own[rows]
    lost = values * (broken[columns] & ~mine)
    values = values - lost
    if back:
        total = torch.zeros(len(weights), dtype=values.dtype, device=values.device)
        values = values + mine * total.index_add(0, rows, lost)[rows]
    return torch.sparse_csr_tensor(start, columns, values, weights.shape, check_invariants=False)
