"""Schedules that make an exact average of any values in a few rounds.

Hyper-hypercubes and Base-(k+1) graphs (Takezawa et al. 2023, *Beyond exponential graph:
communication-efficient topologies for decentralized learning via finite-time convergence*).
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from functools import lru_cache
from typing import NamedTuple

import torch
from torch import Tensor

from p2pfl.topology.lots import at_least_two, both_ways, drawn, lots, repeated
from p2pfl.topology.schedule import Links, Topology


class Edges(NamedTuple):
    """Undirected edges of one round with their weights, ``[edges]`` each."""

    one: Tensor
    other: Tensor
    weight: Tensor

    def placed(self, stride: int, starts: Iterable[int]) -> Edges:
        """Return a copy for every start, in which node i is ``start + i * stride``."""
        at = torch.tensor(list(starts))
        one, other = ((at[:, None] + ends * stride).flatten() for ends in self[:2])
        return Edges(one, other, self.weight.repeat(len(at)))


def one_peer_hypercube(n: int, shuffle: bool = False, seed: int = 0) -> Topology:
    """Return the schedule in which i meets ``i XOR 2^t`` in round t, over and over.

    Everybody exchanges with one other a round, and ``log2 n`` rounds make an exact average.

    >>> [one_peer_hypercube(8).view(1, round)[0] for round in range(4)]
    [(0,), (3,), (5,), (0,)]

    Args:
        n: how many nodes there are, a power of two.
        shuffle: put the nodes in another order for every cycle; see `base`.
        seed: of the orders.
    """
    at_least_two(n)
    if n & (n - 1):
        below = 1 << n.bit_length() - 1
        raise ValueError(f"n = {n} is not a power of two; nearest: {below}, {2 * below}; or base")
    return _schedule(n, _cliques(n, 1), "one_peer_hypercube", shuffle, seed, weighted=False)


def hyper_hypercube(n: int, k: int = 1, shuffle: bool = False, seed: int = 0) -> Topology:
    """Return the schedule of cliques of at most k + 1 nodes that make an exact average.

    Round l joins the nodes whose numbers differ in digit l only, where n is a product of as few
    bases as possible; as many rounds as there are digits (Takezawa et al. 2023, H_k).

    Args:
        n: how many nodes there are; no prime factor may be above k + 1.
        k: the most others that anybody exchanges with in a round.
        shuffle: put the nodes in another order for every cycle; see `base`.
        seed: of the orders.
    """
    k = _checked(n, k)
    if (rest := _rough(n, k)) > 1:
        raise ValueError(
            f"n = {n} has a prime factor above k + 1 = {k + 1}, in {rest}: make k larger, or take"
            " base, which can do any n"
        )
    return _schedule(n, _cliques(n, k), "hyper_hypercube", shuffle, seed, weighted=False)


def simple_base(n: int, k: int = 1, shuffle: bool = False, seed: int = 0) -> Topology:
    """Return the Simple Base-(k+1) schedule, which makes an exact average of any n.

    A hyper-hypercube where there is one, else at most ``2 log_{k+1} n + 2`` rounds. Links come
    with weights of their own, which go before the mixing rule's (Takezawa et al. 2023, A^simple).

    Args:
        n: how many nodes there are.
        k: the most others that anybody exchanges with in a round.
        shuffle: put the nodes in another order for every cycle; see `base`.
        seed: of the orders.
    """
    k = _checked(n, k)
    return _schedule(n, _simple(n, k), "simple_base", shuffle, seed)


def base(n: int, k: int = 1, shuffle: bool = False, seed: int = 0) -> Topology:
    """Return the Base-(k+1) schedule, the shortest here that makes an exact average of any n.

    Where n has prime factors up to k + 1, groups of the rest of it average among themselves, and
    then one node of each group with each other; or it is a Simple Base-(k+1) schedule, if that is
    shorter. Links come with weights of their own, which go before the mixing rule's (Takezawa et
    al. 2023).

    >>> base(6).period, simple_base(6).period
    (4, 5)

    Args:
        n: how many nodes there are.
        k: the most others that anybody exchanges with in a round.
        shuffle: put the nodes in another order for every cycle, so that who averages early is
            another each time. It then never repeats itself.
        seed: of the orders.
    """
    k = _checked(n, k)
    rest = _rough(n, k)
    groups, simple = n // rest, _simple(n, k)
    inside, across = _simple(rest, k), _cliques(groups, k)
    rounds = [each.placed(1, range(0, n, rest)) for each in inside]
    rounds += [each.placed(rest, range(rest)) for each in across]
    return _schedule(n, min(rounds, simple, key=len), "base", shuffle, seed)


def _checked(n: int, k: int) -> int:
    """Return with how many others anybody can exchange in a round, k at most."""
    at_least_two(n)
    if k < 1:
        raise ValueError(f"k = {k} must be at least 1")
    return min(k, n - 1)


def _schedule(
    n: int, rounds: Sequence[Edges], name: str, shuffle: bool, seed: int, weighted: bool = True
) -> Topology:
    def links(edges: Edges, order: Tensor) -> Links:
        weight = edges.weight if weighted else None
        return both_ways(n, order[edges.one], order[edges.other], weight)

    if not shuffle:
        return repeated(n, [links(edges, torch.arange(n)) for edges in rounds], name)

    def draw(round: int) -> Links:
        cycle, step = divmod(round, len(rounds))
        return links(rounds[step], lots(seed, cycle, n).argsort())

    return drawn(n, draw, name)


def _cliques(n: int, k: int) -> list[Edges]:
    """Return the rounds of a hyper-hypercube, of an n without prime factors above k + 1."""
    rounds, stride = [], 1
    for size in reversed(_factors(n, k + 1) or ()):
        one, other = torch.triu_indices(size, size, 1)
        clique = Edges(one, other, torch.full((len(one),), 1 / size, dtype=torch.float64))
        starts = (i for i in range(n) if i // stride % size == 0)
        rounds.append(clique.placed(stride, starts))
        stride *= size
    return rounds


def _simple(n: int, k: int) -> list[Edges]:
    """Return the rounds of a Simple Base-(k+1) schedule."""
    if _rough(n, k) == 1:
        return _cliques(n, k)
    parts = _parts(n, k + 1)
    inside = [_cliques(part.blocks * part.size, k) for part in parts]
    within = [_cliques(part.size, k) for part in parts]
    gather = max(map(len, inside))
    rounds = []
    for t in range(gather):  # every part comes to its own mean
        each = zip(parts, inside, strict=True)
        rounds.append(_joined([r[t % len(r)].placed(1, [p.start]) for p, r in each if r]))
    for stage in range(1 + len(within[0])):
        # All later parts bring their mean to the blocks of this one, in which it is spread while
        # the parts after it have their turn.
        now = [
            r[(stage - s - 1) % len(r)].placed(1, parts[s].starts)
            for s, r in enumerate(within[:stage])
            if r
        ]
        if stage < len(parts) - 1:
            now.append(_bridges(parts[stage], n))
        rounds.append(_joined(now))
    return rounds


class _Part(NamedTuple):
    """Consecutive nodes, as many as one digit of n stands for."""

    start: int
    blocks: int  # the digit
    size: int  # of a block: a power of the base

    @property
    def end(self) -> int:
        return self.start + self.blocks * self.size

    @property
    def starts(self) -> range:
        return range(self.start, self.end, self.size)


def _parts(n: int, radix: int) -> list[_Part]:
    """Return a part for each digit of n that is not zero, the largest first."""
    size, start, parts = 1, 0, []
    while size * radix <= n:
        size *= radix
    while size:
        if blocks := (n - start) // size:
            parts.append(_Part(start, blocks, size))
            start = parts[-1].end
        size //= radix
    return parts


def _bridges(part: _Part, n: int) -> Edges:
    """Join every node behind a part with one node of each of its blocks."""
    behind = torch.arange(part.end, n)
    share = (part.end - part.start) / (part.blocks * (n - part.start))
    one = torch.cat([start + torch.arange(len(behind)) for start in part.starts])
    other = behind.repeat(part.blocks)
    return Edges(one, other, torch.full((len(one),), share, dtype=torch.float64))


def _joined(parts: Sequence[Edges]) -> Edges:
    return Edges(*(torch.cat(each) for each in zip(*parts, strict=True)))


def _rough(n: int, k: int) -> int:
    """Return what is left of n without its prime factors up to k + 1."""
    for divisor in range(2, k + 2):
        while n % divisor == 0:
            n //= divisor
    return n


@lru_cache
def _factors(n: int, most: int) -> tuple[int, ...] | None:
    """Return the fewest factors, none above `most`, that make n; the largest first."""
    if n == 1:
        return ()
    best = None
    for factor in range(min(n, most), 1, -1):
        rest = _factors(n // factor, factor) if n % factor == 0 else None
        if rest is not None and (best is None or 1 + len(rest) < len(best)):
            best = (factor, *rest)
    return best
