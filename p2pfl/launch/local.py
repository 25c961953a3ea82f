"""``--on local``: a process for each peer, on this machine; and what such a process does."""

from __future__ import annotations

import json
import math
import multiprocessing as mp
import os
import signal
import time
from collections.abc import Callable
from multiprocessing import connection
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from p2pfl.errors import P2pflError, RunError, UserError
from p2pfl.experiment.experiment import Experiment
from p2pfl.launch.books import Books, Watch, Where
from p2pfl.launch.crew import Crew, News, listen
from p2pfl.launch.outcome import Outcome, middle, pooled_task
from p2pfl.launch.serving import Post, serve
from p2pfl.launch.watching import Watching
from p2pfl.results.predictor import Predictor, Signature
from p2pfl.results.record import Recorder
from p2pfl.results.runs import merge_peers, read_summary
from p2pfl.results.saved import load, save_tensors
from p2pfl.runtime.handshake import NeighbourGone
from p2pfl.runtime.setup import Ending, Row, Status

PRELOAD = ["p2pfl.launch.local"]
ALIVE = 1.0  # seconds after which a process without news says that it is there
LINGER = 5.0  # seconds for the last messages; between processes of one machine they are short
SCIKIT = ("digits", "breast_cancer", "wine", "diabetes")

Say = Callable[[dict[str, Any]], None]


def run_local(
    experiment: Experiment, books: Books, where: Where, watch: Watch
) -> tuple[Outcome, Status, str | None]:
    """Start the peers, watch them to the end, and put together what they have left.

    Raises:
        UserError, RunError: no peer got through.
    """
    assert books.folder is not None
    folder = books.folder
    crew = Crew(_entry, _jobs(experiment, folder, where), preload(experiment))
    watching = Watching(crew, books, watch)
    try:
        watching.until_the_end()
    finally:
        crew.end()
    rows = merge_peers(folder)
    try:
        outcome = _gather(experiment, folder, where, watching)
        rows = _measured_at_the_end(rows, outcome)
    finally:
        books.add(rows)
    error = watching.error()
    if watching.interrupted:
        return outcome, "interrupted", error
    return outcome, "failed" if error else "finished", error


def _jobs(experiment: Experiment, folder: Path, where: Where) -> list[dict[str, Any]]:
    # On loopback, whatever a network file says: its addresses may be those of other machines.
    sockets = listen(experiment.nodes)
    ports = [held.getsockname()[1] for held in sockets]
    addresses = {node: f"tcp://127.0.0.1:{port}" for node, port in enumerate(ports)}
    threads = max(1, (os.cpu_count() or 1) // experiment.nodes)
    return [
        {
            "experiment": experiment.to_dict(),
            "base": str(experiment.base),
            "node": node,
            "addresses": addresses,
            "socket": sockets[node],
            "data": str(where.data) if where.data else None,
            "device": where.device,
            "join_timeout": where.join_timeout,
            "linger": LINGER,
            "folder": str(folder / "peers" / f"{node:03d}"),
            "threads": threads,
        }
        for node in range(experiment.nodes)
    ]


def preload(experiment: Experiment) -> list[str]:
    """Say what the processes should share: importing scikit-learn takes each 0.7 s."""
    more = ["sklearn.datasets"] if experiment.sections["data"].name in SCIKIT else []
    return [*PRELOAD, *more]


def _entry(job: dict[str, Any], pipe: connection.Connection[Any, Any]) -> None:
    """Be one peer process."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the parent's to deal with
    parent = _Parent(pipe)
    signal.signal(signal.SIGTERM, parent.asks_to_end)
    try:
        experiment = Experiment.from_dict(job["experiment"], job["base"])
        post = Post(
            job["node"],
            job["addresses"][job["node"]],
            job["addresses"],
            Path(job["data"]) if job["data"] else None,
            job["device"],
            job["join_timeout"],
            job["linger"],
            job["socket"].detach() if job["socket"] else None,
        )
        folder = Path(job["folder"])
        summary = peer_run(experiment, post, folder, parent.tell, parent.go_on, job["threads"])
        parent.tell({"status": summary["status"]})
    except P2pflError as error:
        echo = isinstance(error, NeighbourGone)
        parent.tell({"error": str(error), "user": isinstance(error, UserError), "echo": echo})
        raise SystemExit(1) from None


class _Parent:
    """The process that has started this one, as seen from here."""

    def __init__(self, pipe: connection.Connection[Any, Any]) -> None:
        self._pipe, self._told, self._asked = pipe, 0.0, False

    def asks_to_end(self, number: int, frame: object) -> None:
        """Hear a signal."""
        self._asked = True

    def go_on(self) -> bool:
        """Say whether we are wanted any more, and let it know now and then that we live."""
        if time.monotonic() > self._told + ALIVE:
            self.tell({"alive": True})
        parent = mp.parent_process()
        return not self._asked and (parent is None or parent.is_alive())

    def tell(self, news: News) -> None:
        """Report something."""
        self._told = time.monotonic()
        try:
            self._pipe.send_bytes(json.dumps(news).encode())
        except OSError:  # nobody listens any more
            self._asked = True


def peer_run(
    experiment: Experiment,
    post: Post,
    folder: Path,
    say: Say,
    go_on: Callable[[], bool],
    threads: int = 0,
) -> dict[str, Any]:
    """Be one peer, write its folder, and return its summary.

    Args:
        experiment: the same at every peer.
        post: which peer this is, and where.
        folder: what it leaves.
        say: told ``{"phase": ...}`` and ``{"row": {...}}``.
        go_on: asked a few times a second.
        threads: how many to compute with; 0: all.

    Raises:
        UserError, RunError: as `serve`; the folder says so.
    """
    if threads:
        torch.set_num_threads(threads)
    about = {"on": "peer", "experiment": experiment.name, "node": post.node}
    about |= {"seed": experiment.seed, "base": str(experiment.base)}
    recorder = Recorder(folder, experiment.to_toml(), **about)
    rows: list[Row] = []

    def on_row(row: Row, mark: Tensor) -> None:
        rows.append(row)
        recorder.row(row, mark)
        numbers = row._asdict()
        say({"row": {k: None if v != v else v for k, v in numbers.items()}})  # NaN is not JSON

    def on_phase(phase: str) -> None:
        recorder.event(phase)
        say({"phase": phase})

    try:
        served = serve(experiment, post, on_row, go_on, on_phase)
    except P2pflError as error:
        recorder.finish("failed", error.links, str(error))
        raise
    if served.began:
        signature = Signature.of(served.federation, experiment.loss(served.federation))
        predictor = Predictor.of(served.task, signature, served.ending.params[0], post.node)
        recorder.model(post.node, *save_tensors(predictor, len(rows)))
    summary = {**_summary(served.ending, rows), **served.links}
    recorder.finish(summary["status"], summary)
    return summary


def _summary(ending: Ending, rows: list[Row]) -> dict[str, Any]:
    status: Status = "interrupted" if ending.reason == "interrupted" else "finished"
    return {
        "status": status,
        "reason": ending.reason,
        "node_updates": ending.updates,
        "missed": ending.missed,
        "rejected": ending.rejected,
        "rounds": len(rows),
        "bytes_sent": sum(row.bytes_sent for row in rows),
    }


def _measured_at_the_end(rows: list[Row], outcome: Outcome) -> list[Row]:
    """Evaluate the final models here where no peer could: the test rows are not all in one place.

    Peers with a file of data each do not see each other's test rows; we see all the files.
    """
    if not all(math.isnan(row.eval_loss) for row in rows) or outcome.task.test is None:
        return rows
    nodes = outcome.ending.nodes
    loss, acc = outcome.task.evaluate(outcome.ending.params, nodes)
    found = dict(zip(nodes.tolist(), zip(loss.tolist(), acc.tolist(), strict=True), strict=True))
    last = {row.node: row.round for row in rows}
    return [
        row._replace(eval_loss=found[row.node][0], eval_acc=found[row.node][1])
        if row.node in found and row.round == last[row.node]
        else row
        for row in rows
    ]


def _gather(experiment: Experiment, folder: Path, where: Where, watching: Watching) -> Outcome:
    """Put the final models of the peers that got through side by side."""
    federation = experiment.federation(where.data)
    affine = experiment.affine(federation)
    task = experiment.task(federation, affine, where.device)
    params, nodes, summaries = [], [], []
    for node in range(experiment.nodes):
        home = folder / "peers" / f"{node:03d}"
        if node in watching.failed or not list(home.glob("models/*.safetensors")):
            continue
        module = load(home, node).model
        params.append(task.spec.flatten(module).to(task.device, task.dtype))
        nodes.append(node)
        summaries.append(read_summary(home))
    if not nodes and watching.interrupted:
        raise KeyboardInterrupt
    if not nodes:
        raise RunError(watching.error() or "no peer has left a model")
    ending = Ending(
        torch.stack(params),
        torch.tensor(nodes),
        ", ".join(sorted({summary["reason"] for summary in summaries})),
        sum(summary["node_updates"] for summary in summaries),
        missed=sum(summary["missed"] for summary in summaries),
        rejected=sum(summary["rejected"] for summary in summaries),
    )
    pooled = pooled_task(experiment, federation, affine, where.device)
    return Outcome(experiment, federation, task, affine, ending, pooled, middle(ending))
