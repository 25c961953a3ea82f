"""Which examples a node takes at which step, as a pure function of seed, node and step.

A node goes through its examples in a new random order each epoch, and a batch may begin in
one epoch and end in the next: position ``p = step * B + b`` is number ``p mod count`` of
epoch ``p // count``. The order of an epoch is a function of (seed, node, epoch) alone, so
a node takes the same batches alone as among a thousand, and in whatever order it is asked.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from p2pfl import rng
from p2pfl.data.shards import Shards

BatchSize = int | Literal["full"]


class EpochOrders:
    """A memory of the orders of the latest epochs; it makes batches faster, never different.

    Orders lie end to end like the examples themselves, so nodes of very unequal sizes cost
    no padding: two numbers per example in all. There are two slots because a batch touches
    two epochs at most; an even epoch uses one and an odd epoch the other.
    """

    def __init__(self, shards: Shards, seed: int) -> None:
        self.shards = shards
        self.seed = seed
        self._order = torch.empty(2, len(shards.y), dtype=torch.int64, device=shards.nodes.device)
        self._epoch = torch.full((2, len(shards.nodes)), -1, device=shards.nodes.device)

    def look_up(self, at: Tensor, epoch: Tensor, number: Tensor) -> Tensor:
        """Return the index of example `number` in an epoch of the nodes, all ``[rows, B]``.

        `at` ``[rows]`` says where the nodes stand among the shards' nodes, all different.
        The columns of `epoch` may differ by one within a row.
        """
        for column in (0, -1):
            self._renew(at, epoch[:, column])
        start = self.shards.start[at].unsqueeze(1)
        return start + self._order[epoch % 2, start + number]

    def _renew(self, at: Tensor, epoch: Tensor) -> None:
        slot = epoch % 2
        stale = self._epoch[slot, at] != epoch
        if not bool(stale.any()):
            return
        at, epoch, slot = at[stale], epoch[stale], slot[stale]
        count, start = self.shards.count[at], self.shards.start[at]
        row = torch.repeat_interleave(torch.arange(len(at), device=at.device), count)
        number = torch.arange(len(row), device=at.device) - (count.cumsum(0) - count)[row]
        key = rng.fold(rng.keys(self.seed, self.shards.nodes[at]), epoch)
        # One key per example rather than one row of numbers per node, which would need
        # padding to the largest node. Sorting twice, stably, sorts by row and then by draw.
        draw = rng.uniform(rng.fold(key[row], number), 1).squeeze(1)
        order = draw.argsort(stable=True)
        order = order[row[order].argsort(stable=True)]
        self._order[slot[row], start[row] + number] = number[order]
        self._epoch[slot, at] = epoch


def batch_sizes(shards: Shards, nodes: Tensor, batch_size: BatchSize) -> Tensor:
    """Return the batch size each of the nodes can have, ``[rows]``: at most all it holds."""
    counts = shards.counts(nodes)
    if batch_size == "full":
        return counts
    if batch_size < 1:
        raise ValueError(f'batch_size = {batch_size} must be at least 1, or "full"')
    return counts.clamp(max=batch_size)


def batch_indices(
    shards: Shards,
    nodes: Tensor,
    steps: Tensor,
    batch_size: BatchSize,
    seed: int,
    orders: EpochOrders | None = None,
) -> Tensor:
    """Return where the examples of a batch lie, ``[rows] nodes, [rows] steps -> [rows, B]``.

    All the nodes must have the same batch size ``B = min(batch_size, count)``; group
    them by :func:`batch_sizes`. A batch that is everything a node has is in the order of
    its examples, whatever the step. Keep `orders` (of the same shards and seed) from call
    to call to pay O(B) per row rather than O(count).
    """
    at, sizes = shards.find(nodes), batch_sizes(shards, nodes, batch_size)
    if len(sizes) == 0:
        return nodes.new_empty(0, 0)
    width = int(sizes[0])
    if bool((sizes != width).any()):
        raise ValueError(
            f"batch_size = {batch_size} gives some of these nodes {width} examples and others "
            f"{int(sizes[sizes != width][0])}; ask for nodes of equal batch size together"
        )
    whole = shards.start[at].unsqueeze(1) + torch.arange(width, device=nodes.device)
    partial = shards.count[at] > width
    if not bool(partial.any()):
        return whole
    if orders is None:
        orders = EpochOrders(shards, seed)
    elif orders.shards is not shards or orders.seed != seed:
        raise ValueError("these orders were made for other shards or another seed")
    whole[partial] = _drawn(orders, at[partial], steps[partial], width)
    return whole


def _drawn(orders: EpochOrders, at: Tensor, steps: Tensor, width: int) -> Tensor:
    """Return the batches of nodes that hold more than a batch, ``[rows, width]``."""
    if len(set(at.tolist())) < len(at):  # one node at two steps might need three epochs at once
        rows = [slice(i, i + 1) for i in range(len(at))]
        return torch.cat([_drawn(orders, at[row], steps[row], width) for row in rows])
    position = steps.unsqueeze(1) * width + torch.arange(width, device=at.device)
    count = orders.shards.count[at].unsqueeze(1)
    return orders.look_up(at, position // count, position % count)
