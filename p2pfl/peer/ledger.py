"""Shares of a mass over a network that loses messages: running sums.

Where messages are shares of a mass, as in push-sum, one that is lost takes its mass along, and
one that comes twice makes some up. So what a peer sends to a neighbour is the sum of all the
shares it ever meant for it, and the neighbour takes the difference to the sum before. What was
lost then comes with the next message, and a copy brings nothing (Hadjicostis, Vaidya and
Domínguez-García 2016, *Robust distributed average consensus via exchange of running sums*).

A sum means something only while both ends remember it, so each edge has an epoch: the
incarnations of its two ends, which count how often each has started or was taken for dead. It
travels with every message. Whoever learns of a new one calls `forget` before anything else is
given or taken on that edge, and messages of another epoch are dropped. What was on its way then
is lost, numerator and weight alike: quotients remain averages, of what is left.

Who is dead, frozen or slow takes shares and gives none. So where links go both ways a neighbour
is given a share only if it has answered the last one, by any word; and the share that who is gone
never answered is taken back. In step everybody always has answered, whoever speaks first.
"""

from __future__ import annotations

from collections.abc import Set
from typing import Generic

import torch

from p2pfl.algorithm import M
from p2pfl.learning.tree import tree_map, wide
from p2pfl.peer.events import PeerId


class Ledger(Generic[M]):
    """What one peer has given to and taken from each of its neighbours.

    Sums are kept, and sent, in the type of the shares, though at least in float32: a model for
    every neighbour sent to and one for every neighbour heard. Messages are kept as they are, not
    copied, and never written into; nor may anybody else.

    Sums grow, and are rounded the more coarsely. Sixteen peers on one-peer exponential edges
    that average numbers near 1 in float32 are off by 3e-5 after 1,000 rounds and by 3e-4 after
    10,000 (in float64 by 5e-14 and 3e-13).

    Attributes:
        given: the sum of all that was ever meant for each neighbour.
        taken: the sum that each neighbour had sent when something was last taken of it. What
            it has given beyond that is on its way.
    """

    def __init__(self) -> None:
        self.given: dict[PeerId, M] = {}
        self.taken: dict[PeerId, M] = {}
        self._lent: dict[PeerId, tuple[float, M]] = {}  # the share of what
        self._ahead: set[PeerId] = set()  # who has answered its next share already

    @property
    def owing(self) -> Set[PeerId]:
        """Who has not answered its last share."""
        return self._lent.keys()

    def lend(self, to: PeerId, weight: float, message: M) -> None:
        """Take note that a neighbour is given such a share of a message, and is to answer it."""
        if to in self._ahead:
            self._ahead.remove(to)
        else:
            self._lent[to] = weight, message

    def heard(self, peer: PeerId) -> None:
        """Take note of a word of a neighbour."""
        if self._lent.pop(peer, None) is None:
            self._ahead.add(peer)

    def take_back(self, peer: PeerId) -> tuple[float, M] | None:
        """Return the share of what it was that a neighbour, who is gone, has not answered."""
        self._ahead.discard(peer)
        return self._lent.pop(peer, None)

    def give(self, to: PeerId, share: M) -> M:
        """Return what to send to a neighbour in place of a share, fields ``[1, ...]``."""
        share = tree_map(lambda part: part.to(wide(part)), share)
        known = self.given.get(to)
        self.given[to] = share if known is None else tree_map(torch.add, known, share)
        return self.given[to]

    def take(self, sender: PeerId, said: M) -> M:
        """Return what is new in the sum a neighbour has sent, fields ``[1, ...]``.

        A sum older than the last one taken must be left out, as a mailbox does with old rounds:
        it would take back what the newer one has brought.
        """
        known = self.taken.get(sender)
        self.taken[sender] = said
        return said if known is None else tree_map(torch.sub, said, known)

    def forget(self, peer: PeerId) -> None:
        """Begin anew with a neighbour, from nothing given and nothing taken."""
        self.given.pop(peer, None)
        self.taken.pop(peer, None)
