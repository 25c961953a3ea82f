"""Who gets which rows.

The sections carry the names, arguments and defaults of the partitioners of flwr-datasets;
the number of partitions is the experiment's number of nodes and ``partition_by`` is the
label (for `natural_id` the owner). Two things differ: `shuffle` shuffles the rows before
they are cut (there, the whole data set is shuffled first), and each part is a sorted list
of row numbers, so that equal parts are equal in every process. Parts are disjoint; they
cover all rows except where a section says that it drops some.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

from p2pfl.data.by_label import pathological, shard
from p2pfl.data.dirichlet import balanced_dirichlet, dirichlet
from p2pfl.data.labels import (
    Floats,
    Ints,
    Labels,
    Partitioner,
    as_parts,
    check_rows,
    generator,
    row_order,
)


def iid(shuffle: bool = True, seed: int | None = None) -> Partitioner:
    """Deal the rows evenly; sizes differ by at most one.

    Without `shuffle` each node gets a stretch of the file, as of successive days.
    """

    def partition(labels: Labels, n: int, seed_: int) -> list[Tensor]:
        count = check_rows("iid", labels, n)
        order = row_order(count, shuffle, generator(seed, seed_))
        return as_parts(np.array_split(order, n))

    return partition


def size(
    partition_sizes: tuple[int, ...], shuffle: bool = True, seed: int | None = None
) -> Partitioner:
    """Give node k ``partition_sizes[k]`` rows; the sizes must add up to all of them."""
    sizes = np.asarray(partition_sizes, dtype=np.int64)
    if len(sizes) == 0 or (sizes < 1).any():
        raise ValueError(f"size: partition_sizes = {list(partition_sizes)} must all be positive")

    def partition(labels: Labels, n: int, seed_: int) -> list[Tensor]:
        count = len(labels.y)
        if len(sizes) != n:
            raise ValueError(
                f"size: partition_sizes lists {len(sizes)} sizes for {n} nodes; give one per node"
            )
        if sizes.sum() != count:
            raise ValueError(
                f"size: partition_sizes add up to {sizes.sum()}, but there are {count} training "
                "rows to share out; make them add up to that"
            )
        return _cut(row_order(count, shuffle, generator(seed, seed_)), sizes)

    return partition


def linear(shuffle: bool = True, seed: int | None = None) -> Partitioner:
    """Give node k a share in proportion to k + 1; the last also gets what rounding left."""
    return _by_weight("linear", lambda k: k, shuffle, seed)


def square(shuffle: bool = True, seed: int | None = None) -> Partitioner:
    """Give node k a share in proportion to (k + 1)²; the last also gets what rounding left."""
    return _by_weight("square", np.square, shuffle, seed)


def exponential(shuffle: bool = True, seed: int | None = None) -> Partitioner:
    """Give node k a share in proportion to exp(k); the last also gets what rounding left."""
    return _by_weight("exponential", lambda k: np.exp(k - k[-1]), shuffle, seed)


def natural_id() -> Partitioner:
    """Give each node the rows of one natural owner, in the order of the owners."""

    def partition(labels: Labels, n: int, seed_: int) -> list[Tensor]:
        if labels.groups is None:
            raise ValueError(
                "natural_id: the data set does not say who owns a row; for csv give group, or a "
                "list of files"
            )
        if labels.owners != n:
            raise ValueError(
                f"natural_id: the data have {labels.owners} owners, but nodes = {n}; "
                f"set nodes = {labels.owners}"
            )
        return [torch.nonzero(labels.groups == k).flatten() for k in range(n)]

    return partition


PARTITIONERS: dict[str, Callable[..., Partitioner]] = {
    "iid": iid,
    "dirichlet": dirichlet,
    "balanced_dirichlet": balanced_dirichlet,
    "shard": shard,
    "pathological": pathological,
    "natural_id": natural_id,
    "size": size,
    "linear": linear,
    "square": square,
    "exponential": exponential,
}
"""The factories by the name a section gives."""


def _cut(order: Ints, sizes: Ints) -> list[Tensor]:
    return as_parts(np.split(order, np.cumsum(sizes)[:-1]))


def _by_weight(
    name: str, weight: Callable[[Floats], Floats], shuffle: bool, seed: int | None
) -> Partitioner:
    def partition(labels: Labels, n: int, seed_: int) -> list[Tensor]:
        count = check_rows(name, labels, n)
        weights = weight(np.arange(1, n + 1, dtype=np.float64))
        sizes = (weights / weights.sum() * count).astype(np.int64)
        sizes[-1] += count - sizes.sum()
        if sizes.min() < 1:
            raise ValueError(
                f"{name}: of {count} rows, node {sizes.argmin()} of {n} would get none; lower "
                "the number of nodes, or choose a gentler section (linear, iid)"
            )
        return _cut(row_order(count, shuffle, generator(seed, seed_)), sizes)

    return partition
