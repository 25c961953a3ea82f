"""How good algorithms are on topologies, with as many rounds and with as many bytes.

    python scripts/compare_algorithms.py [--methods M ...] [--topologies T ...] [--data DIR]
        [--seeds 3] [--rounds 600] [--local-steps 1] [--alpha 0.1] [--jobs 2] [--out FOLDER]

Every pair is run with each of its learning rates and seed 0, and with the best of them and seeds
1, 2, 3. Pairs that cannot be are shown as "-". Without --data it is about handwritten digits;
DIR may hold images of 28 x 28 in IDX files. Methods that send two models over a link in a round are
also given half of the rounds. In FOLDER stand table.csv (with the reasons why pairs were refused),
compare.png and the runs; the same command goes on there where it was.

It is here to be read and changed: what is compared by default stands in METHODS and TOPOLOGIES,
all else in EXPERIMENT.
"""

from __future__ import annotations

import argparse
import csv
import itertools
import statistics
import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from matplotlib.figure import Figure

from p2pfl.cli.sweep import SweepView
from p2pfl.cli.tables import print_table
from p2pfl.errors import P2pflError, UserError
from p2pfl.sweep import SweepWatch, run_sweep
from p2pfl.sweep.combine import runs
from p2pfl.sweep.plan import read_plan

EXPERIMENT: dict[str, Any] = {
    "nodes": 16,
    "output": {"models": "none"},
}
DIGITS: dict[str, Any] = {
    "data": "digits",
    "partition": {"name": "dirichlet", "min_partition_size": 5},
    "model": {"name": "mlp", "hidden": [64]},
}
IMAGES: dict[str, Any] = {
    "data": "idx",
    "holdout": {"name": "last", "count": 2000},
    "partition": {"name": "dirichlet"},
    "model": {"name": "mlp", "hidden": [128, 64]},
}


class Method(NamedTuple):
    """An algorithm, the learning rates to try, and what is particular about its runs."""

    algorithm: str
    rates: tuple[float, ...]
    momentum: float = 0.0
    falls: bool = False  # the rate: from what it is to 0, in a straight line
    rounds: float = 1.0  # the part of all rounds that it is given


METHODS = {
    "fedavg": Method("fedavg", (0.2, 0.4)),
    "dpsgd": Method("dpsgd", (0.2, 0.4)),
    "dpsgd, falling rate": Method("dpsgd", (0.4, 0.8), falls=True),
    "dpsgd, momentum 0.9": Method("dpsgd", (0.05, 0.1), momentum=0.9),
    "qg": Method("qg", (0.2, 0.4)),
    "d2": Method("d2", (0.2, 0.4)),
    "exact_diffusion": Method("exact_diffusion", (0.2, 0.4)),
    "extra": Method("extra", (0.2, 0.4)),
    "kgt": Method("kgt", (0.1, 0.2)),
    "kgt, half the rounds": Method("kgt", (0.1, 0.2), rounds=0.5),
}
TOPOLOGIES = ("complete", "torus", "ring", "exponential", "one_peer_exponential")
CHOICE = 0  # the seed that rates are chosen with; results are of seeds 1, 2, ...


class Case(NamedTuple):
    """A setting that is run."""

    method: str
    topology: str
    rate: float

    @property
    def label(self) -> str:
        """What it is called in tables and folders."""
        return f"{self.method}, {self.topology}, lr {self.rate}"


class Cell(NamedTuple):
    """What a method has come to on a topology."""

    method: str
    topology: str
    why: str = ""  # it is refused, or has failed
    rate: float | None = None  # None: it is refused
    rounds: int = 0
    accuracy: float = 0.0  # the mean of the nodes, and of the seeds
    deviation: float = 0.0  # of that over the seeds
    worst: float = 0.0  # the worst node, the mean of the seeds
    megabytes: float = 0.0  # sent by a node in all
    models: float = 0.0  # model-sized messages a node sends in a round

    def __str__(self) -> str:
        if self.why:
            return "-" if self.rate is None else "fails"
        return f"{100 * self.accuracy:.1f} / {100 * self.worst:.1f}"


Rows = dict[str, list[Mapping[str, Any]]]  # the figures of each seed, by label


@dataclass(frozen=True)
class Comparison:
    """Methods on topologies, as the command line wants it."""

    methods: Mapping[str, Method]
    topologies: Sequence[str]
    given: argparse.Namespace

    def cells(self) -> list[Cell]:
        """Choose a rate for every pair that can be, and measure it; method by method.

        Raises:
            P2pflError: nothing can be read, run or written.
        """
        pairs = list(itertools.product(self.methods, self.topologies))
        refused = {pair: self._refusal(pair) for pair in pairs}
        for name in (*self.methods, *self.topologies):
            reasons = [why for pair, why in refused.items() if name in pair]
            if all(reasons):
                print(f"{name}: {reasons[0]}", file=sys.stderr)
        allowed = [pair for pair in pairs if not refused[pair]]
        cases = [Case(*pair, rate) for pair in allowed for rate in self.methods[pair[0]].rates]
        tried = self._run(cases, [CHOICE], "rates")
        best = {
            pair: max(each, key=lambda case: tried[case.label][0]["eval_acc_mean"] or 0.0)
            for pair, each in itertools.groupby(cases, key=lambda case: case[:2])
        }
        found = self._run(best.values(), range(1, self.given.seeds + 1), "runs")
        return [
            self._cell(best[pair], found[best[pair].label])
            if pair in best
            else Cell(*pair, why=refused[pair])
            for pair in pairs
        ]

    def _refusal(self, pair: tuple[str, str]) -> str:
        """Return why a pair cannot be, nothing if it can."""
        try:
            runs(read_plan(self._plan([Case(*pair, rate=0.1)], [CHOICE])))
        except UserError as error:
            return str(error)
        return ""

    def _plan(self, cases: Iterable[Case], seeds: Iterable[int]) -> dict[str, Any]:
        """Return a sweep, laid out as in a file."""
        return {
            "experiment": EXPERIMENT | self._data,
            "seeds": list(seeds),
            "cases": [{"label": case.label, "set": self._changes(case)} for case in cases],
        }

    def _changes(self, case: Case) -> dict[str, Any]:
        """Return what a case changes in the experiment."""
        method, local_steps = self.methods[case.method], self.given.local_steps
        rounds = round(self.given.rounds * method.rounds)
        falling = {"name": "linear", "start": case.rate, "steps": rounds * local_steps}
        return {
            "algorithm": method.algorithm,
            "topology": case.topology,
            "optimiser": {
                "name": "sgd",
                "lr": falling if method.falls else case.rate,
                "momentum": method.momentum,
            },
            "partition": {"alpha": self.given.alpha},
            "pace": {"rounds": rounds, "local_steps": local_steps},
            "evaluation": {"every": rounds},
        }

    def _run(self, cases: Iterable[Case], seeds: Iterable[int], folder: str) -> Rows:
        """Run cases with all seeds, and return their figures."""
        plan, out = self._plan(cases, seeds), self.given.out / folder
        with SweepView() as view:
            watch = SweepWatch(view.opened, view.ended, view.note)
            table = run_sweep(plan, out, self.given.jobs, data=self.given.data, watch=watch).table
        return {
            label: list(rows) for label, rows in itertools.groupby(table, lambda row: row["case"])
        }

    def _cell(self, case: Case, rows: Sequence[Mapping[str, Any]]) -> Cell:
        """Return what a case has come to over its seeds."""
        if failed := [row["error"] for row in rows if row["status"] != "finished"]:
            return Cell(case.method, case.topology, failed[0], case.rate)
        means = [row["eval_acc_mean"] for row in rows]
        rounds = rows[0]["rounds"]
        sent = statistics.mean(row["bytes_sent"] for row in rows) / EXPERIMENT["nodes"]
        return Cell(
            case.method,
            case.topology,
            rate=case.rate,
            rounds=rounds,
            accuracy=statistics.mean(means),
            deviation=statistics.stdev(means) if len(means) > 1 else 0.0,
            worst=statistics.mean(row["eval_acc_worst"] for row in rows),
            megabytes=sent / 1e6,
            models=sent / rounds / (4 * self._parameters),
        )

    @property
    def _data(self) -> dict[str, Any]:
        return IMAGES if self.given.data else DIGITS

    @property
    def _parameters(self) -> int:
        """How many parameters the model has."""
        widths = [28 * 28 if self.given.data else 8 * 8, *self._data["model"]["hidden"], 10]
        return sum((inputs + 1) * outputs for inputs, outputs in itertools.pairwise(widths))


def main() -> None:
    """Compare, and show it."""
    given = arguments(__doc__, "runs/compare-algorithms", METHODS, TOPOLOGIES)
    cells = compare(METHODS, given)
    by_method = itertools.groupby(cells, key=lambda cell: cell.method)
    print_table(
        ("mean / worst node, %", *given.topologies),
        [(method, *row) for method, row in by_method],
        texts=["mean / worst node, %"],
    )


def arguments(
    doc: str, out: str, methods: Iterable[str], topologies: Iterable[str]
) -> argparse.Namespace:
    """Return what was given on the command line, by default all methods on all topologies."""
    parser = argparse.ArgumentParser(description=doc.splitlines()[0])
    parser.add_argument("--methods", nargs="+", choices=list(methods), default=list(methods))
    parser.add_argument("--topologies", nargs="+", default=list(topologies))
    parser.add_argument("--data", type=Path, help="a folder of IDX files; default: digits")
    parser.add_argument("--seeds", type=int, default=3, help="how many")
    parser.add_argument("--rounds", type=int, default=600)
    parser.add_argument("--local-steps", type=int, default=1)
    parser.add_argument("--alpha", type=float, default=0.1, help="how alike data are")
    parser.add_argument("--jobs", type=int, default=2, help="runs at a time")
    parser.add_argument("--out", type=Path, default=Path(out), help="a folder")
    given = parser.parse_args()
    if given.data and not given.data.is_dir():
        parser.error(f"--data {given.data}: there is no such folder")
    return given


def compare(methods: Mapping[str, Method], given: argparse.Namespace) -> list[Cell]:
    """Compare, and write the table and the picture; what cannot be ends the script."""
    try:
        chosen = {name: methods[name] for name in given.methods}
        cells = Comparison(chosen, given.topologies, given).cells()
    except P2pflError as error:
        sys.exit(str(error))
    with (given.out / "table.csv").open("w", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(Cell._fields)
        writer.writerows(cells)
    draw(cells, given.out / "compare.png")
    return cells


def draw(cells: Sequence[Cell], path: Path) -> None:
    """Draw a line for each of the more numerous, methods or topologies, and a dot for each pair.

    A dot is the mean of the nodes; a thin line goes from it to the worst node.
    """
    named = [
        list(dict.fromkeys(names)) for names in zip(*(cell[:2] for cell in cells), strict=True)
    ]
    down = max((0, 1), key=lambda at: len(named[at]))
    lines, colours = named[down], named[1 - down]
    figure = Figure(figsize=(8, 1.5 + 0.4 * len(lines)), dpi=120, layout="constrained")
    axes = figure.subplots()
    for i, name in enumerate(colours):
        dots = [cell for cell in cells if cell[1 - down] == name and not cell.why]
        heights = [lines.index(cell[down]) + 0.12 * (i - len(colours) / 2) for cell in dots]
        means = [cell.accuracy for cell in dots]
        axes.plot(means, heights, "o", color=f"C{i}", label=name)
        axes.hlines(heights, [cell.worst for cell in dots], means, f"C{i}", linewidth=1)
    axes.set_yticks(range(len(lines)), lines)
    axes.invert_yaxis()
    axes.set_xlabel("accuracy: mean of the nodes, and down to the worst")
    axes.grid(axis="x", alpha=0.3)
    figure.legend(loc="outside upper center", ncols=3, frameon=False)
    figure.savefig(path)


if __name__ == "__main__":
    main()
