"""Topologies that change from round to round, without anybody arranging it.

The links of a round are a function of the number of nodes, the seed and the round alone, so
every peer works out the same ones by itself. They are made as arrays: at 10,000 nodes a
graph object for every round would cost more than the round.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache

import torch

from p2pfl.topology.epidemic import el_local, el_oracle
from p2pfl.topology.equitopo import equi_static, od_equi_dyn, ou_equi_dyn, u_equi_static
from p2pfl.topology.finite import base, hyper_hypercube, one_peer_hypercube, simple_base
from p2pfl.topology.lots import at_least_two, both_ways, drawn, lots, repeated
from p2pfl.topology.sampling import cyclon
from p2pfl.topology.schedule import Links, Topology, links_between


def one_peer_exponential(n: int) -> Topology:
    """Return the schedule in which node i sends to ``i + 2^k`` in round k, over and over.

    Everybody sends one message a round and hears one. If n is a power of two, ``log2 n``
    rounds make an exact average (Ying et al. 2021, *Exponential graph is provably efficient
    for decentralized deep training*).

    >>> [one_peer_exponential(8).view(1, round)[0] for round in range(4)]
    [(2,), (3,), (5,), (2,)]
    """
    at_least_two(n)
    nodes = torch.arange(n)
    each = [links_between(n, nodes, (nodes + (1 << k)) % n) for k in range((n - 1).bit_length())]
    return repeated(n, each, "one_peer_exponential")


def random_matching(n: int, seed: int = 0) -> Topology:
    """Return the schedule in which everybody meets one other, drawn anew every round.

    Of an odd number one node has nobody to meet. (Boyd et al. 2006, *Randomized gossip
    algorithms*, in rounds.)
    """
    at_least_two(n)

    def draw(round: int) -> Links:
        order = lots(seed, round, n).argsort()
        return both_ways(n, order[: n // 2], order[n // 2 : n // 2 * 2])

    return drawn(n, draw, "random_matching")


def one_factorisation(n: int) -> Topology:
    """Return the tournament in which everybody meets everybody once, then again.

    One other a round, in n - 1 rounds; of an odd number there are n rounds, in each of which
    another node has nobody to meet. By the circle method (Kirkman, 1847): the nodes, but for node
    0 if their number is even, stand in a circle that turns. Who stand opposite each other meet,
    and node 0 meets the one at the top.

    >>> [one_factorisation(4).view(0, round)[0] for round in range(3)]
    [(1,), (2,), (3,)]
    """
    at_least_two(n)
    inside = 1 - n % 2
    around = n - inside
    steps = torch.arange(1, (around + 1) // 2)

    @lru_cache(maxsize=4)  # all of them would take n² numbers
    def meet(top: int) -> Links:
        one, other = inside + (top + steps) % around, inside + (top - steps) % around
        # Of an odd number the one at the top meets itself, which is no link.
        one = torch.cat([one, torch.tensor([inside + top])])
        other = torch.cat([other, torch.tensor([0 if inside else top])])
        return both_ways(n, one, other)

    return Topology(n, lambda round: meet(round % around), around, "one_factorisation")


SCHEDULES: dict[str, Callable[..., Topology]] = {
    "base": base,
    "cyclon": cyclon,
    "el_local": el_local,
    "el_oracle": el_oracle,
    "equi_static": equi_static,
    "hyper_hypercube": hyper_hypercube,
    "od_equi_dyn": od_equi_dyn,
    "one_factorisation": one_factorisation,
    "one_peer_exponential": one_peer_exponential,
    "one_peer_hypercube": one_peer_hypercube,
    "ou_equi_dyn": ou_equi_dyn,
    "random_matching": random_matching,
    "simple_base": simple_base,
    "u_equi_static": u_equi_static,
}
