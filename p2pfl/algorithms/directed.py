"""Gradient tracking on directed graphs, where nobody needs to know who hears whom."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from p2pfl.algorithm import Algorithm, Inbox, Needs, Rows, by_column
from p2pfl.learning.optim import Optimiser
from p2pfl.learning.tree import wide

# A late share arrives in the end, but one that is never taken is missing from the sum for good.
SHARES = Needs(weights="mass", every_message=True, counts=("w",))


class TrackedMass(NamedTuple):
    """Shares of a model, of the tracked gradient and of the weight below the model."""

    x: Tensor  # [rows, d]
    y: Tensor  # [rows, d]
    w: Tensor  # [rows, 1]


class PushDigingState(NamedTuple):
    """A biased model and its weight, the tracked gradient, the last local one, the optimiser."""

    x: Tensor
    w: Tensor
    y: Tensor
    grads: Tensor
    opt: Any


def push_diging(opt: Optimiser) -> Algorithm[PushDigingState, TrackedMass, TrackedMass]:
    """Push-DIGing: gradient tracking by shares (Nedić, Olshevsky and Shi 2017).

    As `gradient_tracking`, with the column-stochastic weights of `push_sum`:
    ``x <- P (x - lr y)``, ``w <- P w``, ``y <- P y + g_new - g_old`` with gradients at ``x / w``,
    which is the model. The sum of all y is the sum of all gradients, and graphs may change.
    Messages are ``8 d + 4`` bytes (float32).
    """

    def init(x: Tensor, rows: Rows) -> PushDigingState:
        zero, one = torch.zeros_like(x), torch.ones_like(x[:, :1], dtype=wide(x))
        return PushDigingState(x, one, zero, zero, opt.init(x))

    def model(s: PushDigingState) -> Tensor:
        return (s.x / s.w).to(s.x.dtype)

    def step(s: PushDigingState, grads: Tensor) -> PushDigingState:
        y = s.y + grads - s.grads
        update, state = opt.update(y, s.opt, model(s))
        return PushDigingState(s.x + update, s.w, y, grads, state)

    def receive(s: PushDigingState, inbox: Inbox[TrackedMass]) -> PushDigingState:
        x, y, w = (inbox.mix(field) for field in inbox.heard)
        return s._replace(x=x, y=y, w=w)

    return Algorithm(
        init,
        model,
        by_column(step, opt.columnwise),
        lambda s: TrackedMass(s.x, s.y, s.w),
        receive,
        needs=SHARES,
        columnwise=True,
    )


class PushPullState(NamedTuple):
    """A model, the tracked gradient, the last local one and the optimiser."""

    x: Tensor
    y: Tensor
    grads: Tensor
    opt: Any


def push_pull(opt: Optimiser) -> Algorithm[PushPullState, TrackedMass, TrackedMass]:
    """Push-pull, or AB: average models by rows, gradients by columns (Pu et al. 2018).

    ``x <- R (x - lr y)`` where R takes the plain mean of who was heard, and
    ``y <- C y + g_new - g_old`` where C are the shares of `push_sum` (also Xin and Khan 2018).
    The sum of all y is the sum of all gradients; no quotient is needed. Asks for a strongly
    connected graph. Messages are ``8 d + 4`` bytes (float32).
    """

    def init(x: Tensor, rows: Rows) -> PushPullState:
        return PushPullState(x, torch.zeros_like(x), torch.zeros_like(x), opt.init(x))

    def step(s: PushPullState, grads: Tensor) -> PushPullState:
        y = s.y + grads - s.grads
        update, state = opt.update(y, s.opt, s.x)
        return PushPullState(s.x + update, y, grads, state)

    def send(s: PushPullState) -> TrackedMass:
        return TrackedMass(s.x, s.y, torch.ones_like(s.x[:, :1], dtype=wide(s.x)))

    def receive(s: PushPullState, inbox: Inbox[TrackedMass]) -> PushPullState:
        # Peers hear shares, and the share of a one says which: divided by it they are models.
        x, y, share = inbox.heard
        # A share of next to nothing, which nobody honest gives, says nothing of a model.
        some = share > torch.finfo(share.dtype).eps
        whole = torch.where(some, share.reciprocal(), 0.0)
        heard = inbox.mean(x, by=whole) / inbox.mean(share, by=whole)
        return s._replace(x=heard.to(s.x.dtype), y=inbox.mix(y))

    return Algorithm(
        init,
        lambda s: s.x,
        by_column(step, opt.columnwise),
        send,
        receive,
        needs=SHARES,
        columnwise=True,
    )
