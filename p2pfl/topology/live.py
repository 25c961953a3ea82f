"""Who talks to whom when not everybody is alive.

Nobody hands the links out: they are a function of who is alive, so whoever agrees on that
agrees on the links of every round, too.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress
from functools import lru_cache
from itertools import groupby

import networkx as nx
import torch
from torch import Tensor

from p2pfl.errors import UserError
from p2pfl.topology.schedule import Links, Topology, links_between

Rule = Callable[[int], Topology]  # the topology of so many nodes

REMEMBERED = 8  # sets of nodes whose topology is kept at hand


class Overlay:
    """The topology among those who are alive.

    With a rule it is what the rule makes of so many nodes, which are the live ones in
    ascending order. Where the rule cannot do that number, and without one, it is what is left
    of the full topology, mended: dead nodes that are linked with each other leave one hole, and
    the parts that a hole has torn apart are linked in a ring, through one live neighbour of the
    dead in each. So whoever reached another still does, all is symmetric that was, and nobody
    has more than twice the neighbours it had. Only what never repeats promises nobody a link:
    there all live nodes form the ring, beside the links that are left. What is mended has no
    weights of its own any more.

    Args:
        full: the topology of all nodes.
        rule: makes the topology of any number of nodes, or raises `ValueError` or `UserError`
            for a number it cannot do; None where there is but the one, as in a file.
    """

    def __init__(self, full: Topology, rule: Rule | None) -> None:
        self._full, self._rule = full, rule
        self._among = lru_cache(REMEMBERED)(self._make)

    def among(self, live: tuple[int, ...]) -> Topology:
        """Return the topology among some nodes, in whatever order they are named.

        Its nodes are those of the full topology, by the same ids; the others have no links.

        Raises:
            ValueError: there is no such node, or nobody is left.
        """
        nodes = tuple(sorted(set(live)))
        if not nodes or nodes[0] < 0 or nodes[-1] >= self._full.n:
            raise ValueError(f"live = {live} must name some of the nodes 0..{self._full.n - 1}")
        return self._among(nodes)

    def _make(self, live: tuple[int, ...]) -> Topology:
        if len(live) == self._full.n:
            return self._full
        ids = torch.tensor(live)
        if self._rule is not None:
            with suppress(ValueError, UserError):
                return _renamed(self._rule(len(live)), ids, self._full.n)
        return _mended(self._full, ids)


def _renamed(topology: Topology, ids: Tensor, n: int) -> Topology:
    """Return a topology in which node i is called ``ids[i]``, which ascend, one of n nodes."""

    def rename(links: Links) -> Links:
        return Links(ids[links.senders], ids[links.receivers], n, links.weights)

    return _changed(topology, n, rename)


def _mended(full: Topology, live: Tensor) -> Topology:
    """Return what is left of a topology, and in every round the links that mend it."""
    n = full.n
    alive = torch.zeros(n, dtype=torch.bool).index_fill(0, live, True)
    rings = _around_holes(full, alive) if full.period else _ring(live.tolist())
    extra = torch.tensor(rings, dtype=torch.int64).reshape(-1, 2).T
    if full.is_symmetric:
        extra = torch.cat([extra, extra.flip(0)], 1)

    def mend(links: Links) -> Links:
        ends = torch.stack([links.senders, links.receivers])
        ends = torch.cat([ends[:, alive[ends].all(0)], extra], 1)
        return links_between(n, ends[0], ends[1])

    return _changed(full, n, mend)


def _changed(topology: Topology, n: int, change: Callable[[Links], Links]) -> Topology:
    period = topology.period

    @lru_cache(maxsize=period or 4)
    def links(round: int) -> Links:
        return change(topology.links(round))

    by_round = (lambda round: links(round % period)) if period else links
    return Topology(n, by_round, period, topology.name)


def _around_holes(full: Topology, alive: Tensor) -> list[tuple[int, int]]:
    """Return the links, sender and receiver, that close what the dead have torn apart."""
    n = full.n
    ends = torch.cat([torch.stack([each.senders, each.receivers]) for each in full.rounds()], 1)
    both, either = alive[ends].all(0), alive[ends].any(0)
    parts = _parts(n, ends[:, both], full.is_symmetric)
    holes = _connected(n, ends[:, ~either])
    torn = ends[:, either & ~both]
    near, gone = torch.where(alive[torn[0]], torn, torn.flip(0))
    borders = torch.unique(holes[gone] * n + near).tolist()
    joined = nx.utils.UnionFind()
    links: list[tuple[int, int]] = []
    for _, border in groupby(borders, lambda key: key // n):
        doors: dict[int, int] = {}  # to each part the first of those that the hole borders on
        for key in border:
            doors.setdefault(joined[parts[key % n]], key % n)
        joined.union(*doors)
        links += _ring(list(doors.values()))
    return links


def _ring(nodes: list[int]) -> list[tuple[int, int]]:
    """Return the links of a directed ring, none of a single node."""
    return list(zip(nodes, nodes[1:] + nodes[:1], strict=True)) if len(nodes) > 1 else []


def _parts(n: int, ends: Tensor, symmetric: bool) -> list[int]:
    """Return for every node a number of the (strongly) connected part it is in, ``[n]``."""
    if symmetric:
        return _connected(n, ends).tolist()
    graph = nx.DiGraph()
    graph.add_nodes_from(range(n))
    graph.add_edges_from(ends.T.tolist())
    parts = [0] * n
    for number, nodes in enumerate(nx.strongly_connected_components(graph)):
        for node in nodes:
            parts[node] = number
    return parts


def _connected(n: int, ends: Tensor) -> Tensor:
    """Return for every node the lowest one it is connected with, ``[n]``.

    On arrays: a graph object takes seconds where thousands of nodes are densely linked.
    """
    lowest = torch.arange(n)
    while True:
        known = lowest[ends]
        low = known.amin(0).expand_as(known)
        lower = lowest.scatter_reduce(0, known.flatten(), low.flatten(), "amin")
        lower = lower[lower]
        if torch.equal(lower, lowest):
            return lowest
        lowest = lower
