"""Methods which reach the optimum of the mean loss in spite of unlike data."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from p2pfl.algorithm import Algorithm, Inbox, Needs, Rows, by_column
from p2pfl.algorithms.averaging import Params
from p2pfl.learning.checks import require
from p2pfl.learning.optim import Optimiser
from p2pfl.learning.tree import wide

# Their state is right only while the same neighbours say something in every round.
STEADY = Needs(graph="symmetric", static=True, every_message=True, one_step=True)


class TrackState(NamedTuple):
    """A model, the tracked gradient, the last local one and the optimiser."""

    x: Tensor
    y: Tensor
    grads: Tensor
    opt: Any


class Track(NamedTuple):
    """A model and the tracked gradient."""

    x: Tensor  # [rows, d]
    y: Tensor  # [rows, d]


def gradient_tracking(opt: Optimiser) -> Algorithm[TrackState, Track, Track]:
    """Step along a running estimate of the average gradient (Di Lorenzo and Scutari 2016).

    ``y <- W y + g_new - g_old`` and ``x <- W (x - lr y)``: the sum of all y is the sum of
    all gradients after every step. Messages are ``8 d`` bytes (float32). A message that is
    lost breaks the sum.
    """

    def init(x: Tensor, rows: Rows) -> TrackState:
        return TrackState(x, torch.zeros_like(x), torch.zeros_like(x), opt.init(x))

    def step(s: TrackState, grads: Tensor) -> TrackState:
        y = s.y + grads - s.grads
        update, state = opt.update(y, s.opt, s.x)
        return TrackState(s.x + update, y, grads, state)

    def receive(s: TrackState, inbox: Inbox[Track]) -> TrackState:
        return s._replace(x=inbox.mix(inbox.heard.x), y=inbox.mix(inbox.heard.y))

    return Algorithm(
        init,
        lambda s: s.x,
        by_column(step, opt.columnwise),
        lambda s: Track(s.x, s.y),
        receive,
        needs=Needs(every_message=True),
        columnwise=True,
        keeps_mean=True,
    )


class D2State(NamedTuple):
    """A model, the last one after its own step, the next proposal and the optimiser."""

    x: Tensor
    adapted: Tensor
    ahead: Tensor
    opt: Any


def d2(opt: Optimiser) -> Algorithm[D2State, Params, Params]:
    """Remove the variance between nodes with the last two iterates (Tang et al. 2018).

    ``x <- W (2 x - x_before + u - u_before)`` where u is the optimiser's update
    (``-lr g`` for SGD, each with the rate of its own time). Messages are ``4 d`` bytes
    (float32). Asks for a static symmetric matrix whose eigenvalues are above -1/3: the lazy
    rule is the default here.
    """
    return _corrected(opt, lambda mixed, own: mixed, positive=True)


def exact_diffusion(opt: Optimiser) -> Algorithm[D2State, Params, Params]:
    """Exact diffusion: adapt, correct, combine (Yuan, Ying, Zhao and Sayed 2017).

    ``a = x + u``, ``p = a + x - a_before``, ``x <- (p + W p) / 2``: what `d2` does with the
    matrix (I + W) / 2, whose eigenvalues are positive for every symmetric W. So it goes with
    any symmetric rule on any static undirected graph. Messages are ``4 d`` bytes (float32).
    """
    return _corrected(opt, lambda mixed, own: (mixed + own) / 2, positive=False)


def _corrected(
    opt: Optimiser, combine: Callable[[Tensor, Tensor], Tensor], positive: bool
) -> Algorithm[D2State, Params, Params]:
    def init(x: Tensor, rows: Rows) -> D2State:
        return D2State(x, x, x, opt.init(x))

    def step(s: D2State, grads: Tensor) -> D2State:
        update, state = opt.update(grads, s.opt, s.x)
        adapted = s.x + update
        return D2State(s.x, adapted, adapted + (s.x - s.adapted), state)

    def receive(s: D2State, inbox: Inbox[Params]) -> D2State:
        return s._replace(x=combine(inbox.mix(inbox.heard.x), s.ahead))

    return Algorithm(
        init,
        lambda s: s.x,
        by_column(step, opt.columnwise),
        lambda s: Params(s.ahead),
        receive,
        needs=STEADY._replace(positive=positive),
        columnwise=True,
    )


class ExtraState(NamedTuple):
    """A model, the update to come, what the last round is corrected by, and the optimiser."""

    x: Tensor
    update: Tensor
    past: Tensor
    opt: Any


def extra(opt: Optimiser) -> Algorithm[ExtraState, Params, Params]:
    """EXTRA: a correction that sums up what mixing got wrong (Shi, Ling, Wu and Yin 2015).

    ``x <- x + W x - (x_before + W x_before) / 2 + u - u_before``, and ``x <- W x + u`` in the
    first round, where u is the optimiser's update (``-lr g`` for SGD, each with the rate of
    its own time). Messages are ``4 d`` bytes (float32) and are models before the step. Asks
    for a static symmetric matrix.
    """

    def init(x: Tensor, rows: Rows) -> ExtraState:
        return ExtraState(x, torch.zeros_like(x), x, opt.init(x))

    def step(s: ExtraState, grads: Tensor) -> ExtraState:
        update, state = opt.update(grads, s.opt, s.x)
        return ExtraState(s.x, update, s.past, state)

    def receive(s: ExtraState, inbox: Inbox[Params]) -> ExtraState:
        mixed = inbox.mix(inbox.heard.x)
        past = (s.x + mixed) / 2 + s.update
        return s._replace(x=s.x + mixed + s.update - s.past, past=past)

    return Algorithm(
        init,
        lambda s: s.x,
        by_column(step, opt.columnwise),
        lambda s: Params(s.x),
        receive,
        needs=STEADY,
        columnwise=True,
    )


class KgtState(NamedTuple):
    """A model, where its round began, the correction, the steps of the round, the optimiser."""

    x: Tensor
    start: Tensor
    correction: Tensor
    steps: Tensor  # [rows, 1]
    opt: Any


class Stride(NamedTuple):
    """A model, and how far one of the steps that led to it went."""

    x: Tensor  # [rows, d]
    z: Tensor  # [rows, d]


def kgt(opt: Optimiser, outer_lr: float = 1.0) -> Algorithm[KgtState, Stride, Stride]:
    """K-GT: gradient tracking with several local steps (Liu, Lin, Koloskova and Stich 2023).

    Each of K local steps makes ``x <- x + u + c`` with the optimiser's update u; then
    ``z = (x - x_start) / K``, ``c <- c - z + W z`` and
    ``x <- W (x_start + outer_lr (x - x_start))``. The sum of all c stays zero. On a complete
    graph it is SCAFFOLD with everybody taking part (Karimireddy et al. 2020); with one step and
    ``outer_lr = 1`` it is `gradient_tracking`.

    The paper's c is in the units of gradients, here in those of updates (its ``-lr c``). Every
    round makes c anew of the steps just taken, so a changing rate is a round behind, and nodes
    may take different numbers of steps. `outer_lr` in (0, 1]. Messages are ``8 d`` bytes
    (float32) for K steps. A message that is lost breaks the sum.
    """
    require(0 < outer_lr <= 1, "outer_lr", outer_lr, "in (0, 1]")

    def init(x: Tensor, rows: Rows) -> KgtState:
        none = torch.zeros_like(x[:, :1], dtype=wide(x))
        return KgtState(x, x, torch.zeros_like(x), none, opt.init(x))

    def step(s: KgtState, grads: Tensor) -> KgtState:
        update, state = opt.update(grads, s.opt, s.x)
        return s._replace(x=s.x + update + s.correction, steps=s.steps + 1, opt=state)

    def stride(s: KgtState) -> Tensor:
        return ((s.x - s.start) / s.steps.clamp(min=1)).to(s.x.dtype)

    def send(s: KgtState) -> Stride:
        return Stride(s.start + outer_lr * (s.x - s.start), stride(s))

    def receive(s: KgtState, inbox: Inbox[Stride]) -> KgtState:
        x = inbox.mix(inbox.heard.x)
        correction = s.correction - stride(s) + inbox.mix(inbox.heard.z)
        return KgtState(x, x, correction, torch.zeros_like(s.steps), s.opt)

    return Algorithm(
        init,
        lambda s: s.x,
        by_column(step, opt.columnwise),
        send,
        receive,
        needs=Needs(every_message=True),
        columnwise=True,
        keeps_mean=True,
    )
