"""State as a tree: tuples and NamedTuples whose leaves are tensors with rows first.

Whatever holds the state of several nodes, of an algorithm or of an optimiser, is such a
tree, so that rows can be taken out, put back and joined without knowing what they mean.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import Any, TypeVar

import torch
from torch import Tensor

T = TypeVar("T")


def wide(values: Tensor) -> torch.dtype:
    """Return a type in which values can be summed up: at least single precision."""
    return torch.promote_types(values.dtype, torch.float32)


def is_finite(block: Tensor) -> bool:
    """Say whether there are only finite numbers, in one pass and without a copy."""
    if not block.is_floating_point() or math.isfinite(block.sum(dtype=torch.float32)):
        return True
    # Large numbers can have a sum beyond single precision and be finite all the same.
    return math.isfinite(block.sum(dtype=torch.float64))


def tree_map(function: Callable[..., Any], tree: T, *others: T) -> T:
    """Apply `function` to the leaves of trees of equal structure.

    Raises:
        TypeError: for a leaf which is neither a tensor nor a tuple.
    """
    if isinstance(tree, Tensor):
        return function(tree, *others)  # type: ignore[no-any-return]
    if not isinstance(tree, tuple):
        raise TypeError(f"state must be tuples of tensors, not {type(tree).__name__}")
    branches: list[Any] = [tree, *others]
    parts = [tree_map(function, *siblings) for siblings in zip(*branches, strict=True)]
    made: Any = type(tree)(*parts) if hasattr(tree, "_fields") else tuple(parts)
    return made  # type: ignore[no-any-return]


def leaves(tree: object) -> Iterator[Tensor]:
    """Yield the tensors of a tree, in order."""
    if isinstance(tree, Tensor):
        yield tree
    elif isinstance(tree, tuple):
        for part in tree:
            yield from leaves(part)


def take(tree: T, rows: Tensor) -> T:
    """Return copies of some rows, in the order given. `rows` is int64, ``[k]``."""
    return tree_map(lambda leaf: leaf.index_select(0, rows), tree)


def put_(tree: T, rows: Tensor, part: T) -> None:
    """Overwrite some rows of a tree, as of `take`."""
    for leaf, new in zip(leaves(tree), leaves(part), strict=True):
        leaf.index_copy_(0, rows, new)


def views(tree: T, rows: slice) -> T:
    """Return some rows as views: what is written into them is written into the tree."""
    return tree_map(lambda leaf: leaf[rows], tree)


def has_columns(leaf: Tensor, d: int) -> bool:
    """Return whether a leaf has a column for each of d parameters."""
    return leaf.ndim == 2 and leaf.shape[1] == d


def columns(tree: T, d: int, which: Tensor | slice) -> T:
    """Return some columns of the leaves that have d; the other leaves as they are.

    Views where `which` is a slice, copies where it is int64, ``[k]``.
    """

    def cut(leaf: Tensor) -> Tensor:
        if not has_columns(leaf, d):
            return leaf
        return leaf[:, which if isinstance(which, slice) else which.to(leaf.device)]

    return tree_map(cut, tree)


def assign(tree: T, values: T) -> None:
    """Overwrite the leaves of a tree; those which stand in `values` themselves are left."""
    changed = [
        (leaf, new)
        for leaf, new in zip(leaves(tree), leaves(values), strict=True)
        if new is not leaf
    ]
    own = {_place(leaf) for leaf in leaves(tree)}
    # One field may hand its old value on to another, which is overwritten by then.
    kept = [new.clone() if _place(new) in own else new for _, new in changed]
    for (leaf, _), new in zip(changed, kept, strict=True):
        leaf.copy_(new)


def write_columns(part: T, after: T, tree: T, d: int) -> None:
    """Overwrite some columns of a tree, of which `part` holds views; the other leaves are left."""
    wide = [has_columns(leaf, d) for leaf in leaves(tree)]
    old = tuple(leaf for leaf, is_wide in zip(leaves(part), wide, strict=True) if is_wide)
    new = tuple(leaf for leaf, is_wide in zip(leaves(after), wide, strict=True) if is_wide)
    assign(old, new)


def merged(tree: T, after: T, d: int) -> T:
    """Return the leaves of the one that have d columns, and the others of the other."""
    return tree_map(lambda old, new: old if has_columns(old, d) else new, tree, after)


def unshared(tree: T) -> T:
    """Return a tree of contiguous leaves no two of which share memory: copies of what did."""
    seen: set[int] = set()

    def own(leaf: Tensor) -> Tensor:
        if leaf.numel() and (_place(leaf) in seen or not leaf.is_contiguous()):
            return leaf.clone(memory_format=torch.contiguous_format)
        seen.add(_place(leaf))
        return leaf

    return tree_map(own, tree)


def split(tree: T, rows: int) -> list[T]:
    """Return the rows of a tree of so many rows as trees of one row each, as views."""

    def row(i: int) -> T:
        return tree_map(lambda leaf: leaf[i : i + 1], tree)

    return [row(i) for i in range(rows)]


def _place(leaf: Tensor) -> int:
    return leaf.untyped_storage().data_ptr()
