"""What peers of large models need: memory for each, counted in models, and seconds a round.

    python scripts/benchmarks/large_models.py [--hidden 1000 2000 4000] [--nodes 4] [--set ...]

Peers on this machine learn the digits, all to all, with an MLP of two hidden layers and two local
steps a round. Memory is the most that a peer ever had resident, beyond what one of a small model
has. Any key of the experiment may be set, as `optimiser=adam` or `algorithm=gossip`.
"""

from __future__ import annotations

import argparse
import statistics
import subprocess
import sys
import tempfile
import time
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

from crowd import megabytes
from machine import describe
from peers import grandchildren, round_seconds
from rich.console import Console
from rich.table import Table

EXPERIMENT = """
nodes = {nodes}
model = {{name = "mlp", hidden = [{hidden}, {hidden}]}}
training = {{batch_size = 16}}
algorithm = "fedavg"
topology = "complete"
pace = {{rounds = {rounds}, local_steps = 2}}
evaluation = {{every = {rounds}}}
"""
SMALL = 8  # hidden units of a model that takes nothing


class Found(NamedTuple):
    """What one run has shown."""

    memory: float  # MB, of a peer, the median
    round: float  # seconds


def main() -> None:
    """Measure, and print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--hidden", type=int, nargs="+", default=[1000, 2000, 4000])
    parser.add_argument("--nodes", type=int, default=4)
    parser.add_argument("--rounds", type=int, default=6)
    parser.add_argument("--set", dest="keys", nargs="*", default=[], metavar="KEY=VALUE")
    given = parser.parse_args()
    console = Console(width=100)
    console.print(describe(), highlight=False)
    words = [word for key in given.keys for word in ("--set", key)]
    title = f"{given.nodes} peers, all to all {' '.join(given.keys)}".rstrip()
    table = Table("parameters", "model, MB", "peer, MB", "in models", "round, s", title=title)
    least = measure(SMALL, given.nodes, given.rounds, words).memory
    for hidden in given.hidden:
        found = measure(hidden, given.nodes, given.rounds, words)
        d = 64 * hidden + hidden**2 + 10 * hidden + 2 * hidden + 10
        more, size = found.memory - least, 4 * d / 1e6
        cells = f"{d:,}", f"{size:.0f}", f"{more:.0f}", f"{more / size:.1f}", f"{found.round:.2f}"
        table.add_row(*cells)
    console.print(table)


def measure(hidden: int, nodes: int, rounds: int, words: list[str]) -> Found:
    """Run the command once and watch its peers."""
    with tempfile.TemporaryDirectory() as scratch:
        experiment, run = Path(scratch) / "large.toml", Path(scratch) / "run"
        experiment.write_text(EXPERIMENT.format(nodes=nodes, hidden=hidden, rounds=rounds))
        command = [sys.executable, "-m", "p2pfl", "run", str(experiment), "--on", "local"]
        command += ["--quiet", "--out", str(run), *words]
        most: dict[int, float] = {}
        with subprocess.Popen(command, stdout=subprocess.DEVNULL) as process:
            while process.poll() is None:
                for pid in grandchildren(process.pid):
                    with suppress(FileNotFoundError, ProcessLookupError, StopIteration):
                        most[pid] = megabytes("VmHWM", pid)
                time.sleep(0.02)
        if process.returncode:
            sys.exit(f"the run failed with code {process.returncode}")
        return Found(statistics.median(most.values()), round_seconds(run))


if __name__ == "__main__":
    main()
