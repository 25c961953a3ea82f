"""Generators: when peers are away, drawn from the seed.

Every draw is keyed by the generator, the node and the number of the draw, so that a node has the
same outages among ten peers as among a thousand, wherever they are computed.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Mapping
from typing import Literal, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray

from p2pfl import rng
from p2pfl.churn import values
from p2pfl.churn.values import Value

How = Literal["kill", "leave"]
Floats = NDArray[np.float64]

MOST = 1_000_000  # outages of one generator
_CHURN = 0x63687572  # tells these lots from others below the same seed
_BLOCK = 64  # numbers a node draws at a time


class Outage(NamedTuple):
    """A node is away in [start, end) seconds; `end` may be infinite."""

    start: float
    end: float
    node: int
    how: How


class Pool(NamedTuple):
    """Whom a generator is about, and until when."""

    nodes: tuple[int, ...]
    until: float  # seconds: nobody goes away later
    how: How
    seed: int
    stream: int  # tells one generator from another


def uniform(seed: int, stream: int, number: int, nodes: tuple[int, ...], width: int) -> Floats:
    """Return numbers in [0, 1), ``[nodes, width]``, below the keys (seed, stream, node, number)."""
    keys = rng.fold(rng.fold(rng.keys(seed, torch.tensor(nodes)), _CHURN + stream), number)
    drawn: Floats = rng.uniform(keys, width).numpy()
    return drawn


def generate(table: Mapping[str, Value], n: int, seed: int, stream: int) -> list[Outage]:
    """Return the outages that a ``[[generate]]`` asks for.

    Args:
        table: the name of a generator with its main value, and further keys.
        n: how many peers there are.
        seed: draws them.
        stream: tells one generator from another.

    Raises:
        ValueError: the table says what cannot be.
    """
    names = [name for name in GENERATORS if name in table]
    if len(names) != 1:
        told = f"there are {', '.join(names)}" if names else f"choices: {', '.join(GENERATORS)}"
        raise ValueError(f"expected one generator; {told}")
    given = dict(table)
    nodes = values.selection(given.pop("nodes", "all"), n)
    how = given.pop("how", "kill")
    if how not in ("kill", "leave"):
        raise ValueError(f"how = {how!r}: expected 'kill' or 'leave'")
    until = values.lasting(given.pop("until", "1h"))
    factory = GENERATORS[names[0]]
    parameters = list(inspect.signature(factory).parameters.values())[1:]
    values.check_keys(given, [p.name for p in parameters] + ["nodes", "how", "until"], names[0])
    for p in parameters:
        if p.default is p.empty and p.name not in given:
            raise ValueError(f"{p.name} is missing beside {names[0]}")
    pool = Pool(_drawn(nodes, n, seed, stream), until, how, seed, stream)
    # To the microsecond: the last digits of a logarithm are not the same on all machines.
    rounded = [
        one._replace(start=round(one.start, 6), end=round(one.end, 6))
        for one in factory(pool, **given)
    ]
    return [one for one in rounded if one.start < one.end]


def _drawn(who: values.Selection, n: int, seed: int, stream: int) -> tuple[int, ...]:
    if who.named is not None:
        return who.named
    return lots(seed, stream, 0, tuple(range(n)), n if who.number is None else who.number)


def lots(
    seed: int, stream: int, number: int, among: tuple[int, ...], count: int
) -> tuple[int, ...]:
    """Draw `count` of the nodes `among`; a node's lot does not depend on who else there is."""
    order = np.argsort(uniform(seed, stream, number, among, 1)[:, 0], kind="stable")[:count]
    return tuple(sorted(among[i] for i in order))


def sessions(
    pool: Pool, sessions: str, mean_up: Value, mean_down: Value = "30s", shape: Value = None
) -> list[Outage]:
    """Let every node come and go by itself.

    Args:
        pool: whom.
        sessions: the law of the time it stays: exponential, weibull or pareto.
        mean_up: mean time it stays.
        mean_down: mean time it is away, which is exponential.
        shape: of weibull (below 1: many short stays, few long ones), or of pareto (its alpha,
            above 1).
    """
    law = _law(sessions, shape)
    up, down = values.lasting(mean_up), values.lasting(mean_down)
    nodes = np.array(pool.nodes)
    _refuse_more(len(nodes) * pool.until / (up + down), pool)
    found: list[Outage] = []
    begins, number = np.zeros(len(nodes)), 1
    while len(nodes):
        _refuse_more(len(found), pool)
        u = uniform(pool.seed, pool.stream, number, tuple(nodes.tolist()), 2 * _BLOCK)
        stays, away = up * law(u[:, ::2]), down * -np.log1p(-u[:, 1::2])
        ends = begins[:, None] + np.cumsum(stays + away, 1)
        starts = ends - away
        for i, k in np.argwhere(starts < pool.until):
            found.append(Outage(float(starts[i, k]), float(ends[i, k]), int(nodes[i]), pool.how))
        more = ends[:, -1] < pool.until
        nodes, begins, number = nodes[more], ends[more, -1], number + 1
    return found


def churn(pool: Pool, churn: Value, mean_down: Value = "30s") -> list[Outage]:
    """Let a share of those that are there go in every minute (second, hour); they come back.

    Args:
        pool: whom.
        churn: the share, as ``"20% a minute"``.
        mean_down: mean time one is away.
    """
    return sessions(pool, "exponential", 1 / values.rate(churn), mean_down)


def diurnal(
    pool: Pool, diurnal: Value, high: Value = 0.9, low: Value = 0.3, spread: Value = 0.0
) -> list[Outage]:
    """Let the probability to be there follow a cosine, as day and night.

    Args:
        pool: whom.
        diurnal: the period; time 0 is noon.
        high: probability to be there at noon.
        low: probability to be there at midnight.
        spread: noon is later by a time drawn for each node, up to this share of the period.
    """
    period, top, bottom = values.lasting(diurnal), values.share(high), values.share(low)
    if not bottom < top:
        raise ValueError(f"low = {low!r} is not below high = {high!r}")
    late = uniform(pool.seed, pool.stream, 1, pool.nodes, 1)[:, 0] * values.share(spread) * period
    _refuse_more(pool.until / period * len(pool.nodes), pool)
    days = math.ceil(pool.until / period) + 2  # noon of the first may lie before the start
    # In each period a node draws one number u, and is there while the probability is above it.
    u = uniform(pool.seed, pool.stream, 2, pool.nodes, days)
    half = np.arccos(np.clip((2 * u - top - bottom) / (top - bottom), -1, 1)) * period / 2 / math.pi
    found = []
    for i, node in enumerate(pool.nodes):
        noon = late[i] + period * (np.arange(days) - 1)
        there = half[i] > 0  # some days it does not come at all
        evening, morning = (noon + half[i])[there], (noon - half[i])[there]
        away = zip([0.0, *evening], [*morning, pool.until], strict=True)
        found += [
            Outage(max(0.0, float(start)), float(end), node, pool.how)
            for start, end in away
            if max(0.0, start) < min(end, pool.until)
        ]
    return found


def failures(pool: Pool, failures: Value, size: Value, mean_down: Value = "30s") -> list[Outage]:
    """Let several nodes fail at once, and come back together, as when a rack loses its power.

    Args:
        pool: whom.
        failures: mean time between two failures.
        size: how many nodes fail at once: a number, or a share of the pool as ``"25%"``.
        mean_down: mean time they are away.
    """
    between, down = values.lasting(failures), values.lasting(mean_down)
    count = values.how_many(size, len(pool.nodes))
    _refuse_more(pool.until / between * count, pool)
    found: list[Outage] = []
    now, number = 0.0, 1
    while True:
        gap, length = -np.log1p(-uniform(pool.seed, pool.stream, number, (0,), 2)[0])
        now += between * float(gap)
        if now >= pool.until:
            return found
        end = now + down * float(length)
        failed = lots(pool.seed, pool.stream, -number, pool.nodes, count)
        found += [Outage(now, end, node, pool.how) for node in failed]
        number += 1


def _law(name: Value, shape: Value) -> Callable[[Floats], Floats]:
    """Return what makes numbers of mean 1 out of uniform ones."""
    if name not in ("exponential", "weibull", "pareto"):
        raise ValueError(f"sessions = {name!r}: expected exponential, weibull or pareto")
    if name == "exponential":
        if shape is not None:
            raise ValueError("shape is for weibull and pareto")
        return lambda u: -np.log1p(-u)
    least = 0.1 if name == "weibull" else 1
    if type(shape) not in (int, float) or not least < shape < math.inf:
        raise ValueError(f"shape = {shape!r}: {name} needs a number above {least}")
    if name == "weibull":
        scale = 1 / math.gamma(1 + 1 / shape)
        return lambda u: scale * (-np.log1p(-u)) ** (1 / shape)
    return lambda u: (shape - 1) / shape * (1 - u) ** (-1 / shape)


def _refuse_more(count: float, pool: Pool) -> None:
    if count > MOST:
        raise ValueError(f"this makes more than {MOST:,} outages until {pool.until:g} s")


GENERATORS: dict[str, Callable[..., list[Outage]]] = {
    "sessions": sessions,
    "churn": churn,
    "diurnal": diurnal,
    "failures": failures,
}
