"""Make one run folder of what the peers have left on their hosts.

The data stay where they are, so nothing is measured here: scores are those that the peers have
measured themselves, and the mean model is put together from theirs without being tried.
"""

from __future__ import annotations

import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from p2pfl.errors import UserError
from p2pfl.experiment.experiment import Experiment
from p2pfl.fleet.record import Ending, Place
from p2pfl.fleet.ssh import Shell
from p2pfl.results.predictor import Predictor
from p2pfl.results.record import (
    EVENTS,
    EXPERIMENT,
    METRICS,
    MODELS,
    PEERS,
    SKETCHES,
    SUMMARY,
    Recorder,
)
from p2pfl.results.runs import (
    Facts,
    columns,
    merge_peers,
    read_experiment,
    read_rows,
    read_summary,
    summarise,
)
from p2pfl.results.saved import load, save_tensors
from p2pfl.runtime.setup import Status

ON = "lan"
# What stands in the summary from the start: files that the experiment names may change later.
FACTS = ("experiment", "on", "algorithm", "topology", "seed", "nodes", "attackers", "attack")
COUNTS = ("node_updates", "missed", "rejected")
TOLD = {"reason", *COUNTS}  # by the summary of a peer that has trained
LOG = "peer.log"
DRAFT = ".collected"
DAMAGED = ".damaged"  # is added to the name of a file that cannot be read


def open_folder(folder: Path, experiment: Experiment) -> None:
    """Make a run folder whose status is ``"running"``; `gather` completes it.

    Raises:
        UserError: it holds something already.
    """
    about = _facts(experiment)._asdict() | {"base": str(experiment.base)}
    Recorder(folder, experiment.to_toml(), **about).finish("running", {})


async def fetch(folder: Path, place: Place, shell: Shell) -> None:
    """Copy what the peers of a host have written into ``peers/``.

    Only names that a peer is known to write are asked for, whatever else a host may have.

    Raises:
        HostError: the host cannot be reached.
    """
    wanted = []
    for node in place.nodes:
        there, here = f"{place.folder}/{node:03d}", folder / PEERS / f"{node:03d}"
        model = _model(folder, node).relative_to(here)
        names = (EXPERIMENT, METRICS, EVENTS, SUMMARY, SKETCHES, str(model))
        wanted += [(f"{there}/{name}", here / name) for name in names]
        wanted.append((f"{there}.log", here / LOG))
    await shell.fetch(wanted)


def set_aside(folder: Path) -> dict[int, str]:
    """Rename fetched metrics that are damaged, which would keep the others from being merged.

    Returns:
        What is wrong with those of each peer that has such.
    """
    faults = {}
    for path in (folder / PEERS).glob(f"*/{METRICS}"):
        try:
            read_rows(path)
        except UserError as error:
            aside = path.rename(path.with_name(METRICS + DAMAGED))
            faults[int(path.parent.name)] = f"its metrics are damaged: {error}; kept as {aside}"
    return faults


def gather(folder: Path, endings: Mapping[int, Ending], status: Status, error: str | None) -> None:
    """Put together what was fetched, as any other run folder holds it.

    It is written aside and then moved, so that doing it again does no harm.

    Args:
        folder: made by `open_folder`.
        endings: how each peer has ended: its ``"status"``, and ``"why"``.
        status: how the run has ended.
        error: what went wrong, in words.
    """
    tables, about = read_experiment(folder), read_summary(folder)
    text = (folder / EXPERIMENT).read_text(encoding="utf-8")
    rows = merge_peers(folder)
    draft = folder / DRAFT
    shutil.rmtree(draft, ignore_errors=True)
    recorder = Recorder(draft, text, base=about.get("base"))
    for node, ending in sorted(endings.items()):
        recorder.event("peer", node=node, phase=ending["status"], why=ending["why"])
    recorder.rows(rows)
    sums = [read_summary(home) for home in sorted((folder / PEERS).glob("*")) if _ended(home)]
    known: dict[str, Any] = {key: about[key] for key in FACTS}
    facts = Facts(**known)._replace(
        reason=", ".join(sorted({part["reason"] for part in sums})),
        **{key: sum(part[key] for part in sums) for key in COUNTS},
    )
    summary = summarise(columns(rows), facts)
    honest = set(range(facts.nodes)).difference(facts.attackers or ())
    got_through = [
        node
        for node, ending in sorted(endings.items())
        if ending["status"] != "failed" and _model(folder, node).is_file() and node in honest
    ]
    if tables["output"]["models"] != "none":
        try:
            mean = mean_model(folder, got_through)
            recorder.model("mean", *save_tensors(mean, summary["rounds"]))
        except Exception as why:  # anything: the model may be the user's, and changed since
            summary["mean_model_missing"] = str(why) if isinstance(why, UserError) else repr(why)
    recorder.finish(status, summary, error)
    _move(draft, folder)


def mean_model(folder: Path, nodes: Sequence[int]) -> Predictor:
    """Return the mean of the models of these nodes, and of what they standardise with.

    Raises:
        UserError: there are none, they are not alike, or their layers hold statistics of the
            data, which cannot be had without them.
    """
    if not nodes:
        raise UserError("no peer has got through")
    mean = load(folder, nodes[0])
    if any(True for _ in mean.model.buffers()):
        raise UserError("the model's buffers are estimated from data, which are on the hosts")
    sums = [place.double() for place in mean.state_dict().values()]
    for node in nodes[1:]:
        other = load(folder, node)
        if other.signature != mean.signature:
            raise UserError(f"the data of peers {nodes[0]} and {node} differ in their columns")
        sums = [a + b for a, b in zip(sums, other.state_dict().values(), strict=True)]
    with torch.no_grad():
        for place, total in zip(mean.state_dict().values(), sums, strict=True):
            place.copy_(total / len(nodes))
    return mean


def _model(folder: Path, node: int) -> Path:
    return folder / PEERS / f"{node:03d}" / MODELS / f"node-{node:04d}.safetensors"


def _move(draft: Path, folder: Path) -> None:
    for path in sorted(draft.rglob("*")):
        if path.is_file():
            place = folder / path.relative_to(draft)
            place.parent.mkdir(exist_ok=True)
            path.replace(place)
    shutil.rmtree(draft)


def _ended(home: Path) -> bool:
    """Say whether a peer has left a summary that tells how training went."""
    try:
        return TOLD.issubset(read_summary(home))
    except UserError:
        return False


def _facts(experiment: Experiment) -> Facts:
    tables = experiment.to_dict()
    return Facts(
        experiment=tables["name"],
        on=ON,
        algorithm=tables["algorithm"]["name"],
        topology=tables["topology"]["name"],
        seed=tables["seed"],
        nodes=tables["nodes"],
        attackers=list(experiment.attackers.who) or None,
        attack=experiment.attack,
    )
