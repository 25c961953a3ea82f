"""Where the time of a simulated round goes, by operation, on one thread.

Usage:  python scripts/benchmarks/round_profile.py [--nodes 300] [--model mlp]

An update is one local step of one node; a round has two and an exchange over a 4-regular graph.
What no operation accounts for is Python, and torch's way from there to the operation. Profiling
itself costs time, so the total is measured without it.
"""

from __future__ import annotations

import argparse
import time
from collections import Counter

import machine
import torch
from rich.console import Console
from rich.table import Table
from torch.profiler import ProfilerActivity, profile

from p2pfl.experiment.experiment import Experiment
from p2pfl.runtime.simulate import Simulator

ROUNDS = 6
WHAT = {
    "products of all layers, forward": ("aten::baddbmm",),
    "products that change the weights": ("aten::addmm_", "aten::baddbmm_"),
    "products that lead further back": ("aten::bmm",),
    "examples": ("aten::index_select",),
    "softmax, loss, activations": (
        "aten::_log_softmax",
        "aten::exp_",
        "aten::gather",
        "aten::scatter_add_",
        "aten::mul_",
        "aten::clamp_min",
        "aten::threshold_backward",
        "aten::sum",
    ),
    "mixing": ("aten::_embedding_bag", "aten::embedding_bag", "aten::copy_"),
}


def main() -> None:
    """Run some rounds, profile some, and print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--nodes", type=int, default=300)
    parser.add_argument("--model", choices=["mlp", "logistic", "cnn"], default="mlp")
    given = parser.parse_args()
    torch.set_num_threads(1)
    rounds = simulator(given.nodes, given.model).rounds()
    next(rounds)
    began = time.perf_counter()
    for _ in range(ROUNDS):
        next(rounds)
    total = time.perf_counter() - began
    with profile(activities=[ProfilerActivity.CPU]) as found:
        for _ in range(ROUNDS):
            next(rounds)
    spent = Counter({each.key: each.self_cpu_time_total / 1e6 for each in found.key_averages()})
    show(spent, total, 2 * ROUNDS * given.nodes)


def simulator(nodes: int, model: str) -> Simulator:
    """Return a simulation that is evaluated at its end only."""
    experiment = Experiment.from_dict(
        {
            "nodes": nodes,
            "data": {"name": "synthetic", "examples": 64 * nodes, "shape": [1, 28, 28]},
            "holdout": "none",
            "model": model,
            "algorithm": "dpsgd",
            "topology": "random_regular:degree=4",
            "optimiser": {"name": "sgd", "lr": 0.05},
            "pace": {"rounds": 2 * ROUNDS + 2, "local_steps": 2},
            "evaluation": {"every": 10**6},
        }
    )
    return Simulator(experiment.setup(experiment.task(experiment.federation(), None)))


def show(spent: Counter[str], total: float, updates: int) -> None:
    """Print microseconds per update and shares."""
    table = Table("what", "µs an update", "share", title="one thread")
    named = 0.0
    for what, operations in WHAT.items():
        seconds = sum(spent[name] for name in operations)
        named += seconds
        table.add_row(what, f"{seconds / updates * 1e6:.1f}", f"{seconds / total:.0%}")
    rest = total - named
    table.add_row(
        "all else, most of it Python", f"{rest / updates * 1e6:.1f}", f"{rest / total:.0%}"
    )
    table.add_section()
    table.add_row("a round, per update", f"{total / updates * 1e6:.1f}", "100%")
    console = Console(width=100)
    console.print(machine.describe())
    console.print(table)


if __name__ == "__main__":
    main()
