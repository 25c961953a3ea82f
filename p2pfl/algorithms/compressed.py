"""Averaging of models that travel compressed; any codec goes with any of these methods."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from p2pfl import rng
from p2pfl.algorithm import Algorithm, Inbox, M, Needs, Rows
from p2pfl.algorithms.averaging import Params
from p2pfl.algorithms.steps import plain_factor, plain_step
from p2pfl.codec import Codec
from p2pfl.learning.optim import Optimiser
from p2pfl.learning.tree import wide


class QuantisedState(NamedTuple):
    """A model, the keys of its lots, the optimiser."""

    x: Tensor
    keys: Tensor
    opt: Any


def quantised(
    opt: Optimiser, codec: Codec[M], seed: int = 0
) -> Algorithm[QuantisedState, M, Params]:
    """Send compressed models, and nothing else (after Aysal et al. 2008).

    ``x <- x + W C(x) - C(x)``, which keeps the mean whatever the codec loses. Models agree up to
    what it loses of a whole model: little for `half`, `bfloat16` and `int8`, and too much for
    codecs that send a part of the entries, which are for `choco`. No state between peers, so
    neighbours may change. Messages are as large as the codec says.
    """

    def init(x: Tensor, rows: Rows) -> QuantisedState:
        return QuantisedState(x, rng.keys(seed, rows.nodes), opt.init(x))

    def receive(s: QuantisedState, inbox: Inbox[Params]) -> QuantisedState:
        return s._replace(x=_pulled(s.x, inbox, 1.0), keys=rng.fold(s.keys, 1))

    return Algorithm(
        init,
        lambda s: s.x,
        plain_step(opt),
        lambda s: codec.encode(s.x, s.keys),
        receive,
        lambda known, message, d: Params(codec.decode(message, d)),
        Needs(every_message=True),
        factor=plain_factor(opt),
        columnwise=True,
        restart=lambda s: s,  # messages say all there is
        keeps_mean=True,
    )


class SqueezeState(NamedTuple):
    """A model, what was not said of it so far, the keys of its lots, the optimiser."""

    x: Tensor
    error: Tensor
    keys: Tensor
    opt: Any


def deepsqueeze(
    opt: Optimiser, codec: Codec[M], gamma: float = 0.1, seed: int = 0
) -> Algorithm[SqueezeState, M, Params]:
    """DeepSqueeze: send compressed models and make up for errors later (Tang et al. 2019).

    ``v = x + e``, ``e <- v - C(v)`` and ``x <- x + gamma (W C(v) - C(v))``: what the codec loses
    of a model is added to the next one. `gamma` in (0, 1]: the smaller the more the codec loses;
    too large diverges. Keeps the mean. No state between peers, so neighbours may change.
    Messages are as large as the codec says.
    """
    check_gamma(gamma)

    def init(x: Tensor, rows: Rows) -> SqueezeState:
        error = torch.zeros_like(x, dtype=wide(x))
        return SqueezeState(x, error, rng.keys(seed, rows.nodes), opt.init(x))

    def receive(s: SqueezeState, inbox: Inbox[Params]) -> SqueezeState:
        error = s.x + s.error - inbox.mine(inbox.heard.x)
        x = _pulled(s.x, inbox, gamma)
        return s._replace(x=x, error=error, keys=rng.fold(s.keys, 1))

    return Algorithm(
        init,
        lambda s: s.x,
        plain_step(opt),
        lambda s: codec.encode((s.x + s.error).to(s.x.dtype), s.keys),
        receive,
        lambda known, message, d: Params(codec.decode(message, d)),
        Needs(every_message=True),
        factor=plain_factor(opt),
        columnwise=True,
        restart=lambda s: s,  # messages say all there is
        keeps_mean=True,
    )


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
    decoded differences. `gamma` in (0, 1]: 1 for `int8` and `sign`, 0.2 to 0.3 for the
    largest 10 % of the entries, 0.05 for 1 %; too large diverges. Messages are as large as the
    codec says. Asks for a fixed set of neighbours and for every message, in order; where
    neighbours come or go it begins anew, with public copies of zero.
    """
    check_gamma(gamma)

    def init(x: Tensor, rows: Rows) -> ChocoState:
        return ChocoState(x, _nothing_said(x), rng.keys(seed, rows.nodes), opt.init(x))

    def send(s: ChocoState) -> M:
        return codec.encode((s.x - s.public).to(s.x.dtype), s.keys)

    def absorb(known: Params | None, message: M, d: int) -> Params:
        change = codec.decode(message, d)
        return Params(change.to(wide(change)) if known is None else known.x + change)

    def receive(s: ChocoState, inbox: Inbox[Params]) -> ChocoState:
        public = inbox.mine(inbox.heard.x)
        return s._replace(x=_pulled(s.x, inbox, gamma), public=public, keys=rng.fold(s.keys, 1))

    return Algorithm(
        init,
        lambda s: s.x,
        plain_step(opt),
        send,
        receive,
        absorb,
        Needs(graph="symmetric", static=True, every_message=True),
        factor=plain_factor(opt),
        columnwise=True,
        restart=lambda s: s._replace(public=_nothing_said(s.x)),
        keeps_mean=True,
    )


def check_gamma(gamma: float) -> None:
    """Refuse consensus steps out of range.

    Raises:
        ValueError: for them.
    """
    if not 0 < gamma <= 1:
        raise ValueError(f"gamma = {gamma} is not in (0, 1]")


def _nothing_said(x: Tensor) -> Tensor:
    # Many small differences add up in it, which half precision would round away.
    return torch.zeros_like(x, dtype=wide(x))


def _pulled(x: Tensor, inbox: Inbox[Params], gamma: float) -> Tensor:
    """Return models, ``[rows, d]``, pulled from their own public copies towards the others'."""
    pull = inbox.mix(inbox.heard.x) - inbox.mine(inbox.heard.x)
    return (x + gamma * pull).to(x.dtype)
