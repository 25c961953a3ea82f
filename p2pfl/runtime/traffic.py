"""The bytes of a round, as peers on a network would count them."""

from __future__ import annotations

import torch
from torch import Tensor

from p2pfl.runtime import wire
from p2pfl.runtime.setup import Setup

# Where one more number makes a header longer: msgpack has integers of 1, 2, 3, 5 and 9 bytes.
_LONGER = torch.tensor([1 << 7, 1 << 8, 1 << 16, 1 << 32])


class Traffic:
    """Count the bytes every node sends and receives."""

    def __init__(self, setup: Setup) -> None:
        self._topology = setup.topology
        self._known: dict[tuple[int, int, int], tuple[Tensor, Tensor]] = {}

    def of_round(self, round: int, payload: int) -> tuple[Tensor, Tensor]:
        """Return the bytes sent and received, ``[n]`` int64, where a message holds `payload`."""
        period = self._topology.period
        key = (round % period if period else round, _length(round), payload)
        if key not in self._known:
            if not period:
                self._known.clear()
            self._known[key] = self._count(round, payload)
        return self._known[key]

    def _count(self, round: int, payload: int) -> tuple[Tensor, Tensor]:
        links = self._topology.links(round)
        degree = torch.bincount(links.senders, minlength=links.n)
        # Headers differ by how many digits their numbers have, so a few stand for all.
        lengths = torch.stack(
            [
                torch.bucketize(each, _LONGER, right=True)
                for each in (torch.arange(links.n), degree)
            ],
            1,
        )
        kinds, kind = torch.unique(lengths, dim=0, return_inverse=True)
        few = [wire.header_size(_least(sender), round, _least(to)) for sender, to in kinds.tolist()]
        size = payload + torch.tensor(few)[kind]
        received = torch.zeros_like(size).index_add(0, links.receivers, size[links.senders])
        return degree * size, received


def _length(number: int) -> int:
    return int(torch.bucketize(torch.tensor(number), _LONGER, right=True))


def _least(length: int) -> int:
    """Return the smallest number of a length."""
    return 0 if length == 0 else int(_LONGER[length - 1])
