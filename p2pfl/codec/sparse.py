"""Codecs that keep some entries of each row and take the others for zero."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal, NamedTuple, TypeAlias

import torch
from torch import Tensor

from p2pfl import rng
from p2pfl.codec.base import Codec
from p2pfl.codec.bits import pack, unpack

Width: TypeAlias = Callable[[int], int]  # how many of so many entries are kept


class Sparse(NamedTuple):
    """The entries of each row which were kept, and a list of their columns."""

    values: Tensor  # [rows, k]
    columns: Tensor  # [rows, k], int32, ascending


class Marked(NamedTuple):
    """The entries of each row which were kept, and a bit for every column."""

    values: Tensor  # [rows, k], by columns
    marks: Tensor  # [rows, ceil(d / 8)], uint8


class Seeded(NamedTuple):
    """The entries of each row which were kept, and the key by which their columns are drawn."""

    values: Tensor  # [rows, k], by columns
    key: Tensor  # [rows, 1], int64


Kept: TypeAlias = Sparse | Marked
Indices: TypeAlias = Literal["list", "bitmap"]


def top_k(
    k: int | None = None, share: float | None = None, indices: Indices = "list"
) -> Codec[Kept]:
    """Keep the `k` entries of each row, or the given `share`, that are largest in magnitude.

    Loses at most ``1 - k/d`` of the squared norm (Stich et al. 2018). ``8 k`` bytes (float32)
    with a list of columns, ``4 k + d/8`` with a bit for every column, which is less as soon as
    more than one entry in 32 is kept.
    """
    keep = keeper(k, share)
    return Codec(
        lambda block, keys: listed(block, keep(block.abs()), indices),
        lambda packed, d: spread(packed.values, kept_columns(packed, d), d),
    )


def random_k(
    k: int | None = None, share: float | None = None, indices: Literal["list", "seed"] = "list"
) -> Codec[Any]:
    """Keep `k` entries of each row, or the given `share`, drawn anew each time.

    Loses ``1 - k/d`` of the squared norm in expectation (Stich et al. 2018). ``8 k`` bytes
    (float32) with a list of columns; ``4 k + 8`` with the seed they were drawn from, by which
    the receiver draws them again.
    """
    keep = keeper(k, share)

    def draw(keys: Tensor, d: int) -> Tensor:
        return keep(rng.uniform(keys, d))

    def encode(block: Tensor, keys: Tensor) -> Sparse | Seeded:
        columns = draw(keys, block.shape[1])
        values = block.gather(1, columns)
        if indices == "seed":
            return Seeded(values, keys.unsqueeze(1))
        return Sparse(values, columns.int())

    def decode(packed: Sparse | Seeded, d: int) -> Tensor:
        if isinstance(packed, Seeded):
            return spread(packed.values, draw(packed.key.squeeze(1), d), d)
        return spread(packed.values, kept_columns(packed, d), d)

    return Codec(encode, decode)


def keeper(k: int | None, share: float | None) -> Callable[[Tensor], Tensor]:
    """Return a function from scores ``[rows, d]`` to the columns of the largest, ascending.

    Raises:
        ValueError: not exactly one of `k` and `share` is given, or it is out of range.
    """
    width = _width(k, share)
    # Sorted columns make a message independent of the order a top-k kernel happens to return.
    return lambda score: score.topk(width(score.shape[1]), dim=1).indices.sort(dim=1).values


def listed(block: Tensor, columns: Tensor, indices: Indices) -> Kept:
    """Return the given columns of each row, ``[rows, k]`` ascending, as they travel."""
    values = block.gather(1, columns)
    if indices == "list":
        return Sparse(values, columns.int())
    marks = torch.zeros_like(block, dtype=torch.uint8).scatter(1, columns, 1)
    return Marked(values, pack(marks, 1))


def kept_columns(packed: Kept, d: int) -> Tensor:
    """Return the columns that were kept, ``[rows, k]`` int64, ascending.

    Raises:
        ValueError: some are out of range, or come twice, or are not as many as the values.
    """
    rows, k = packed.values.shape
    if isinstance(packed, Marked):
        marks = unpack(packed.marks, 1, d)
        if bool((marks.sum(1) != k).any()):
            raise ValueError(f"not {k} columns are marked")
        return marks.nonzero()[:, 1].view(rows, k)
    columns = packed.columns.long()
    if columns.shape != (rows, k):
        raise ValueError(f"{tuple(columns.shape)} columns for {k} values")
    if columns.numel() and not 0 <= int(columns.min()) <= int(columns.max()) < d:
        raise ValueError(f"a column outside 0..{d - 1}")
    if k > 1 and bool((columns.diff(dim=1) <= 0).any()):
        raise ValueError("columns that do not ascend")
    return columns


def spread(values: Tensor, columns: Tensor, d: int) -> Tensor:
    """Return rows of d entries that are zero but in the given columns."""
    return values.new_zeros(len(values), d).scatter(1, columns, values)


def _width(k: int | None, share: float | None) -> Width:
    if (k is None) == (share is None):
        raise ValueError("give either k (a number of entries) or share (a part of them)")
    if k is not None:
        if k < 1:
            raise ValueError(f"k = {k} is below 1")
        return lambda d: min(k, d)
    assert share is not None
    if not 0 < share <= 1:
        raise ValueError(f"share = {share} is not in (0, 1]")
    return lambda d: max(1, round(share * d))
