"""Local optimisers: pairs of pure functions over blocks of rows, after optax.

The arithmetic is that of `torch.optim`, row by row. The state is a tuple of tensors with
rows first. Nothing an optimiser is given is written into.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any, NamedTuple

import torch
from torch import Tensor

from p2pfl.learning.checks import require
from p2pfl.learning.schedules import Schedule
from p2pfl.learning.tree import wide

State = tuple[Any, ...]  # tensors with rows first, or tuples of such


class Optimiser(NamedTuple):
    """Turn gradients into updates.

    Attributes:
        init: the state that goes with parameters ``[rows, d]``.
        update: ``(gradients, state, parameters) -> (what to add to the parameters, state)``.
        linear: whether an update is the gradient times a number that depends on neither
            gradient nor parameters; `factor` tells that number.
        columnwise: whether it treats every parameter by itself.
    """

    init: Callable[[Tensor], State]
    update: Callable[[Tensor, State, Tensor], tuple[Tensor, State]]
    linear: bool = False
    columnwise: bool = False

    def factor(self, state: State, params: Tensor) -> tuple[Tensor, State]:
        """Return what a `linear` optimiser multiplies gradients by, ``[rows, 1]``, and its state.

        >>> optimiser, params = sgd(0.5), torch.zeros(2, 3)
        >>> optimiser.factor(optimiser.init(params), params)
        (tensor([[-0.5000],
                [-0.5000]]), ())
        """
        ones = torch.ones_like(params[:, :1], dtype=wide(params))
        return self.update(ones, state, ones)


class Count(NamedTuple):
    """How many updates each row has made."""

    steps: Tensor  # [rows, 1], int64


class Trace(NamedTuple):
    """The running sum of gradients."""

    sum: Tensor  # [rows, d]


class Moments(NamedTuple):
    """Running means of the gradient and of its square."""

    steps: Tensor  # [rows, 1], int64
    first: Tensor  # [rows, d]
    second: Tensor  # [rows, d]


def sgd(
    lr: float | Schedule,
    momentum: float = 0.0,
    nesterov: bool = False,
    weight_decay: float = 0.0,
) -> Optimiser:
    """Stochastic gradient descent, as `torch.optim.SGD`.

    With a constant rate and no momentum there is no state at all.

    Args:
        lr: the learning rate, a number >= 0 or a schedule.
        momentum: in [0, 1); 0 keeps no trace (Polyak 1964).
        nesterov: look ahead along the trace (Sutskever et al. 2013); needs a momentum.
        weight_decay: add so much of the parameters to the gradient.
    """
    require(0 <= momentum < 1, "momentum", momentum, "in [0, 1)")
    require(momentum > 0 or not nesterov, "nesterov", nesterov, "false when momentum is 0")
    parts = [_add_decay("weight_decay", weight_decay)] if weight_decay else []
    parts += [_heavy_ball(momentum, nesterov)] if momentum else []
    parts += [_descend(lr)]
    return parts[0] if len(parts) == 1 else chain(parts)


def adam(
    lr: float | Schedule = 1e-3,
    beta1: float = 0.9,
    beta2: float = 0.999,
    eps: float = 1e-8,
    weight_decay: float = 0.0,
) -> Optimiser:
    """Adam (Kingma and Ba 2015), as `torch.optim.Adam`: the decay goes into the gradient."""
    core = _adam(lr, beta1, beta2, eps, 0.0)
    return chain([_add_decay("weight_decay", weight_decay), core]) if weight_decay else core


def adamw(
    lr: float | Schedule = 1e-3,
    beta1: float = 0.9,
    beta2: float = 0.999,
    eps: float = 1e-8,
    weight_decay: float = 0.01,
) -> Optimiser:
    """Adam with decoupled decay (Loshchilov and Hutter 2019), as `torch.optim.AdamW`."""
    _check_finite("weight_decay", weight_decay)
    return _adam(lr, beta1, beta2, eps, weight_decay)


def clip_norm(norm: float) -> Optimiser:
    """Shorten the rows which are longer than `norm` (Euclidean), and leave the others."""
    require(0 < norm < math.inf, "norm", norm, "a finite number > 0")

    def clip(grads: Tensor, params: Tensor) -> Tensor:
        length = torch.linalg.vector_norm(grads, dim=1, keepdim=True)
        return torch.mul(grads, norm / length.clamp(min=norm))

    return _stateless(clip, columnwise=False)


def clip_value(value: float) -> Optimiser:
    """Clip every coordinate to [-value, value]."""
    require(0 < value < math.inf, "value", value, "a finite number > 0")
    return _stateless(lambda grads, params: grads.clamp(-value, value))


def weight_decay(rate: float) -> Optimiser:
    """Add ``rate * params`` to the gradients."""
    return _add_decay("rate", rate)


def scale(factor: float) -> Optimiser:
    """Multiply the gradients by `factor`, any finite number."""
    require(math.isfinite(factor), "factor", factor, "a finite number")
    return _stateless(lambda grads, params: grads * factor, linear=True)


def chain(parts: list[Optimiser]) -> Optimiser:
    """Feed the result of each part to the next, as ``chain([clip_norm(1.0), sgd(0.1)])``."""
    require(len(parts) > 0, "parts", parts, "at least one optimiser")

    def init(params: Tensor) -> State:
        return tuple(part.init(params) for part in parts)

    def update(grads: Tensor, states: State, params: Tensor) -> tuple[Tensor, State]:
        after = []
        for part, state in zip(parts, states, strict=True):
            grads, state = part.update(grads, state, params)
            after.append(state)
        return grads, tuple(after)

    linear = all(part.linear for part in parts)
    return Optimiser(init, update, linear, all(part.columnwise for part in parts))


def _stateless(
    function: Callable[[Tensor, Tensor], Tensor], linear: bool = False, columnwise: bool = True
) -> Optimiser:
    def update(grads: Tensor, state: State, params: Tensor) -> tuple[Tensor, State]:
        return function(grads, params), state

    return Optimiser(lambda params: (), update, linear, columnwise)


def _add_decay(name: str, rate: float) -> Optimiser:
    _check_finite(name, rate)
    return _stateless(lambda grads, params: torch.add(grads, params, alpha=rate))


def _heavy_ball(momentum: float, nesterov: bool) -> Optimiser:
    def update(grads: Tensor, state: State, params: Tensor) -> tuple[Tensor, State]:
        (trace,) = state
        trace = torch.add(grads, trace, alpha=momentum)
        ahead = torch.add(grads, trace, alpha=momentum) if nesterov else trace
        return ahead, Trace(trace)

    return Optimiser(lambda params: Trace(torch.zeros_like(params)), update, columnwise=True)


def _descend(lr: float | Schedule) -> Optimiser:
    if not callable(lr):
        _check_finite("lr", lr)
        return scale(-lr)

    def update(grads: Tensor, state: State, params: Tensor) -> tuple[Tensor, State]:
        (steps,) = state
        return grads * -_rate(lr, steps, params), Count(steps + 1)

    return Optimiser(lambda params: Count(_zero(params)), update, linear=True, columnwise=True)


def _adam(
    lr: float | Schedule, beta1: float, beta2: float, eps: float, decoupled: float
) -> Optimiser:
    require(0 <= beta1 < 1, "beta1", beta1, "in [0, 1)")
    require(0 <= beta2 < 1, "beta2", beta2, "in [0, 1)")
    require(0 <= eps < math.inf, "eps", eps, "a finite number >= 0")
    if not callable(lr):
        _check_finite("lr", lr)

    def init(params: Tensor) -> State:
        return Moments(_zero(params), torch.zeros_like(params), torch.zeros_like(params))

    def update(grads: Tensor, state: State, params: Tensor) -> tuple[Tensor, State]:
        steps, first, second = state
        rate = _rate(lr, steps, params)
        steps = steps + 1
        first = first.lerp(grads, 1 - beta1)
        second = second.mul(beta2).addcmul_(grads, grads, value=1 - beta2)
        change = second.sqrt().div_(_correction(beta2, steps, params).sqrt()).add_(eps)
        torch.div(first, change, out=change)
        change.mul_(-rate / _correction(beta1, steps, params))
        if decoupled:
            change.addcmul_(rate, params, value=-decoupled)
        return change, Moments(steps, first, second)

    return Optimiser(init, update, columnwise=True)


def _correction(beta: float, steps: Tensor, params: Tensor) -> Tensor:
    """Return ``1 - beta ** steps``, which in float32 must not be written so."""
    log = math.log(beta) if beta else -math.inf
    return -torch.expm1(steps * torch.full_like(params[:, :1], log, dtype=wide(params)))


def _rate(lr: float | Schedule, steps: Tensor, params: Tensor) -> Tensor:
    if callable(lr):
        return lr(steps.to(wide(params))).to(params.dtype)
    return torch.full_like(params[:, :1], lr)


def _zero(params: Tensor) -> Tensor:
    return torch.zeros(len(params), 1, dtype=torch.int64, device=params.device)


def _check_finite(name: str, value: float) -> None:
    require(0 <= value < math.inf, name, value, "a finite number >= 0")


OPTIMISERS: Mapping[str, Callable[..., Optimiser]] = MappingProxyType(
    {
        "sgd": sgd,
        "adam": adam,
        "adamw": adamw,
        "clip_norm": clip_norm,
        "clip_value": clip_value,
        "weight_decay": weight_decay,
        "scale": scale,
        "chain": chain,
    }
)
