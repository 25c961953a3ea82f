"""Methods which send compressed differences."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from p2pfl import rng
from p2pfl.algorithm import Algorithm, Inbox, M, Needs, Rows
from p2pfl.algorithms.averaging import Params, plain_steps
from p2pfl.codec import Codec
from p2pfl.learning.optim import Optimiser


class ChocoState(NamedTuple):
    """A model, what the neighbours believe it to be, the keys of its lots, the optimiser."""

    x: Tensor
    public: Tensor
    keys: Tensor
    opt: Any


def choco(
    opt: Optimiser, codec: Codec[M], gamma: float = 0.2, seed: int = 0
) -> Algorithm[ChocoState, M, Params]:
    """CHOCO-SGD: send compressed differences to a public copy (Koloskova et al. 2019).

    ``x <- x + gamma (W p - p)`` where p are the public copies, which all move by the same
    decoded differences. `gamma` in (0, 1]: about 0.2 for the largest 10 % of the entries,
    0.05 to 0.1 for 1 %; too large diverges. Messages are as large as the codec says. Asks
    for a fixed set of neighbours and for every message, in order; where neighbours come or go
    it begins anew, with public copies of zero.
    """
    if not 0 < gamma <= 1:
        raise ValueError(f"gamma = {gamma} is not in (0, 1]")

    def init(x: Tensor, rows: Rows) -> ChocoState:
        return ChocoState(x, torch.zeros_like(x), rng.keys(seed, rows.nodes), opt.init(x))

    def step(s: ChocoState, grads: Tensor) -> ChocoState:
        update, state = opt.update(grads, s.opt, s.x)
        return s._replace(x=s.x + update, opt=state)

    def send(s: ChocoState) -> M:
        return codec.encode(s.x - s.public, s.keys)

    def absorb(known: Params | None, message: M, d: int) -> Params:
        change = codec.decode(message, d)
        return Params(change if known is None else known.x + change)

    def receive(s: ChocoState, inbox: Inbox[Params]) -> ChocoState:
        public = inbox.mine(inbox.heard.x)
        pull = inbox.mix(inbox.heard.x) - public
        return s._replace(x=s.x + gamma * pull, public=public, keys=rng.fold(s.keys, 1))

    needs = Needs(graph="symmetric", static=True, every_message=True)
    return Algorithm(
        init,
        lambda s: s.x,
        step,
        send,
        receive,
        absorb,
        needs,
        factor=plain_steps(opt),
        columnwise=True,
        restart=lambda s: s._replace(public=torch.zeros_like(s.x)),
    )
