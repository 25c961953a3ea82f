"""Steps as long as a node has examples: plain averaging then seeks the optimum over all of them."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from p2pfl.algorithm import Algorithm, ByColumn, Inbox, M, R, Rows, by_column, on_inner
from p2pfl.learning.checks import above_zero
from p2pfl.learning.optim import Optimiser
from p2pfl.learning.tree import wide

SMALL = 1e-3  # a gradient that no clipping shortens


class Weighed(NamedTuple):
    """The state of the algorithm inside, and what the gradients of each row are multiplied by."""

    inner: Any
    scale: Tensor  # [rows, 1]


def weighed(algorithm: Algorithm[Any, M, R], mean_examples: float) -> Algorithm[Weighed, M, R]:
    """Multiply the gradients of a node with m examples by ``m / mean_examples``.

    Averaging with doubly stochastic weights seeks the optimum of the mean of all nodes' losses;
    with these gradients it is that of the loss over everybody's examples, ``sum_i m_i f_i / sum_i
    m_i``, at the same mean rate if `mean_examples` is what a node has on average. (Another number
    changes the rate alone, but it must be the same for all.) Rates must be small enough for the
    node that has most. No message grows.
    """
    above_zero("mean_examples", mean_examples)
    inner = algorithm

    def init(x: Tensor, rows: Rows) -> Weighed:
        scale = rows.examples.to(wide(x)).unsqueeze(1) / mean_examples
        return Weighed(inner.init(x, rows), scale)

    def step(s: Weighed, grads: Tensor) -> Weighed:
        return s._replace(inner=inner.step(s.inner, (grads * s.scale).to(grads.dtype)))

    def receive(s: Weighed, inbox: Inbox[R]) -> Weighed:
        return s._replace(inner=inner.receive(s.inner, inbox))

    def factor(s: Weighed) -> tuple[Tensor, Weighed]:
        assert inner.factor is not None
        by, state = inner.factor(s.inner)
        return by * s.scale, s._replace(inner=state)

    return Algorithm(
        init,
        lambda s: inner.model(s.inner),
        by_column(step, isinstance(inner.step, ByColumn)),
        lambda s: inner.send(s.inner),
        receive,
        inner.absorb,
        inner.needs,
        factor=factor if inner.factor else None,
        columnwise=inner.columnwise,
        carry=on_inner(inner.carry),
        restart=on_inner(inner.restart),
        settle=on_inner(inner.settle),
        keeps_mean=inner.keeps_mean,
    )


def follows_scale(opt: Optimiser) -> bool:
    """Say whether twice the gradient makes a longer step; of `adam` it does not."""
    zero = torch.zeros(1, 1, dtype=torch.float64)
    one, two = (
        float(opt.update(torch.full_like(zero, by * SMALL), opt.init(zero), zero)[0])
        for by in (1, 2)
    )
    return abs(two) > 1.5 * abs(one)
