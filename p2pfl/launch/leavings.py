"""What peer processes leave: folders that a next life goes on in, and models put side by side."""

from __future__ import annotations

import math
from collections.abc import Iterable
from pathlib import Path
from typing import Any, NamedTuple

import torch

from p2pfl.errors import RunError, UserError
from p2pfl.experiment.experiment import Experiment
from p2pfl.files import is_file
from p2pfl.launch.books import Where
from p2pfl.launch.outcome import Outcome, honest_only, middle, pooled_task
from p2pfl.launch.resuming import compare
from p2pfl.launch.watching import Watching
from p2pfl.results.durable import DRAFT
from p2pfl.results.record import (
    EVENTS,
    EXPERIMENT,
    HEADER,
    METRICS,
    PEERS,
    SKETCHED,
    SUMMARY,
    Mark,
    Recorder,
)
from p2pfl.results.runs import read_summary, sound_rows
from p2pfl.results.saved import load
from p2pfl.runtime.setup import Ending, Mass, Row


class Before(NamedTuple):
    """How far the earlier lives of a peer have come; at first nothing.

    Attributes:
        mark: where its files end, if there are any.
        rounds: the first round that is not in them.
        wall_s: seconds that it has been training.
    """

    mark: Mark | None = None
    rounds: int = 0
    wall_s: float = 0.0


def home(folder: Path, node: int) -> Path:
    """Return the folder of a peer in that of its run."""
    return folder / PEERS / f"{node:03d}"


def check_home(folder: Path, experiment: Experiment, node: int) -> None:
    """Refuse to go on in a folder that is not that of the same peer of the same experiment.

    Raises:
        UserError: it says whose it is, or that the folder cannot be read.
    """
    if not _has_begun(folder):
        return
    summary = read_summary(folder)
    if (summary.get("on"), summary.get("node")) != ("peer", node):
        whose = f"peer {summary['node']}" if "node" in summary else "another kind of run"
        raise UserError(f"{folder} is the folder of {whose}, not of peer {node}")
    compare(Experiment.load(folder / EXPERIMENT), experiment, folder)


def has_finished(folder: Path) -> bool:
    """Say whether a run folder is that of a run that came to its end."""
    return (folder / SUMMARY).is_file() and read_summary(folder).get("status") == "finished"


def so_far(folder: Path) -> Before:
    """Return how far a peer had come when it was killed: what it has written whole counts.

    Raises:
        UserError: the folder cannot be read, or is one of another version.
    """
    if not _has_begun(folder):
        return Before(Mark() if _was_made(folder) else None)
    rows = sound_rows(folder / METRICS)
    if not rows:
        return Before(Mark())
    last, end = rows[-1]
    return Before(Mark(end, len(rows) * SKETCHED, last.wall_s), last.round + 1, last.wall_s)


def _has_begun(folder: Path) -> bool:
    """Say whether a run folder was made to the end."""
    return is_file(folder / EXPERIMENT)


def _was_made(folder: Path) -> bool:
    """Say whether a folder holds only what is there of one when its making is broken off."""
    names = {path.name for path in folder.iterdir()} if folder.is_dir() else set[str]()
    drafts = {f".{name}{DRAFT}" for name in (SUMMARY, EXPERIMENT)}
    if METRICS not in names or names - {METRICS, EVENTS, SUMMARY, *drafts}:
        return False
    return (folder / METRICS).stat().st_size <= len(HEADER)


def bury(folder: Path, gone: Iterable[int]) -> None:
    """Say in the folders of peers that were killed, and have not come back, that they were."""
    for node in gone:
        place = home(folder, node)
        if not _has_begun(place):
            continue
        told = read_summary(place)
        if told["status"] == "running":
            text = (place / EXPERIMENT).read_text(encoding="utf-8")
            recorder = Recorder(place, text, so_far(place).mark, **told)
            recorder.finish("interrupted", {"reason": "killed"})


def measured_at_the_end(rows: list[Row], outcome: Outcome) -> list[Row]:
    """Evaluate the final models here where no peer could: the test rows are not all in one place.

    Peers with a file of data each do not see each other's test rows; we see all the files.
    """
    if not all(math.isnan(row.eval_loss) for row in rows) or outcome.task.test is None:
        return rows
    ending = honest_only(outcome.ending, outcome.experiment)
    nodes = ending.nodes
    loss, acc = outcome.task.evaluate(ending.params, nodes)
    found = dict(zip(nodes.tolist(), zip(loss.tolist(), acc.tolist(), strict=True), strict=True))
    last = {row.node: row.round for row in rows}
    return [
        row._replace(eval_loss=found[row.node][0], eval_acc=found[row.node][1])
        if row.node in found and row.round == last[row.node]
        else row
        for row in rows
    ]


def gather(experiment: Experiment, folder: Path, where: Where, watching: Watching) -> Outcome:
    """Put the final models of the peers that got through side by side.

    Raises:
        RunError: there is none.
    """
    federation = experiment.federation(where.data)
    affine = experiment.affine(federation)
    task = experiment.task(federation, affine, where.device)
    lost = watching.failed.keys() | watching.absent
    places = {node: home(folder, node) for node in range(experiment.nodes) if node not in lost}
    nodes = [node for node, place in places.items() if list(place.glob("models/*.safetensors"))]
    if not nodes and watching.interrupted:
        raise KeyboardInterrupt
    if not nodes:
        away = f": the churn script keeps peers {sorted(watching.absent)} away"
        none = "no peer has left a model" + (away if watching.absent else "")
        raise RunError(watching.error() or none)
    params = torch.empty((len(nodes), task.d), dtype=task.dtype, device=task.device)
    for row, node in zip(params, nodes, strict=True):
        row.copy_(task.spec.flatten(load(places[node], node).model))
    summaries = [read_summary(places[node]) for node in nodes]
    ending = Ending(
        params,
        torch.tensor(nodes),
        ", ".join(sorted({summary["reason"] for summary in summaries})),
        sum(summary["node_updates"] for summary in summaries),
        missed=sum(summary["missed"] for summary in summaries),
        rejected=sum(summary["rejected"] for summary in summaries),
        one_sided=sum(summary["one_sided"] for summary in summaries),
        mass=_mass_of(summaries),
    )
    pooled = pooled_task(experiment, federation, affine, where.device)
    between = middle(honest_only(ending, experiment))
    return Outcome(experiment, federation, task, affine, ending, pooled, between)


def _mass_of(summaries: list[dict[str, Any]]) -> Mass | None:
    """Return the weight of all together, where models are averaged by mass."""
    each = [Mass(**summary["mass"]) for summary in summaries if summary["mass"]]
    return Mass(*map(sum, zip(*each, strict=True))) if each else None
