"""How well peers learn while others are killed and come back: a table and a picture.

    python scripts/churn_experiment.py [--nodes 16] [--seeds 2] [--rounds 120] [--out churn.png]

Every minute a share of the peers is killed; half a minute later, on average, they come back. All
runs are emulated: a round takes a second of virtual time, and nobody waits longer than two
for anybody. What counts is the accuracy at the end, of those who are there, on images nobody
trained on; a seed draws who holds what, and who is killed when.

It is here to be read and changed: what is compared stands in CASES, all else in BASE.
"""

from __future__ import annotations

import argparse
import statistics
from typing import Any

from matplotlib.figure import Figure
from rich.console import Console
from rich.table import Table

import p2pfl

BASE: dict[str, Any] = {
    "data": "digits",
    "partition": {"name": "dirichlet", "alpha": 0.3, "min_partition_size": 5},
    "model": {"name": "mlp", "hidden": [32]},
    "optimiser": {"name": "sgd", "lr": 0.1},
    "network": {"compute": 0.2, "latency": 0.01},
}
CASES: dict[str, dict[str, Any]] = {
    "fedavg, complete": {"algorithm": "fedavg", "topology": "complete"},
    "dpsgd, ring": {"algorithm": "dpsgd", "topology": "ring"},
    "dpsgd, random regular": {"algorithm": "dpsgd", "topology": "random_regular:degree=4"},
    "push_sum, exponential": {"algorithm": "push_sum", "topology": "exponential"},
    "gossip, complete": {"algorithm": "gossip", "topology": "complete"},
}
SHARES = (0, 10, 20, 40)  # percent a minute
Found = dict[str, list[list[float]]]  # for each case and share the accuracy with each seed


def main() -> None:
    """Run everything, and show it."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--nodes", type=int, default=16)
    parser.add_argument("--seeds", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=120)
    parser.add_argument("--out", default="churn.png", help="the picture to write")
    given = parser.parse_args()
    seeds = range(given.seeds)
    found: Found = {
        case: [[run(case, share, seed, given) for seed in seeds] for share in SHARES]
        for case in CASES
    }
    Console().print(table(found))
    draw(found, given.out)


def run(case: str, share: int, seed: int, given: argparse.Namespace) -> float:
    """Return how good the peers are at the end of one run, on average."""
    pace: dict[str, Any] = {"rounds": given.rounds, "patience": 2.0}
    if case.startswith("gossip"):
        pace = {"name": "timer", "ticks": given.rounds, "period": 1.0}
    churn = {"name": "rate", "share": f"{share}% a minute"} if share else "none"
    more = {"nodes": given.nodes, "seed": seed, "pace": {**pace, "local_steps": 5}, "churn": churn}
    evaluation = {"every": given.rounds}  # the last
    result = p2pfl.run(BASE | CASES[case] | more | {"evaluation": evaluation}, on="emulate")
    return float(result.summary["eval_acc_mean"])


def table(found: Found) -> Table:
    """Return the means over the seeds."""
    shown = Table("killed a minute", *(f"{share} %" for share in SHARES), title="accuracy")
    for case, runs in found.items():
        shown.add_row(case, *(f"{statistics.mean(seeds):.1%}" for seeds in runs))
    return shown


def draw(found: Found, path: str) -> None:
    """Draw the means over the seeds, and bands from the worst seed to the best."""
    figure = Figure(figsize=(7, 4.5), dpi=150, layout="constrained")
    axes = figure.subplots()
    for case, runs in found.items():
        axes.plot(SHARES, [statistics.mean(seeds) for seeds in runs], marker="o", label=case)
        axes.fill_between(SHARES, list(map(min, runs)), list(map(max, runs)), alpha=0.2)
    axes.set_xlabel("peers killed a minute (%)")
    axes.set_ylabel("accuracy at the end")
    figure.legend(loc="outside right center", frameon=False)
    figure.savefig(path)


if __name__ == "__main__":
    main()
