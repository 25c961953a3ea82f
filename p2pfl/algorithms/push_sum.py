"""Averaging by mass: right on directed graphs, where no matrix keeps the mean."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from p2pfl.algorithm import Algorithm, Inbox, Needs, Rows, by_column
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
    counts: Tensor  # [rows, 1]: what an update counts


def push_sum(
    opt: Optimiser, weight: Literal["uniform", "examples"] = "uniform"
) -> Algorithm[PushSumState, Mass, Mass]:
    """Stochastic gradient push, for directed graphs (Assran et al. 2019; Kempe et al. 2003).

    Every peer splits ``(x, w)`` among itself and those it sends to; ``x / w`` tends to the
    mean. With ``weight = "examples"`` it starts from ``(n_i x, n_i)`` and adds ``n_i u`` to x
    for an update u, so that it seeks the optimum over all examples; a node with twice as many
    as others takes steps about twice as long. On a timer a peer keeps one half and pushes the
    other. Messages are ``4 d + 4`` bytes (float32).
    """
    return _sharing(opt, counts=weight == "examples", scaled=False, carry=_by_sums)


def gosgd(opt: Optimiser) -> Algorithm[PushSumState, Mass, Mass]:
    """GoSGD: as `push_sum`, with local steps on the quotient (Blot, Picard, Cord and Thome 2016).

    A local step moves the model ``x / w`` by the optimiser's update u, so it adds ``w u`` to x,
    and what its peer gives away meanwhile does not lengthen it. Made for peers that push on a
    timer (``pace = "timer"``), where w halves with every push: `push_sum` adds u to x, which
    moves the model by ``u / w``. In return a node counts in proportion to its mean w:
    all alike where neighbours are as many and pushes as frequent everywhere. No exchange
    needs an answer, which AD-PSGD's averaging of a pair does (Lian et al. 2018). Messages are
    ``4 d + 4`` bytes (float32).
    """
    return _sharing(opt, counts=False, scaled=True, carry=_by_quotients)


Carry = Callable[[PushSumState, PushSumState, PushSumState], PushSumState]


def _by_sums(before: PushSumState, trained: PushSumState, mixed: PushSumState) -> PushSumState:
    # Local steps change no weight, and the sum of all x by as much as they would alone.
    return trained._replace(x=shifted(mixed.x, before.x, trained.x), w=mixed.w)


def _by_quotients(before: PushSumState, trained: PushSumState, mixed: PushSumState) -> PushSumState:
    # They move the quotient by as much as they would alone, whatever the weight is by now.
    moved = (trained.x.to(mixed.w.dtype) - before.x) * (mixed.w / before.w)
    return trained._replace(x=(mixed.x + moved).to(mixed.x.dtype), w=mixed.w)


def _sharing(
    opt: Optimiser, *, counts: bool, scaled: bool, carry: Carry
) -> Algorithm[PushSumState, Mass, Mass]:
    """Average by mass.

    Args:
        opt: the optimiser.
        counts: whether a node counts in proportion to its examples.
        scaled: whether an update is that of the quotient, not of its numerator.
        carry: as of `Algorithm`.
    """

    def init(x: Tensor, rows: Rows) -> PushSumState:
        examples = rows.examples.to(wide(x)).unsqueeze(1)
        w = examples if counts else torch.ones_like(examples)
        return PushSumState((x * w).to(x.dtype), w, opt.init(x), w.clone())

    def model(s: PushSumState) -> Tensor:
        return (s.x / s.w).to(s.x.dtype)

    def step(s: PushSumState, grads: Tensor) -> PushSumState:
        update, state = opt.update(grads, s.opt, model(s))
        if scaled or counts:
            update = (update * (s.w if scaled else s.counts)).to(s.x.dtype)
        return s._replace(x=s.x + update, opt=state)

    def receive(s: PushSumState, inbox: Inbox[Mass]) -> PushSumState:
        return s._replace(x=inbox.mix(inbox.heard.x), w=inbox.mix(inbox.heard.w))

    return Algorithm(
        init,
        model,
        by_column(step, opt.columnwise),
        lambda s: Mass(s.x, s.w),
        receive,
        needs=Needs(weights="mass", counts=("w",)),
        columnwise=True,
        carry=carry,
    )
