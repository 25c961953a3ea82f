"""Peer sampling by shuffling: everybody knows a few others, and they keep exchanging whom.

Voulgaris, Gavidia and van Steen 2005, *CYCLON: inexpensive membership management for
unstructured P2P overlays*. Here every peer replays all the shuffles by itself.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray

from p2pfl import rng
from p2pfl.topology.lots import at_least_two, drawn, lots
from p2pfl.topology.schedule import Links, Topology, links_between

REMEMBERED = 8  # rounds whose views are kept at hand

Ids = NDArray[np.int64]


class Views(NamedTuple):
    """Whom everybody knows; never written into once it is made.

    No row holds an id twice, or its own.
    """

    ids: Ids  # [n, view]
    ages: Ids  # [n, view]: rounds since that node has spoken for itself, as far as this one knows


def cyclon(n: int, s: int = 4, view: int = 20, shuffle: int = 8, seed: int = 0) -> Topology:
    """Return the schedule in which everybody sends to s of those it knows, which keep changing.

    Close to EL-Local, of what a peer can know without a list of all: ``mixing = "uniform"``, or
    push_sum. Each round everybody shuffles once with the one it has not heard of for longest, and
    sends to s of those it knows then.

    Args:
        n: how many nodes there are.
        s: how many others each sends to, at most `view` and n - 1.
        view: how many others each knows, n - 1 if there are not so many.
        shuffle: how many of them two nodes swap, at most `view`.
        seed: of the draws.
    """
    at_least_two(n)
    width = min(view, n - 1)
    for name, value, most in (("s", s, width), ("shuffle", shuffle, view)):
        if not 1 <= value <= most:
            raise ValueError(f"{name} = {value} must be 1 to {most}, with view = {view}, n = {n}")
    at = views(n, width, min(shuffle, width), seed)

    def draw(round: int) -> Links:
        nodes = torch.arange(n)
        choice = rng.uniform(_keys(n, seed, round, 1), width).argsort(1)[:, :s]
        receivers = torch.from_numpy(at(round).ids).gather(1, choice)
        return links_between(n, nodes.repeat_interleave(s), receivers.flatten())

    return drawn(n, draw, "cyclon")


def views(n: int, width: int, shuffle: int, seed: int) -> Callable[[int], Views]:
    """Return a function from a round to what everybody knows after its shuffles.

    A round costs its own shuffles if the one before has just been asked for; else all those since
    the last that is remembered, or from the beginning.
    """
    order = lots(seed, -1, n).argsort().numpy()
    around = (np.arange(n)[:, None] + np.arange(1, width + 1)) % n
    first = np.empty_like(around)
    first[order] = order[around]  # a circle in random order, where all know who comes next
    start = Views(first, np.zeros_like(first))
    known: dict[int, Views] = {}

    def at(round: int) -> Views:
        last = max((each for each in known if each <= round), default=-1)
        state = known.get(last, start)
        for each in range(last + 1, round + 1):
            lots = rng.uniform(_keys(n, seed, each, 0), 2 * width + 1)
            state = shuffled(state, shuffle, lots.numpy())
        known[round] = state
        if len(known) > REMEMBERED:
            del known[next(iter(known))]
        return state

    return at


def shuffled(views: Views, shuffle: int, lots: NDArray[np.float64]) -> Views:
    """Return the views after everybody has shuffled once with the one it knows for longest.

    In waves of pairs that have nobody in common, so that the order does not matter within one.

    Args:
        views: as they are, which is left so.
        shuffle: how many entries two nodes swap.
        lots: ``[n, 2 view + 1]`` in [0, 1): what each node that begins a shuffle sends, what it is
            sent, and how soon it has its turn.
    """
    ids, ages = views.ids.copy(), views.ages + 1
    n, width = ids.shape
    turn, waiting = lots[:, -1], np.arange(n)
    while len(waiting):
        slot = (ages[waiting] + lots[waiting, :width]).argmax(1)  # lots decide between equals
        partner = ids[waiting, slot]
        first = np.ones(n)  # whose turn it is of those who want a node
        np.minimum.at(first, waiting, turn[waiting])
        np.minimum.at(first, partner, turn[waiting])
        now = (first[waiting] == turn[waiting]) & (first[partner] == turn[waiting])
        _swap(ids, ages, waiting[now], partner[now], slot[now], lots[waiting[now]], shuffle)
        waiting = waiting[~now]
    return Views(ids, ages)


def _swap(  # noqa: PLR0913 - one step of `shuffled`, taken out of it
    ids: Ids,
    ages: Ids,
    here: Ids,
    there: Ids,
    slot: Ids,
    lots: NDArray[np.float64],
    shuffle: int,
) -> None:
    """Let pairs of nodes swap entries, of which the first sends itself in place of the second."""
    width = ids.shape[1]
    first = np.arange(width) == slot[:, None]
    mine = np.where(first, -1.0, lots[:, :width]).argsort(1)[:, :shuffle]
    theirs = lots[:, width : 2 * width].argsort(1)[:, :shuffle]
    ages[here, slot] = 0  # they have just spoken, should the entry stay for want of a new one
    sent = ids[here[:, None], mine], ages[here[:, None], mine]
    answer = ids[there[:, None], theirs], ages[there[:, None], theirs]
    sent[0][:, 0] = here
    _merge(ids, ages, there, theirs, *sent)
    _merge(ids, ages, here, mine, *answer)


def _merge(ids: Ids, ages: Ids, nodes: Ids, slots: Ids, new: Ids, new_ages: Ids) -> None:
    """Put what is new to nodes in the place of what they have sent, ``[nodes, shuffle]`` each."""
    known = (new[:, :, None] == ids[nodes][:, None, :]).any(2) | (new == nodes[:, None])
    order = known.argsort(1, kind="stable")
    row, column = np.nonzero(np.arange(new.shape[1]) < (~known).sum(1)[:, None])
    source = order[row, column]
    ids[nodes[row], slots[row, column]] = new[row, source]
    ages[nodes[row], slots[row, column]] = new_ages[row, source]


def _keys(n: int, seed: int, round: int, what: int) -> torch.Tensor:
    return rng.fold(rng.fold(rng.keys(seed, torch.arange(n)), round), what)
