"""Outer optimisers: what the local steps of a round have changed is a gradient of its own."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from p2pfl.algorithm import Algorithm, Inbox, Needs, Rows
from p2pfl.algorithms.averaging import Params
from p2pfl.algorithms.steps import plain_factor, plain_step
from p2pfl.learning.checks import require
from p2pfl.learning.optim import Optimiser, State, sgd


class SlowState(NamedTuple):
    """A model, the slow one it began the round from, and the optimisers of both."""

    x: Tensor
    slow: Tensor
    opt: Any
    outer: Any


class Slow(NamedTuple):
    """A slow model, and what the local steps have changed of it."""

    slow: Tensor  # [rows, d]
    change: Tensor  # [rows, d]


def diloco(
    opt: Optimiser, lr: float = 0.7, momentum: float = 0.9
) -> Algorithm[SlowState, Slow, Slow]:
    """DiLoCo: many inner steps, then one of Nesterov's (Douillard et al. 2023).

    The inner optimiser is usually ``adamw``, with 100 to 500 steps a round; its state stays
    with the node. See `fedadam` for what is mixed.
    """
    return _with_outer(opt, sgd(lr, momentum, nesterov=momentum > 0))


def noloco(
    opt: Optimiser, lr: float = 0.7, momentum: float = 0.5, gamma: float | None = None
) -> Algorithm[SlowState, Params, Params]:
    """NoLoCo: an outer momentum that pulls neighbours together (Kolehmainen et al. 2025).

    Every node keeps a slow model s, from which the local steps of a round lead to x, and a
    velocity: ``v <- momentum v + lr W (x - s) - gamma (s - W s)`` and ``s <- s + v``. The slow
    models are not averaged; the last term draws each of them to the mean of those it hears. Made
    for pairs, drawn anew in every round (``topology = "random_matching"``), in place of everybody
    at once. Where all slow models are alike it is `fedavgm`; with ``momentum = 0`` and
    ``gamma = 1`` it is `diloco` without momentum. W is linear, so ``lr x + (gamma - lr) s`` is all
    that has to be sent: messages are ``4 d`` bytes (float32), half of `diloco`'s. The inner
    optimiser is usually ``adamw``.

    Args:
        lr: of the outer step.
        momentum: of the outer step, in [0, 1).
        gamma: how strongly slow models are drawn together, >= 0; by default `lr`, as in the
            authors' program. With 0 they never come together. In random pairs they fly apart from
            about 1.5 on, and with ``momentum = 0.9`` from 0.4 on.
    """
    require(0 <= lr < math.inf, "lr", lr, "a finite number >= 0")
    require(0 <= momentum < 1, "momentum", momentum, "in [0, 1)")
    pull = lr if gamma is None else gamma
    require(0 <= pull < math.inf, "gamma", gamma, "a finite number >= 0")

    def init(x: Tensor, rows: Rows) -> SlowState:
        return SlowState(x, x, opt.init(x), torch.zeros_like(x))

    def send(s: SlowState) -> Params:
        return Params(lr * s.x + (pull - lr) * s.slow)

    def receive(s: SlowState, inbox: Inbox[Params]) -> SlowState:
        velocity = momentum * s.outer + inbox.mix(inbox.heard.x) - pull * s.slow
        slow = s.slow + velocity
        return s._replace(x=slow, slow=slow, outer=velocity)

    return Algorithm(
        init,
        lambda s: s.x,
        plain_step(opt),
        send,
        receive,
        needs=Needs(rounds=True),
        factor=plain_factor(opt),
        columnwise=True,
    )


def fedavgm(
    opt: Optimiser, lr: float = 1.0, momentum: float = 0.9
) -> Algorithm[SlowState, Slow, Slow]:
    """FedAvgM: an outer step with momentum (Hsu, Qi and Brown 2019).

    With ``lr = 1`` and ``momentum = 0`` it is `dpsgd`. See `fedadam` for what is mixed.
    """
    return _with_outer(opt, sgd(lr, momentum))


def fedadagrad(
    opt: Optimiser, lr: float = 0.1, beta1: float = 0.0, tau: float = 1e-3
) -> Algorithm[SlowState, Slow, Slow]:
    """FedAdagrad: ``v <- v + D^2``, else as `fedadam` (Reddi et al. 2020)."""
    return _with_outer(opt, _adaptive(lr, beta1, tau, lambda v, square: v + square))


def fedadam(
    opt: Optimiser,
    lr: float = 0.1,
    beta1: float = 0.9,
    beta2: float = 0.99,
    tau: float = 1e-3,
) -> Algorithm[SlowState, Slow, Slow]:
    """FedAdam without a server (Reddi et al. 2020).

    Every node keeps a slow model s. The local steps of a round lead from s to x; with
    ``D = W (x - s)``, ``m <- beta1 m + (1 - beta1) D``, ``v <- beta2 v + (1 - beta2) D^2`` and
    ``s <- W s + lr m / (sqrt(v) + tau)``, from ``v = tau^2``; no bias is corrected. Where all
    hear all alike it is the method of the paper with clients of equal weight; elsewhere mixing s
    keeps the nodes together. `lr` is usually 0.01 to 0.1. Messages are ``8 d`` bytes (float32).
    """
    require(0 <= beta2 < 1, "beta2", beta2, "in [0, 1)")
    return _with_outer(
        opt, _adaptive(lr, beta1, tau, lambda v, square: beta2 * v + (1 - beta2) * square)
    )


def fedyogi(
    opt: Optimiser,
    lr: float = 0.1,
    beta1: float = 0.9,
    beta2: float = 0.99,
    tau: float = 1e-3,
) -> Algorithm[SlowState, Slow, Slow]:
    """FedYogi: ``v <- v - (1 - beta2) D^2 sign(v - D^2)``, else as `fedadam` (same paper)."""
    require(0 <= beta2 < 1, "beta2", beta2, "in [0, 1)")

    def second(v: Tensor, square: Tensor) -> Tensor:
        return v - (1 - beta2) * square * (v - square).sign()

    return _with_outer(opt, _adaptive(lr, beta1, tau, second))


def _adaptive(
    lr: float, beta1: float, tau: float, second: Callable[[Tensor, Tensor], Tensor]
) -> Optimiser:
    require(0 <= lr < math.inf, "lr", lr, "a finite number >= 0")
    require(0 <= beta1 < 1, "beta1", beta1, "in [0, 1)")
    require(0 < tau <= 1e19, "tau", tau, "above 0 and at most 1e19, as float32 holds its square")

    def init(params: Tensor) -> State:
        return torch.zeros_like(params), torch.full_like(params, tau**2)

    def update(grads: Tensor, state: State, params: Tensor) -> tuple[Tensor, State]:
        m, v = state
        m, v = beta1 * m + (1 - beta1) * grads, second(v, grads.square())
        return -lr * m / (v.sqrt() + tau), (m, v)

    return Optimiser(init, update)


def _with_outer(opt: Optimiser, outer: Optimiser) -> Algorithm[SlowState, Slow, Slow]:
    """Take local steps from the slow model, and step with `outer`, parameter by parameter."""

    def init(x: Tensor, rows: Rows) -> SlowState:
        return SlowState(x, x, opt.init(x), outer.init(x))

    def receive(s: SlowState, inbox: Inbox[Slow]) -> SlowState:
        slow, change = inbox.mix(inbox.heard.slow), inbox.mix(inbox.heard.change)
        update, state = outer.update(-change, s.outer, slow)
        return s._replace(x=slow + update, slow=slow + update, outer=state)

    return Algorithm(
        init,
        lambda s: s.x,
        plain_step(opt),
        lambda s: Slow(s.slow, s.x - s.slow),
        receive,
        needs=Needs(rounds=True),
        factor=plain_factor(opt),
        columnwise=True,
    )
