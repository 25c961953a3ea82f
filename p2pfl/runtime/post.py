"""Messages on their way: how large they are, and when they arrive."""

from __future__ import annotations

import math
from collections import Counter

from p2pfl.peer.events import PeerId, Send
from p2pfl.runtime import wire
from p2pfl.runtime.network import NetworkModel
from p2pfl.runtime.turmoil import Turmoil


class Post:
    """What is sent over a modelled network, link by link.

    Args:
        network: the model.
        turmoil: the faults that come on top of it.
    """

    def __init__(self, network: NetworkModel, turmoil: Turmoil) -> None:
        self._network, self._turmoil = network, turmoil
        self._lines: dict[PeerId, float] = {}  # when the line of each sender is free again
        self._links: dict[tuple[PeerId, PeerId], _Link] = {}
        self._small: Counter[tuple[PeerId, PeerId]] = Counter()  # small messages by link
        self._sent: Counter[tuple[PeerId, int]] = Counter()  # bytes by (node, round)

    def size(self, src: PeerId, send: Send) -> int:
        """Return the bytes of a message on the wire, and count them for all its receivers."""
        payload = sum(block.nbytes for block in send.message)
        # A header is as long as its numbers are, so a few stand for all.
        size = wire.model_size(*map(wire.alike, (src, send.round, send.degree)), payload)
        self._sent[src, send.round] += size * len(send.to)
        return size

    def sent(self, src: PeerId, round: int) -> int:
        """Return the bytes a node has sent in a round, and forget them."""
        return self._sent.pop((src, round), 0)

    def due(self, src: PeerId, dst: PeerId, size: int, now: float) -> float:
        """Send a message of `size` bytes; return when it arrives: ``inf`` if it is lost."""
        link = self._links.get((src, dst))
        if link is None:
            link = self._links[src, dst] = _Link()
        start = max(now, self._lines.get(src, 0.0))
        delivery = self._network.delivery((src, dst), link.number, size, start, link.free)
        link.number += 1
        self._lines[src], link.free, usual = delivery
        arrives = self._turmoil.arrival((src, dst), usual)
        if arrives < math.inf:
            link.arrived = arrives = max(arrives, link.arrived)  # links are in order
        return arrives

    def small(self, src: PeerId, dst: PeerId, now: float) -> float | None:
        """Return when a small message arrives, which no model is in the way of; None: never."""
        self._small[src, dst] += 1
        number = (1 << 40) + self._small[src, dst]
        usual = self._network.delivery((src, dst), number, 0, now).arrives
        arrives = self._turmoil.arrival((src, dst), usual)
        return arrives if arrives < math.inf else None

    def is_damaged(self, src: PeerId, dst: PeerId) -> bool:
        """Say whether a message is changed on its way; its receiver refuses it then."""
        return self._turmoil.corrupts((src, dst))

    def contacts(self, peer: PeerId) -> list[PeerId]:
        """Return who has exchanged anything with a peer, in ascending order."""
        ends = {end for link in self._links if peer in link for end in link}
        return sorted(ends - {peer})

    def not_before(self, src: PeerId, dst: PeerId, due: float) -> float:
        """Return a time after everything that was sent over a link so far has arrived."""
        link = self._links.get((src, dst))
        return due if link is None else max(due, link.arrived)


class _Link:
    __slots__ = ("arrived", "free", "number")

    def __init__(self) -> None:
        self.number, self.free, self.arrived = 0, 0.0, 0.0
