"""What it costs the others when a peer process is killed or frozen in the middle of training.

    python scripts/benchmarks/kills.py [--what kill] [--nodes 16] [--runs 20] [--seed 0]
                                       [--topology ring] [--seconds 20] [--unharmed 5]

Every run starts peer processes anew, on scikit-learn's digits. When all have been training for
some seconds, one of them, drawn by the seed, is killed (``--what kill``), stopped for a few seconds
(``stop``), or half of them are killed at once (``half``). Four figures of each:

* the longest pause of those who waited for it, its neighbours, between two rounds,
* when the last of the others took it for dead, from the moment it was killed,
* for how long the survivors stood still in all: what their rounds took beyond twice the usual,
* the mean accuracy at the end of those who are left, less that of the same nodes in runs in which
  nothing happens, of which there are a few: as runs end after some seconds, they differ.
"""

from __future__ import annotations

import argparse
import math
import random
import statistics
import sys
import tempfile
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
from machine import describe
from rich.console import Console
from rich.table import Table

import p2pfl
from p2pfl.experiment.experiment import Experiment
from p2pfl.results.runs import Result, last_measured

EARLIEST, LATEST = 3.0, 5.0  # seconds of training after which it happens
FROZEN = 3.5  # seconds
HEADS = {
    "pause": "neighbours' longest pause, s",
    "known": "known dead to all, s",
    "stall": "survivors stood still, s",
    "accuracy": "accuracy gained, points",
}


class Figures(NamedTuple):
    """What one run has shown; NaN if there is nothing to be known."""

    pause: float
    known: float
    stall: float
    accuracy: float


class Harm(NamedTuple):
    """What happens in a run: to whom, and when, in seconds of training."""

    what: str
    victims: list[int]
    at: float

    def script(self) -> str:
        """Return it as a churn script."""
        action = "stop" if self.what == "stop" else "kill"
        text = f'[[event]]\nat = "{self.at}s"\n{action} = {self.victims}\n'
        return text + (f'for = "{FROZEN}s"\n' if self.what == "stop" else "")


def main() -> None:
    """Measure, and print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--what", choices=("kill", "stop", "half"), default="kill")
    parser.add_argument("--nodes", type=int, default=16)
    parser.add_argument("--runs", type=int, default=20)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--topology", choices=("ring", "complete"), default="ring")
    parser.add_argument("--unharmed", type=int, default=5, help="runs in which nothing happens")
    parser.add_argument("--seconds", type=float, default=20.0, help="of training, in every run")
    given = parser.parse_args()
    rng = random.Random(given.seed)
    found: list[Figures] = []
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        usual = [accuracies(run(given, folder / f"usual-{k}")[0]) for k in range(given.unharmed)]
        unharmed = np.mean(usual, axis=0)
        print(f"unharmed: {[round(float(100 * one.mean()), 2) for one in usual]}", file=sys.stderr)
        for number in range(given.runs):
            victims = rng.sample(
                range(given.nodes), given.nodes // 2 if given.what == "half" else 1
            )
            harm = Harm(given.what, sorted(victims), round(rng.uniform(EARLIEST, LATEST), 3))
            found.append(measure(*run(given, folder / str(number), harm), harm, unharmed))
            print(f"{harm.what} {harm.victims} at {harm.at} s: {found[-1]}", file=sys.stderr)
    show(found, given)


def run(
    given: argparse.Namespace, folder: Path, harm: Harm | None = None
) -> tuple[Result, Experiment]:
    """Let all peers train, while something happens or nothing."""
    tables: dict[str, Any] = {
        "nodes": given.nodes,
        "data": "digits",
        "partition": {"name": "dirichlet", "alpha": 0.5, "min_partition_size": 5},
        "model": {"name": "mlp", "hidden": [64]},
        "optimiser": {"name": "sgd", "lr": 0.05},
        "algorithm": "dpsgd",
        "topology": given.topology,
        "pace": {"rounds": 1_000_000, "seconds": given.seconds, "local_steps": 4},
        "evaluation": {"every": 1_000_000},
    }
    if harm:
        script = folder.with_suffix(".toml")
        script.write_text(harm.script())
        tables["churn"] = {"name": "script", "path": str(script)}
    experiment = Experiment.from_dict(tables)
    result = p2pfl.run(experiment, on="local", out=folder)
    if result.summary["status"] != "finished":
        sys.exit(f"a run failed: {result.summary.get('error')}")
    return result, experiment


def accuracies(result: Result) -> npt.NDArray[np.float64]:
    """Return the last accuracy of every node in order, NaN where there is none."""
    found = np.full(1 + result.metrics["node"].max(), math.nan)
    nodes, values = last_measured(result.metrics, "eval_acc")
    found[nodes] = values
    return found


def measure(
    result: Result, experiment: Experiment, harm: Harm, unharmed: npt.NDArray[np.float64]
) -> Figures:
    """Return what a run has shown; `unharmed`: how good every node is if nothing happens."""
    metrics = result.metrics
    gaps: dict[int, list[float]] = {}
    for node in set(range(experiment.nodes)) - set(harm.victims):
        ends = metrics["wall_s"][metrics["node"] == node]
        gaps[node] = np.diff(ends[ends > harm.at - 1]).tolist()
    near = set[int]().union(*(experiment.topology.contacts(victim)[1] for victim in harm.victims))
    known = result.summary["churn"]["known_dead_to_all_s"]
    return Figures(
        max(max(gaps[node]) for node in near & gaps.keys()),
        known["max"] if known else math.nan,
        max(map(stood_still, gaps.values())),
        float(100 * np.nanmean(accuracies(result) - unharmed)),
    )


def stood_still(gaps: list[float]) -> float:
    """Return what rounds took beyond twice the usual, in all."""
    usual = statistics.median(gaps)
    return sum(max(0.0, gap - 2 * usual) for gap in gaps)


def show(found: list[Figures], given: argparse.Namespace) -> None:
    """Print the table, and on what machine it was measured."""
    title = f"{given.what}: {given.nodes} processes, {given.topology}, {len(found)} runs"
    table = Table("", "p50", "p99", "max", title=title)
    for name, head in HEADS.items():
        values = sorted(v for v in (getattr(one, name) for one in found) if not math.isnan(v))
        figures = [quantile(values, q) for q in (0.5, 0.99, 1.0)]
        if name == "accuracy":  # the worst are the lowest
            figures = [quantile(values[::-1], q) for q in (0.5, 0.99, 1.0)]
        table.add_row(head, *("-" if math.isnan(x) else f"{x:.2f}" for x in figures))
    console = Console(width=100)
    console.print(table)
    console.print(describe(), markup=False, highlight=False)


def quantile(values: list[float], q: float) -> float:
    """Return a quantile of values in order; NaN if there are none."""
    return values[min(len(values) - 1, int(q * len(values)))] if values else math.nan


if __name__ == "__main__":
    main()
