"""The exchange of a simulation against the machine's memory: how far it is from what it must move.

Usage:  python scripts/benchmarks/mixing.py [--repeats 7]

The floor is ``(degree + 2) * n * d * 4`` bytes at the speed of a copy: every model is read by each
of its neighbours and itself, and written once. Blocks of columns are read from memory once, so that
less than the floor is possible. Medians.
"""

from __future__ import annotations

import argparse
import statistics
import time

import machine
import torch
from rich.console import Console
from rich.table import Table

from p2pfl.algorithm import Rows
from p2pfl.algorithms import dpsgd
from p2pfl.algorithms.averaging import Params
from p2pfl.learning.optim import sgd
from p2pfl.learning.scratch import keep_freed_memory
from p2pfl.runtime.exchange import receive_
from p2pfl.runtime.ranks import Ranks
from p2pfl.topology import metropolis, random_regular_graph, static, weights

CASES = {"mlp": (1_000, 109_386, 4), "logistic": (10_000, 7_850, 20)}


def main() -> None:
    """Measure both cases and print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--repeats", type=int, default=7)
    given = parser.parse_args()
    console = Console(width=100)
    console.print(machine.describe(), highlight=False)
    table = Table("model", "nodes", "degree", "ms", "floor, ms", "of the floor")
    for name, (n, d, degree) in CASES.items():
        copy = machine.gigabytes(machine.cores()) * 1e9
        floor = (degree + 2) * n * d * 4 / copy
        spent = statistics.median(exchange(n, d, degree, given.repeats))
        figures = (f"{n:,}", str(degree), f"{spent * 1e3:.0f}", f"{floor * 1e3:.0f}")
        table.add_row(name, *figures, f"{spent / floor:.2f}")
    console.print(table)


def exchange(n: int, d: int, degree: int, repeats: int) -> list[float]:
    """Return the seconds of some exchanges, the first left out."""
    keep_freed_memory()  # as a simulator does
    links = static(random_regular_graph(n, degree)).links(0)
    around = Ranks().neighbourhood(weights(links, metropolis(), torch.float32))
    algorithm, x = dpsgd(sgd(0.1)), torch.randn(n, d)
    state = algorithm.init(x, Rows(torch.arange(n), torch.ones(n)))
    seconds = []
    for _ in range(repeats + 1):
        began = time.perf_counter()
        state = receive_(algorithm, state, Params(state.x), around, d)
        seconds.append(time.perf_counter() - began)
    return seconds[1:]


if __name__ == "__main__":
    main()
