"""State as a tree: tuples and NamedTuples whose leaves are tensors with rows first.

Whatever holds the state of several nodes, of an algorithm or of an optimiser, is such a
tree, so that rows can be taken out, put back and joined without knowing what they mean.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any, TypeVar

import torch
from torch import Tensor

T = TypeVar("T")


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


def put(tree: T, rows: Tensor, part: T) -> T:
    """Return a copy of the tree with `part`, as of `take`, over the rows it came from.

    A copy, since leaves may share memory with each other, or with a message under way.
    """
    return tree_map(lambda leaf, new: leaf.index_copy(0, rows, new), tree, part)


def concat(trees: Sequence[T]) -> T:
    """Return one tree with the rows of all, in order."""
    return tree_map(lambda *leaves: torch.cat(leaves), *trees)


def split(tree: T, rows: int) -> list[T]:
    """Return the rows of a tree of so many rows as trees of one row each, as views."""

    def row(i: int) -> T:
        return tree_map(lambda leaf: leaf[i : i + 1], tree)

    return [row(i) for i in range(rows)]
