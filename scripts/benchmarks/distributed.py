"""One process with all threads against several ranks with a share of them: updates a second.

    python scripts/benchmarks/distributed.py [--topology ring] [--nodes 1000] [--ranks 2]

An update is one local step of one node, as in `simulation.py`, and so is what is counted: all
the time of the rounds after the first, except evaluation. The ranks are processes on this
machine, which talk over loopback. Both run in turns; the ratio is the median of the ratios
within a repeat.
"""

from __future__ import annotations

import argparse
import os
import statistics
import sys
import tempfile
import time
from dataclasses import replace
from datetime import timedelta
from typing import Any

import machine
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from jobs import WARM_UP, Job, job, options
from simulation import description

from p2pfl.experiment.experiment import Experiment
from p2pfl.runtime.distributed import Distributed
from p2pfl.runtime.ranks import Ranks
from p2pfl.runtime.simulate import Simulator

PATIENCE = timedelta(minutes=10)


def main() -> None:
    """Measure in turns, and print."""
    parser = options(__doc__)
    parser.set_defaults(nodes=1000, rounds=4)
    parser.add_argument("--algorithm", default="dpsgd")
    parser.add_argument("--topology", default="random_regular")
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--repeats", type=int, default=3)
    given = parser.parse_args()
    print(machine.describe())
    ratios = []
    for _ in range(given.repeats):
        alone, together = (measure(given, ranks) for ranks in (1, given.ranks))
        ratios.append(together / alone)
        print(
            f"{given.topology}, {given.nodes} nodes: one process {alone:,.0f} updates/s,"
            f" {given.ranks} ranks {together:,.0f}, ratio {ratios[-1]:.2f}"
        )
    print(f"median ratio {statistics.median(ratios):.2f}")


def measure(given: argparse.Namespace, ranks: int) -> float:
    """Return the updates a second of so many ranks, which have the threads between them."""
    context = mp.get_context("spawn")
    found = context.SimpleQueue()
    with tempfile.TemporaryDirectory() as folder:
        shared = (given, ranks, f"file://{folder}/store", found)
        workers = [context.Process(target=work, args=(rank, *shared)) for rank in range(ranks)]
        for process in workers:
            process.start()
        for process in workers:
            process.join()
    if any(process.exitcode for process in workers):
        sys.exit("a rank has failed")
    return float(found.get())


def work(rank: int, given: argparse.Namespace, size: int, store: str, found: Any) -> None:  # noqa: ANN401
    """Do one rank's share; the first says how fast it was."""
    torch.set_num_threads(max(1, given.threads // size))
    os.environ["LOCAL_WORLD_SIZE"] = str(size)  # as torchrun would
    if size > 1:
        dist.init_process_group("gloo", store, PATIENCE, size, rank)
    rate = simulate(job(given), given, Distributed() if size > 1 else Ranks())
    if rank == 0:
        found.put(rate)
    if size > 1:
        dist.destroy_process_group()


def simulate(task: Job, given: argparse.Namespace, ranks: Ranks) -> float:
    """Simulate once; return all ranks' updates a second."""
    topology = {"name": given.topology}
    if given.topology == "random_regular":
        topology["degree"] = task.degree
    about = {**description(task), "topology": topology, "algorithm": {"name": given.algorithm}}
    experiment = Experiment.from_dict(about)
    whole = experiment.federation()
    held = whole.train.subset(ranks.nodes(task.nodes))
    learning = experiment.task(replace(whole, train=held), None, "cpu")
    simulator, marks = Simulator(experiment.setup(learning), ranks), []
    for _ in simulator.rounds():
        marks.append((simulator.updates, time.perf_counter() - simulator.seconds.evaluation))
    (updates, begin), (all_updates, end) = marks[WARM_UP - 1], marks[-1]
    return (all_updates - updates) / (end - begin)


if __name__ == "__main__":
    main()
