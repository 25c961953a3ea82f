"""Learning rates which change: pure functions of a row's own count of steps.

A schedule maps the number of updates each row has made before this one, a floating
``[rows, 1]``, to that row's rate, ``[rows, 1]``. Rows may stand at different counts.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from types import MappingProxyType

import torch
from torch import Tensor

from p2pfl.learning.checks import require

Schedule = Callable[[Tensor], Tensor]


def constant(value: float) -> Schedule:
    """Always `value`.

    >>> constant(0.5)(torch.tensor([[0.0], [9.0]])).tolist()
    [[0.5], [0.5]]
    """
    _check_rate("value", value)
    return lambda count: count * 0.0 + value


def step_decay(start: float, every: int, factor: float) -> Schedule:
    """Begin at `start` and multiply by `factor` after every so many steps.

    >>> step_decay(1.0, 10, 0.5)(torch.tensor([[9.0], [10.0], [20.0]])).tolist()
    [[1.0], [0.5], [0.25]]
    """
    _check_rate("start", start)
    require(every >= 1, "every", every, "a whole number >= 1")
    require(0 < factor <= 1, "factor", factor, "in (0, 1]")
    return lambda count: start * torch.pow(factor, torch.floor(count / every))


def exponential(start: float, rate: float) -> Schedule:
    """Begin at `start` and multiply by `rate` after every step."""
    _check_rate("start", start)
    require(0 < rate <= 1, "rate", rate, "in (0, 1]")
    return lambda count: start * torch.pow(rate, count)


def linear(start: float, steps: int, final: float = 0.0) -> Schedule:
    """Go in a straight line from `start` to `final` within so many steps, and stay there."""
    _check_rate("start", start)
    _check_rate("final", final)
    require(steps >= 1, "steps", steps, "a whole number >= 1")
    return lambda count: start + (final - start) * (count / steps).clamp(max=1.0)


def cosine(start: float, steps: int, final: float = 0.0, warmup: int = 0) -> Schedule:
    """Anneal from `start` to `final` along half a cosine (Loshchilov and Hutter 2017).

    Args:
        start: the highest rate.
        steps: when `final` is reached, the warm-up included; it stays there.
        final: the lowest rate.
        warmup: for so many steps the rate first climbs in a straight line; the first step
            is already one `warmup`-th of `start`, since a rate of zero wastes it.
    """
    _check_rate("start", start)
    _check_rate("final", final)
    require(steps >= 1, "steps", steps, "a whole number >= 1")
    require(0 <= warmup < steps, "warmup", warmup, f"in [0, steps = {steps})")

    def rate(count: Tensor) -> Tensor:
        progress = ((count - warmup) / (steps - warmup)).clamp(0.0, 1.0)
        falling = final + (start - final) * (1 + torch.cos(math.pi * progress)) / 2
        if not warmup:
            return falling
        return torch.where(count < warmup, start * (count + 1) / warmup, falling)

    return rate


def _check_rate(name: str, value: float) -> None:
    require(0 <= value < math.inf, name, value, "a finite number >= 0")


SCHEDULES: Mapping[str, Callable[..., Schedule]] = MappingProxyType(
    {
        "constant": constant,
        "step_decay": step_decay,
        "cosine": cosine,
        "linear": linear,
        "exponential": exponential,
    }
)
