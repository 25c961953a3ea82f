"""Epidemic learning: everybody talks to s others, drawn anew every round."""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray

from p2pfl import rng
from p2pfl.topology.lots import at_least_two, both_ways, distinct, drawn, lots
from p2pfl.topology.schedule import Links, Topology, links_between

SWEEPS = 10  # in each of which every edge is offered another end

Edges = NDArray[np.int64]  # [edges, 2]


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
    _check(n, s)

    def draw(round: int) -> Links:
        nodes = torch.arange(n)
        steps = distinct(rng.uniform(rng.fold(rng.keys(seed, nodes), round), s), n - 1)
        others = ((nodes.unsqueeze(1) + 1 + steps) % n).flatten()
        drawing = nodes.repeat_interleave(s)
        return links_between(n, others, drawing) if pull else links_between(n, drawing, others)

    return drawn(n, draw, "el_local")


def el_oracle(n: int, s: int = 4, seed: int = 0) -> Topology:
    """Return the schedule in which everybody exchanges with s others, drawn anew every round.

    A random s-regular graph each round (de Vos et al. 2023, *Epidemic learning*, EL-Oracle),
    and no oracle: everybody draws the same one. A circle in which everybody is joined with the s
    nearest is put in random order, and pairs of its edges then swap ends at random (Maslov and
    Sneppen, 2002), which comes close to drawing all such graphs alike.

    Args:
        n: how many nodes there are.
        s: how many others each exchanges with, 1 to n - 1; n or s must be even.
        seed: of the draws.
    """
    _check(n, s)
    if n * s % 2:
        raise ValueError(f"s = {s} with n = {n} is an odd number of ends; make either even")
    circle = _circle(n, s)

    def draw(round: int) -> Links:
        edges = lots(seed, round, n).argsort().numpy()[circle]
        keys = rng.fold(rng.fold(torch.tensor(seed), round), torch.arange(SWEEPS))
        for sweep in rng.uniform(keys, n * s).numpy():
            edges = _switched(edges, n, sweep)
        return both_ways(n, *torch.from_numpy(edges).unbind(1))

    return drawn(n, draw, "el_oracle")


def _check(n: int, s: int) -> None:
    at_least_two(n)
    if not 1 <= s <= n - 1:
        raise ValueError(f"s = {s} must be 1 to n - 1 = {n - 1}")


def _circle(n: int, s: int) -> Edges:
    """Return the edges of a circle in which everybody is joined with the s nearest."""
    nodes = np.arange(n)
    edges = [np.stack([nodes, (nodes + step) % n], 1) for step in range(1, s // 2 + 1)]
    if s % 2:
        edges.append(np.stack([nodes, (nodes + n // 2) % n], 1)[: n // 2])
    return np.concatenate(edges)


def _switched(edges: Edges, n: int, lots: NDArray[np.float64]) -> Edges:
    """Return edges of which pairs have swapped ends, where that makes a new edge of each.

    Args:
        edges: each once.
        n: how many nodes there are.
        lots: ``[2 e]`` in [0, 1): who is paired, and which way round.
    """
    count = len(edges)
    turned = np.where(lots[count:, None] < 0.5, edges, edges[:, ::-1])[lots[:count].argsort()]
    half = count // 2
    pairs = turned[: 2 * half].reshape(2, half, 2)
    new = np.stack([pairs[:, :, 0], pairs[::-1, :, 1]], 2)  # their second ends change places
    keys = _keys(new, n)
    once = np.bincount(np.searchsorted(every := np.unique(keys), keys).ravel()) == 1
    fresh = every[once & ~np.isin(every, _keys(edges, n))]
    good = (np.isin(keys, fresh) & (new[..., 0] != new[..., 1])).all(0)
    swapped = np.where(good[None, :, None], new, pairs).reshape(-1, 2)
    return np.concatenate([swapped, turned[2 * half :]])


def _keys(edges: Edges, n: int) -> NDArray[np.int64]:
    """Return a number for every edge, whichever way round it is."""
    keys: NDArray[np.int64] = edges.min(-1) * n + edges.max(-1)
    return keys
