"""What schedules are made of: lots that everybody draws alike, and rounds that come again."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import lru_cache

import torch
from torch import Tensor

from p2pfl import rng
from p2pfl.topology.schedule import Links, Topology, links_between


def lots(seed: int, round: int, count: int) -> Tensor:
    """Return the numbers in [0, 1) of a round, ``[count]`` float64."""
    return rng.uniform(rng.fold(torch.tensor(seed), round), count)


def shift(lot: float, n: int) -> int:
    """Return one of the shifts 1 to n - 1 of a circle."""
    return 1 + int(lot * (n - 1))


def distinct(lots: Tensor, choices: int) -> Tensor:
    """Return different numbers below `choices` in every row, from lots ``[rows, k]`` in [0, 1).

    The next is a number among those which are left, counted past those that are taken.
    """
    taken = torch.empty(len(lots), 0, dtype=torch.int64)
    for i, lot in enumerate(lots.unbind(1)):
        number = (lot * (choices - i)).long()
        for smaller in taken.sort(1).values.unbind(1):
            number += number >= smaller
        taken = torch.cat([taken, number.unsqueeze(1)], 1)
    return taken


def both_ways(n: int, one: Tensor, other: Tensor, weights: Tensor | None = None) -> Links:
    """Return the links of undirected edges, ``[edges]`` each."""
    if weights is not None:
        weights = torch.cat([weights, weights])
    return links_between(n, torch.cat([one, other]), torch.cat([other, one]), weights)


def drawn(n: int, draw: Callable[[int], Links], name: str) -> Topology:
    """Return the schedule in which every round is drawn anew."""
    return Topology(n, lru_cache(maxsize=4)(draw), None, name)


def repeated(n: int, rounds: Sequence[Links], name: str) -> Topology:
    """Return the schedule which goes through some rounds over and over."""
    return Topology(n, lambda round: rounds[round % len(rounds)], len(rounds), name)


def at_least_two(n: int) -> None:
    """Refuse a schedule for one.

    Raises:
        ValueError: n is below 2.
    """
    if n < 2:
        raise ValueError(f"n = {n} must be at least 2")
