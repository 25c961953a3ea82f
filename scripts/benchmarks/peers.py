"""What a process for each peer costs: time to start, memory, and the price of a round.

    python scripts/benchmarks/peers.py [--data DIR] [--nodes 16] [--rounds 40] [--repeats 3]

Peers in a ring train an MLP 784-128-64-10 with 15 local steps a round on IDX images: those in
DIR, or made-up ones of MNIST's shape. Three things are measured and printed as one table:

* seconds from the command until the last peer begins its first round,
* proportional memory (PSS) of a peer in the middle of training,
* a round with exchange (dpsgd) against the local steps alone (the same processes with the
  algorithm `local`, all at once on the same cores), the two run alternately.

The figures are medians over the repeats; of memory also the largest.
"""

from __future__ import annotations

import argparse
import csv
import importlib.metadata
import os
import platform
import statistics
import struct
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import numpy as np

EXPERIMENT = """
name = "peers"
nodes = {nodes}
data = {{name = "idx", path = "{data}"}}
holdout = {{name = "last", count = 1000}}
model = {{name = "mlp", hidden = [128, 64]}}
training = {{batch_size = 32}}
algorithm = "{algorithm}"
topology = "ring"
pace = {{rounds = {rounds}, local_steps = 15}}
evaluation = {{every = {rounds}}}
output = {{models = "none"}}
"""


class Figures(NamedTuple):
    """What one run has shown."""

    start: float  # seconds until the last peer trains
    memory: list[float]  # MB of each peer
    round: float  # seconds


def main() -> None:
    """Measure, and print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path, help="a folder of IDX files")
    parser.add_argument("--nodes", type=int, default=16)
    parser.add_argument("--rounds", type=int, default=40)
    parser.add_argument("--repeats", type=int, default=3)
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        data = given.data.resolve() if given.data else made_up(Path(scratch) / "data")
        pairs = []
        for repeat in range(given.repeats):
            folder = Path(scratch) / str(repeat)
            folder.mkdir()
            sizes = (given.nodes, given.rounds)
            pairs.append([measure(folder, name, data, *sizes) for name in ("dpsgd", "local")])
    print_table(pairs, given.nodes)


def made_up(folder: Path, images: int = 10_000) -> Path:
    """Write random images of MNIST's shape, and return where."""
    folder.mkdir()
    draw = np.random.default_rng(0)
    pixels = draw.integers(0, 256, (images, 28, 28), dtype=np.uint8)
    labels = draw.integers(0, 10, images, dtype=np.uint8)
    for name, array in (("images-idx3", pixels), ("labels-idx1", labels)):
        head = struct.pack(f">I{array.ndim}I", 0x0800 + array.ndim, *array.shape)
        (folder / f"train-{name}-ubyte").write_bytes(head + array.tobytes())
    return folder


def measure(folder: Path, algorithm: str, data: Path, nodes: int, rounds: int) -> Figures:
    """Run the command once and watch its peers."""
    experiment, run = folder / f"{algorithm}.toml", folder / algorithm
    experiment.write_text(
        EXPERIMENT.format(nodes=nodes, data=data, algorithm=algorithm, rounds=rounds)
    )
    words = [sys.executable, "-m", "p2pfl", "run", experiment, "--on", "local", "--out", run]
    began = time.monotonic()
    with subprocess.Popen([*map(str, words), "--quiet"], stdout=subprocess.DEVNULL) as process:
        wait_until(lambda: in_training(run) == nodes, process)
        start = time.monotonic() - began
        wait_until(lambda: rounds_done(run) >= rounds // 2, process)
        memory = [megabytes(pid) for pid in grandchildren(process.pid)]
    if process.returncode:
        sys.exit(f"the run failed with code {process.returncode}")
    return Figures(start, memory, round_seconds(run))


def wait_until(condition: Callable[[], bool], process: subprocess.Popen[bytes]) -> None:
    """Wait for something to happen in a run, or for the run to end."""
    while not condition() and process.poll() is None:
        time.sleep(0.02)


def in_training(run: Path) -> int:
    """Return how many peers have begun their first round."""
    events = run / "events.jsonl"
    return events.read_text().count('"phase": "training"') if events.is_file() else 0


def rounds_done(run: Path) -> int:
    """Return how many rounds the first peer has behind it."""
    return len((run / "peers" / "000" / "metrics.csv").read_text().splitlines()) - 1


def round_seconds(run: Path) -> float:
    """Return the median over the peers of their mean seconds a round, the first left out."""
    means = []
    for metrics in run.glob("peers/*/metrics.csv"):
        with metrics.open() as file:
            times = [float(row["wall_s"]) for row in csv.DictReader(file)]
        means.append((times[-1] - times[0]) / (len(times) - 1))
    return statistics.median(means)


def grandchildren(parent: int) -> list[int]:
    """Return the peers a command has started: forked by its fork server."""
    pids = [int(path.name) for path in Path("/proc").glob("[0-9]*")]
    parents = {pid: parent_of(pid) for pid in pids}
    return [pid for pid, above in parents.items() if parents.get(above) == parent]


def parent_of(pid: int) -> int:
    """Return the parent of a process, 0 if it has just ended."""
    try:
        return int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1])
    except (FileNotFoundError, ProcessLookupError):
        return 0


def megabytes(pid: int) -> float:
    """Return the proportional memory of a process: what it shares is shared out."""
    lines = Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("Pss:")) / 1000


def print_table(pairs: list[list[Figures]], nodes: int) -> None:
    """Print medians, and on what machine they were measured."""
    both = [figures for pair in pairs for figures in pair]
    memory = [peer for figures in both for peer in figures.memory]
    exchange, alone = (statistics.median(pair[i].round for pair in pairs) for i in (0, 1))
    ratio = statistics.median(pair[0].round / pair[1].round for pair in pairs)
    rows = [
        (
            "command to first round of the last peer",
            f"{statistics.median(f.start for f in both):.1f} s",
        ),
        (
            "memory of a peer (PSS)",
            f"{statistics.median(memory):.0f} MB, at most {max(memory):.0f} MB",
        ),
        (
            "round in a ring / local steps alone",
            f"{ratio:.2f} ({exchange * 1e3:.0f} ms / {alone * 1e3:.0f} ms)",
        ),
    ]
    print(f"{nodes} peers, ring, MLP 784-128-64-10, 15 local steps; medians of {len(pairs)} runs")
    for what, figure in rows:
        print(f"  {what:40}  {figure}")
    versions = [f"{name} {importlib.metadata.version(name)}" for name in ("torch", "pyzmq")]
    versions = [f"Python {platform.python_version()}", *versions]
    print(f"{os.cpu_count()} cores, {cpu()}; {', '.join(versions)}")


def cpu() -> str:
    """Return what the processor calls itself."""
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor()


if __name__ == "__main__":
    main()
