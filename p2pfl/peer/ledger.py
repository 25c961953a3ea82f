"""Shares of a mass over a network that loses messages: running sums.

Where messages are shares of a mass, as in push-sum, one that is lost takes its mass along, and
one that comes twice makes some up. So what a peer sends to a neighbour is the sum of all the
shares it ever meant for it, and the neighbour takes the difference to the sum before. What was
lost then comes with the next message, and a copy brings nothing (Hadjicostis, Vaidya and
Domínguez-García 2016, *Robust distributed average consensus via exchange of running sums*).

A sum means something only while both ends remember it, so each edge has an epoch: the lives of
its two ends, which count how often each has started. It travels with every message. Whoever
learns of a new one calls `forget` before anything else is given or taken on that edge, and
messages of another epoch are dropped. What was on its way then is lost, numerator and weight
alike: quotients remain averages, of what is left.

Who is dead, frozen or slow takes shares and gives few or none. So where links go both ways, any
word of a neighbour is an answer to what it was given, and who has left a few shares unanswered is
given no more. Those that somebody who is gone never answered are taken back: they are no
part of the sum any more.
"""

from __future__ import annotations

from collections import Counter
from typing import Any, Generic

import torch
from torch import Tensor

from p2pfl.algorithm import M
from p2pfl.learning.tree import tree_map, wide
from p2pfl.peer.events import PeerId

CREDIT = 2  # shares; in step nobody ever has more to answer


class Ledger(Generic[M]):
    """What one peer has given to and taken from each of its neighbours.

    Sums are kept, and sent, in the type of the shares, though at least in float32: a model for
    every neighbour sent to, another until it answers, and one for every neighbour heard. Messages
    are kept as they are, not copied, and never written into; nor may anybody else.

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
        self._answered: dict[PeerId, M] = {}  # how much of it, when each was heard last
        self._unanswered: Counter[PeerId] = Counter()  # how many shares each was given since

    def owes(self, peer: PeerId) -> bool:
        """Say whether a neighbour is to be given nothing until it is heard."""
        return self._unanswered[peer] >= CREDIT

    def lend(self, to: PeerId, share: M, answered: bool = False) -> M:
        """Give a share to a neighbour that is to answer it, or has done so already; as `give`."""
        said = self.give(to, share)
        self._unanswered[to] += 1
        if answered:
            self._answered[to] = said
        return said

    def heard(self, peer: PeerId) -> None:
        """Take note of a word of a neighbour."""
        self._unanswered.pop(peer, None)
        if peer in self.given:
            self._answered[peer] = self.given[peer]

    def take_back(self, peer: PeerId) -> M | None:
        """Return what a neighbour, who is gone, was given and never answered, if there is any.

        Should it only have been silent, and have taken that, the next sums will make up for it.
        """
        if not self._unanswered.pop(peer, None):
            return None
        given, answered = self.given.pop(peer), self._answered.get(peer)
        if answered is None:
            return given
        self.given[peer] = answered
        return tree_map(torch.sub, given, answered) if answered is not given else None

    def give(self, to: PeerId, share: M) -> M:
        """Return what to send to a neighbour in place of a share, fields ``[1, ...]``."""
        share = tree_map(lambda part: part.to(wide(part)), share)
        known = self.given.get(to)
        self.given[to] = share if known is None else tree_map(torch.add, known, share)
        return self.given[to]

    def take(self, sender: PeerId, said: M) -> M | None:
        """Return what is new in the sum a neighbour has sent, fields ``[1, ...]``.

        None: it has taken back what we have taken. We owe it that, and may have passed it on, so we
        take no more until its sum has come to as much again. A sum older than the last one taken
        must be left out, as a mailbox does with old rounds.
        """
        known = self.taken.get(sender)
        if known is not None and bool(_weight(said) < _weight(known)):
            return None
        self.taken[sender] = said
        return said if known is None else tree_map(torch.sub, said, known)

    def forget(self, peer: PeerId) -> None:
        """Begin anew with a neighbour, from nothing given and nothing taken."""
        self._unanswered.pop(peer, None)
        for sums in (self.given, self.taken, self._answered):
            sums.pop(peer, None)


def typed(share: M, like: M) -> M:
    """Return a share in the types that another message has."""
    return tree_map(lambda part, other: part.to(other.dtype), share, like)


def _weight(share: Any) -> Tensor:  # noqa: ANN401 - any mass has one
    weight: Tensor = share.w
    return weight
