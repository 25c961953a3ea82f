"""EquiTopo: random shifts of a circle, which mix at a rate that does not depend on n.

Song et al. 2022, *Communication-efficient topologies for decentralized learning with O(1)
consensus rate*. A shift by u sends from i to ``i + u``, with the weight (n - 1) / n. Links come
with these weights, which go before the mixing rule's: doubly stochastic for any n.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from p2pfl.topology.lots import at_least_two, both_ways, drawn, lots, repeated, shift
from p2pfl.topology.schedule import Links, Topology, links_between

TRIES = 100  # how often shifts are drawn before they count as hopeless
MOST = 10**8  # links that are drawn, repeated ones among them: they take gigabytes


def equi_static(n: int, m: int = 4, seed: int = 0) -> Topology:
    """Return the directed graph of m random shifts, the same in every round (D-EquiStatic).

    Everybody sends to m others, fewer where a shift is drawn twice, and hears as many. Shifts
    with which not everybody would hear of everybody are drawn anew.

    Args:
        n: how many nodes there are.
        m: how many shifts; ``8/3 ln(2 n / p) / rho²`` are enough for a rate below rho with
            probability 1 - p, and usually far fewer.
        seed: of the draws.
    """
    return repeated(n, [_shifts(n, m, seed)], "equi_static")


def u_equi_static(n: int, m: int = 4, seed: int = 0) -> Topology:
    """Return the undirected graph of m random shifts, the same in every round (U-EquiStatic).

    Everybody exchanges with at most 2 m others.

    Args:
        n: how many nodes there are.
        m: how many shifts; see `equi_static`.
        seed: of the draws.
    """
    links = _shifts(n, m, seed)
    assert links.weights is not None
    undirected = both_ways(n, links.senders, links.receivers, links.weights / 2)
    return repeated(n, [undirected], "u_equi_static")


def od_equi_dyn(n: int, eta: float = 0.5, seed: int = 0) -> Topology:
    """Return the schedule of one random shift a round (OD-EquiDyn).

    Everybody sends to one other and hears another.

    Args:
        n: how many nodes there are.
        eta: how much of what is heard is taken, above 0 and up to 1.
        seed: of the draws.
    """
    _check_eta(n, eta)
    nodes = torch.arange(n)

    def draw(round: int) -> Links:
        receivers = (nodes + shift(float(lots(seed, round, 1)), n)) % n
        return links_between(n, nodes, receivers, _weights(n, n, eta))

    return drawn(n, draw, "od_equi_dyn")


def ou_equi_dyn(n: int, eta: float = 0.5, seed: int = 0) -> Topology:
    """Return the schedule of pairs that are a random shift apart (OU-EquiDyn).

    From a random node on around the circle, everybody who is still free exchanges with who is
    one shift further on, if that one is free too. The others have nobody to meet in that round.

    Args:
        n: how many nodes there are.
        eta: how much of what is heard is taken, above 0 and up to 1.
        seed: of the draws.
    """
    _check_eta(n, eta)

    def draw(round: int) -> Links:
        step, start = lots(seed, round, 2).tolist()
        one, other = _pairs(n, shift(step, n), int(start * n))
        return both_ways(n, one, other, _weights(len(one), n, eta))

    return drawn(n, draw, "ou_equi_dyn")


def _shifts(n: int, m: int, seed: int) -> Links:
    at_least_two(n)
    if m < 1:
        raise ValueError(f"m = {m} must be at least 1")
    if m * n > MOST:
        raise ValueError(f"m = {m} of n = {n} are more than {MOST:,} links")
    for attempt in range(TRIES):
        shifts = [shift(lot, n) for lot in lots(seed, attempt, m).tolist()]
        if math.gcd(n, *shifts) == 1:
            nodes = torch.arange(n).repeat(m)
            receivers = (nodes + torch.tensor(shifts).repeat_interleave(n)) % n
            return links_between(n, nodes, receivers, _weights(n * m, n, 1 / m))
    raise ValueError(f"m = {m} gave no connected graph of n = {n} in {TRIES} draws; try m >= 2")


def _pairs(n: int, step: int, start: int) -> tuple[Tensor, Tensor]:
    free, one, other = [True] * n, [], []
    for place in range(start, start + n):
        here, there = place % n, (place + step) % n
        if free[here] and free[there]:
            free[here] = free[there] = False
            one.append(here)
            other.append(there)
    return torch.tensor(one), torch.tensor(other)


def _weights(count: int, n: int, share: float) -> Tensor:
    return torch.full((count,), share * (n - 1) / n, dtype=torch.float64)


def _check_eta(n: int, eta: float) -> None:
    at_least_two(n)
    if not 0 < eta <= 1:
        raise ValueError(f"eta = {eta} must be above 0 and up to 1")
