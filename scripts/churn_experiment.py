"""How well peers learn while others are killed and come back: a table and a picture.

    python scripts/churn_experiment.py [--nodes 16] [--seeds 3] [--rounds 120] [--out churn.png]

Every minute a share of the peers is killed; half a minute later, on average, they come back. All
runs are emulated: a round takes a second of virtual time, and nobody waits longer than two
for anybody. Accuracy is that of those who are there, on images nobody trained on; a seed draws
who holds what, and who is killed when. Of the picture the upper row shows how they learn at one
of the shares, the lower one how good they are at the end at all of them.

It is here to be read and changed: what is compared stands in ALGORITHMS, TOPOLOGIES and SHARES,
all else in BASE.
"""

from __future__ import annotations

import argparse
import statistics
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from rich.console import Console
from rich.progress import track
from rich.table import Table

import p2pfl

BASE: dict[str, Any] = {
    "data": "digits",
    "partition": {"name": "dirichlet", "alpha": 0.3, "min_partition_size": 5},
    "model": {"name": "mlp", "hidden": [32]},
    "optimiser": {"name": "sgd", "lr": 0.1},
    "network": {"compute": 0.2, "latency": 0.01},
    "evaluation": {"every": 10},
}
ALGORITHMS: dict[str, Any] = {
    "dpsgd": "dpsgd",
    "push_sum": "push_sum",
    "gossip": "gossip",
    "choco": {"name": "choco", "codec": {"name": "top_k", "share": 0.1}},
}
TOPOLOGIES = ("ring", "random_regular:degree=4", "complete")
SHARES = (0, 10, 20, 40)  # percent a minute
SHOWN = 20  # the share whose runs are drawn over time


class Curve(NamedTuple):
    """What one run has shown."""

    minutes: npt.NDArray[np.float64]
    accuracy: npt.NDArray[np.float64]  # the mean of those who were there


Found = dict[tuple[str, str, int], list[Curve]]  # by algorithm, topology and share: a run a seed


def main() -> None:
    """Run everything, and show it."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--nodes", type=int, default=16)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--rounds", type=int, default=120)
    parser.add_argument("--out", default="churn.png", help="the picture to write")
    given = parser.parse_args()
    cases = [(a, t, share) for a in ALGORITHMS for t in TOPOLOGIES for share in SHARES]
    found: Found = {case: [] for case in cases}
    for case, seed in track([(case, seed) for case in cases for seed in range(given.seeds)]):
        found[case].append(run(*case, seed, given))
    Console().print(table(found))
    draw(found, given.out)


def run(algorithm: str, topology: str, share: int, seed: int, given: argparse.Namespace) -> Curve:
    """Return how good the peers were in the course of one run, on average."""
    pace: dict[str, Any] = {"rounds": given.rounds, "patience": 2.0}
    if algorithm == "gossip":
        pace = {"name": "timer", "ticks": given.rounds, "period": 1.0}
    churn = {"name": "rate", "share": f"{share}% a minute"} if share else "none"
    more = {
        "nodes": given.nodes,
        "seed": seed,
        "algorithm": ALGORITHMS[algorithm],
        "topology": topology,
        "pace": {**pace, "local_steps": 5},
        "churn": churn,
    }
    metrics = p2pfl.run(BASE | more, on="emulate").metrics
    measured = ~np.isnan(metrics["eval_acc"])
    rounds = metrics["round"][measured]

    def means(column: str) -> npt.NDArray[np.float64]:
        each = metrics[column][measured]
        return np.array([each[rounds == number].mean() for number in np.unique(rounds)])

    return Curve(means("virtual_s") / 60, means("eval_acc"))


def table(found: Found) -> Table:
    """Return how good the peers were at the end: the mean over the seeds."""
    shown = Table("killed a minute", *(f"{share} %" for share in SHARES), title="accuracy")
    for algorithm in ALGORITHMS:
        for topology in TOPOLOGIES:
            ends = [last(found[algorithm, topology, share]) for share in SHARES]
            means = [f"{statistics.mean(each):.1%}" for each in ends]
            shown.add_row(f"{algorithm}, {short(topology)}", *means)
    return shown


def draw(found: Found, path: str) -> None:
    """Draw the means over the seeds, and bands from the worst seed to the best."""
    figure = Figure(figsize=(10, 6), dpi=120, layout="constrained")
    rows = figure.subplots(2, len(TOPOLOGIES), sharey="row")
    for topology, over_time, at_the_end in zip(TOPOLOGIES, *rows, strict=True):
        for algorithm in ALGORITHMS:
            curves = found[algorithm, topology, SHOWN]
            minutes = np.mean([curve.minutes for curve in curves], axis=0)
            band(over_time, minutes, [curve.accuracy for curve in curves], algorithm)
            ends = [last(found[algorithm, topology, share]) for share in SHARES]
            band(at_the_end, SHARES, list(zip(*ends, strict=True)), algorithm)
        over_time.set_title(f"{short(topology)}, {SHOWN} % a minute")
        over_time.set_xlabel("minutes")
        at_the_end.set_xlabel("peers killed a minute (%)")
    rows[0][0].set_ylabel("accuracy")
    rows[1][0].set_ylabel("accuracy at the end")
    rows[0][-1].legend(frameon=False)
    figure.savefig(path)


def band(axes: Axes, x: npt.ArrayLike, each: npt.ArrayLike, label: str) -> None:
    """Draw a line through the means over the seeds, ``[seeds, points]``, and what lies between."""
    y = np.asarray(each)
    axes.plot(np.asarray(x), y.mean(0), label=label)
    axes.fill_between(np.asarray(x), y.min(0), y.max(0), alpha=0.2)


def last(curves: list[Curve]) -> list[float]:
    """Return how good the peers were at the end, for every seed."""
    return [float(curve.accuracy[-1]) for curve in curves]


def short(topology: str) -> str:
    """Return the name of a topology alone."""
    return topology.partition(":")[0].replace("_", " ")


if __name__ == "__main__":
    main()
