"""Gossip learning as a PyTorch user would write it: a module per node, and a loop over them.

    python scripts/benchmarks/plain_loop.py [--model mlp] [--nodes 100] [--processes 1] ...

It is meant to be fast: no data loader, batches that are slices, whichever kind of
`torch.optim.SGD` and number of threads (one or all) is fastest for the model, and parameters that
lie in one matrix ``[n, d]``, so that mixing is one sparse product. There are two such matrices, and
two modules for each node that look into them: every round mixes from one into the other, and
copies nothing back.

With several processes the matrices are in shared memory, every process trains and mixes its
own share of the nodes with one thread, and they wait for each other once a round.

Counted are local steps, mixing and waiting; not the start, the making of data and modules, nor
the first round.
"""

from __future__ import annotations

import itertools
import sys
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.multiprocessing as mp
from jobs import (
    BATCH,
    RATE,
    WARM_UP,
    Job,
    build,
    fastest_threads,
    graph,
    job,
    made_up,
    options,
    report,
)
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.nn.utils import parameters_to_vector

Wait = Callable[[], object]
PATIENCE = 600  # seconds for the slowest process to finish a round
KINDS = ({"foreach": False}, {"foreach": True}, {"fused": True})


class Node(NamedTuple):
    """One node, as it looks into one of the two matrices."""

    model: nn.Module
    optimiser: torch.optim.SGD

    def update(self, x: Tensor, y: Tensor) -> None:
        """Take one local step."""
        self.optimiser.zero_grad()
        cross_entropy(self.model(x), y).backward()  # type: ignore[no-untyped-call]
        self.optimiser.step()


def main() -> None:
    """Run the job and print the figures."""
    parser = options(__doc__)
    parser.add_argument("--processes", type=int, default=1)
    given = parser.parse_args()
    seconds = measure(job(given), given.processes)
    who = f"plain loop, {given.processes} process(es)"
    report(who, torch.__version__, job(given).updates, seconds)


def measure(job: Job, processes: int) -> float:
    """Return the seconds that the counted rounds take."""
    start = parameters_to_vector(build(job.model).parameters()).detach()
    matrices = [start.repeat(job.nodes, 1) for _ in range(2)]
    if processes == 1:
        torch.set_num_threads(fastest_threads(job.model, job.threads))
        return work(job, range(job.nodes), matrices, lambda: None)
    for matrix in matrices:
        matrix.share_memory_()  # type: ignore[no-untyped-call]
    context = mp.get_context("spawn")
    barrier, found = context.Barrier(processes, timeout=PATIENCE), context.SimpleQueue()
    workers = [
        context.Process(target=worker, args=(job, share, matrices, barrier, found))
        for share in shares(job.nodes, processes)
    ]
    for process in workers:
        process.start()
    for process in workers:
        process.join()
    if any(process.exitcode for process in workers):
        sys.exit("a process of the plain loop has failed")
    return max(float(found.get()) for _ in workers)


def shares(nodes: int, processes: int) -> list[range]:
    """Cut the nodes into stretches of about the same length, one for each process."""
    edges = [nodes * k // processes for k in range(processes + 1)]
    return [range(*pair) for pair in itertools.pairwise(edges)]


def worker(job: Job, mine: range, matrices: list[Tensor], barrier: Any, found: Any) -> None:  # noqa: ANN401
    """Do one process's share, and say how long it took."""
    torch.set_num_threads(1)
    found.put(work(job, mine, matrices, barrier.wait))


def work(job: Job, mine: range, matrices: list[Tensor], wait: Wait) -> float:
    """Train and mix some of the nodes; return the seconds that the counted rounds take.

    Args:
        job: what is to be done.
        mine: the nodes of this process.
        matrices: the parameters of all nodes, twice, ``[n, d]``.
        wait: returns when all processes have called it.
    """
    images, labels = (part[mine.start : mine.stop] for part in made_up(job.nodes, job.local_steps))
    stretches = [slice(i, i + BATCH) for i in range(0, images.shape[1], BATCH)]
    batches = [(images[:, part], labels[:, part]) for part in stretches]
    kind = fastest(job, images[0, :BATCH], labels[0, :BATCH])
    nodes = [[looking_into(matrix[i], job, kind) for i in mine] for matrix in matrices]
    weights = mixing(job, mine)
    wait()
    began = time.perf_counter()
    for k in range(WARM_UP + job.rounds):
        if k == WARM_UP:
            began = time.perf_counter()
        here, there = matrices if k % 2 == 0 else matrices[::-1]
        for i, node in enumerate(nodes[k % 2]):
            for x, y in batches:
                node.update(x[i], y[i])
        wait()
        rows = there[mine.start : mine.stop]
        torch.addmm(rows, weights, here, beta=0, out=rows)
    wait()
    return time.perf_counter() - began


def looking_into(row: Tensor, job: Job, kind: dict[str, bool]) -> Node:
    """Return a node whose parameters are views of a row ``[d]``."""
    model, at = build(job.model), 0
    for parameter in model.parameters():
        parameter.data = row[at : at + parameter.numel()].view_as(parameter)
        at += parameter.numel()
    return Node(model, torch.optim.SGD(model.parameters(), lr=RATE, **kind))


def mixing(job: Job, mine: range) -> Tensor:
    """Return some rows of the mixing matrix, ``[mine, n]``: 1 / (degree + 1) for each heard."""
    network = graph(job)
    heard = torch.tensor([sorted([i, *network[i]]) for i in mine])
    begin = torch.arange(0, heard.numel() + 1, heard.shape[1])
    values = torch.full((heard.numel(),), 1 / heard.shape[1])
    return torch.sparse_csr_tensor(begin, heard.flatten(), values, (len(mine), job.nodes))


def fastest(job: Job, x: Tensor, y: Tensor, updates: int = 20) -> dict[str, bool]:
    """Return which kind of SGD is the fastest for a model, by trying."""
    row = parameters_to_vector(build(job.model).parameters()).detach()
    times = []
    for kind in KINDS:
        node = looking_into(row.clone(), job, kind)
        node.update(x, y)
        began = time.perf_counter()
        for _ in range(updates):
            node.update(x, y)
        times.append(time.perf_counter() - began)
    return KINDS[times.index(min(times))]


if __name__ == "__main__":
    main()
