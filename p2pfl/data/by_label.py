"""Partitions in which a node sees few of the classes."""

from __future__ import annotations

from typing import Literal

import numpy as np
import numpy.typing as npt
from torch import Tensor

from p2pfl.data.labels import (
    Ints,
    Labels,
    Partitioner,
    as_parts,
    check_rows,
    classes_of,
    generator,
    row_order,
)


def shard(
    num_shards_per_partition: int | None = None,
    shard_size: int | None = None,
    keep_incomplete_shard: bool = False,
    shuffle: bool = True,
    seed: int | None = None,
) -> Partitioner:
    """Sort the rows by label, cut them into shards and deal those at random.

    With `num_shards_per_partition` each node gets so many shards, of `shard_size` rows or
    of as many as go round; the rows of the other shards are dropped. With `shard_size`
    alone all shards are dealt, and the first nodes may get one more; the last, incomplete
    one is dropped unless `keep_incomplete_shard`. McMahan et al. (2017), arXiv 1602.05629.
    """
    for name, value in (
        ("num_shards_per_partition", num_shards_per_partition),
        ("shard_size", shard_size),
    ):
        if value is not None and value < 1:
            raise ValueError(f"shard: {name} = {value} must be at least 1")
    if num_shards_per_partition is None and shard_size is None:
        raise ValueError("shard: give num_shards_per_partition, shard_size or both")

    def partition(labels: Labels, n: int, seed_: int) -> list[Tensor]:
        count, rand = check_rows("shard", labels, n), generator(seed, seed_)
        y = classes_of("shard", labels)
        order = row_order(count, shuffle, rand)
        order = order[np.argsort(y[order], kind="stable")]
        width, usable = _shards(
            count, n, num_shards_per_partition, shard_size, keep_incomplete_shard
        )
        used = n * num_shards_per_partition if num_shards_per_partition else usable
        if not n <= used <= usable:
            raise ValueError(
                f"shard: {count} rows make {usable} shards of {width}, too few for "
                f"num_shards_per_partition = {num_shards_per_partition} on each of {n} nodes; "
                "lower it, or shard_size, or the number of nodes"
            )
        dealt = np.array_split(rand.permutation(usable)[:used], n)
        pieces = [order[k * width : (k + 1) * width] for k in range(usable)]
        return as_parts([np.concatenate([pieces[k] for k in hand]) for hand in dealt])

    return partition


def pathological(
    num_classes_per_partition: int,
    class_assignment_mode: Literal["random", "deterministic", "first-deterministic"] = "random",
    shuffle: bool = True,
    seed: int | None = None,
) -> Partitioner:
    """Give each node rows of so many classes only; a class is shared evenly by its nodes.

    Node k gets random classes, or classes k, k + 1, … ("deterministic"), or class k and
    random others ("first-deterministic"), counted round. Rows of a class that falls to
    nobody are dropped. Li et al. (2022), arXiv 2102.02079.
    """

    def partition(labels: Labels, n: int, seed_: int) -> list[Tensor]:
        count, rand = check_rows("pathological", labels, n), generator(seed, seed_)
        y = classes_of("pathological", labels)
        names = np.unique(y)
        if not 1 <= num_classes_per_partition <= len(names):
            raise ValueError(
                f"pathological: num_classes_per_partition = {num_classes_per_partition} must "
                f"be between 1 and the {len(names)} classes there are"
            )
        order = row_order(count, shuffle, rand)
        holds = _assign(class_assignment_mode, n, len(names), num_classes_per_partition, rand)
        hands: list[list[Ints]] = [[] for _ in range(n)]
        for at, name in enumerate(names):
            holders, rows = np.flatnonzero(holds[:, at]), order[y[order] == name]
            if len(holders) > len(rows):
                raise ValueError(
                    f"pathological: class {name} falls to {len(holders)} nodes and has only "
                    f"{len(rows)} rows; lower num_classes_per_partition or the number of "
                    'nodes, or try class_assignment_mode = "deterministic"'
                )
            pieces = np.array_split(rows, len(holders)) if len(holders) else []
            for node, piece in zip(holders, pieces, strict=True):
                hands[node].append(piece)
        return as_parts([np.concatenate(hand) for hand in hands])

    return partition


def _shards(
    count: int, n: int, per_node: int | None, size: int | None, keep_incomplete: bool
) -> tuple[int, int]:
    """Return the rows in a shard, and how many shards there are to be dealt."""
    width = size or count // (n * (per_node or 1))
    if width == 0:
        return 0, 0
    exact = per_node is not None and size is not None  # then all shards are of equal size
    return width, -(-count // width) if keep_incomplete and not exact else count // width


def _assign(
    mode: str, n: int, classes: int, per_node: int, rand: np.random.Generator
) -> npt.NDArray[np.bool_]:
    """Return which node holds which class, bool ``[n, classes]``."""
    holds = np.zeros((n, classes), dtype=np.bool_)
    for node in range(n):
        others = rand.permutation(classes)
        first = node % classes
        if mode == "deterministic":
            others = (node + np.arange(classes)) % classes
        elif mode == "first-deterministic":
            others = np.concatenate([[first], others[others != first]])
        elif mode != "random":
            raise ValueError(
                f"pathological: class_assignment_mode = {mode!r} must be 'random', "
                "'deterministic' or 'first-deterministic'"
            )
        holds[node, others[:per_node]] = True
    return holds
