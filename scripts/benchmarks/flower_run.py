"""The same job on Flower's simulation: FedAvg with a server, since Flower has no gossip.

    python scripts/benchmarks/flower_run.py [--model mlp] [--nodes 100] [--rounds 3] ...

In an environment of its own: ``pip install 'flwr[simulation]'``. Every client takes part in every
round and takes the same local steps on the same data as a node elsewhere; one actor a core, each
with one thread. `--degree` means nothing here.

Counted are the rounds after the first: from one averaged model to the next, through the last.
Not counted are imports, the start of Ray and of its actors, the making of data (every actor keeps
them, after the first round), and evaluation, of which there is none.
"""

from __future__ import annotations

import contextlib
import functools
import importlib.metadata
import logging
import os
import sys
import time
from typing import NamedTuple

os.environ |= {"FLWR_TELEMETRY_ENABLED": "0", "RAY_DEDUP_LOGS": "0"}

import torch
from flwr.app import (  # type: ignore[import-not-found]
    ArrayRecord,
    ConfigRecord,
    Context,
    Message,
    MetricRecord,
    RecordDict,
)
from flwr.clientapp import ClientApp  # type: ignore[import-not-found]
from flwr.serverapp import Grid, ServerApp  # type: ignore[import-not-found]
from flwr.serverapp.strategy import FedAvg  # type: ignore[import-not-found]
from flwr.simulation import run_simulation  # type: ignore[import-not-found]
from jobs import BATCH, RATE, WARM_UP, Job, build, job, made_up, options, report
from torch import Tensor
from torch.nn.functional import cross_entropy


class Round(NamedTuple):
    """What one round has come to."""

    ended: float  # seconds, by this process's clock
    clients: int  # how many have answered


def main() -> None:
    """Run the job and print the figures."""
    given = job(options(__doc__).parse_args())
    logging.getLogger("flwr").setLevel(logging.ERROR)
    rounds: list[Round] = []
    server, client = ServerApp(), ClientApp()
    server.main()(functools.partial(serve, given, rounds))
    client.train()(train)
    resources = {
        "client_resources": {"num_cpus": 1, "num_gpus": 0.0},
        "init_args": {"num_cpus": os.cpu_count(), "logging_level": "error", "log_to_driver": False},
    }
    with contextlib.redirect_stdout(sys.stderr):
        run_simulation(server, client, given.nodes, backend_config=resources)
    seconds = rounds[-1].ended - rounds[WARM_UP - 1].ended
    updates = given.local_steps * sum(round.clients for round in rounds[WARM_UP:])
    report("Flower", importlib.metadata.version("flwr"), updates, seconds)


def serve(job: Job, rounds: list[Round], grid: Grid, context: Context) -> None:
    """Let all clients train for some rounds, and note what each round has come to."""

    def count(answers: list[RecordDict], weighted_by: str) -> MetricRecord:
        rounds.append(Round(time.perf_counter(), len(answers)))
        return MetricRecord()

    strategy = FedAvg(
        fraction_train=1.0,
        fraction_evaluate=0.0,
        min_train_nodes=job.nodes,
        min_available_nodes=job.nodes,
        train_metrics_aggr_fn=count,
    )
    task = ConfigRecord({"model": job.model, "nodes": job.nodes, "batches": job.local_steps})
    strategy.start(
        grid,
        ArrayRecord(build(job.model).state_dict()),
        num_rounds=WARM_UP + job.rounds,
        train_config=task,
    )


def train(message: Message, context: Context) -> Message:
    """Take the local steps of one client."""
    torch.set_num_threads(1)
    task = message.content["config"]
    x, y = made_up(task["nodes"], task["batches"])
    client = int(context.node_config["partition-id"])
    model = build(task["model"])
    model.load_state_dict(message.content["arrays"].to_torch_state_dict())
    steps(model, x[client], y[client])
    examples = MetricRecord({"num-examples": len(y[client])})
    content = RecordDict({"arrays": ArrayRecord(model.state_dict()), "metrics": examples})
    return Message(content, reply_to=message)


def steps(model: torch.nn.Module, images: Tensor, labels: Tensor) -> None:
    """Go once through the data of a client."""
    optimiser = torch.optim.SGD(model.parameters(), lr=RATE)
    for i in range(0, len(labels), BATCH):
        optimiser.zero_grad()
        cross_entropy(model(images[i : i + BATCH]), labels[i : i + BATCH]).backward()  # type: ignore[no-untyped-call]
        optimiser.step()


if __name__ == "__main__":
    main()
