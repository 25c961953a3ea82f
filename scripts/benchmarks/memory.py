"""The memory that runs take, against what `p2pfl run` foresees.

    python scripts/benchmarks/memory.py [--nodes 1000] [--only krum "choco qsgd"]

Every run is a process of its own: an MLP 784-100-10 at each node, random 4-regular graph if
nothing else is said, two rounds. Taken is by how much the most memory the process ever had grows
from before the nodes are there until the end.
"""

from __future__ import annotations

import argparse
import json
import resource
import subprocess
import sys
from typing import Any

from machine import describe

from p2pfl.experiment.experiment import Experiment
from p2pfl.runtime.emulate import Emulator
from p2pfl.runtime.memory import needed
from p2pfl.runtime.simulate import Simulator

HALF = {"training": {"dtype": "bfloat16"}}
ADAM = {"optimiser": {"name": "adam", "lr": 0.001}}
KRUM = {"algorithm": {"name": "dpsgd", "aggregate": "krum:f=1"}}
MEDIAN = {"algorithm": {"name": "dpsgd", "aggregate": "median"}}
TOP = {"algorithm": {"name": "choco", "codec": "top_k:share=0.1"}}


def coded(name: str, codec: str = "int8") -> dict[str, Any]:
    """Return an algorithm whose messages are encoded."""
    return {"algorithm": {"name": name, "codec": codec}}


RUNS: dict[str, dict[str, Any]] = {
    "dpsgd": {},
    "dpsgd, bfloat16": HALF,
    "adam": ADAM,
    "adam, bfloat16": {**HALF, **ADAM},
    "krum": KRUM,
    "krum, bfloat16": {**HALF, **KRUM},
    "geometric_median": {"algorithm": {"name": "dpsgd", "aggregate": "geometric_median"}},
    "median": MEDIAN,
    "median, degree 40": {**MEDIAN, "topology": {"name": "random_regular", "degree": 40}},
    "emulated median, degree 40": {
        "on": "emulate",
        **MEDIAN,
        "topology": {"name": "random_regular", "degree": 40},
    },
    "balance": {"algorithm": "balance"},
    "quantised int8": coded("quantised"),
    "quantised int8, bfloat16": {**HALF, **coded("quantised")},
    "choco int8": coded("choco"),
    "choco int8, bfloat16": {**HALF, **coded("choco")},
    "choco qsgd": coded("choco", "qsgd"),
    "choco top_k": TOP,
    "moniqua": {"algorithm": {"name": "moniqua", "theta": 2.0}},
    "deepsqueeze int8": coded("deepsqueeze"),
    "beer top_k": coded("beer", "top_k:share=0.1"),
    "jwins": {"algorithm": {"name": "jwins", "share": 0.1}},
    "powergossip": {"algorithm": "powergossip"},
    "blocks of 1000, vmapped": {"training": {"block": 1000, "backend": "vmapped"}},
    "emulated": {"on": "emulate"},
    "emulated, bfloat16": {"on": "emulate", **HALF},
    "emulated, no waiting": {"on": "emulate", "pace": {"patience": 0}},
    "emulated choco top_k": {"on": "emulate", **TOP},
}


def main() -> None:
    """Measure, and print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--nodes", type=int, default=1000)
    parser.add_argument("--only", nargs="+", choices=[*RUNS], default=[*RUNS], metavar="RUN")
    parser.add_argument("--one", choices=[*RUNS], help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.one:
        print(json.dumps(measure(RUNS[given.one], given.nodes)))
        return
    print(f"{describe()}; {given.nodes} nodes")
    print(f"{'run':26}  {'taken, GB':>10}  {'foreseen':>10}  {'ratio':>6}")
    for name in given.only:
        words = [sys.executable, __file__, "--nodes", str(given.nodes), "--one", name]
        taken, foreseen = json.loads(subprocess.check_output(words))
        ratio = f"{taken / foreseen:6.2f}"
        print(f"{name:26}  {taken / 1e9:10.2f}  {foreseen / 1e9:10.2f}  {ratio}", flush=True)


def measure(sections: dict[str, Any], nodes: int) -> tuple[int, int]:
    """Return the bytes that a run in this process takes, and those foreseen."""
    others = {key: value for key, value in sections.items() if key not in ("on", "pace")}
    about = {
        "nodes": nodes,
        "data": {"name": "synthetic", "examples": 16 * nodes, "shape": [1, 28, 28], "classes": 10},
        "holdout": "none",
        "model": {"name": "mlp", "hidden": [100]},
        "optimiser": {"name": "sgd", "lr": 0.05},
        "algorithm": "dpsgd",
        "topology": {"name": "random_regular", "degree": 4},
        "pace": {"rounds": 2, "local_steps": 2, **sections.get("pace", {})},
        **others,
    }
    experiment = Experiment.from_dict(about)
    federation = experiment.federation()
    setup = experiment.setup(experiment.task(federation, experiment.affine(federation)))
    emulated = "on" in sections
    foreseen = needed(setup, nodes, emulated).total
    before = most()
    driver = Emulator(setup, experiment.network) if emulated else Simulator(setup)
    for _ in driver.rounds():
        pass
    return most() - before, foreseen


def most() -> int:
    """Return the most memory this process ever had, in bytes."""
    return 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


if __name__ == "__main__":
    main()
