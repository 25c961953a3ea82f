"""The attacks: those that need no ears, and those that listen first."""

from __future__ import annotations

from collections.abc import Callable
from statistics import NormalDist
from typing import NamedTuple

import torch
from torch import Tensor

from p2pfl import rng
from p2pfl.attacks.attack import Attack, Known
from p2pfl.learning.checks import above_zero


def sign_flip(scale: float = 1.0) -> Attack:
    """Send ``-scale x``, the honest model turned around (Li et al. 2019, RSA)."""
    above_zero("scale", scale)
    return Attack(lambda memory, truth, keys: -scale * truth)


def gaussian(sigma: float = 1.0) -> Attack:
    """Send the honest model with noise of standard deviation `sigma` on every parameter."""
    above_zero("sigma", sigma)

    def lie(memory: tuple[()], truth: Tensor, keys: Tensor) -> Tensor:
        return truth + sigma * rng.normal(keys, truth.shape[1]).to(truth)

    return Attack(lie)


def label_flip() -> Attack:
    """Send what comes of training on wrong labels: ``classes - 1 - y`` in place of y."""
    return Attack(lambda memory, truth, keys: truth, labels=True)


def non_finite() -> Attack:
    """Send NaN in place of every number: receivers must refuse it, and do without."""
    return Attack(lambda memory, truth, keys: torch.full_like(truth, torch.nan), finite=False)


def replay(rounds: int = 10) -> Attack:
    """Send the honest model of so many exchanges ago; the first one until then.

    Keeps that many models.
    """
    if rounds < 1:
        raise ValueError(f"rounds = {rounds} is below 1")

    def hear(memory: tuple[Tensor, ...], known: Known) -> tuple[Tensor, ...]:
        return (*memory[1:], known.truth)

    return Attack(lambda memory, truth, keys: memory[0], lambda x: (x,) * rounds, hear)


class Prepared(NamedTuple):
    """What is sent next, made of what was heard last."""

    lie: Tensor


def alie(z: float | None = None, b: int | None = None) -> Attack:
    """Send ``mean - z std`` of what was heard: a little is enough (Baruch et al. 2019, ALIE).

    Args:
        z: how many standard deviations, in every parameter; 1.5 if neither is given. Or
        b: attackers among those heard, oneself included: z is then the largest that still hides
            among the honest, see `alie_z`. Among few models that is close to 0.
    """
    if z is not None and b is not None:
        raise ValueError("give either z (standard deviations) or b (attackers), not both")
    if z is not None:
        above_zero("z", z)
    if b is not None and b < 1:
        raise ValueError(f"b = {b} is below 1")

    def made(known: Known) -> Tensor:
        many = alie_z(len(known.others) + 1, b) if b else z or 1.5
        return known.others.mean(0) - many * known.others.std(0, correction=0)

    return _listening(made)


def alie_z(n: int, b: int) -> float:
    """Return the standard deviations by which b of n may be off and win over a majority.

    ``z = Phi^-1((n - b - s) / (n - b))`` where ``s = n // 2 + 1 - b`` honest models are needed
    (Baruch et al. 2019); 0 where that is not positive.

    >>> round(alie_z(50, 24), 4)
    1.4261
    """
    needed = max(n // 2 + 1 - b, 1)
    below = (n - b - needed) / max(n - b, 1)
    return max(NormalDist().inv_cdf(below), 0.0) if below > 0 else 0.0


def ipm(epsilon: float = 0.1) -> Attack:
    """Send ``-epsilon mean`` of what was heard (Xie et al. 2019, inner-product manipulation).

    Small values are hard to tell from honest ones; 10 and more break what is not robust at once.
    """
    above_zero("epsilon", epsilon)
    return _listening(lambda known: -epsilon * known.others.mean(0))


def dissensus(epsilon: float = 1.5) -> Attack:
    """Send what undoes the mixing of a neighbour (He et al. 2022, *Byzantine-robust ... clipping*).

    ``x_i - epsilon sum_k W_ik (x_k - x_i) / W_ij``, where i is the first one heard: with 1 it stays
    where it was, with more the models are pushed apart. In place of the weights of i, which an
    attacker j does not know, stand its own; and all are sent the same.
    """
    above_zero("epsilon", epsilon)

    def made(known: Known) -> Tensor:
        victim = known.others[:1]
        moved = known.weights.to(victim) @ (known.others - victim)
        return victim - epsilon * moved / known.kept.to(victim)

    return _listening(made)


class Shadow(NamedTuple):
    """The copy that is sent next, and the direction in which the models differ most."""

    lie: Tensor
    axis: Tensor


def mimic() -> Attack:
    """Send a copy of the model that stands out most (Karimireddy et al. 2022, mimic).

    That is the one whose projection on the main axis of what is heard, followed with Oja's rule, is
    the largest: its data are counted too often, which hurts where data are unlike.
    """

    def hear(memory: Shadow, known: Known) -> Shadow:
        apart = known.others - known.others.mean(0)
        start = memory.axis if bool(memory.axis.any()) else apart[:1]
        axis = start + (apart @ start.T).T @ apart
        axis = axis / axis.norm().clamp(min=torch.finfo(axis.dtype).tiny)
        victim = (apart @ axis.T).abs().argmax()
        return Shadow(known.others[victim].unsqueeze(0), axis)

    return Attack(
        lambda memory, truth, keys: memory.lie,
        lambda x: Shadow(x, torch.zeros_like(x)),
        hear,
        listens=True,
    )


ATTACKS: dict[str, Callable[..., Attack]] = {
    "alie": alie,
    "dissensus": dissensus,
    "gaussian": gaussian,
    "ipm": ipm,
    "label_flip": label_flip,
    "mimic": mimic,
    "non_finite": non_finite,
    "replay": replay,
    "sign_flip": sign_flip,
}


def _listening(made: Callable[[Known], Tensor]) -> Attack:
    """Return the attack that sends what is made of the last exchange, ``[d]`` or ``[1, d]``."""
    return Attack(
        lambda memory, truth, keys: memory.lie,
        Prepared,
        lambda memory, known: Prepared(made(known).reshape(1, -1)),
        listens=True,
    )
