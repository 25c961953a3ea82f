"""FedProx: keep the local steps of any algorithm close to where the round began."""

from __future__ import annotations

from typing import Any, NamedTuple

from torch import Tensor

from p2pfl.algorithm import Algorithm, ByColumn, Inbox, M, R, Rows, by_column, on_inner


class Anchored(NamedTuple):
    """The state of the algorithm inside, and its model right after the last mixing."""

    inner: Any
    anchor: Tensor


def proximal(algorithm: Algorithm[Any, M, R], mu: float) -> Algorithm[Anchored, M, R]:
    """Add ``mu / 2 |x - anchor|^2`` to the local loss (Li et al. 2018, FedProx).

    The anchor is the model of the last mixing. `mu` is usually 0.001 to 0.1; with one local step
    a round it changes nothing, unless the exchange goes on meanwhile (``pace.overlap``).
    """
    if mu < 0:
        raise ValueError(f"proximal = {mu} is negative")
    inner = algorithm

    def init(x: Tensor, rows: Rows) -> Anchored:
        state = inner.init(x, rows)
        return Anchored(state, inner.model(state))

    def step(s: Anchored, grads: Tensor) -> Anchored:
        pull = mu * (inner.model(s.inner) - s.anchor)
        return Anchored(inner.step(s.inner, grads + pull), s.anchor)

    def receive(s: Anchored, inbox: Inbox[R]) -> Anchored:
        state = inner.receive(s.inner, inbox)
        return Anchored(state, inner.model(state))

    return Algorithm(
        init,
        lambda s: inner.model(s.inner),
        by_column(step, isinstance(inner.step, ByColumn)),
        lambda s: inner.send(s.inner),
        receive,
        inner.absorb,
        inner.needs,
        columnwise=inner.columnwise,
        carry=on_inner(inner.carry),
        restart=on_inner(inner.restart),
        settle=on_inner(inner.settle),
        keeps_mean=inner.keeps_mean,
    )
