"""Averaging by mass: right on directed graphs, where no matrix keeps the mean."""

from __future__ import annotations

from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from p2pfl.algorithm import Algorithm, Inbox, Needs, Rows
from p2pfl.algorithms.steps import shifted
from p2pfl.learning.optim import Optimiser
from p2pfl.learning.tree import wide


class Mass(NamedTuple):
    """A share of the numerator and of the weight below it."""

    x: Tensor  # [rows, d]
    w: Tensor  # [rows, 1]


class PushSumState(NamedTuple):
    """A biased model and its weight; the model is ``x / w``."""

    x: Tensor
    w: Tensor
    opt: Any


def push_sum(
    opt: Optimiser, weight: Literal["uniform", "examples"] = "uniform"
) -> Algorithm[PushSumState, Mass, Mass]:
    """Stochastic gradient push, for directed graphs (Assran et al. 2019; Kempe et al. 2003).

    Every peer splits ``(x, w)`` among itself and those it sends to; ``x / w`` tends to the
    mean. With ``weight = "examples"`` it starts from ``(n_i x, n_i)`` and scales its updates
    by ``w``, so that the limit is the mean in proportion to the examples. Messages are
    ``4 d + 4`` bytes (float32).
    """

    def init(x: Tensor, rows: Rows) -> PushSumState:
        counts = rows.examples.to(wide(x)).unsqueeze(1)
        w = counts if weight == "examples" else torch.ones_like(counts)
        return PushSumState((x * w).to(x.dtype), w, opt.init(x))

    def model(s: PushSumState) -> Tensor:
        return (s.x / s.w).to(s.x.dtype)

    def step(s: PushSumState, grads: Tensor) -> PushSumState:
        update, state = opt.update(grads, s.opt, model(s))
        if weight == "examples":
            update = (update * s.w).to(s.x.dtype)
        return PushSumState(s.x + update, s.w, state)

    def receive(s: PushSumState, inbox: Inbox[Mass]) -> PushSumState:
        return s._replace(x=inbox.mix(inbox.heard.x), w=inbox.mix(inbox.heard.w))

    def carry(before: PushSumState, trained: PushSumState, mixed: PushSumState) -> PushSumState:
        # Local steps change no weight, and the sum of all x by as much as they would alone.
        return trained._replace(x=shifted(mixed.x, before.x, trained.x), w=mixed.w)

    return Algorithm(
        init,
        model,
        step,
        lambda s: Mass(s.x, s.w),
        receive,
        needs=Needs(weights="mass"),
        columnwise=True,
        carry=carry,
    )
