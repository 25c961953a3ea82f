"""Who talks to whom, and when: the links of every round."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cached_property, lru_cache
from typing import NamedTuple

import networkx as nx
import numpy as np
import torch
from torch import Tensor

EXACT_REACH = 2000  # nodes up to which `reach` follows every message
SAMPLE = 16  # rounds looked at of a topology which never repeats
FEW = 4  # of a large one
REMEMBERED = 64  # rounds of it whose neighbours are kept at hand
STALE = 1000  # rounds without news after which such a topology counts as disconnected


class Links(NamedTuple):
    """The links of one round, sorted by receiver and then by sender, without self loops.

    Where `weights` are given, the matrix they make is doubly stochastic, and they go before
    those that a mixing rule would have; see `mixing`.
    """

    senders: Tensor  # [links], int64
    receivers: Tensor  # [links], int64
    n: int  # nodes
    weights: Tensor | None = None  # [links], float64: what the receiver takes of the sender


def links_between(
    n: int, senders: Tensor, receivers: Tensor, weights: Tensor | None = None
) -> Links:
    """Return links in their canonical order; repeated ones and self loops are left out.

    Args:
        n: how many nodes there are.
        senders: ``[links]``, int64.
        receivers: ``[links]``, int64.
        weights: ``[links]``, float64; those of repeated links are added up.

    Raises:
        ValueError: a node is not among ``0 .. n-1``.
    """
    for nodes in (senders, receivers):
        if len(nodes) and not 0 <= int(nodes.min()) <= int(nodes.max()) < n:
            raise ValueError(f"links name nodes outside 0..{n - 1}")
    other = senders != receivers
    keys, place = torch.unique(receivers[other] * n + senders[other], return_inverse=True)
    if weights is not None:
        none = torch.zeros(len(keys), dtype=torch.float64)
        weights = none.index_add_(0, place, weights[other])
    return Links(keys % n, keys // n, n, weights)


def in_degrees(links: Links) -> Tensor:
    """Return how many nodes each node hears, ``[n]``."""
    return torch.bincount(links.receivers, minlength=links.n)


def out_degrees(links: Links) -> Tensor:
    """Return to how many nodes each node sends, ``[n]``."""
    return torch.bincount(links.senders, minlength=links.n)


@dataclass(frozen=True)
class Topology:
    """The links of every round.

    Attributes:
        n: how many nodes there are.
        links: the links of a round, counted from 0.
        period: after how many rounds the links repeat; 1 is a static graph, None never.
        name: what reports call it.
    """

    n: int
    links: Callable[[int], Links]
    period: int | None
    name: str = ""

    def contacts(self, node: int) -> tuple[set[int], set[int]]:
        """Return to whom a node ever sends, and whom it ever hears."""
        if self.period is None:  # it never repeats: anybody may come
            others = set(range(self.n)) - {node}
            return others, others
        views = [self.view(node, round) for round in range(self.period)]
        return {to for view in views for to in view[0]}, {of for view in views for of in view[1]}

    def view(self, node: int, round: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """Return to whom a node sends in a round and whom it hears, both in ascending order."""
        neighbours = self._neighbours(round % self.period if self.period else round)
        return neighbours.sends_to(node), neighbours.hears_from(node)

    def view_weights(
        self, node: int, round: int
    ) -> tuple[tuple[float, ...], tuple[float, ...]] | None:
        """Return the weights of the links in a node's `view`, given and taken, if they have any."""
        return self._neighbours(round % self.period if self.period else round).weights(node)

    def rounds(self) -> Iterator[Links]:
        """Yield the links of one period, or of the first 16 rounds if there is none."""
        return (self.links(round) for round in range(self.period or SAMPLE))

    @cached_property
    def is_symmetric(self) -> bool:
        """Whether every link goes both ways in the same round, weighted alike, in all `rounds`."""
        return all(_is_symmetric(links) for links in self.rounds())

    @cached_property
    def is_complete(self) -> bool:
        """Whether everybody hears everybody, in all `rounds`."""
        return all(len(links.senders) == self.n * (self.n - 1) for links in self.rounds())

    @cached_property
    def is_tree(self) -> bool:
        """Whether the links go both ways and join all nodes without a cycle, in all `rounds`."""
        return self.is_symmetric and all(map(_is_tree, self.rounds()))

    def reach(self) -> int:
        """Return the number of rounds after which anything said has reached everybody.

        The directed diameter of a static graph; of a periodic topology the worst case over the
        rounds in which it may have been said. Above 2000 nodes it is an upper bound, the way
        to node 0 and on from there (at most twice the diameter). Without a period it is the
        worst of the first few, which is usual and not certain: see `floods`.

        Raises:
            ValueError: some node never hears of some other.
        """
        return self._reach

    @cached_property
    def _reach(self) -> int:
        if self.is_complete:
            return min(1, self.n - 1)
        if self.period is None or self.n <= EXACT_REACH:
            some = SAMPLE if self.n <= EXACT_REACH else FEW
            return max(_flood(self, start) for start in range(self.period or some))
        period = [self.links(round) for round in range(self.period)]
        starts = range(self.period)
        gather = max(
            _spread(period[start::-1] + period[:start:-1], True, self.name) for start in starts
        )
        return gather + max(
            _spread(period[start:] + period[:start], False, self.name) for start in starts
        )

    def floods(self, start: int, rounds: int) -> bool:
        """Say whether what is said in a round has reached everybody after so many rounds.

        As of `reach`, which it is to be true of: only without a period there is anything to find
        out.
        """
        return self.period is not None or _flood(self, start, rounds) <= rounds

    @cached_property
    def _neighbours(self) -> Callable[[int], _Neighbours]:
        @lru_cache(maxsize=self.period or REMEMBERED)
        def neighbours(round: int) -> _Neighbours:
            return _Neighbours.of(self.links(round))

        return neighbours


def static(graph: nx.Graph, name: str = "") -> Topology:
    """Return the topology that has the same links in every round.

    An undirected edge is a link in both directions; a directed one goes from the sender to
    the receiver.

    >>> static(nx.path_graph(3)).view(1, round=7)
    ((0, 2), (0, 2))

    Raises:
        ValueError: the nodes of the graph are not ``0 .. n-1``.
    """
    n = graph.number_of_nodes()
    if n == 0 or set(graph) != set(range(n)):
        raise ValueError("the nodes of a graph must be 0 .. n-1, with n at least 1")
    ends = torch.from_numpy(np.array(list(graph.edges()), dtype=np.int64).reshape(-1, 2))
    if not graph.is_directed():
        ends = torch.cat([ends, ends.flip(1)])
    links = links_between(n, ends[:, 0], ends[:, 1])
    return Topology(n, lambda round: links, 1, name)


def nobody(n: int) -> Topology:
    """Return the topology in which nobody hears anybody."""
    none = torch.empty(0, dtype=torch.int64)
    links = Links(none, none, n)
    return Topology(n, lambda round: links, 1, "none")


class _Neighbours(NamedTuple):
    """Links as two lists of neighbours, cut where the next node begins."""

    receivers: list[int]  # by sender
    senders: list[int]  # by receiver
    sending: list[int]  # [n + 1]: where the receivers of each sender begin
    hearing: list[int]  # [n + 1]: where the senders of each receiver begin
    given: list[float] | None  # the weights of the links, by sender
    taken: list[float] | None  # by receiver

    @classmethod
    def of(cls, links: Links) -> _Neighbours:
        by_sender = torch.sort(links.senders, stable=True).indices
        return cls(
            links.receivers[by_sender].tolist(),
            links.senders.tolist(),
            [0, *out_degrees(links).cumsum(0).tolist()],
            [0, *in_degrees(links).cumsum(0).tolist()],
            None if links.weights is None else links.weights[by_sender].tolist(),
            None if links.weights is None else links.weights.tolist(),
        )

    def sends_to(self, node: int) -> tuple[int, ...]:
        return tuple(self.receivers[self.sending[node] : self.sending[node + 1]])

    def hears_from(self, node: int) -> tuple[int, ...]:
        return tuple(self.senders[self.hearing[node] : self.hearing[node + 1]])

    def weights(self, node: int) -> tuple[tuple[float, ...], tuple[float, ...]] | None:
        if self.given is None or self.taken is None:
            return None
        given = self.given[self.sending[node] : self.sending[node + 1]]
        return tuple(given), tuple(self.taken[self.hearing[node] : self.hearing[node + 1]])


def _is_symmetric(links: Links) -> bool:
    back = links_between(links.n, links.receivers, links.senders, links.weights)
    return all(
        torch.equal(one, other)
        for one, other in zip(links, back, strict=True)
        if isinstance(one, Tensor) and isinstance(other, Tensor)
    )


def _is_tree(links: Links) -> bool:
    graph = nx.Graph(zip(links.senders.tolist(), links.receivers.tolist(), strict=True))
    graph.add_nodes_from(range(links.n))
    return bool(nx.is_tree(graph))


def _flood(topology: Topology, start: int, most: float = math.inf) -> int:
    """Return the rounds from `start` on until everybody knows what everybody said then.

    It is given up after one round more than `most`.
    """
    everything = (1 << topology.n) - 1
    # One integer per node, one bit for everybody it has heard of: a round is a few "or"s.
    known = [1 << node for node in range(topology.n)]
    round, news = start, start
    while round - start <= most and any(bits != everything for bits in known):
        links = topology.links(round)
        before = known.copy()
        for sender, receiver in zip(links.senders.tolist(), links.receivers.tolist(), strict=True):
            known[receiver] |= before[sender]
        round += 1
        if known != before:
            news = round
        _check_news(topology.name, round - news, topology.period or STALE)
    return round - start


def _spread(period: list[Links], backwards: bool, name: str) -> int:
    """Return the rounds until node 0 has reached everybody, or backwards, everybody node 0."""
    ends = [(links.senders.numpy(), links.receivers.numpy()) for links in period]
    reached = np.zeros(period[0].n, dtype=np.bool_)
    reached[0] = True
    rounds = news = 0
    while not reached.all():
        senders, receivers = ends[rounds % len(period)]
        source, target = (receivers, senders) if backwards else (senders, receivers)
        before = reached.sum()
        reached[target[reached[source]]] = True
        rounds += 1
        if reached.sum() > before:
            news = rounds
        _check_news(name, rounds - news, len(period))
    return rounds


def _check_news(name: str, quiet: int, patience: int) -> None:
    if quiet >= patience:
        name = name or "the topology"
        raise ValueError(f"{name} is not strongly connected: some node never hears of another")
