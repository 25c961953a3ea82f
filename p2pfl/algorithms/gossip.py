"""Gossip learning: models travel, and those which meet are merged by their age."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from p2pfl.algorithm import Algorithm, Inbox, Needs, Rows
from p2pfl.algorithms.steps import plain_factor, plain_step
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


class RememberedState(NamedTuple):
    """As `AgedState`, and what became of the model that came before the last one."""

    x: Tensor
    age: Tensor
    opt: Any
    past: Tensor
    past_age: Tensor


Merge = Callable[[Any, Inbox[Aged]], Tensor]  # what becomes of the model of each row
Count = Callable[[Tensor, Tensor], Tensor]  # age, and that of the oldest -> what a model counts


def gossip(
    opt: Optimiser,
    merge: Literal["age", "mean", "limited"] | None = None,
    limit: int | None = None,
    order: Literal["merge_then_update", "update_then_merge", "random_walk"] = "merge_then_update",
) -> Algorithm[Any, Aged, Aged]:
    """Gossip learning: models travel, and are trained where they come (Ormándi et al. 2013).

    Made for peers that push on a timer and train on arrival (``pace = "timer"``). A merged model
    takes the age of the oldest of its parents, the number of local steps behind it. Messages are
    ``4 d + 4`` bytes (float32).

    Args:
        merge: ``"age"``, the default: in proportion to age plus one (Hegedűs, Danner and Jelasity
            2021). ``"mean"``: as the mixing rule says, half and half on a timer. ``"limited"``:
            those more than `limit` steps younger than the oldest are left out, the others in
            proportion to age plus one, whatever the mixing rule (Danner et al. 2023).
        limit: steps, for ``"limited"``; 100 by default.
        order: ``"merge_then_update"``: what comes is merged with one's own model and trained, which
            is the paper's MU with one's own model for the last one that came; in rounds every
            neighbour is merged at once. ``"update_then_merge"``: the paper's UM: what comes is
            trained, and merged with what became of the model that came before it, which is
            kept. ``"random_walk"``: the paper's RW: what comes takes the place of one's own and is
            trained, and nothing is merged. These two take one model at a time: on a
            timer as they come, in rounds from one neighbour each; a period without any trains
            one's own. The optimiser's state stays with the node.
    """
    if order == "random_walk" and merge is not None:
        raise ValueError(f"merge = {merge!r}: order = 'random_walk' merges nothing: leave it out")
    if limit is not None and merge != "limited":
        raise ValueError(f"limit = {limit} is for merge = 'limited' alone: leave it out")
    most = 100 if limit is None else limit
    require(most >= 0, "limit", most, "a whole number >= 0")
    if order == "random_walk":
        return _walking(opt)

    kinds: dict[str, Count] = {
        "age": lambda age, oldest: age + 1,
        "mean": lambda age, oldest: torch.ones_like(age),
        "limited": lambda age, oldest: (age + 1) * (age >= oldest - most),
    }
    kind = merge or "age"
    if order == "update_then_merge":
        return _remembering(opt, kinds[kind])

    def by_age(s: AgedState, inbox: Inbox[Aged]) -> Tensor:
        return inbox.mix(inbox.heard.x, by=inbox.heard.age + 1)

    def by_mean(s: AgedState, inbox: Inbox[Aged]) -> Tensor:
        return inbox.mix(inbox.heard.x)

    def limited(s: AgedState, inbox: Inbox[Aged]) -> Tensor:
        age, heard = inbox.gather(inbox.heard.age)
        oldest = inbox.largest(inbox.heard.age).unsqueeze(1)
        counts = kinds["limited"](age, oldest) * heard.unsqueeze(2)
        shares = counts / counts.sum(1, keepdim=True)  # first: a model times an age may overflow
        return (inbox.gather(inbox.heard.x)[0] * shares).sum(1)

    return _on_arrival(opt, {"age": by_age, "mean": by_mean, "limited": limited}[kind])


def _walking(opt: Optimiser) -> Algorithm[Any, Aged, Aged]:
    """Take what comes in place of one's own: the mean of it, if it were several."""

    def receive(s: Any, inbox: Inbox[Aged]) -> Any:  # noqa: ANN401 - with or without a past
        x, age = _others(inbox, s.x, s.age)
        return s._replace(x=x, age=age)

    return _aging(opt, receive, Needs(single=True))


def _remembering(opt: Optimiser, count: Count) -> Algorithm[RememberedState, Aged, Aged]:
    """Train what comes, and merge it with what became of the one before."""
    walk = _walking(opt)

    def init(x: Tensor, rows: Rows) -> RememberedState:
        begun = walk.init(x, rows)
        return RememberedState(x, begun.age, begun.opt, x, begun.age)

    def settle(s: RememberedState) -> RememberedState:
        oldest = torch.maximum(s.age, s.past_age)
        mine, past = count(s.age, oldest), count(s.past_age, oldest)
        both = mine + past
        merged = (mine / both * s.x + past / both * s.past).to(s.x.dtype)
        return RememberedState(merged, oldest, s.opt, s.x, s.age)

    return walk._replace(init=init, settle=settle)


def _others(inbox: Inbox[Aged], x: Tensor, age: Tensor) -> tuple[Tensor, Tensor]:
    """Return the mean of the others' models and their largest age; if there are none, one's own."""
    others = inbox.others().unsqueeze(2)
    some, count = others.any(1), others.sum(1).clamp(min=1)
    models, ages = inbox.gather(inbox.heard.x)[0], inbox.gather(inbox.heard.age)[0]
    mean = ((models * others).sum(1) / count).to(x.dtype)
    return torch.where(some, mean, x), torch.where(some, (ages * others).amax(1), age)


def fedasync(
    opt: Optimiser,
    alpha: float = 0.6,
    staleness: Literal["constant", "polynomial", "hinge"] = "polynomial",
    a: float | None = None,
    b: float | None = None,
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
        a: how fast the weight falls, >= 0; by default as in the paper, 0.5, and 10 for the hinge.
        b: local steps that do not count yet, >= 0, for the hinge; 4 by default.
    """
    require(0 < alpha <= 1, "alpha", alpha, "in (0, 1]")
    if a is not None and staleness == "constant":
        raise ValueError(f"a = {a}: staleness = 'constant' makes no use of it: leave it out")
    if b is not None and staleness != "hinge":
        raise ValueError(f"b = {b} is for staleness = 'hinge' alone: leave it out")
    fall = (10.0 if staleness == "hinge" else 0.5) if a is None else a
    free = 4.0 if b is None else b
    require(0 <= fall < math.inf, "a", a, "a finite number >= 0")
    require(0 <= free < math.inf, "b", b, "a finite number >= 0")
    fade: dict[str, Callable[[Tensor], Tensor]] = {
        "constant": torch.ones_like,
        "polynomial": lambda late: (1 + late) ** -fall,
        "hinge": lambda late: 1 / (fall * (late - free).clamp(min=0) + 1),
    }

    def merge(s: AgedState, inbox: Inbox[Aged]) -> Tensor:
        # A row hears itself, too, which changes nothing, but is none of the others.
        age, heard = inbox.gather(inbox.heard.age)
        late = (s.age.unsqueeze(1) - age).clamp(min=0)
        share = alpha * fade[staleness](late) * heard.unsqueeze(2)
        share = share / (heard.sum(1) - 1).clamp(min=1).view(-1, 1, 1)
        return s.x + ((inbox.gather(inbox.heard.x)[0] - s.x.unsqueeze(1)) * share).sum(1)

    return _on_arrival(opt, merge)


def _on_arrival(opt: Optimiser, merge: Merge) -> Algorithm[Any, Aged, Aged]:
    """Merge what comes, and train on."""

    def receive(s: AgedState, inbox: Inbox[Aged]) -> AgedState:
        age = inbox.largest(inbox.heard.age)
        return s._replace(x=merge(s, inbox).to(s.x.dtype), age=age)

    # Ages scale the weights, whose sum must not come near 0.
    return _aging(opt, receive, Needs(convex=True))


def _aging(
    opt: Optimiser, receive: Callable[[Any, Inbox[Aged]], Any], needs: Needs
) -> Algorithm[Any, Aged, Aged]:
    """Count the local steps behind a model."""

    def init(x: Tensor, rows: Rows) -> AgedState:
        return AgedState(x, torch.zeros_like(x[:, :1], dtype=wide(x)), opt.init(x))

    def older(s: Any) -> Any:  # noqa: ANN401 - with or without a past
        return s._replace(age=s.age + 1)

    return Algorithm(
        init,
        lambda s: s.x,
        plain_step(opt, older),
        lambda s: Aged(s.x, s.age),
        receive,
        needs=needs._replace(counts=("age",)),
        factor=plain_factor(opt, older),
        columnwise=True,
    )
