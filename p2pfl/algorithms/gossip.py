"""Gossip learning: models which meet are merged by their age."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from p2pfl.algorithm import Algorithm, Inbox, Needs, Rows
from p2pfl.algorithms.averaging import plain_steps
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


def gossip(opt: Optimiser) -> Algorithm[AgedState, Aged, Aged]:
    """Merge models in proportion to the steps behind them (Ormándi et al. 2013; Hegedűs 2021).

    The merged model takes the age of the oldest of its parents. Made for peers that push on
    a timer and merge on arrival (``pace = "timer"``); in rounds every neighbour is merged at
    once. Messages are ``4 d + 4`` bytes (float32).
    """

    def init(x: Tensor, rows: Rows) -> AgedState:
        return AgedState(x, torch.zeros_like(x[:, :1], dtype=wide(x)), opt.init(x))

    def step(s: AgedState, grads: Tensor) -> AgedState:
        update, state = opt.update(grads, s.opt, s.x)
        return AgedState(s.x + update, s.age + 1, state)

    def receive(s: AgedState, inbox: Inbox[Aged]) -> AgedState:
        x, age = inbox.heard
        return s._replace(x=inbox.mix(x, by=age + 1), age=inbox.largest(age))

    plain = plain_steps(opt)

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
        needs=Needs(convex=True),  # ages scale the weights, whose sum must not come near zero
        factor=factor if plain else None,
        columnwise=True,
    )
