"""What an aggregation rule is: what a row makes of the models it has heard."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from p2pfl.algorithm import Inbox, R
from p2pfl.learning.tree import wide


class Heard(NamedTuple):
    """What some rows have heard, side by side; their own models are among it.

    Rows may have heard different numbers of models: what the mask leaves out is padding, and
    may hold anything. Models stand in the order of their senders' ids.
    """

    models: Tensor  # [rows, k, d]
    mask: Tensor  # [rows, k], bool
    weights: Tensor  # [rows, k]: the mixing weights, 0 in the padding
    own: Tensor  # [rows, d]
    keys: Tensor  # [rows], for rules which draw lots

    @property
    def senders(self) -> Tensor:
        """How many models each row has, int64 ``[rows]``."""
        return self.mask.sum(1)


class Aggregation(NamedTuple):
    """A rule: a pure function of what rows have heard.

    Attributes:
        combine: what a row takes for its model, ``[rows, d]``.
        needs: how many models that takes, its own included: with fewer the rule would promise
            nothing, so a row keeps its own.
        title: the rule in words, for error messages.
        columnwise: whether it treats every parameter by itself.
        draws: whether it makes use of the keys.
        linear: whether it is the weighted mean, which needs no models side by side.
    """

    combine: Callable[[Heard], Tensor]
    needs: int
    title: str
    columnwise: bool = False
    draws: bool = False
    linear: bool = False


def combined(rule: Aggregation, inbox: Inbox[R], x: Tensor, keys: Tensor) -> Tensor:
    """Return what a rule makes of a field of an inbox, ``[senders, d] -> [rows, d]``.

    Takes the memory of all models heard, side by side: for a complete graph of n nodes in the
    simulator n times that of all models, and as much again for rules which compare them.
    """
    if rule.linear:
        return inbox.mix(x)
    models, mask = inbox.gather(x)
    own = inbox.mine(x)
    exact = wide(own)
    heard = Heard(models.to(exact), mask, inbox.shares().to(exact), own.to(exact), keys)
    enough = (heard.senders >= rule.needs).unsqueeze(1)
    return torch.where(enough, rule.combine(heard).to(own.dtype), own)
