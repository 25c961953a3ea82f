"""What an attack is: what is sent in place of a model."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

from torch import Tensor


class Known(NamedTuple):
    """What one attacker knows after an exchange.

    It cannot tell who else is an attacker: what it hears of the others it takes for honest.
    """

    truth: Tensor  # [1, d]: what it would have sent if it were honest
    others: Tensor  # [k, d], k at least 1: what it has heard of the others
    weights: Tensor  # [k]: their mixing weights
    kept: Tensor  # [1]: its own mixing weight


def _nothing(x: Tensor) -> tuple[Tensor, ...]:
    return ()


def _deaf(memory: Any, known: Known) -> Any:  # noqa: ANN401
    return memory


class Attack(NamedTuple):
    """Three pure functions over what an attacker remembers, a tuple of blocks.

    Attributes:
        lie: what is sent, given the memory, the honest message and a key for each row,
            ``[rows, d] -> [rows, d]``.
        init: what is remembered at first, given the first honest message ``[rows, d]``.
        hear: what is remembered after an exchange, of one attacker; leaves are ``[1, ...]``.
        listens: whether it makes use of what it hears.
        finite: whether what is sent is numbers at all.
        labels: whether the attackers lie about nothing, but train on labels that are turned
            around, ``classes - 1 - y``.
    """

    lie: Callable[[Any, Tensor, Tensor], Tensor]
    init: Callable[[Tensor], Any] = _nothing
    hear: Callable[[Any, Known], Any] = _deaf
    listens: bool = False
    finite: bool = True
    labels: bool = False
