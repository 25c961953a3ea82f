"""``--on local``: a process for each peer, on this machine; and what such a process does."""

from __future__ import annotations

import json
import multiprocessing as mp
import shutil
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from multiprocessing import connection
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from p2pfl.churn.script import Script
from p2pfl.errors import P2pflError, UserError, short_of_memory
from p2pfl.experiment.experiment import Experiment
from p2pfl.launch import cores
from p2pfl.launch.books import Books, Watch, Where
from p2pfl.launch.crew import Crew, News, reserve
from p2pfl.launch.leavings import (
    Before,
    bury,
    check_home,
    gather,
    home,
    measured_at_the_end,
    so_far,
)
from p2pfl.launch.nemesis import Nemesis, needs_proxy
from p2pfl.launch.outcome import Outcome, conserved
from p2pfl.launch.proxy import Proxy
from p2pfl.launch.serving import Post, serve
from p2pfl.launch.watching import Watching
from p2pfl.results.predictor import Predictor, Signature
from p2pfl.results.record import CHECKPOINTS, Recorder
from p2pfl.results.runs import merge_peers
from p2pfl.results.saved import save_tensors
from p2pfl.results.sketches import moved
from p2pfl.runtime.handshake import NeighbourGone
from p2pfl.runtime.setup import Ending, Row, Status

PRELOAD = ["p2pfl.launch.local"]
ALIVE = 1.0  # seconds after which a process without news says that it is there
LINGER = 5.0  # seconds for the last messages; between processes of one machine they are short
SCIKIT = ("breast_cancer", "wine", "diabetes")  # data that need it imported

Job = dict[str, Any]
Say = Callable[[dict[str, Any]], None]


def run_local(
    experiment: Experiment, books: Books, where: Where, watch: Watch, resume: bool = False
) -> tuple[Outcome, Status, str | None]:
    """Start the peers, watch them to the end, and put together what they have left.

    Args:
        experiment: what is run.
        books: of the run.
        where: what may differ from machine to machine.
        watch: told how it goes on.
        resume: let every peer go on from its newest checkpoint, if it has one.

    Raises:
        UserError, RunError: no peer got through.
    """
    assert books.folder is not None
    folder, everybody = books.folder, tuple(range(experiment.nodes))
    script = experiment.churn or Script("", experiment.nodes, everybody)
    jobs = _jobs(experiment, folder, where, resume)
    with ExitStack() as stack:
        for job in jobs:
            stack.callback(job["socket"].close)
        proxy = stack.enter_context(_between(jobs, experiment)) if needs_proxy(script) else None
        crew = Crew(_entry, preload(experiment))
        stack.callback(crew.end)

        def start(node: int) -> None:
            crew.start(node, jobs[node])
            # The process has taken the socket with it; the next one binds the address anew.
            jobs[node] |= {"socket": None, "resume": True}

        nemesis = Nemesis(script, crew, start, proxy)
        alone = experiment.algorithm.needs.weights == "none"
        watching = Watching(crew, nemesis, script.founders, books, watch, alone)
        for node in script.founders:
            start(node)
        watching.until_the_end()
    bury(folder, nemesis.down)
    churn = watching.churn() if experiment.churn else None
    if churn:
        books.note(churn=churn)
    rows = merge_peers(folder)
    try:
        outcome = gather(experiment, folder, where, watching)
        if churn:
            books.note(churn=churn | conserved(outcome.ending, moved(folder)))
        rows = measured_at_the_end(rows, outcome)
    finally:
        books.add(rows)
    error = watching.error()
    if watching.interrupted:
        return outcome, "interrupted", error
    return outcome, "failed" if error else "finished", error


@contextmanager
def _between(jobs: list[Job], experiment: Experiment) -> Iterator[Proxy]:
    """Put a proxy between the peers: it is what they take for one another."""
    targets = {job["node"]: job["socket"].getsockname() for job in jobs}
    with Proxy(targets, experiment.seed) as proxy:
        for job in jobs:
            job["addresses"] = {**job["addresses"], **proxy.addresses(job["node"])}
        yield proxy


def _jobs(experiment: Experiment, folder: Path, where: Where, resume: bool) -> list[Job]:
    # On loopback, whatever a network file says: its addresses may be those of other machines.
    sockets = reserve(experiment.nodes)
    ports = [held.getsockname()[1] for held in sockets]
    addresses = {node: f"tcp://127.0.0.1:{port}" for node, port in enumerate(ports)}
    nodes = experiment.nodes
    threads = cores.threads_each(nodes)
    dealt = cores.deal(nodes) if where.bind else [cores.usable()] * nodes
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
            "folder": str(home(folder, node)),
            "threads": threads,
            "cores": dealt[node],
            "resume": resume,
        }
        for node in range(experiment.nodes)
    ]


def preload(experiment: Experiment) -> list[str]:
    """Say what the processes should share: importing scikit-learn takes each 0.7 s."""
    more = ["sklearn.datasets"] if experiment.sections["data"].name in SCIKIT else []
    return [*PRELOAD, *more]


def _entry(job: Job, pipe: connection.Connection[Any, Any]) -> None:
    """Be one peer process."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the parent's to deal with
    cores.bind(job["cores"])  # before there is any other thread
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
            resume=job["resume"],
        )
        folder = Path(job["folder"])
        with short_of_memory():
            threads = job["threads"]
            summary = peer_run(experiment, post, folder, parent.tell, parent.go_on, threads)
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
        post: which peer this is, and where. If it resumes, it goes on in the folder of its
            earlier life.
        folder: what it leaves.
        say: told ``{"phase": ...}``, ``{"row": {...}}``, ``{"noticed": {...}}``,
            ``{"refused": {...}}`` and ``{"membership": {...}}``.
        go_on: asked a few times a second.
        threads: how many to compute with; 0: all.

    Raises:
        UserError, RunError: as `serve`; the folder says so.
    """
    if threads:
        torch.set_num_threads(threads)
    about = {"on": "peer", "experiment": experiment.name, "node": post.node}
    about |= {"seed": experiment.seed, "base": str(experiment.base)}
    if post.resume:
        check_home(folder, experiment, post.node)
    before = so_far(folder) if post.resume else Before()
    recorder = Recorder(folder, experiment.to_toml(), before.mark, **about)
    notes = _Notes(recorder, say, before, post.node in experiment.attackers.who)
    post = replace(post, home=folder, elapsed=before.wall_s)
    try:
        served = serve(experiment, post, notes.on_row, go_on, notes.on_phase, notes.on_event)
        summary = {**_summary(served.ending, notes.rows), **served.links}
        if served.began:
            signature = Signature.of(served.federation, experiment.loss(served.federation))
            predictor = Predictor.of(served.task, signature, served.ending.params[0], post.node)
            recorder.model(post.node, *save_tensors(predictor, summary["rounds"]))
    except Exception as error:  # even one of ours: no folder says for ever that it is running
        links = error.links if isinstance(error, P2pflError) else {}
        recorder.finish("failed", links, str(error) or type(error).__name__)
        raise
    recorder.finish(summary["status"], summary)
    if summary["status"] == "finished":  # there is nothing to come back to
        shutil.rmtree(folder / CHECKPOINTS, ignore_errors=True)
    return summary


class _Notes:
    """What a peer writes down as it goes, and says to whoever listens.

    Attributes:
        rows: the rounds of this life.
    """

    def __init__(self, recorder: Recorder, say: Say, before: Before, attacks: bool) -> None:
        self._recorder, self._say, self._before = recorder, say, before
        self._attacks = attacks  # its model is then no part of what is reported
        self.rows: list[Row] = []

    def on_row(self, row: Row, mark: Tensor) -> None:
        """Take note of a round."""
        self.rows.append(row)
        if row.round >= self._before.rounds:
            self._recorder.row(row, None if self._attacks else mark)
        numbers = row._asdict()
        self._say({"row": {k: None if v != v else v for k, v in numbers.items()}})  # no NaN in JSON

    def on_phase(self, phase: str) -> None:
        """Take note of a phase."""
        self._recorder.event(phase)
        self._say({"phase": phase})

    def on_event(self, kind: str, **fields: Any) -> None:  # noqa: ANN401
        """Take note of anything else; of the others, say it too."""
        self._recorder.event(kind, **fields)
        if kind in ("noticed", "refused", "membership"):
            self._say({kind: fields})


def _summary(ending: Ending, rows: list[Row]) -> dict[str, Any]:
    status: Status = "interrupted" if ending.reason == "interrupted" else "finished"
    return {
        "status": status,
        "reason": ending.reason,
        "node_updates": ending.updates,
        "missed": ending.missed,
        "one_sided": ending.one_sided,
        "mass": ending.mass._asdict() if ending.mass else None,
        "rejected": ending.rejected,
        "rounds": rows[-1].round + 1 if rows else 0,
        "bytes_sent": sum(row.bytes_sent for row in rows),
    }
