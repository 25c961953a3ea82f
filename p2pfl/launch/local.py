"""``--on local``: a process for each peer, on this machine; and what such a process does."""

from __future__ import annotations

import json
import math
import multiprocessing as mp
import os
import signal
from collections.abc import Callable
from multiprocessing import connection
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from p2pfl.errors import P2pflError, RunError, UserError
from p2pfl.experiment.experiment import Experiment
from p2pfl.launch.crew import Crew, News, free_addresses
from p2pfl.launch.outcome import Outcome
from p2pfl.launch.serving import Post, serve
from p2pfl.results.predictor import Predictor, Signature
from p2pfl.results.record import Recorder
from p2pfl.results.runs import merge_peers, read_summary
from p2pfl.results.saved import load, save_tensors
from p2pfl.runtime.setup import Ending, Row, Status
from p2pfl.topology.files import Network

if TYPE_CHECKING:
    from p2pfl.launch.session import Books, Watch, Where

PRELOAD = ["p2pfl.launch.local"]
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
    crew = Crew(_entry, _jobs(experiment, folder, where), _preload(experiment))
    watching = _Watching(crew, books, watch)
    try:
        watching.until_the_end()
    finally:
        crew.end()
    books.add(merge_peers(folder))
    outcome = _gather(experiment, folder, where, watching)
    error = watching.error()
    if error:
        return outcome, "failed", error
    return outcome, "interrupted" if watching.interrupted else "finished", None


def _jobs(experiment: Experiment, folder: Path, where: Where) -> list[dict[str, Any]]:
    addresses = free_addresses(experiment.nodes)
    if isinstance(experiment.drawn, Network):
        given = experiment.drawn.addresses
        addresses = given if len(given) == experiment.nodes else addresses
    threads = max(1, (os.cpu_count() or 1) // experiment.nodes)
    return [
        {
            "experiment": experiment.to_dict(),
            "base": str(experiment.base),
            "node": node,
            "addresses": addresses,
            "data": str(where.data) if where.data else None,
            "device": where.device,
            "join_timeout": where.join_timeout,
            "folder": str(folder / "peers" / f"{node:03d}"),
            "threads": threads,
        }
        for node in range(experiment.nodes)
    ]


def _preload(experiment: Experiment) -> list[str]:
    """Say what the processes should share: importing scikit-learn takes each 0.7 s."""
    more = ["sklearn.datasets"] if experiment.sections["data"].name in SCIKIT else []
    return [*PRELOAD, *more]


def _entry(job: dict[str, Any], pipe: connection.Connection[Any, Any]) -> None:
    """Be one peer process."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the parent's to deal with
    stop = _Stop()
    signal.signal(signal.SIGTERM, stop.hear)
    say = _speak(pipe, stop)
    try:
        experiment = Experiment.from_dict(job["experiment"], job["base"])
        post = Post(
            job["node"],
            job["addresses"][job["node"]],
            job["addresses"],
            Path(job["data"]) if job["data"] else None,
            job["device"],
            job["join_timeout"],
        )
        folder = Path(job["folder"])
        summary = peer_run(experiment, post, folder, say, stop.go_on, job["threads"])
        say({"status": summary["status"]})
    except P2pflError as error:
        say({"error": str(error), "user": isinstance(error, UserError)})
        raise SystemExit(1) from None


class _Stop:
    """Remembers that this process was asked to end, or has lost its parent."""

    def __init__(self) -> None:
        self.asked = False

    def hear(self, number: int, frame: object) -> None:
        self.asked = True

    def go_on(self) -> bool:
        parent = mp.parent_process()
        return not self.asked and (parent is None or parent.is_alive())


def _speak(pipe: connection.Connection[Any, Any], stop: _Stop) -> Say:
    def say(news: News) -> None:
        try:
            pipe.send_bytes(json.dumps(news).encode())
        except OSError:  # nobody listens any more
            stop.asked = True

    return say


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
        recorder.finish("failed", {}, str(error))
        raise
    ending = served.ending
    status: Status = "interrupted" if ending.reason == "interrupted" else "finished"
    signature = Signature.of(served.federation, experiment.loss(served.federation))
    predictor = Predictor.of(served.task, signature, ending.params[0], post.node)
    recorder.model(post.node, *save_tensors(predictor, len(rows)))
    summary = {
        "status": status,
        "reason": ending.reason,
        "node_updates": ending.updates,
        "missed": ending.missed,
        "rejected": ending.rejected,
        "rounds": len(rows),
        "bytes_sent": sum(row.bytes_sent for row in rows),
    }
    recorder.finish(status, summary)
    return summary


class _Watching:
    """Follows the news of the peer processes."""

    def __init__(self, crew: Crew, books: Books, watch: Watch) -> None:
        self.crew, self.books, self.watch = crew, books, watch
        self.interrupted = False
        self.failed: dict[int, str] = {}
        self._phase: dict[int, str] = {}
        self._done: set[int] = set()

    def until_the_end(self) -> None:
        """Return when every process has ended.

        Raises:
            UserError, RunError: a peer failed before training, so nobody can begin.
        """
        try:
            for node, news in self.crew.news():
                if node >= 0:
                    self._hear(node, news)
        except KeyboardInterrupt:
            self.interrupted = True
            self.books.event("interrupted")
            self.crew.end()
            for node, news in self.crew.news():  # what they said on their way out
                self._hear(node, news)

    def error(self) -> str | None:
        """Say which peers failed, and how."""
        if not self.failed:
            return None
        return "; ".join(f"peer {node} {how}" for node, how in sorted(self.failed.items()))

    def _hear(self, node: int, news: News) -> None:
        if "row" in news:
            row: dict[str, Any] = news["row"]
            self.watch.rows([Row(**{k: math.nan if v is None else v for k, v in row.items()})])
        elif "phase" in news:
            self._phase[node] = news["phase"]
            self._tell(node, news["phase"])
        elif "status" in news:
            self._done.add(node)
            self._tell(node, news["status"])
        elif "error" in news:
            self.failed[node] = f"failed: {news['error']}"
            self._give_up_early(node, news)
        elif "exit" in news and node not in self._done and not self.interrupted:
            code = news["exit"]
            how = f"ended with code {code}"
            if code is not None and code < 0:
                how = f"was killed by {signal.Signals(-code).name}"
            self.failed.setdefault(node, how)
            self._tell(node, self.failed[node])
            self._give_up_early(node, {"error": f"peer {node} {how}", "user": False})

    def _give_up_early(self, node: int, news: News) -> None:
        """End everybody if a peer failed before training: the others wait for it in vain."""
        if self._phase.get(node) != "training" and "training" not in self._phase.values():
            kind = UserError if news["user"] else RunError
            raise kind(news["error"])

    def _tell(self, node: int, phase: str) -> None:
        self.books.event("peer", node=node, phase=phase)
        self.watch.phase(node, phase)


def _gather(experiment: Experiment, folder: Path, where: Where, watching: _Watching) -> Outcome:
    """Put the peers' final models side by side."""
    federation = experiment.federation(where.data)
    affine = experiment.affine(federation)
    task = experiment.task(federation, affine, where.device)
    params, nodes, summaries = [], [], []
    for node in range(experiment.nodes):
        home = folder / "peers" / f"{node:03d}"
        if not list(home.glob("models/*.safetensors")):
            continue
        module = load(home, node).model
        params.append(task.spec.flatten(module).to(task.device, task.dtype))
        nodes.append(node)
        summaries.append(read_summary(home))
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
    return Outcome(experiment, federation, task, affine, ending)
