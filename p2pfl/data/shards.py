"""Examples of some nodes laid end to end, and a data set shared out among nodes."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

import torch
from torch import Tensor

from p2pfl import rng
from p2pfl.data.dataset import Dataset
from p2pfl.data.encoder import Encoder
from p2pfl.data.holdout import Holdout
from p2pfl.data.labels import Labels, Partitioner
from p2pfl.errors import UserError

Cell = str | int | float


class Examples(NamedTuple):
    """Inputs and targets."""

    x: Tensor  # [N, ...]
    y: Tensor  # [N]


@dataclass(frozen=True, eq=False)
class Shards:
    """The examples of some nodes, laid end to end: a simulator's, or one peer's alone.

    A batch of a block of nodes is ``x[idx], y[idx]`` with ``idx`` as ``[rows, B]``.
    """

    x: Tensor  # [rows, ...]
    y: Tensor  # [rows]
    nodes: Tensor  # [m] int64, ascending: the nodes whose examples are here
    start: Tensor  # [m] int64: where each of them begins
    count: Tensor  # [m] int64: how many each of them has

    @cached_property
    def _first(self) -> int | None:
        """The first node if the nodes follow one another without a gap, else None."""
        if not len(self.nodes) or bool((self.nodes.diff() != 1).any()):
            return None
        return int(self.nodes[0])

    def find(self, nodes: Tensor) -> Tensor:
        """Return where the nodes stand in `nodes`; ``ValueError`` for one that is not here."""
        if len(nodes) and self._first is not None:
            lowest, highest = (int(end) for end in nodes.aminmax())
            if lowest >= self._first and highest < self._first + len(self.nodes):
                return nodes - self._first
        at = torch.searchsorted(self.nodes, nodes).clamp_(max=len(self.nodes) - 1)
        absent = nodes[self.nodes[at] != nodes]
        if len(absent):
            raise ValueError(
                f"the examples of node {int(absent[0])} are not here; "
                f"held are those of {_summary(self.nodes)}"
            )
        return at

    def counts(self, nodes: Tensor) -> Tensor:
        """Return how many examples each of the nodes has, ``[rows]`` int64."""
        return self.count[self.find(nodes)]

    def starts(self, nodes: Tensor) -> Tensor:
        """Return where the examples of each of the nodes begin, ``[rows]`` int64."""
        return self.start[self.find(nodes)]

    def rows_of(self, node: int) -> Examples:
        """Return the examples of one node, without a copy."""
        at = self.find(torch.tensor([node], device=self.nodes.device))
        start, count = int(self.start[at]), int(self.count[at])
        return Examples(self.x[start : start + count], self.y[start : start + count])

    def gather(self, index: Tensor, into: Tensor | None = None) -> Examples:
        """Return the examples at `index`, ``[rows, B] -> [rows, B, ...]``.

        Args:
            index: int64.
            into: memory for the inputs, ``[rows * B, ...]`` of their type; None: new.
        """
        flat = index.flatten()  # several times as fast as ``x[index]`` on a CPU
        x = torch.index_select(self.x, 0, flat, out=into)
        y = self.y.index_select(0, flat)
        return Examples(x.view(*index.shape, *x.shape[1:]), y.view(index.shape))

    def subset(self, nodes: Tensor) -> Shards:
        """Return some of the nodes alone, with copies of their examples laid end to end.

        Args:
            nodes: int64 ``[k]``, ascending.

        Raises:
            ValueError: if a node is not here, or the nodes do not ascend.
        """
        if bool((nodes.diff() < 1).any()):
            raise ValueError(f"nodes = {nodes.tolist()} must ascend, each of them once")
        at = self.find(nodes)
        start, count = self.start[at], self.count[at]
        begin = count.cumsum(0) - count
        index = torch.arange(int(count.sum()), device=nodes.device)
        index += torch.repeat_interleave(start - begin, count)
        return Shards(*self.gather(index), nodes, begin, count)

    def to(self, device: torch.device | str) -> Shards:
        """Return the same on another device."""
        return Shards(
            self.x.to(device),
            self.y.to(device),
            self.nodes.to(device),
            self.start.to(device),
            self.count.to(device),
        )


@dataclass(frozen=True, slots=True, eq=False)
class Federation:
    """A data set shared out among `n` nodes, or one node's part of it."""

    n: int
    train: Shards
    test: Examples | None  # all test rows; None: there are none, or they are not all here
    own_test: Shards | None  # each node's own test rows, where the holdout is per node
    features: tuple[str, ...]
    classes: tuple[str, ...]
    numeric: Tensor | None
    encoder: Encoder | None
    shape: tuple[int, ...]
    outputs: int
    group_names: tuple[str, ...]


class Counts(NamedTuple):
    """A table: how many training examples each node has, and of which kind."""

    header: tuple[str, ...]
    rows: list[tuple[Cell, ...]]


def federate(
    dataset: Dataset,
    partitioner: Partitioner,
    holdout: Holdout,
    n: int,
    seed: int,
    only: int | None = None,
) -> Federation:
    """Share out a data set among `n` nodes.

    With ``only=k`` no training rows but node k's stay in memory; they are the same rows
    as in the full federation. Raises ``ValueError`` if the rows cannot be shared out so,
    and :class:`UserError` if the data are one peer's file and the sections need them all.
    """
    if only is not None and not 0 <= only < n:
        raise ValueError(f"there is no node {only} among {n} nodes, numbered from 0")
    _check_alone(dataset, holdout, only)
    seed_ = seed if holdout.seed is None else holdout.seed
    mask = torch.zeros(len(dataset.y), dtype=torch.bool)
    if holdout.scope == "all":
        mask = holdout.choose(dataset.y, seed_)
    parts = _partition(dataset, partitioner, ~mask, n, seed)
    held = torch.nonzero(mask).flatten()
    own: list[Tensor] | None = None
    if holdout.scope == "node":
        parts, own = _hold_out_each(dataset.y, parts, holdout, seed_)
        held = torch.cat(own)
    nodes = [only] if only is not None else list(range(n))
    _check_not_empty(parts, nodes)
    return Federation(
        n=n,
        train=_lay(dataset, parts, nodes),
        test=_examples(dataset, held) if len(held) and dataset.only is None else None,
        own_test=None if own is None else _lay(dataset, own, nodes),
        features=dataset.features,
        classes=dataset.classes,
        numeric=dataset.numeric,
        encoder=dataset.encoder,
        shape=dataset.shape,
        outputs=dataset.outputs,
        group_names=dataset.group_names,
    )


def counts_by_label(federation: Federation) -> Counts:
    """Return each node's training examples: in all, and by class.

    For a regression: in all, and mean and standard deviation of the target.
    """
    train = federation.train
    row = torch.repeat_interleave(torch.arange(len(train.nodes)), train.count)
    heads = list(zip(train.nodes.tolist(), train.count.tolist(), strict=True))
    if federation.classes:
        k = len(federation.classes)
        table = torch.bincount(row * k + train.y, minlength=len(heads) * k).view(-1, k)
        header = ("node", "examples", *federation.classes)
        return Counts(header, [(*h, *c) for h, c in zip(heads, table.tolist(), strict=True)])
    targets = [train.rows_of(node).y.double() for node, _ in heads]
    spread = [(float(y.mean()), float(y.std(correction=0))) for y in targets]
    header = ("node", "examples", "target mean", "target std")
    return Counts(header, [(*h, *s) for h, s in zip(heads, spread, strict=True)])


def _check_alone(dataset: Dataset, holdout: Holdout, only: int | None) -> None:
    if dataset.only is None:
        return
    if only != dataset.only:
        raise UserError(f"only the file of node {dataset.only} was read, not all of them")
    if holdout.scope == "all":
        raise UserError(
            "the data come as one file per node, so no peer can draw a test set from all rows; "
            "use the holdout per_node or none"
        )


def _partition(
    dataset: Dataset, partitioner: Partitioner, training: Tensor, n: int, seed: int
) -> list[Tensor]:
    """Return the row numbers of each node's part of the training rows."""
    groups = None if dataset.groups is None else dataset.groups[training]
    labels = Labels(dataset.y[training], groups, len(dataset.group_names))
    rows = torch.nonzero(training).flatten()
    parts = [rows[part] for part in partitioner(labels, n, seed)]
    if dataset.only is not None and len(parts[dataset.only]) != len(dataset.y):
        raise UserError(
            "the data come as one file per node, so a peer cannot share them out anew; "
            "use the partition natural_id"
        )
    return parts


def _hold_out_each(
    y: Tensor, parts: list[Tensor], holdout: Holdout, seed: int
) -> tuple[list[Tensor], list[Tensor]]:
    """Return what each node trains on and what it holds out."""
    seeds = rng.keys(seed, torch.arange(len(parts))).tolist()
    masks = [holdout.choose(y[part], key) for part, key in zip(parts, seeds, strict=True)]
    train = [part[~mask] for part, mask in zip(parts, masks, strict=True)]
    return train, [part[mask] for part, mask in zip(parts, masks, strict=True)]


def _check_not_empty(parts: list[Tensor], nodes: list[int]) -> None:
    for node in nodes:
        if len(parts[node]) == 0:
            raise ValueError(
                f"node {node} would have no training example; hold out less, or share out the "
                "rows in another way or among fewer nodes"
            )


def _lay(dataset: Dataset, parts: list[Tensor], nodes: list[int]) -> Shards:
    count = torch.tensor([len(parts[node]) for node in nodes], dtype=torch.int64)
    x, y = _examples(dataset, torch.cat([parts[node] for node in nodes]))
    return Shards(x, y, torch.tensor(nodes), count.cumsum(0) - count, count)


def _examples(dataset: Dataset, rows: Tensor) -> Examples:
    return Examples(dataset.x.index_select(0, rows), dataset.y.index_select(0, rows))


def _summary(nodes: Tensor) -> str:
    if len(nodes) == 1:
        return f"node {int(nodes[0])}"
    return f"{len(nodes)} nodes, {int(nodes[0])} to {int(nodes[-1])}"
