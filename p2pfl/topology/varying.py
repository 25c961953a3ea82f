"""Topologies that change from round to round, without anybody arranging it.

The links of a round are a function of the number of nodes, the seed and the round alone, so
every peer works out the same ones by itself. They are made as arrays: at 10,000 nodes a
graph object for every round would cost more than the round.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache

import torch
from torch import Tensor

from p2pfl import rng
from p2pfl.topology.schedule import Links, Topology, links_between


def one_peer_exponential(n: int) -> Topology:
    """Return the schedule in which node i sends to ``i + 2^k`` in round k, over and over.

    Everybody sends one message a round and hears one. If n is a power of two, ``log2 n``
    rounds make an exact average (Ying et al. 2021, *Exponential graph is provably efficient
    for decentralized deep training*).

    >>> [one_peer_exponential(8).view(1, round)[0] for round in range(4)]
    [(2,), (3,), (5,), (2,)]
    """
    _at_least_two(n)
    nodes = torch.arange(n)
    period = (n - 1).bit_length()
    each = [links_between(n, nodes, (nodes + (1 << k)) % n) for k in range(period)]
    return Topology(n, lambda round: each[round % period], period, "one_peer_exponential")


def random_matching(n: int, seed: int = 0) -> Topology:
    """Return the schedule in which everybody meets one other, drawn anew every round.

    Of an odd number one node has nobody to meet. (Boyd et al. 2006, *Randomized gossip
    algorithms*, in rounds.)
    """
    _at_least_two(n)

    def draw(round: int) -> Links:
        order = _lots(seed, round, n).argsort()
        one, other = order[: n // 2], order[n // 2 : n // 2 * 2]
        return links_between(n, torch.cat([one, other]), torch.cat([other, one]))

    return _drawn(n, draw, "random_matching")


def el_local(n: int, s: int = 4, seed: int = 0, pull: bool = False) -> Topology:
    """Return the schedule in which everybody sends to s others, drawn anew every round.

    How many a node hears differs (de Vos et al. 2023, *Epidemic learning*, EL-Local). There
    everybody takes the plain mean of what it hears: ``mixing = "uniform"``.

    Args:
        n: how many nodes there are.
        s: how many others each sends to, 1 to n - 1.
        seed: of the draws.
        pull: everybody hears s others instead, so that nobody is told more than it has asked for.
    """
    _at_least_two(n)
    if not 1 <= s <= n - 1:
        raise ValueError(f"s = {s} must be 1 to n - 1 = {n - 1}")

    def draw(round: int) -> Links:
        nodes = torch.arange(n)
        steps = _distinct(rng.uniform(rng.fold(rng.keys(seed, nodes), round), s), n - 1)
        receivers = (nodes.unsqueeze(1) + 1 + steps) % n
        drawing, drawn = nodes.repeat_interleave(s), receivers.flatten()
        return links_between(n, drawn, drawing) if pull else links_between(n, drawing, drawn)

    return _drawn(n, draw, "el_local")


SCHEDULES: dict[str, Callable[..., Topology]] = {
    "el_local": el_local,
    "one_peer_exponential": one_peer_exponential,
    "random_matching": random_matching,
}


def _lots(seed: int, round: int, n: int) -> Tensor:
    key = rng.fold(torch.tensor(seed), round)
    return rng.uniform(key, n)


def _distinct(lots: Tensor, choices: int) -> Tensor:
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


def _drawn(n: int, draw: Callable[[int], Links], name: str) -> Topology:
    return Topology(n, lru_cache(maxsize=4)(draw), None, name)


def _at_least_two(n: int) -> None:
    if n < 2:
        raise ValueError(f"n = {n} must be at least 2")
