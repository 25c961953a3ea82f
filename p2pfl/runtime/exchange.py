"""Everybody's exchange at once, in place: a few columns of all rows at a time.

A block of columns is read from memory, mixed while it is in the cache, and written back, so
that a round needs one pass over the state, and no second copy of it.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from p2pfl.algorithm import Algorithm, Inbox
from p2pfl.learning.cache import cache_bytes
from p2pfl.learning.crew import Crew
from p2pfl.learning.tree import columns, has_columns, merged, unshared, write_columns
from p2pfl.runtime.ranks import Fields, Neighbourhood

PART = 8  # of a thread's cache: a block is read as often as a node has neighbours
LEAST = 64  # columns, below which reading a row's part costs as much as reading more


def receive_(
    algorithm: Algorithm[Any, Any, Any],
    state: Any,  # noqa: ANN401 - whatever the algorithm keeps
    heard: tuple[Tensor, ...],
    around: Neighbourhood,
    d: int,
) -> Any:  # noqa: ANN401
    """Return the state after the exchange; large fields are overwritten where they lie.

    Args:
        algorithm: whose `receive` it is.
        state: of some rows.
        heard: what is remembered of the same rows, ``[rows, ...]`` each.
        around: whom they hear.
        d: the number of parameters, by which large fields are known.
    """
    if not algorithm.columnwise:
        return unshared(algorithm.receive(state, _inbox(around, heard, around.fetch(heard)())))
    width = around.agree(block_width(heard, d), column_bytes(heard, d))
    is_wide = [has_columns(field, d) for field in heard]
    # Once, and not for every block; what is fetched lasts only until the next but one.
    narrow = tuple(f.clone() for f in around.fetch(_select(heard, is_wide, False))())
    wide = _select(heard, is_wide, True)
    ahead = around.fetch(columns(wide, d, slice(0, width)))
    last: list[Any] = []

    def mix(start: int, fields: Fields) -> None:
        part = columns(state, d, slice(start, start + width))
        known = _interleaved(is_wide, fields, narrow)
        after = algorithm.receive(part, _inbox(around, heard, known))
        write_columns(part, after, state, d)
        last[:] = [after]  # of whichever block: what is small is the same in all

    with Crew(torch.get_num_threads() if around.side_by_side else 1) as crew:
        for start in range(0, d, width):
            fields = ahead()
            if start + width < d:  # the next columns may travel while these are mixed
                ahead = around.fetch(columns(wide, d, slice(start + width, start + 2 * width)))
            crew.do(mix, start, fields)
    return unshared(merged(state, last[0], d))


def block_width(fields: tuple[Tensor, ...], d: int) -> int:
    """Return how many of d columns are mixed at a time."""
    column = max(1, len(fields[0]) * column_bytes(fields, d))
    return max(LEAST, cache_bytes(fields[0].device) // PART // column)


def column_bytes(fields: tuple[Tensor, ...], d: int) -> int:
    """Return the bytes that one row has of one column, in all large fields together."""
    return sum(field.element_size() for field in fields if has_columns(field, d))


def squared_distances(params: Tensor, mean: Tensor) -> Tensor:
    """Return the squared distance of every row from `mean`, ``[rows, d], [d] -> [rows]``."""
    far = torch.zeros(len(params), dtype=mean.dtype, device=mean.device)
    rows = max(1, cache_bytes(params.device) // PART // max(params[:1].nbytes, 1))
    for start in range(0, len(params), rows):
        block = slice(start, start + rows)
        far[block] = (params[block] - mean).square_().sum(1)
    return far


def _inbox(around: Neighbourhood, heard: Any, fields: tuple[Tensor, ...]) -> Inbox[Any]:  # noqa: ANN401
    kind = type(heard)
    named = kind(*fields) if hasattr(kind, "_fields") else fields
    return around.inbox(around.weights, named, around.own)


def _select(fields: Fields, is_wide: list[bool], wanted: bool) -> Fields:
    return tuple(field for field, wide in zip(fields, is_wide, strict=True) if wide is wanted)


def _interleaved(is_wide: list[bool], wide: Fields, narrow: Fields) -> Fields:
    """Return the fields in the order in which `_select` found them."""
    some, others = iter(wide), iter(narrow)
    return tuple(next(some) if each else next(others) for each in is_wide)
