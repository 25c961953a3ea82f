"""Four hospitals, five seeds: accuracy together, alone, and with all records in one place.

Usage:  python scripts/benchmarks/heart.py --data DIR [--seeds 5]

DIR/heart holds the four files of the UCI Heart Disease data set. The setting is that of FLamby
(Ogier du Terrail et al. 2022): 10 columns after dropping slope, ca and thal, incomplete rows
left out, 66 % of each hospital for training, accuracy on the pooled test rows. Published there:
0.784, 0.727, 0.483 and 0.611 for a hospital alone, 0.748 for FedAvg, 0.779 for the best FedOpt
method, 0.795 for pooled training.
"""

from __future__ import annotations

import argparse
import statistics

from rich.console import Console
from rich.table import Table

import p2pfl

HOSPITALS = ("Cleveland", "Hungary", "Switzerland", "Long Beach")


def main() -> None:
    """Run the seeds and print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", required=True, help="the folder with heart/ in it")
    parser.add_argument("--seeds", type=int, default=5)
    options = parser.parse_args()
    table = Table("seed", "together", "pooled", *(f"{name} alone" for name in HOSPITALS))
    rows = []
    for seed in range(options.seeds):
        run = p2pfl.run("heart", data=options.data, changes=[f"seed={seed}"])
        told = run.summary
        rows.append([told["eval_acc_mean"], told["pooled"], *told["alone"]])
        table.add_row(str(seed), *(f"{value:.3f}" for value in rows[-1]))
    means = [statistics.mean(column) for column in zip(*rows, strict=True)]
    table.add_section()
    table.add_row("mean", *(f"{value:.3f}" for value in means))
    Console().print(table)


if __name__ == "__main__":
    main()
