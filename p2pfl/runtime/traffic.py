"""The bytes of a round, as peers on a network would count them."""

from __future__ import annotations

import torch
from torch import Tensor

from p2pfl.runtime import wire
from p2pfl.runtime.setup import Setup


class Traffic:
    """Count the bytes every node sends and receives.

    Args:
        setup: the run.
        node: one whose data are here; all say as much.
    """

    def __init__(self, setup: Setup, node: int) -> None:
        self._topology = setup.topology
        self._payload = sum(field.nbytes for field in setup.message(node))
        self._known: dict[tuple[int, int], tuple[Tensor, Tensor]] = {}

    def of_round(self, round: int) -> tuple[Tensor, Tensor]:
        """Return the bytes sent and received, ``[n]`` int64."""
        period = self._topology.period
        key = (round % period if period else round, wire.alike(round))
        if key not in self._known:
            if not period:
                self._known.clear()
            self._known[key] = self._count(round)
        return self._known[key]

    def _count(self, round: int) -> tuple[Tensor, Tensor]:
        links = self._topology.links(round)
        degree = torch.bincount(links.senders, minlength=links.n)
        # Headers differ by how many digits their numbers have, so a few stand for all.
        size = torch.tensor(
            [
                wire.model_size(*map(wire.alike, (sender, round, to)), self._payload)
                for sender, to in enumerate(degree.tolist())
            ]
        )
        received = torch.zeros_like(size).index_add(0, links.receivers, size[links.senders])
        return degree * size, received
