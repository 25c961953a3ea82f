"""Which rows are kept away from training."""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from p2pfl import rng


class Holdout(NamedTuple):
    """A rule for the test rows.

    ``choose(y, seed)`` returns bool ``[N]``, true for a test row. It is asked once about
    all rows before they are shared out (`scope` "all"), once for each node about the
    node's own rows ("node"), or never ("none"). `seed` stands in for the experiment's.
    """

    scope: Literal["all", "node", "none"]
    choose: Callable[[Tensor, int], Tensor]
    seed: int | None = None


def random(fraction: float = 0.2, stratify: bool = True, seed: int | None = None) -> Holdout:
    """Hold out a random fraction of all rows, before they are shared out.

    With `stratify` each class gives its share, to within one row; a regression target
    has no classes, so there it changes nothing.
    """
    _check_fraction("random", fraction)
    return Holdout("all", _sampler(fraction, stratify), seed)


def last(count: int) -> Holdout:
    """Hold out the last rows, as when a test file was read after the training file."""
    if count < 1:
        raise ValueError(f"last: count = {count} must be at least 1")

    def choose(y: Tensor, seed: int) -> Tensor:
        if count >= len(y):
            raise ValueError(f"last: count = {count} of {len(y)} rows leaves none to train on")
        return torch.arange(len(y)) >= len(y) - count

    return Holdout("all", choose)


def per_node(fraction: float = 0.2, stratify: bool = True, seed: int | None = None) -> Holdout:
    """Let each node hold out a random fraction of its own rows.

    The choice depends on nothing but the seed, the node and its own rows, so a peer that
    holds only its own data makes the same one. The pooled test set is all of theirs.
    """
    _check_fraction("per_node", fraction)
    return Holdout("node", _sampler(fraction, stratify), seed)


def none() -> Holdout:
    """Hold out nothing."""
    return Holdout("none", lambda y, seed: torch.zeros(len(y), dtype=torch.bool))


HOLDOUTS: dict[str, Callable[..., Holdout]] = {
    "random": random,
    "last": last,
    "per_node": per_node,
    "none": none,
}
"""The factories by the name a section gives."""


def _check_fraction(name: str, fraction: float) -> None:
    if not 0 < fraction < 1:
        raise ValueError(f"{name}: fraction = {fraction} must lie between 0 and 1")


def _sampler(fraction: float, stratify: bool) -> Callable[[Tensor, int], Tensor]:
    """Return a rule that takes rows at even distances from a shuffled, sorted order.

    Sorting by class first is what makes the sample stratified: each class is a stretch of
    that order and loses every fifth row, say, to the test set. The total is exact.
    """

    def choose(y: Tensor, seed: int) -> Tensor:
        order = rng.uniform(rng.keys(seed, torch.tensor(0)), len(y)).argsort(stable=True)
        if stratify and not y.is_floating_point():
            order = order[y[order].argsort(stable=True)]
        edges = (torch.arange(len(y) + 1, dtype=torch.float64) * fraction + 0.5).floor()
        taken = torch.zeros(len(y), dtype=torch.bool)
        taken[order] = edges.diff() > 0
        return taken

    return choose
