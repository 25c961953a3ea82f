"""How soon all know that a peer is gone, what that costs, and how often they are wrong.

    python scripts/benchmarks/detection.py [--seeds 50] [--hours 100] [--sizes 4 8 16 32 64 128 200]

Two tables, both of simulated peers on a simulated LAN, under a virtual clock:

* one peer crashes: when the first and the last of the others take it for dead, from the crash, and
  how many messages a peer sends while nothing happens,
* nobody crashes, but every peer freezes now and then: how many of them are taken for dead.

Figures repeat themselves exactly for the same seeds. A quick look: ``--seeds 5 --hours 5``.
"""

from __future__ import annotations

import argparse
import random
from functools import partial
from typing import NamedTuple

from rich.console import Console
from rich.table import Table

from p2pfl.membership.cluster import Cluster, Network
from p2pfl.membership.members import Status
from p2pfl.membership.timers import Timers

SIZES = (4, 8, 16, 32, 64, 128, 200)
QUIET = (20.0, 40.0)  # seconds after the start between which messages are counted
LONGEST = 60.0  # seconds in which a crash must be known to all
PEERS = 32  # that freeze
MINUTES = 5.0  # of each seed with freezes


class Freezes(NamedTuple):
    """How often peers freeze, and for how long."""

    a_minute: float
    shortest: float  # seconds
    longest: float
    resent: float = 0.0  # share of packets lost, and sent again by TCP


FREEZES = (
    Freezes(3, 0.2, 1),
    Freezes(1, 1, 3),
    Freezes(1, 1, 5, resent=0.02),
    Freezes(0.5, 5, 15),
)


def main() -> None:
    """Measure, and print the tables."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seeds", type=int, default=50, help="crashes of each size")
    parser.add_argument("--hours", type=float, default=100, help="of peers that freeze")
    parser.add_argument("--sizes", type=int, nargs="*", default=SIZES, help="numbers of peers")
    given = parser.parse_args()
    console = Console(width=100)
    if given.sizes:
        console.print(detection(given.sizes, given.seeds))
    if given.hours:
        console.print(deaths(given.hours))


def detection(sizes: list[int], seeds: int) -> Table:
    """Return how long crashes took to be known."""
    title = f"One peer crashes; seconds until it is taken for dead, {seeds} seeds"
    heads = ("first p50", "first p99", "all p50", "all p99", "messages a second a peer")
    found = Table("peers", title=title, min_width=80)
    for head in heads:
        found.add_column(head, justify="right")
    for n in sizes:
        crashes = [crash(n, seed) for seed in range(seeds)]
        first, last, rates = (sorted(column) for column in zip(*crashes, strict=True))
        figures = [quantile(q, x) for x in (first, last) for q in (0.5, 0.99)]
        rate = sum(rates) / len(rates)
        found.add_row(str(n), *(f"{figure:.1f}" for figure in figures), f"{rate:.1f}")
    return found


def crash(n: int, seed: int) -> tuple[float, float, float]:
    """Return when the first and the last knew, in seconds, and the messages a second before."""
    rng, cluster = random.Random(seed), Cluster(Timers(), seed)
    cluster.boot_all(n)
    sent = []
    for time in QUIET:
        cluster.run(time)
        sent.append(sum(swim.statistics.messages for swim in cluster.swims().values()))
    cluster.run(QUIET[1] + rng.random())
    began, victim, noted = cluster.now, rng.randrange(n), len(cluster.log)
    cluster.crash(victim)
    knew: dict[int, float] = {}
    while len(knew) < n - 1:
        if cluster.now > began + LONGEST:
            raise RuntimeError(f"seed {seed}: {n - 1 - len(knew)} of {n} peers never knew")
        cluster.run(cluster.now + 1)
        for time, observer, change in cluster.log[noted:]:
            if change.peer == victim and change.status is Status.DEAD:
                knew.setdefault(observer, time - began)
    rate = (sent[1] - sent[0]) / (QUIET[1] - QUIET[0]) / n
    return min(knew.values()), max(knew.values()), rate


def deaths(hours: float) -> Table:
    """Return how many peers were taken for dead because they froze."""
    title = f"Nobody crashes, {PEERS} peers freeze now and then; {hours:g} peer-hours each"
    found = Table("freezes", title=title, min_width=80)
    for head in ("false suspicions", "false deaths", "deaths a peer-hour"):
        found.add_column(head, justify="right")
    seeds = max(1, round(hours * 60 / MINUTES / PEERS))
    for kind in FREEZES:
        each = [freeze(kind, seed) for seed in range(seeds)]
        suspected, dead = (sum(column) for column in zip(*each, strict=True))
        name = f"{kind.a_minute:g} a minute, {kind.shortest:g}-{kind.longest:g} s"
        name += f", {kind.resent:.0%} of packets resent" if kind.resent else ""
        rate = dead / (seeds * PEERS * MINUTES / 60)
        found.add_row(name, str(suspected), str(dead), f"{rate:.2f}")
    return found


def freeze(kind: Freezes, seed: int) -> tuple[int, int]:
    """Return how many false suspicions, and how many false deaths there were."""
    rng = random.Random(seed)
    cluster = Cluster(Timers(), seed, Network(resent=kind.resent))
    cluster.boot_all(PEERS)
    for peer in range(PEERS):
        time = rng.expovariate(kind.a_minute / 60)
        while time < 60 * MINUTES:
            seconds = rng.uniform(kind.shortest, kind.longest)
            cluster.at(time, partial(cluster.freeze, peer, seconds))
            time += seconds + rng.expovariate(kind.a_minute / 60)
    cluster.run(60 * MINUTES)
    changes = [(c.peer, c.incarnation, c.status) for _, _, c in cluster.log]
    suspected, dead = (
        len({change for change in changes if change[2] is status})
        for status in (Status.SUSPECT, Status.DEAD)
    )
    return suspected, dead


def quantile(q: float, values: list[float]) -> float:
    """Return a quantile of sorted values."""
    return values[min(len(values) - 1, int(q * len(values)))]


if __name__ == "__main__":
    main()
