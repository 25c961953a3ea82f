"""Momentum that follows the network instead of a node's own gradients."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from p2pfl.algorithm import Algorithm, Inbox, Needs, Rows, by_column
from p2pfl.algorithms.averaging import Params
from p2pfl.learning.checks import require
from p2pfl.learning.optim import Optimiser
from p2pfl.learning.tree import wide


class QuasiGlobalState(NamedTuple):
    """A model, where its round began, two velocities, the steps of the round, the optimiser."""

    x: Tensor
    start: Tensor
    velocity: Tensor  # of the network: a running mean of how far a step has moved the model
    ahead: Tensor  # the same with the gradients of this round on top
    steps: Tensor  # [rows, 1]
    opt: Any


def qg(
    opt: Optimiser, beta: float = 0.9, mu: float = 0.9, nesterov: bool = False
) -> Algorithm[QuasiGlobalState, Params, Params]:
    """QG-DSGDm: momentum along the way the mixed models go (Lin et al. 2021).

    A node's own momentum carries it away from the others where data are unlike. Here a round
    of H steps begins from the velocity v of the network: ``a = v``, then each step makes
    ``a <- beta a + u`` and ``x <- x + a`` (`nesterov`: ``x + beta a + u``) with the
    optimiser's update u (``-lr g`` for SGD). After mixing,
    ``v <- mu v + (1 - mu) (x - x_start) / H``.

    The paper keeps ``m = -v / lr`` in the units of gradients. At a constant rate that is the
    same; where a schedule changes the rate, v goes on at the rates of the past, as a moving
    average does, and nothing is divided by a rate of zero. A round without steps counts as one.
    Messages are ``4 d`` bytes (float32), as of `dpsgd`; three models more are kept. Goes with
    ``sgd`` without a momentum of its own, on any doubly stochastic matrix.
    """
    require(0 <= beta < 1, "beta", beta, "in [0, 1)")
    require(0 <= mu < 1, "mu", mu, "in [0, 1)")

    def init(x: Tensor, rows: Rows) -> QuasiGlobalState:
        zero, none = torch.zeros_like(x), torch.zeros_like(x[:, :1], dtype=wide(x))
        return QuasiGlobalState(x, x, zero, zero, none, opt.init(x))

    def step(s: QuasiGlobalState, grads: Tensor) -> QuasiGlobalState:
        update, state = opt.update(grads, s.opt, s.x)
        ahead = beta * s.ahead + update
        change = beta * ahead + update if nesterov else ahead
        return s._replace(x=s.x + change, ahead=ahead, steps=s.steps + 1, opt=state)

    def receive(s: QuasiGlobalState, inbox: Inbox[Params]) -> QuasiGlobalState:
        x = inbox.mix(inbox.heard.x)
        moved = ((x - s.start) / s.steps.clamp(min=1)).to(x.dtype)
        velocity = mu * s.velocity + (1 - mu) * moved
        return QuasiGlobalState(x, x, velocity, velocity, torch.zeros_like(s.steps), s.opt)

    return Algorithm(
        init,
        lambda s: s.x,
        by_column(step, opt.columnwise),
        lambda s: Params(s.x),
        receive,
        needs=Needs(rounds=True),
        columnwise=True,
        keeps_mean=True,
    )
