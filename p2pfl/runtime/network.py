"""How long things take in the emulator, and which messages are lost.

Every draw is keyed by what it is about (the link and the number of the message on it, or
the node and its step), so the same seed gives the same network whatever happens first.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import NamedTuple

from p2pfl.peer.events import PeerId

# `rng` for one number at a time: the same numbers, without a tensor for each.
_STEP = 0x9E3779B97F4A7C15
_MUL1 = 0xBF58476D1CE4E5B9
_MUL2 = 0x94D049BB133111EB
_MASK = 2**64 - 1


class Delivery(NamedTuple):
    """What becomes of one message."""

    leaves: float  # when the sender's line is free again
    passes: float  # when the link is free again
    arrives: float  # inf: lost


@dataclass(frozen=True)
class NetworkModel:
    """A model of the network and of the speed of the nodes.

    Attributes:
        latency: seconds a message is under way, beside its transmission.
        jitter: the latency of each message is stretched by a factor drawn uniformly from
            ``[1, 1 + jitter]``.
        bandwidth: bytes per second of a link; ``inf``: transmission takes no time.
        uplink: bytes per second that leave a node over all its links; ``inf``: no limit.
        loss: probability that a message is lost.
        compute: seconds a local step takes on a node of speed 1.
        compute_jitter: as `jitter`, for the local steps of a round.
        slow: share of nodes, drawn by the seed, which are `slow_factor` times slower.
        slow_factor: how many times slower they are.
        seed: draws all of this.
        links: latency, bandwidth and loss of single links ``(sender, receiver)``, which go
            before the values above.
        speeds: the speed of single nodes; 2.0 is twice as fast.
    """

    latency: float = 0.001
    jitter: float = 0.0
    bandwidth: float = math.inf
    uplink: float = math.inf
    loss: float = 0.0
    compute: float = 0.01
    compute_jitter: float = 0.0
    slow: float = 0.0
    slow_factor: float = 10.0
    seed: int = 0
    links: Mapping[tuple[PeerId, PeerId], Mapping[str, float]] = field(default_factory=dict)
    speeds: Mapping[PeerId, float] = field(default_factory=dict)
    _keys: dict[tuple[int, int], int] = field(
        default_factory=dict, init=False, repr=False, compare=False
    )

    def __post_init__(self) -> None:
        for name in ("latency", "jitter", "compute", "compute_jitter"):
            if not 0 <= getattr(self, name) < math.inf:
                raise ValueError(f"{name} = {getattr(self, name)} is not a finite number >= 0")
        for name in ("bandwidth", "uplink", "slow_factor"):
            if not getattr(self, name) > 0:
                raise ValueError(f"{name} = {getattr(self, name)} is not above 0")
        for name in ("loss", "slow"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"{name} = {getattr(self, name)} is not in [0, 1]")

    def training(self, node: PeerId, step: int, count: int) -> float:
        """Return how long `count` local steps take, in seconds."""
        slow = self.slow and self._draw(1, node, 0) < self.slow
        factor = (self.slow_factor if slow else 1.0) / self.speeds.get(node, 1.0)
        stretch = self._stretch(self.compute_jitter, 2, node, step)
        return count * self.compute * factor * stretch

    def delivery(
        self,
        link: tuple[PeerId, PeerId],
        number: int,
        size: int,
        now: float,
        free: float = 0.0,
    ) -> Delivery:
        """Return when message `number` of a link, of `size` bytes and ready `now`, arrives.

        The message before it has passed the link at `free`.
        """
        latency, bandwidth, loss = self.latency, self.bandwidth, self.loss
        if link in self.links:
            special = self.links[link]
            latency = special.get("latency", latency)
            bandwidth = special.get("bandwidth", bandwidth)
            loss = special.get("loss", loss)
        key = _number_of(link)
        leaves = now + size / self.uplink
        passes = max(now, free) + size / min(bandwidth, self.uplink)
        if loss and self._draw(3, key, number) < loss:
            return Delivery(leaves, passes, math.inf)
        stretch = self._stretch(self.jitter, 4, key, number)
        return Delivery(leaves, passes, passes + latency * stretch)

    def lot(self, use: int, link: tuple[PeerId, PeerId], number: int) -> float:
        """Draw from [0, 1) for something that happens to a message of a link.

        Args:
            use: tells kinds of lots apart; 1 to 4 are taken.
            link: ``(sender, receiver)``.
            number: of the message.
        """
        return self._draw(use, _number_of(link), number)

    def _stretch(self, jitter: float, use: int, which: int, number: int) -> float:
        return 1 + jitter * self._draw(use, which, number) if jitter else 1.0

    def _draw(self, use: int, which: int, number: int) -> float:
        """Return what `rng.uniform` gives below the key (seed, which, use, number)."""
        key = self._keys.get((use, which))
        if key is None:
            key = _fold(_fold(self.seed & _MASK, which), use)
            key = self._keys[use, which] = _hash(key)  # the part of `_fold` that stays the same
        return (_hash(_hash(key + number * _STEP) + _STEP) >> 11) * 2.0**-53


def _number_of(link: tuple[PeerId, PeerId]) -> int:
    return link[0] * 2**31 + link[1]


def _fold(key: int, data: int) -> int:
    return _hash(_hash(key) + data * _STEP)


def _hash(z: int) -> int:
    z &= _MASK
    z = ((z ^ z >> 30) * _MUL1) & _MASK
    z = ((z ^ z >> 27) * _MUL2) & _MASK
    return z ^ z >> 31
