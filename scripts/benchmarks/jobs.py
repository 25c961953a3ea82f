"""The jobs that the simulator and the others are given, and the one line they answer with.

One update is one local step of one node: 32 images ``[1, 28, 28]``, cross-entropy, plain SGD.
Nothing of p2pfl is imported here, so the others can run in an environment of their own.
"""

from __future__ import annotations

import argparse
import functools
import json
import os
import time
from typing import NamedTuple

import networkx as nx
import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

BATCH = 32
CLASSES = 10
RATE = 0.05
SHAPE = (1, 28, 28)
WARM_UP = 1  # rounds that are not counted

# Multiplications in the forward pass of one image, layer by layer.
PRODUCTS = {
    "mlp": (784 * 128, 128 * 64, 64 * 10),
    "logistic": (784 * 10,),
    "cnn": (24 * 24 * 20 * 25, 8 * 8 * 50 * 20 * 25, 800 * 500, 500 * 10),
}


class Job(NamedTuple):
    """What is to be done.

    Attributes:
        model: one of `PRODUCTS`.
        nodes: how many nodes there are.
        degree: neighbours of each node, in a random regular graph.
        rounds: how many rounds are counted; `WARM_UP` come before.
        local_steps: updates of a node in a round.
        threads: the most threads of a process that is alone.
    """

    model: str
    nodes: int
    degree: int
    rounds: int
    local_steps: int
    threads: int

    @property
    def updates(self) -> int:
        """Updates of all nodes in the rounds that are counted."""
        return self.nodes * self.rounds * self.local_steps


def options(about: str) -> argparse.ArgumentParser:
    """Return a parser of the options that make a job."""
    parser = argparse.ArgumentParser(description=about.splitlines()[0])
    parser.add_argument("--model", choices=[*PRODUCTS], default="mlp")
    parser.add_argument("--nodes", type=int, default=100)
    parser.add_argument("--degree", type=int, default=4)
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--local-steps", type=int, default=2)
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1)
    return parser


def job(given: argparse.Namespace) -> Job:
    """Return the job that was asked for, among whatever other options."""
    return Job(*(getattr(given, field) for field in Job._fields))


def words(job: Job) -> list[str]:
    """Return a job as the words of a command line."""
    pairs = job._asdict().items()
    return [word for key, value in pairs for word in (f"--{key.replace('_', '-')}", str(value))]


def flop(model: str) -> int:
    """Return the floating-point operations of the products in one update.

    Backwards there are two products to each one forwards, but the first layer needs no
    gradient with respect to its input.
    """
    products = PRODUCTS[model]
    return 2 * BATCH * (3 * sum(products) - products[0])


def build(model: str) -> nn.Module:
    """Return a new model; its input is ``[b, 1, 28, 28]`` and its output ``[b, 10]``."""
    if model == "logistic":
        return nn.Sequential(nn.Flatten(), nn.Linear(784, CLASSES))
    if model == "mlp":
        hidden = (nn.Linear(784, 128), nn.ReLU(), nn.Linear(128, 64), nn.ReLU())
        return nn.Sequential(nn.Flatten(), *hidden, nn.Linear(64, CLASSES))
    return nn.Sequential(
        *(nn.Conv2d(1, 20, 5), nn.ReLU(), nn.MaxPool2d(2)),
        *(nn.Conv2d(20, 50, 5), nn.ReLU(), nn.MaxPool2d(2)),
        *(nn.Flatten(), nn.Linear(800, 500), nn.ReLU(), nn.Linear(500, CLASSES)),
    )


@functools.cache
def made_up(nodes: int, batches: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Return random images and labels, so many batches for each node, made once in a process.

    Returns:
        Images in [0, 1], ``[nodes, batches * 32, 1, 28, 28]``, and classes, int64.
    """
    draw = np.random.default_rng(seed)
    x = draw.random((nodes, batches * BATCH, *SHAPE), dtype=np.float32)
    y = draw.integers(0, CLASSES, (nodes, batches * BATCH))
    return torch.from_numpy(x), torch.from_numpy(y)


def fastest_threads(model: str, most: int, updates: int = 20) -> int:
    """Return whether one thread or `most` take local steps faster, by trying.

    Small products gain little from threads, and lose much where others use the cores too.
    """
    x, y = made_up(1, 1)
    network, times = build(model), {}
    for threads in (1, most):
        torch.set_num_threads(threads)
        for k in range(updates + 1):
            if k <= 1:  # the first update is not counted
                began = time.perf_counter()
            cross_entropy(network(x[0]), y[0]).backward()  # type: ignore[no-untyped-call]
        times[threads] = time.perf_counter() - began
    return min(times, key=lambda threads: times[threads])


def graph(job: Job) -> nx.Graph:
    """Return the graph of the nodes."""
    return nx.random_regular_graph(job.degree, job.nodes, seed=0)


def report(who: str, version: str, updates: int, seconds: float) -> None:
    """Print the one line that `simulation.py` reads."""
    rate = updates / seconds
    figures = {"updates_per_s": rate, "updates": updates, "seconds": seconds}
    print(json.dumps({"who": who, "version": version, **figures}))
