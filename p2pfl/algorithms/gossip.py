"""Gossip learning: models which meet are merged by their age."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from p2pfl.algorithm import Algorithm, Inbox, Needs, Rows
from p2pfl.algorithms.steps import plain_factor
from p2pfl.learning.checks import require
from p2pfl.learning.optim import Optimiser
from p2pfl.learning.tree import wide


class Aged(NamedTuple):
    """A model and the number of steps behind it."""

    x: Tensor  # [rows, d]
    age: Tensor  # [rows, 1]


class AgedState(NamedTuple):
    """A model, its age and its optimiser."""

    x: Tensor
    age: Tensor
    opt: Any


Merge = Callable[[AgedState, Inbox[Aged]], Tensor]  # what becomes of the model of each row


def gossip(
    opt: Optimiser, merge: Literal["age", "mean", "limited"] = "age", limit: int = 100
) -> Algorithm[AgedState, Aged, Aged]:
    """Merge the models that meet, and train on (Ormándi, Hegedűs and Jelasity 2013).

    The merged model takes the age of the oldest of its parents, the number of local steps
    behind it. Made for peers that push on a timer and merge on arrival (``pace = "timer"``),
    which is the paper's order MU with the node's own model for the last one it received; in
    rounds every neighbour is merged at once. Messages are ``4 d + 4`` bytes (float32).

    Args:
        merge: ``"age"``: in proportion to age plus one (Hegedűs, Danner and Jelasity 2021).
            ``"mean"``: as the mixing rule says, half and half on a timer. ``"limited"``: those
            more than `limit` steps younger than the oldest are left out, the others in
            proportion to age plus one, whatever the mixing rule (Danner et al. 2023).
        limit: steps, for ``"limited"``.
    """
    require(limit >= 0, "limit", limit, "a whole number >= 0")

    def by_age(s: AgedState, inbox: Inbox[Aged]) -> Tensor:
        return inbox.mix(inbox.heard.x, by=inbox.heard.age + 1)

    def by_mean(s: AgedState, inbox: Inbox[Aged]) -> Tensor:
        return inbox.mix(inbox.heard.x)

    def limited(s: AgedState, inbox: Inbox[Aged]) -> Tensor:
        age, heard = inbox.gather(inbox.heard.age)
        oldest = inbox.largest(inbox.heard.age).unsqueeze(1)
        counts = (age + 1) * (heard.unsqueeze(2) & (age >= oldest - limit))
        return (inbox.gather(inbox.heard.x)[0] * counts).sum(1) / counts.sum(1)

    return _on_arrival(opt, {"age": by_age, "mean": by_mean, "limited": limited}[merge])


def fedasync(
    opt: Optimiser,
    alpha: float = 0.6,
    staleness: Literal["constant", "polynomial", "hinge"] = "polynomial",
    a: float = 0.5,
    b: float = 4,
) -> Algorithm[AgedState, Aged, Aged]:
    """FedAsync among peers: the staler a model, the less it counts (Xie, Koyejo and Gupta 2019).

    A model x' with t local steps fewer behind it than one's own is merged as
    ``x <- x + alpha s(t) (x' - x)``, where t = 0 for one that has more; the merged model takes
    the larger of the two ages. Made for ``pace = "timer"`` or ``patience = 0``; several models
    heard at once share alpha evenly, whatever the mixing rule. The mean of all is not kept.
    Messages are ``4 d + 4`` bytes (float32).

    Args:
        alpha: the weight of a model that is not stale, in (0, 1].
        staleness: ``"polynomial"``: ``s = (1 + t) ** -a``. ``"hinge"``: 1 up to t = b, then
            ``1 / (a (t - b) + 1)``. ``"constant"``: 1.
        a: how fast the weight falls, >= 0; the paper takes 0.5, and 10 for the hinge.
        b: local steps that do not count yet, >= 0, for the hinge.
    """
    require(0 < alpha <= 1, "alpha", alpha, "in (0, 1]")
    require(0 <= a < math.inf, "a", a, "a finite number >= 0")
    require(0 <= b < math.inf, "b", b, "a finite number >= 0")
    fade: dict[str, Callable[[Tensor], Tensor]] = {
        "constant": torch.ones_like,
        "polynomial": lambda late: (1 + late) ** -a,
        "hinge": lambda late: 1 / (a * (late - b).clamp(min=0) + 1),
    }

    def merge(s: AgedState, inbox: Inbox[Aged]) -> Tensor:
        # A row hears itself, too, which changes nothing, but is none of the others.
        age, heard = inbox.gather(inbox.heard.age)
        late = (s.age.unsqueeze(1) - age).clamp(min=0)
        share = alpha * fade[staleness](late) * heard.unsqueeze(2)
        share = share / (heard.sum(1) - 1).clamp(min=1).view(-1, 1, 1)
        return s.x + ((inbox.gather(inbox.heard.x)[0] - s.x.unsqueeze(1)) * share).sum(1)

    return _on_arrival(opt, merge)


def _on_arrival(opt: Optimiser, merge: Merge) -> Algorithm[AgedState, Aged, Aged]:
    def init(x: Tensor, rows: Rows) -> AgedState:
        return AgedState(x, torch.zeros_like(x[:, :1], dtype=wide(x)), opt.init(x))

    def step(s: AgedState, grads: Tensor) -> AgedState:
        update, state = opt.update(grads, s.opt, s.x)
        return AgedState(s.x + update, s.age + 1, state)

    def receive(s: AgedState, inbox: Inbox[Aged]) -> AgedState:
        age = inbox.largest(inbox.heard.age)
        return s._replace(x=merge(s, inbox).to(s.x.dtype), age=age)

    plain = plain_factor(opt)

    def factor(s: AgedState) -> tuple[Tensor, AgedState]:
        assert plain is not None
        by, state = plain(s)
        return by, state._replace(age=s.age + 1)

    return Algorithm(
        init,
        lambda s: s.x,
        step,
        lambda s: Aged(s.x, s.age),
        receive,
        needs=Needs(convex=True),  # ages scale the weights, whose sum must not come near 0
        factor=factor if plain else None,
        columnwise=True,
    )
