"""The simulator against a plain loop, gossipy and Flower: updates a second, side by side.

    python scripts/benchmarks/simulation.py [--only mlp,logistic,cnn] [--nodes 100] [--degree 4]
    python scripts/benchmarks/simulation.py --rivals PYTHON [--repeats 5]
    python scripts/benchmarks/simulation.py --scaling [--only mlp]

An update is one local step of one node: 32 images [1, 28, 28], cross-entropy, plain SGD. All
train the same models on made-up data, two steps a round, and average over the same kind of
graph; what each of them counts stands at the head of `plain_loop.py`, `gossipy_run.py` and
`flower_run.py`. Here it is all the time of the rounds after the first, except evaluation. They run
in turns, one of each in every repeat; figures are medians, and ratios medians of the ratios
within a repeat.

PYTHON is the interpreter of an environment with ``pip install gossipy-dfl 'flwr[simulation]'``.
Settings of the experiment (``--dtype``, ``--backend``, ``--set``) are for p2pfl alone: the others
always train in single precision.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any, NamedTuple

import machine
import torch
from jobs import BATCH, CLASSES, PRODUCTS, RATE, SHAPE, WARM_UP, Job, build, flop, words
from rich.console import Console
from rich.table import Table

from p2pfl.errors import UserError
from p2pfl.experiment.experiment import Experiment
from p2pfl.runtime.simulate import Simulator

LOCAL_STEPS = 2
SIZES = (10, 100, 1_000, 10_000)
REFERENCE = 100  # of SIZES
# Updates that take a second or two.
BUDGET = {"mlp": 6_000, "logistic": 30_000, "cnn": 400}
FEWER = 10  # how many times fewer rounds Flower gets, which is slow and steady
ALONE, OURS = "p2pfl, training alone", "p2pfl, with mixing"
# Of gossipy: as it is, with fewer copies than it makes, and its usual way.
EXCHANGES = {"all": "all to all", "shared": "all to all, copies shared", "push": "push"}
FOLDER = Path(__file__).parent


class Answer(NamedTuple):
    """What somebody has achieved once.

    Attributes:
        who: a name, and the version of a rival.
        rate: updates a second; NaN if there is none.
        note: why there is none.
    """

    who: str
    rate: float
    note: str = ""


def main() -> None:
    """Measure, and print a table."""
    given = parse()
    console = Console(width=100)
    console.print(machine.describe(), f"up to {given.threads} threads", sep=", ", highlight=False)
    try:
        console.print(scaling(given) if given.scaling else comparison(given))
    except UserError as error:
        sys.exit(f"simulation.py: {error}")


def parse() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", default="mlp,logistic,cnn", help="models, with commas")
    parser.add_argument("--nodes", type=int, default=100)
    parser.add_argument("--degree", type=int, default=4)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--threads", type=int, default=machine.cores())
    parser.add_argument("--rivals", metavar="PYTHON", help="an interpreter that has the others")
    parser.add_argument("--scaling", action="store_true", help="p2pfl with 10 to 10,000 nodes")
    parser.add_argument("--dtype", help="the key training.dtype")
    parser.add_argument("--backend", help="the key training.backend")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE")
    given = parser.parse_args()
    given.only = given.only.split(",")
    unknown = [model for model in given.only if model not in PRODUCTS]
    if unknown:
        parser.error(f"--only {unknown[0]}: expected some of {','.join(PRODUCTS)}")
    for key in ("dtype", "backend"):
        given.set += [f"training.{key}={getattr(given, key)}"] if getattr(given, key) else []
    return given


def comparison(given: argparse.Namespace) -> Table:
    """Measure everybody on every model, and return the table."""
    figures = {}
    for model in given.only:
        task = job(model, given.nodes, given)
        figures[model] = [everybody(task, given) for _ in range(given.repeats)]
    peak = max(machine.gigaflops(torch.float32, threads) for threads in {1, given.threads})
    title = f"{given.nodes} nodes, degree {given.degree}, {LOCAL_STEPS} local steps a round"
    table = Table(title=f"{title}; medians of {given.repeats}")
    table.add_column("model")
    table.add_column("who")
    for head in ("updates/s", "µs/update", "p2pfl is faster", "of sgemm"):
        table.add_column(head, justify="right")
    for model, turns in figures.items():
        for place in range(len(turns[0])):
            table.add_row(*row(model, [turn[place] for turn in turns], turns, peak))
        table.add_section()
    table.caption = f"sgemm: {peak:.0f} GFLOP/s; " + ", ".join(
        f"{model} {flop(model) / 1e6:.2f} MFLOP an update" for model in given.only
    )
    return table


def row(model: str, answers: list[Answer], turns: list[list[Answer]], peak: float) -> list[str]:
    """Return one line of the table: one of the contestants on one model.

    Args:
        model: which.
        answers: the contestant's own, one for each repeat.
        turns: everybody's, to compare with.
        peak: GFLOP/s of a product of matrices.
    """
    who, rate = answers[0].who, statistics.median(answer.rate for answer in answers)
    if any(math.isnan(answer.rate) for answer in answers):
        return [model, f"{who}: {next(answer.note for answer in answers if answer.note)}"]
    ours = [answer.rate for turn in turns for answer in turn if answer.who == OURS]
    ratio = statistics.median(o / a.rate for o, a in zip(ours, answers, strict=True))
    share = rate * flop(model) / peak / 1e9
    compared = "" if who in (ALONE, OURS) else f"{ratio:.2f} x"
    return [model, who, f"{rate:,.0f}", f"{1e6 / rate:,.1f}", compared, f"{share:.0%}"]


def everybody(job: Job, given: argparse.Namespace) -> list[Answer]:
    """Let everybody do the job once, one after the other."""
    alone, whole = simulate(job, given.set)
    cores = str(machine.cores())
    few = job._replace(rounds=max(1, job.rounds // FEWER))
    return [
        Answer(ALONE, alone),
        Answer(OURS, whole),
        ask("plain loop, one process", sys.executable, "plain_loop.py", words(job)),
        ask(
            "plain loop, a process a core",
            sys.executable,
            "plain_loop.py",
            [*words(job), "--processes", cores],
        ),
        *(
            ask(f"gossipy, {how}", given.rivals, "gossipy_run.py", [*words(job), "--exchange", key])
            for key, how in EXCHANGES.items()
        ),
        ask("Flower", given.rivals, "flower_run.py", words(few)),
    ]


def ask(who: str, python: str | None, script: str, words: list[str]) -> Answer:
    """Run one of the scripts in a process of its own; say so if it cannot."""
    if python is None:
        return Answer(who, math.nan, "not installed")
    command = [python, str(FOLDER / script), *words]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        reason = (done.stderr.strip().splitlines() or [f"exit code {done.returncode}"])[-1]
        missing = reason.startswith("ModuleNotFoundError")
        return Answer(who, math.nan, "not installed" if missing else reason)
    found = json.loads(done.stdout.splitlines()[-1])
    rival = script != "plain_loop.py"
    return Answer(f"{who} {found['version']}" if rival else who, found["updates_per_s"])


def simulate(job: Job, changes: Iterable[str] = ()) -> tuple[float, float]:
    """Simulate once; return updates a second in training, and over all but evaluation."""
    torch.set_num_threads(job.threads)
    experiment = Experiment.from_dict(description(job), changes=changes)
    federation = experiment.federation()
    task = experiment.task(federation, experiment.affine(federation), "cpu")
    simulator = Simulator(experiment.setup(task))
    marks = []
    for _ in simulator.rounds():
        spent = simulator.seconds
        whole = time.perf_counter() - spent.evaluation
        marks.append((simulator.updates, spent.training, whole))
    begin, end = marks[WARM_UP - 1], marks[-1]
    updates, training, whole = (b - a for a, b in zip(begin, end, strict=True))
    return updates / training, updates / whole


def description(job: Job) -> dict[str, Any]:
    """Return the job as an experiment."""
    rounds = WARM_UP + job.rounds
    examples = job.nodes * job.local_steps * BATCH
    return {
        "name": "simulation",
        "nodes": job.nodes,
        "data": {
            "name": "synthetic",
            "examples": examples,
            "shape": list(SHAPE),
            "classes": CLASSES,
        },
        "holdout": {"name": "none"},
        "partition": {"name": "iid"},
        "model": {"name": job.model},
        "training": {"batch_size": BATCH},
        "optimiser": {"name": "sgd", "lr": RATE},
        "algorithm": {"name": "dpsgd"},
        "topology": {"name": "random_regular", "degree": job.degree},
        "pace": {"rounds": rounds, "local_steps": job.local_steps},
        "evaluation": {"every": rounds + 1},
    }


def scaling(given: argparse.Namespace) -> Table:
    """Measure p2pfl with more and more nodes, and return the table."""
    table = Table(title=f"p2pfl, degree {given.degree}; medians of {given.repeats}")
    table.add_column("model")
    heads = ("nodes", "training, µs/update", "with mixing, µs/update", f"to {REFERENCE} nodes")
    for head in heads:
        table.add_column(head, justify="right")
    for model in given.only:
        sizes = [nodes for nodes in SIZES if fits(model, nodes)]
        turns = [
            {nodes: simulate(job(model, nodes, given), given.set) for nodes in sizes}
            for _ in range(given.repeats)
        ]
        for nodes in SIZES:
            cells = costs([turn[nodes] for turn in turns]) if nodes in sizes else ["too large"]
            ratio = [turn[REFERENCE][1] / turn[nodes][1] for turn in turns if nodes in sizes]
            last = [f"{statistics.median(ratio):.2f}"] if ratio else []
            table.add_row(model, f"{nodes:,}", *cells, *last)
        table.add_section()
    return table


def costs(rates: list[tuple[float, float]]) -> list[str]:
    """Return microseconds for an update, in training and over all."""
    return [f"{1e6 / statistics.median(kind):.1f}" for kind in zip(*rates, strict=True)]


def fits(model: str, nodes: int) -> bool:
    """Tell whether parameters and data of so many nodes take at most half of the memory."""
    memory = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    numbers = sum(parameter.numel() for parameter in build(model).parameters())
    return 4 * nodes * (numbers + LOCAL_STEPS * BATCH * math.prod(SHAPE)) <= memory / 2


def job(model: str, nodes: int, given: argparse.Namespace) -> Job:
    """Return a job of so many rounds that it takes a second or two."""
    rounds = max(2, math.ceil(BUDGET[model] / (nodes * LOCAL_STEPS)))
    return Job(model, nodes, given.degree, rounds, LOCAL_STEPS, given.threads)


if __name__ == "__main__":
    main()
