"""Runs in processes of their own, and how to follow and disturb them."""

from __future__ import annotations

import csv
import itertools
import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

LONG = 60.0  # seconds a test waits for what should take a few


def small(**sections: Any) -> dict[str, Any]:
    """A small experiment on six peers, in double precision."""
    return {
        "name": "small",
        "nodes": 6,
        "seed": 3,
        "data": {"name": "digits"},
        "holdout": {"name": "random", "fraction": 0.2},
        "partition": {"name": "dirichlet", "alpha": 0.5},
        "model": {"name": "mlp", "hidden": [8]},
        "training": {"batch_size": 16, "dtype": "float64"},
        "optimiser": {"name": "sgd", "lr": 0.1, "momentum": 0.5},
        "algorithm": {"name": "dpsgd"},
        "topology": {"name": "ring"},
        "pace": {"rounds": 3, "local_steps": 2},
        **sections,
    }


def wait_for(what: Callable[[], Any], timeout: float = LONG) -> Any:
    """Ask until the answer is true, and return it."""
    deadline = time.monotonic() + timeout
    while not (answer := what()):
        assert time.monotonic() < deadline, "waited in vain"
        time.sleep(0.02)
    return answer


def metrics(folder: Path) -> list[dict[str, str]]:
    """Read the lines of ``metrics.csv``, as far as they are there."""
    if not (folder / "metrics.csv").is_file():
        return []
    with (folder / "metrics.csv").open() as file:
        return [row for row in csv.DictReader(file) if row["virtual_s"] is not None]


def rounds_done(run: Path) -> int:
    """Return how many rounds all peers of a run have behind them."""
    peers = list(run.glob("peers/*"))
    return min((len(metrics(peer)) for peer in peers), default=0)


def summary(folder: Path) -> dict[str, Any]:
    loaded: dict[str, Any] = json.loads((folder / "summary.json").read_text())
    return loaded


def longest_pauses(run: Path, node: int) -> list[float]:
    """Return the seconds between the ends of a peer's rounds, longest first."""
    times = [float(row["wall_s"]) for row in metrics(run / "peers" / f"{node:03d}")]
    pauses = [later - earlier for earlier, later in itertools.pairwise(times)]
    return sorted(pauses, reverse=True)


def free_address() -> str:
    with socket.create_server(("127.0.0.1", 0)) as held:
        return f"tcp://127.0.0.1:{held.getsockname()[1]}"


@contextmanager
def command(*words: object, cwd: Path) -> Iterator[subprocess.Popen[str]]:
    """Run a command line in a session of its own; nothing of it survives the block."""
    with subprocess.Popen(
        [sys.executable, *map(str, words)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        cwd=cwd,
        start_new_session=True,
    ) as process:
        try:
            yield process
        finally:
            for pid in session(process.pid):
                os.kill(pid, signal.SIGKILL)


def p2pfl(*words: object) -> tuple[object, ...]:
    return ("-m", "p2pfl", *words)


def session(leader: int) -> dict[int, int]:
    """Return the living processes of a session, with their parents."""
    found = {}
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            fields = (folder / "stat").read_text().rpartition(")")[2].split()
        except (FileNotFoundError, ProcessLookupError):
            continue
        state, parent, of = fields[0], int(fields[1]), int(fields[3])
        if of == leader and state not in "ZX":
            found[int(folder.name)] = parent
    return found


def peers_of(leader: int) -> list[int]:
    """Return the peer processes that a command has started: forked by its fork server."""
    family = session(leader)
    return sorted(pid for pid, parent in family.items() if family.get(parent) == leader)
