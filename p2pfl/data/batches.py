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

_SORTED_TOGETHER = 1024  # orders; the number of one and a 53-bit draw fill an int64


class EpochOrders:
    """A memory of the orders of the latest epochs; it makes batches faster, never different.

    Each node has a ring of two epochs, an even and an odd one, in which position ``p``
    stands at ``p mod (2 * count)``. The rings lie end to end, so nodes of very unequal
    sizes cost no padding: two numbers per example in all.
    """

    def __init__(self, shards: Shards, seed: int) -> None:
        self.shards = shards
        self.seed = seed
        length = 2 * shards.count
        self._begin = length.cumsum(0) - length
        self._ring = torch.empty(int(length.sum()), dtype=torch.int64, device=length.device)
        self._key = rng.keys(seed, shards.nodes)
        self._epoch = length.new_full((len(length), 2), -1)

    def look_up(self, at: Tensor, position: Tensor, width: int) -> Tensor:
        """Return the examples at `width` positions from `position` on, ``[rows, width]``.

        Args:
            at: where the nodes stand among the shards' nodes, ``[rows]``.
            position: the first position of each row, ``[rows]``.
            width: at most the count of each of the nodes, so that two epochs are enough.
        """
        count = self.shards.count[at]
        ends = torch.stack([position, position + (width - 1)])
        epoch = ends.div_(count, rounding_mode="floor")
        slot = epoch % 2
        stale = self._epoch[at, slot] != epoch
        if bool(stale.any()):
            if len(torch.unique(at)) < len(at):  # one node at two steps may need more than its ring
                rows = [slice(i, i + 1) for i in range(len(at))]
                return torch.cat([self.look_up(at[row], position[row], width) for row in rows])
            stale[1] &= slot[0] != slot[1]
            self._renew(at.expand_as(stale)[stale], epoch[stale])
        place = (position % (2 * count)).unsqueeze(1) + torch.arange(width, device=at.device)
        place %= 2 * count.unsqueeze(1)
        place += self._begin[at].unsqueeze(1)
        return self._ring.take(place)

    def _renew(self, at: Tensor, epoch: Tensor) -> None:
        """Put an epoch of each of the nodes into the rings, ``[k] nodes, [k] epochs``."""
        for begin in range(0, len(at), _SORTED_TOGETHER):
            some = slice(begin, begin + _SORTED_TOGETHER)
            part, numbered = at[some], epoch[some]
            count, slot = self.shards.count[part], numbered % 2
            row = torch.repeat_interleave(count)
            index = torch.arange(len(row), device=at.device)
            first = count.cumsum(0) - count
            # One key per example rather than one row of numbers per node, which would need
            # padding to the largest node.
            key = rng.fold(self._key[part], numbered)[row]
            draw = rng.uniform(rng.fold(key, index - first[row]), 1).squeeze(1)
            # The 53 bits of the draw below the number of the row: one sort for all rows.
            order = (draw.mul_(2.0**53).long() + (row << 53)).argsort(stable=True)
            place = index + (self._begin[part] + slot * count - first)[row]
            self._ring[place] = order + (self.shards.start[part] - first)[row]
            self._epoch[part, slot] = numbered


def batch_sizes(shards: Shards, nodes: Tensor, batch_size: BatchSize) -> Tensor:
    """Return the batch size each of the nodes can have, ``[rows]``: at most all it holds."""
    counts = shards.counts(nodes)
    return counts if batch_size == "full" else counts.clamp(max=_checked(batch_size))


def batch_indices(  # noqa: PLR0913  (what the batches are a function of, and a memory)
    shards: Shards,
    nodes: Tensor,
    steps: Tensor,
    batch_size: BatchSize,
    seed: int,
    orders: EpochOrders | None = None,
    count: int = 1,
) -> Tensor:
    """Return where the examples of some batches in a row lie, ``[rows, count * B]``.

    Row i is the batches of steps ``steps[i]`` to ``steps[i] + count - 1``, one after the
    other. A batch that is everything a node has is in the order of its examples, whatever
    the step.

    Args:
        shards: where the examples lie.
        nodes: int64 ``[rows]``, all of the same batch size ``B = min(batch_size, count)``;
            group them by :func:`batch_sizes`.
        steps: the first step of each row, int64 ``[rows]``, from 0.
        batch_size: examples of a step; ``"full"`` is all.
        seed: of the orders.
        orders: a memory of the same shards and seed; keep it from call to call to pay
            O(B) per row rather than O(examples of the node).
        count: how many steps, at least 1.

    Raises:
        ValueError: for a node that is not here, nodes of different batch sizes, a batch size
            below 1, or `orders` made for something else.
    """
    if len(nodes) == 0:
        return nodes.new_empty(0, 0)
    at = shards.find(nodes)
    held = shards.count[at]
    width, largest = _width(held, batch_size)
    whole = shards.start[at].unsqueeze(1) + torch.arange(width, device=at.device).repeat(count)
    if largest == width:
        return whole
    if orders is None:
        orders = EpochOrders(shards, seed)
    elif orders.shards is not shards or orders.seed != seed:
        raise ValueError("these orders were made for other shards or another seed")
    partial = held > width
    if bool(partial.all()):
        return _drawn(orders, at, steps, width, count)
    whole[partial] = _drawn(orders, at[partial], steps[partial], width, count)
    return whole


def _width(held: Tensor, batch_size: BatchSize) -> tuple[int, int]:
    """Return the one batch size of nodes with so many examples, and the most any holds."""
    smallest, largest = (int(end) for end in held.aminmax())
    width = largest if batch_size == "full" else min(_checked(batch_size), largest)
    if smallest < width:
        raise ValueError(
            f"batch_size = {batch_size} gives some of these nodes {width} examples and others "
            f"{smallest}; ask for nodes of equal batch size together"
        )
    return width, largest


def _checked(batch_size: int) -> int:
    if batch_size < 1:
        raise ValueError(f'batch_size = {batch_size} must be at least 1, or "full"')
    return batch_size


def _drawn(orders: EpochOrders, at: Tensor, steps: Tensor, width: int, count: int) -> Tensor:
    """Return the batches of nodes that hold more than a batch, ``[rows, count * width]``."""
    position = steps * width
    together = max(1, int(orders.shards.count[at].min()) // width)
    pieces = [
        orders.look_up(at, position + step * width, min(together, count - step) * width)
        for step in range(0, count, together)
    ]
    return pieces[0] if len(pieces) == 1 else torch.cat(pieces, 1)
