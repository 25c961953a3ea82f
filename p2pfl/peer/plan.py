"""What a peer is given before it begins: whom it talks to, how long it goes on, and from where."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import NamedTuple

from p2pfl.peer.events import PeerId
from p2pfl.peer.stopping import StopRule

# How many messages of one sender may lie unopened. Where links go both ways, a sender in
# step is at most one round ahead; only a peer which has fallen far behind ever reaches this,
# and it must not be drowned in models that it will never mix.
BACKLOG = 8


def is_measured(every: int, round: int, last: bool) -> bool:
    """Say whether models are measured at the end of a round: `every` so many, and after the last.

    >>> [is_measured(2, round, last=round == 4) for round in range(5)]
    [False, True, False, True, True]
    >>> is_measured(0, 4, last=True)
    False
    """
    return every > 0 and (last or (round + 1) % every == 0)


class View(NamedTuple):
    """Whom a peer talks to in a round.

    Attributes:
        sends_to: who is to hear it.
        hears_from: whom it is to hear.
        given: what each of those it sends to makes of it, where the links come with weights;
            None: that follows from degrees.
        taken: what it makes of each that it hears, likewise.
    """

    sends_to: tuple[PeerId, ...]
    hears_from: tuple[PeerId, ...]
    given: Mapping[PeerId, float] | None = None
    taken: Mapping[PeerId, float] | None = None


class Views(NamedTuple):
    """How a peer finds out whom it talks to.

    Attributes:
        of: given a round and who is gone.
        follow: whether the topology is one of those who are there, so that others may see it
            otherwise for a while. Else it is fixed, and the gone only leave gaps.
        mutual: whether, besides, both ends of a link are to count each other, or neither.
    """

    of: Callable[[int, frozenset[PeerId]], View]
    follow: bool = False
    mutual: bool = False


class Pace(NamedTuple):
    """How long a peer goes on, and how long it waits for the others.

    Attributes:
        rounds: the most rounds it takes.
        steps: local steps in a round.
        train_every: take them in every so manieth round only, from the first on.
        patience: seconds to wait for neighbours after sending; 0 or ``inf`` allowed.
        evaluate_every: measure the model after every so many rounds, and after the last;
            0: never.
        stop: when to stop before that, or None.
        width: rounds after which what anybody said has reached everybody.
        floods: where that is not certain, whether it is so of what is said in a given round.
        backlog: unopened messages of one sender that are kept, where only the newest counts
            and patience is finite.
        seconds: begin no further round after so many.
        overlap: take the local steps of the next round while waiting; the algorithm must
            have a `carry`.
    """

    rounds: int
    steps: int = 1
    patience: float = math.inf
    evaluate_every: int = 1
    stop: StopRule | None = None
    width: int = 1
    backlog: int = BACKLOG
    seconds: float = math.inf
    overlap: bool = False
    train_every: int = 1
    floods: Callable[[int], bool] = lambda round: True

    def steps_in(self, round: int) -> int:
        """Return how many local steps a round has."""
        return 0 if round % self.train_every else self.steps
