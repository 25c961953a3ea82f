"""What a partitioner is, and what all of them need."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

Ints = npt.NDArray[np.int64]
Floats = npt.NDArray[np.float64]


class Labels(NamedTuple):
    """What a partitioner may look at."""

    y: Tensor  # [N]: int64 classes, or a float regression target
    groups: Tensor | None = None  # [N] int64: the natural owner of each row
    owners: int = 0  # how many natural owners there are


Partitioner = Callable[[Labels, int, int], list[Tensor]]
"""``(labels, n, seed) -> n`` sorted int64 tensors of row numbers; ``ValueError`` if it cannot."""


def generator(own: int | None, experiment: int) -> np.random.Generator:
    """Return the one generator a partition draws from; a section's own seed wins."""
    return np.random.default_rng((experiment if own is None else own) % 2**64)


def row_order(count: int, shuffle: bool, rand: np.random.Generator) -> Ints:
    """Return the row numbers in the order in which they are cut."""
    return rand.permutation(count) if shuffle else np.arange(count)


def check_rows(name: str, labels: Labels, n: int) -> int:
    """Return the number of rows; ``ValueError`` if they cannot go round."""
    if n < 1:
        raise ValueError(f"{name}: nodes = {n} must be at least 1")
    if n > len(labels.y):
        raise ValueError(
            f"{name}: {n} nodes cannot share {len(labels.y)} training rows; lower the number of "
            "nodes or hold out less"
        )
    return len(labels.y)


def classes_of(name: str, labels: Labels) -> Ints:
    """Return the class of each row; ``ValueError`` for a regression target."""
    if labels.y.is_floating_point():
        raise ValueError(
            f"{name}: partitions by class, but this data set is a regression; use iid, size, "
            "linear, square, exponential or natural_id"
        )
    return np.asarray(labels.y.numpy(), dtype=np.int64)


def as_parts(pieces: Sequence[Ints]) -> list[Tensor]:
    """Return each piece as a sorted tensor."""
    return [torch.from_numpy(np.sort(piece).astype(np.int64, copy=False)) for piece in pieces]
