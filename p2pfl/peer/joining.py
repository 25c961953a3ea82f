"""Where a peer goes on that comes late, or comes back: from what its neighbours hold."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from p2pfl.learning.tree import wide
from p2pfl.peer.events import Position

ASKED = 3  # neighbours whose models are asked for
SHORT = 20  # rounds: who was away for longer takes the model of the others
NEAR = 0.1  # as does who is further from it than this share of its norm
TOGETHER = 4  # rounds: offers that far behind the newest are not used


class Offer(NamedTuple):
    """What a neighbour has, and in which round."""

    round: int
    params: Tensor  # [1, d]


def position(
    offers: Sequence[Offer],
    own: Position | None,
    model: Callable[[Any], Tensor],
    begin: Callable[[Tensor], Any],
) -> Position | None:
    """Return where to begin, in the round after the newest that was offered.

    A peer that was away for a moment, and is close to the others, keeps its own state, what
    its optimiser remembers included. Else it begins from the mean of what it was offered. The
    batches it draws go on where they were in any case.

    Args:
        offers: of a few neighbours; from none of them nothing follows but one's own state.
        own: where it stood when it was last seen, if it has kept that.
        model: the parameters in a state.
        begin: a state that begins from parameters ``[1, d]``.

    Returns:
        the position, or None if nothing is known: it begins like everybody else.
    """
    if not offers:
        return own
    newest = max(offer.round for offer in offers)
    near = [offer.params for offer in offers if offer.round > newest - TOGETHER]
    exact = wide(near[0])
    mean = torch.stack([params.to(exact) for params in near]).mean(0)
    step = own.step if own else 0
    if own and newest - own.round <= SHORT:
        away = (model(own.state).to(exact) - mean).norm()
        if away <= NEAR * mean.norm():
            return Position(newest + 1, step, own.state)
    return Position(newest + 1, step, begin(mean.to(near[0].dtype)))
