"""What most algorithms do between two exchanges: step with the optimiser, alone or beside one.

For states which are named tuples with a model `x`, ``[rows, d]``, and an optimiser's state `opt`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor

from p2pfl.algorithm import S, by_column
from p2pfl.learning.optim import Optimiser
from p2pfl.learning.tree import wide


def plain_step(opt: Optimiser, besides: Callable[[S], S] = lambda s: s) -> Callable[[S, Tensor], S]:
    """Return an algorithm's `step` which moves the model as the optimiser says.

    Args:
        opt: the optimiser.
        besides: what else a step makes of a state, looking at neither model nor gradient.
    """

    def step(s: Any, grads: Tensor) -> Any:  # noqa: ANN401 - any such state
        update, state = opt.update(grads, s.opt, s.x)
        return besides(s._replace(x=s.x + update, opt=state))

    return by_column(step, opt.columnwise)


def plain_factor(
    opt: Optimiser, besides: Callable[[Any], Any] = lambda s: s
) -> Callable[[Any], tuple[Tensor, Any]] | None:
    """Return the `factor` that goes with `plain_step`, or None if the optimiser has none."""
    if not opt.linear:
        return None

    def factor(s: Any) -> tuple[Tensor, Any]:  # noqa: ANN401 - any such state
        by, state = opt.factor(s.opt, s.x)
        return by, besides(s._replace(opt=state))

    return factor


def shifted(mixed: Tensor, before: Tensor, trained: Tensor) -> Tensor:
    """Return mixed models, ``[rows, d]``, moved as far as the local steps went meanwhile."""
    exact = wide(mixed)
    return (mixed.to(exact) + (trained.to(exact) - before.to(exact))).to(mixed.dtype)


def carry_model(before: Any, trained: Any, mixed: Any) -> Any:  # noqa: ANN401
    """Return the state after local steps beside an exchange; an algorithm's `carry`.

    For states whose model is all that the exchange changes. Where mixing keeps the mean of all
    models, only the local steps move it, as without `carry`.
    """
    return trained._replace(x=shifted(mixed.x, before.x, trained.x))
