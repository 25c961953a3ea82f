"""The two Dirichlet partitions of the literature, which are not the same.

Results under one say little about the other at the same alpha: the plain one also makes
the sizes very unequal, the balanced one keeps them within a factor of about two.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import numpy as np
from torch import Tensor

from p2pfl.data.labels import (
    Floats,
    Ints,
    Labels,
    Partitioner,
    as_parts,
    check_rows,
    classes_of,
    generator,
    row_order,
)

_ATTEMPTS = 500  # an attempt draws sizes only, no rows, so it is cheap


class _Rule(NamedTuple):
    """What a draw must look like."""

    alpha: Floats  # [n]
    smallest: int  # no node may end with fewer rows
    full: float  # a node with so many rows gets none of the next class


def dirichlet(
    alpha: float | tuple[float, ...],
    min_partition_size: int = 10,
    self_balancing: bool = False,
    shuffle: bool = True,
    seed: int | None = None,
) -> Partitioner:
    """Share out each class by proportions drawn from a Dirichlet distribution.

    The smaller `alpha` (one number, or one per node), the fewer classes a node has and the
    more unequal the sizes. Drawn anew until every node has `min_partition_size` rows, 1 or more.
    With `self_balancing` a node above the mean size gets nothing of the next class.
    Yurochkin et al. (2019), arXiv 1905.12022.
    """
    alphas = np.asarray(alpha, dtype=np.float64)
    _check_alpha("dirichlet", alphas)
    if min_partition_size < 1:
        raise ValueError(f"dirichlet: min_partition_size = {min_partition_size} must be at least 1")

    def partition(labels: Labels, n: int, seed_: int) -> list[Tensor]:
        count, rand = check_rows("dirichlet", labels, n), generator(seed, seed_)
        y = classes_of("dirichlet", labels)
        if alphas.ndim and len(alphas) != n:
            raise ValueError(
                f"dirichlet: alpha lists {len(alphas)} numbers for {n} nodes; give one per "
                "node, or a single number"
            )
        # "above the mean" there, "at the mean" in the balanced one: hence the next float
        full = math.nextafter(count / n, math.inf) if self_balancing else math.inf
        rule = _Rule(np.broadcast_to(alphas, (n,)), min_partition_size, full)
        order = row_order(count, shuffle, rand)
        parts = _share(y[order], rule, rand)
        if parts is None:
            raise ValueError(
                f"dirichlet: in {_ATTEMPTS} draws at alpha = {alpha} some of {n} nodes always "
                f"had fewer than min_partition_size = {min_partition_size} of {count} rows; "
                "lower min_partition_size, raise alpha, or use balanced_dirichlet"
            )
        return as_parts([order[part] for part in parts])

    return partition


def balanced_dirichlet(
    alpha: float, group_size: int = 10, shuffle: bool = True, seed: int | None = None
) -> Partitioner:
    """Share out each class by a Dirichlet distribution at nearly equal sizes.

    Nodes form groups of at most `group_size`, each with a random share of all rows. Within
    a group a node that already holds the mean size gets nothing of the next class; drawn
    anew until the smallest holds half the mean. Lin et al. (2021), arXiv 2102.04761.
    """
    _check_alpha("balanced_dirichlet", np.asarray(alpha, dtype=np.float64))
    if group_size < 1:
        raise ValueError(f"balanced_dirichlet: group_size = {group_size} must be at least 1")

    def partition(labels: Labels, n: int, seed_: int) -> list[Tensor]:
        count, rand = check_rows("balanced_dirichlet", labels, n), generator(seed, seed_)
        y = classes_of("balanced_dirichlet", labels)
        order = row_order(count, shuffle, rand)
        edges = np.append(np.arange(0, n, group_size), n)
        parts: list[Ints] = []
        for rows, nodes in zip(
            np.split(order, edges[1:-1] * count // n), np.diff(edges), strict=True
        ):
            mean = len(rows) / nodes
            rule = _Rule(np.full(nodes, float(alpha)), max(1, math.ceil(mean / 2)), mean)
            shares = _share(y[rows], rule, rand)
            if shares is None:
                raise ValueError(
                    f"balanced_dirichlet: in {_ATTEMPTS} draws at alpha = {alpha} some of {nodes} "
                    f"nodes always had less than half of the mean of {mean:.4g} rows; raise "
                    "alpha or lower group_size or the number of nodes"
                )
            parts += [rows[share] for share in shares]
        return as_parts(parts)

    return partition


def _share(y: Ints, rule: _Rule, rand: np.random.Generator) -> list[Ints] | None:
    """Return the positions in `y` that each node gets, or None if no draw satisfies `rule`."""
    n = len(rule.alpha)
    if n * rule.smallest > len(y):
        return None
    names, counts = np.unique(y, return_counts=True)
    for _ in range(_ATTEMPTS):
        sizes = _draw_sizes(counts, rule, rand)
        if sizes.sum(0).min() >= rule.smallest:
            break
    else:
        return None
    cuts = [
        np.split(np.flatnonzero(y == name), np.cumsum(row)[:-1])
        for name, row in zip(names, sizes, strict=True)
    ]
    return [np.concatenate([cut[node] for cut in cuts]) for node in range(n)]


def _draw_sizes(counts: Ints, rule: _Rule, rand: np.random.Generator) -> Ints:
    """Return how many rows of each class each node gets, ``[classes, n]``."""
    sizes = np.zeros((len(counts), len(rule.alpha)), dtype=np.int64)
    held = np.zeros(len(rule.alpha), dtype=np.int64)
    for at, count in enumerate(counts):
        room = held < rule.full
        shares = rand.dirichlet(rule.alpha) * room
        if shares.sum() <= 0:  # a small alpha may put all of a class on nodes that are full
            shares = room.astype(np.float64)
        # Rounded, not cut off: that would give the last node a row of every class.
        edges = np.rint(np.cumsum(shares / shares.sum())[:-1] * count).astype(np.int64)
        sizes[at] = np.diff(np.concatenate([[0], np.minimum(edges, count), [count]]))
        held += sizes[at]
    return sizes


def _check_alpha(name: str, alphas: Floats) -> None:
    if alphas.size == 0 or not (alphas > 0).all():
        raise ValueError(f"{name}: alpha = {alphas.tolist()} must be greater than 0")
