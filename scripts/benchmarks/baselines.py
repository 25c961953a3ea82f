"""An experiment over several seeds: accuracy together, alone, and with all data in one place.

Usage:  python scripts/benchmarks/baselines.py EXPERIMENT [--data DIR] [--seeds 5] [--set K=V ...]

    python scripts/benchmarks/baselines.py digits
    python scripts/benchmarks/baselines.py heart --data DIR

EXPERIMENT is a file or the name of one that ships with the package. The runs are simulated, the
seeds are 1, 2, ...; alone and pooled are trained on as many examples as the peers together.
"""

from __future__ import annotations

import argparse
import statistics

from rich.console import Console
from rich.table import Table

import p2pfl


def main() -> None:
    """Run the seeds and print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("experiment")
    parser.add_argument("--data", help="where relative data paths start")
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE")
    options = parser.parse_args()
    rows = []
    for seed in range(1, options.seeds + 1):
        changes = [*options.set, "evaluation.baselines=true", f"seed={seed}"]
        told = p2pfl.run(options.experiment, data=options.data, changes=changes).summary
        mean, worst = told["eval_acc_mean"], told["eval_acc_worst"]
        rows.append([mean, worst, told["pooled"], told["alone_mean"], *told["alone"]])
    nodes = range(len(rows[0]) - 4)
    table = Table("seed", "mean", "worst", "pooled", "alone", *(f"{node} alone" for node in nodes))
    for seed, row in enumerate(rows, start=1):
        table.add_row(str(seed), *(f"{value:.3f}" for value in row))
    table.add_section()
    columns = zip(*rows, strict=True)
    table.add_row("mean", *(f"{statistics.mean(column):.3f}" for column in columns))
    Console(width=max(80, 12 * len(rows[0]))).print(table)


if __name__ == "__main__":
    main()
