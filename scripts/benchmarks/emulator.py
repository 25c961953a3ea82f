"""The pace of the emulator, as a share of the simulator's.

    python scripts/benchmarks/emulator.py [--nodes 256 1000] [--models mlp logistic] ...

Nodes on a random regular graph take local steps of plain SGD on made-up images and exchange
with everybody's neighbours: all at once in the simulator; in the emulator one message after
the other, in step (steady network, unlimited patience) and without waiting (jittered network,
no patience). Every run is a process of its own, and the three kinds take turns, so that what
else the machine does befalls all of them. Counted are local steps and exchange, without the
first round and without evaluation. The figures are medians over the repeats.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import math
import os
import resource
import statistics
import subprocess
import sys

import torch
from machine import describe

from p2pfl.experiment.experiment import Experiment
from p2pfl.runtime.emulate import Emulator
from p2pfl.runtime.network import NetworkModel
from p2pfl.runtime.setup import Setup
from p2pfl.runtime.simulate import Simulator

MODELS = {"mlp": {"name": "mlp", "hidden": [128, 64]}, "logistic": "linear"}
STEADY = NetworkModel()
UNEVEN = NetworkModel(latency=0.002, jitter=1.0, compute_jitter=0.5, seed=1)
KINDS = ("simulator", "synchronous", "asynchronous")
Figures = dict[str, float]


def main() -> None:
    """Measure, and print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--nodes", type=int, nargs="+", default=[256, 1000])
    parser.add_argument("--models", nargs="+", choices=[*MODELS], default=[*MODELS])
    parser.add_argument("--degree", type=int, default=4)
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--one", choices=KINDS, help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.one:
        torch.set_num_threads(given.threads)
        setup = build(given.models[0], given.nodes[0], given.degree, given.rounds, given.one)
        print(json.dumps(measure(setup, given.one)))
        return
    print(f"{describe()}; {given.threads} threads, degree {given.degree}, {given.rounds} rounds,")
    print(f"2 local steps of 32 images each; medians of {given.repeats} runs")
    heads = ("simulator/s", "emulator/s", "ratio", "simulator", "emulator")
    print(f"{'nodes':>5}  {'model':8}  {'mode':12}" + "".join(f"  {head:>11}" for head in heads))
    for model in given.models:
        for n in given.nodes:
            compare(model, n, given)


def compare(model: str, n: int, given: argparse.Namespace) -> None:
    """Run the three kinds in turns, and print a line for each mode of the emulator."""
    found: dict[str, list[Figures]] = {kind: [] for kind in KINDS}
    for _ in range(given.repeats):
        for kind in KINDS:
            found[kind].append(run(model, n, kind, given))
    rates = {kind: [one["rate"] for one in each] for kind, each in found.items()}
    peaks = {kind: max(one["peak"] for one in each) for kind, each in found.items()}
    for mode in KINDS[1:]:
        ratio = statistics.median(
            a / b for a, b in zip(rates[mode], rates["simulator"], strict=True)
        )
        simulator, emulator = (statistics.median(rates[kind]) for kind in ("simulator", mode))
        line = f"{n:5}  {model:8}  {mode:12}  {simulator:11.0f}  {emulator:11.0f}  {ratio:11.2f}"
        print(f"{line}  {peaks['simulator']:8.0f} MB  {peaks[mode]:8.0f} MB", flush=True)


def run(model: str, n: int, kind: str, given: argparse.Namespace) -> Figures:
    """Measure in a process of its own."""
    words = ["--one", kind, "--models", model, "--nodes", n, "--degree", given.degree]
    words += ["--rounds", given.rounds, "--threads", given.threads]
    line = subprocess.run(
        [sys.executable, __file__, *map(str, words)], capture_output=True, check=True
    ).stdout
    figures: Figures = json.loads(line)
    return figures


def build(model: str, n: int, degree: int, rounds: int, kind: str) -> Setup:
    """Return the run."""
    data = {"name": "synthetic", "examples": 64 * n, "shape": [1, 28, 28], "classes": 10}
    patience = 0.0 if kind == "asynchronous" else math.inf
    experiment = Experiment.from_dict(
        {
            "nodes": n,
            "data": data,
            "holdout": "none",
            "model": MODELS[model],
            "training": {"batch_size": 32},
            "optimiser": {"name": "sgd", "lr": 0.05},
            "algorithm": "dpsgd",
            "topology": {"name": "random_regular", "degree": degree},
            "pace": {"rounds": rounds, "local_steps": 2, "patience": patience},
        }
    )
    federation = experiment.federation()
    setup = experiment.setup(experiment.task(federation, experiment.affine(federation)))
    return dataclasses.replace(setup, pace=setup.pace._replace(evaluate_every=rounds))


def measure(setup: Setup, kind: str) -> Figures:
    """Return the updates per second, and the most memory the process ever had, in MB."""
    driver: Simulator | Emulator
    if kind == "simulator":
        driver = Simulator(setup)
    else:
        driver = Emulator(setup, STEADY if kind == "synchronous" else UNEVEN)
    history = driver.rounds()
    next(history)
    updates, busy = driver.updates, driver.seconds.training + driver.seconds.exchange
    for _ in history:
        pass
    busy = driver.seconds.training + driver.seconds.exchange - busy
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    return {"rate": (driver.updates - updates) / busy, "peak": peak}


if __name__ == "__main__":
    main()
