"""Methods which reach the optimum of the mean loss in spite of unlike data."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from p2pfl.algorithm import Algorithm, Inbox, Needs, Rows
from p2pfl.algorithms.averaging import Params
from p2pfl.learning.optim import Optimiser


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
        step,
        lambda s: Track(s.x, s.y),
        receive,
        needs=Needs(every_message=True),
        columnwise=True,
    )


class D2State(NamedTuple):
    """The last two iterates, the last update and the next proposal."""

    x: Tensor
    before: Tensor
    update: Tensor
    ahead: Tensor
    opt: Any


def d2(opt: Optimiser) -> Algorithm[D2State, Params, Params]:
    """Remove the variance between nodes with the last two iterates (Tang et al. 2018).

    ``x <- W (2 x - x_before + u - u_before)`` where u is the optimiser's update
    (``-lr g`` for SGD). Messages are ``4 d`` bytes (float32). Asks for a static symmetric
    matrix whose eigenvalues are above -1/3: the lazy rule is the default here.
    """

    def init(x: Tensor, rows: Rows) -> D2State:
        return D2State(x, x, torch.zeros_like(x), x, opt.init(x))

    def step(s: D2State, grads: Tensor) -> D2State:
        update, state = opt.update(grads, s.opt, s.x)
        return D2State(s.x, s.before, update, 2 * s.x - s.before + update - s.update, state)

    def receive(s: D2State, inbox: Inbox[Params]) -> D2State:
        return s._replace(x=inbox.mix(inbox.heard.x), before=s.x)

    needs = Needs(graph="symmetric", static=True, every_message=True, positive=True, one_step=True)
    return Algorithm(
        init,
        lambda s: s.x,
        step,
        lambda s: Params(s.ahead),
        receive,
        needs=needs,
        columnwise=True,
    )
