"""What it costs to get models to one another and to average them, and what it could cost.

    python scripts/benchmarks/wire.py [--params 25] [--small 1] [--processes 8] [--repeats 5]

Four tables, all on loopback, all of float32 values:

* one model, one way, from one application to the other, until its values are ready to mix,
* the same where every byte is encrypted,
* all to all: every process gives a small model to all the others, and averages,
* the average of several models that have been received.

The two ends of p2pfl are bound to cores of their own, as ``p2pfl run --on local`` binds two peers
where there are two cores; rivals are left to the system but where a line says that they are bound.
Extra memory is what the process that receives most needed at most beyond its buffers, if it keeps
any. Each rival runs in processes of its own, and the rivals take turns; figures are medians, and
ratios medians of the ratios within a repeat. A quick look: ``--params 1 --small 0.1 --repeats 1``.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import statistics
from collections.abc import Callable, Mapping
from functools import partial

import all_to_all
import averages
import machine
import one_way
from crowd import Measured
from rich.console import Console
from rich.table import Table

TABLES = ("one-way", "encrypted", "all-to-all", "average")
Jobs = Mapping[str, Callable[[], Measured]]


def main() -> None:
    """Measure, and print the tables."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--params", type=float, default=25, help="millions, of a large model")
    parser.add_argument("--small", type=float, default=1, help="millions, of a model for all")
    parser.add_argument("--processes", type=int, default=8)
    parser.add_argument("--models", type=int, default=8, help="how many are averaged")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--only", nargs="+", choices=TABLES, default=TABLES)
    given = parser.parse_args()
    console = Console(width=100)
    pyzmq = importlib.metadata.version("pyzmq")
    console.print(f"{machine.describe()}, pyzmq {pyzmq}", highlight=False)
    large, small = round(given.params * 1e6), round(given.small * 1e6)
    for name, rivals in (("one-way", one_way.IN_CLEAR), ("encrypted", one_way.ENCRYPTED)):
        if name in given.only:
            title = f"One model, {name}: {large:,} parameters"
            jobs = {one: partial(one_way.measure, one, large) for one in rivals}
            console.print(table(title, jobs, given.repeats, 4 * large / 1e9))
    if "all-to-all" in given.only:
        title = f"All to all, and averaged: {given.processes} processes, {small:,} parameters each"
        jobs = {
            name: partial(all_to_all.measure, name, given.processes, small)
            for name in all_to_all.RIVALS
        }
        console.print(table(title, jobs, given.repeats))
    if "average" in given.only:
        title = f"The average of {given.models} models of {large:,} parameters, one thread"
        jobs = {
            name: partial(averages.measure, name, given.models, large) for name in averages.RIVALS
        }
        console.print(table(title, jobs, given.repeats))


def table(title: str, jobs: Jobs, repeats: int, gigabytes: float = 0.0) -> Table:
    """Let all do their jobs in turns, and return how long they took, next to the first.

    Args:
        title: what they do.
        jobs: who does it.
        repeats: how many turns there are.
        gigabytes: what one job moves; if any, the table says how fast.
    """
    turns = [{name: job() for name, job in jobs.items()} for _ in range(repeats)]
    heads = ["ms", *(["GB/s"] if gigabytes else []), "speed, first = 100 %", "extra memory, MB"]
    found = Table("", title=f"{title}; medians of {repeats}", min_width=80)
    for head in heads:
        found.add_column(head, justify="right")
    first = next(iter(jobs))
    for name in jobs:
        mine = [(turn[name], turn[first]) for turn in turns]
        seconds = statistics.median(one.seconds for one, _ in mine)
        cells = [f"{1e3 * seconds:.1f}"]
        cells += [f"{gigabytes / seconds:.2f}"] if gigabytes else []
        cells.append(f"{statistics.median(other.seconds / one.seconds for one, other in mine):.0%}")
        cells.append(f"{statistics.median(one.extra for one, _ in mine):.0f}")
        found.add_row(name, *cells)
    return found


if __name__ == "__main__":
    main()
