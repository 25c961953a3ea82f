"""Going on with a run that was broken off: which one, whether it is the same, and from where."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any, NamedTuple

from p2pfl import __version__
from p2pfl.errors import UserError
from p2pfl.experiment.experiment import Experiment
from p2pfl.launch.books import Books, On, Watch
from p2pfl.learning.packing import pack, unpack
from p2pfl.learning.spec import Spec
from p2pfl.results.checkpoint import CheckpointError, Checkpoints
from p2pfl.results.record import CHECKPOINTS, EXPERIMENT, Mark
from p2pfl.results.runs import read_summary
from p2pfl.runtime.simulate import Simulator, Snapshot

# What may differ in a run that goes on: how long it takes, and what is kept of it.
FREE = ("name", "base", "pace.rounds", "pace.seconds", "output", "checkpoint")


def unfinished(
    folder: Path, on: On | None = None, changes: Iterable[str] = ()
) -> tuple[Experiment, On]:
    """Return the experiment of a run that was broken off, and where it ran.

    Args:
        folder: the run folder.
        on: where the user wants to go on, if that was said.
        changes: ``"pace.rounds=200"`` and the like.

    Raises:
        UserError: there is no such run, it cannot go on, or not with these changes.
    """
    summary = read_summary(folder)
    began: On = summary.get("on", "simulate")
    if on is not None and on != began:
        raise UserError(f"{folder} began with --on {began} and cannot go on with --on {on}")
    again = f"p2pfl run {folder / EXPERIMENT} --on {began}"
    if began == "emulate":
        raise UserError(
            "the emulator cannot be resumed: it keeps no checkpoints. Start again, with the same"
            f" result: {again}"
        )
    if began not in ("simulate", "local"):
        raise UserError(f"{folder} is not the folder of a simulation and cannot be resumed")
    if summary.get("status") == "finished":
        raise UserError(f"{folder} has finished. For more rounds: {again} --set pace.rounds=...")
    before = Experiment.load(folder / EXPERIMENT)
    after = Experiment.load(folder / EXPERIMENT, changes)
    compare(before, after, folder)
    if began == "local" and before.churn:
        raise UserError(
            f"{folder} has a churn script, which cannot go on from the middle. Start again: {again}"
        )
    return after, began


def digest(experiment: Experiment, spec: Spec) -> str:
    """Return what tells a run, or a peer of it, from those of other experiments.

    Args:
        experiment: what is run.
        spec: the parameters of its model.
    """
    version = ".".join(__version__.split(".")[:2])  # of which the files of a run depend
    told = [version, spec.digest, sorted(_fixed(experiment).items())]
    return hashlib.sha256(json.dumps(told, default=str).encode()).hexdigest()


class Resumed(NamedTuple):
    """What a run goes on from.

    Attributes:
        rounds: that have been done; None: every peer knows for itself.
        mark: how far the books had come then.
        skipped: newer checkpoints that are not valid, and why.
    """

    rounds: int | None
    mark: Mark
    skipped: list[str]

    def tell(self, books: Books, watch: Watch) -> None:
        """Note where the run goes on, and what was passed over."""
        for text in self.skipped:
            books.event("checkpoint_skipped", error=text)
            watch.warn(f"a checkpoint is not valid and was passed over: {text}")
        books.event("resumed", rounds=self.rounds)
        if self.rounds is not None:
            watch.warn(f"going on after {self.rounds} rounds")


def restore(driver: Simulator, folder: Path, run: str) -> Resumed:
    """Let a simulator go on from the newest valid checkpoint in a run folder.

    Raises:
        UserError: there is none, or it cannot be read, or all rounds have been done.
    """
    outline: Snapshot = driver.vacate()
    like, _ = pack(outline)
    try:
        found = Checkpoints(folder / CHECKPOINTS, run).newest(like)
    except CheckpointError as error:
        raise UserError(f"{error}. Start again: {_again(folder)}") from error
    if found is None:
        raise UserError(
            f"{folder} holds no checkpoints to go on from. Start again: {_again(folder)}"
        )
    try:
        mark = Mark(**found.about["mark"])
        snapshot = unpack(found.tensors, found.about["state"], outline)
    except (KeyError, TypeError, ValueError) as error:
        raise UserError(f"a checkpoint in {folder} does not fit this run: {error!r}") from error
    driver.restore(snapshot)
    return Resumed(found.number, mark, found.skipped)


def _again(folder: Path) -> str:
    return f"p2pfl run {folder / EXPERIMENT}"


def compare(before: Experiment, after: Experiment, folder: Path) -> None:
    """Refuse to go on with another experiment; raises `UserError`."""
    old, new = _fixed(before), _fixed(after)
    for key in sorted(old.keys() | new.keys()):
        was, now = old.get(key), new.get(key)
        if was != now:
            raise UserError(
                f"{key} = {now!r}: it was {was!r} when {folder} began, and stays so in a run that"
                f" goes on. What may be changed: {', '.join(FREE[2:])}"
            )


def _fixed(experiment: Experiment) -> dict[str, Any]:
    """Return what stays the same in a run that goes on, by key."""
    flat = _flat(experiment.to_dict(), "")
    return {key: value for key, value in flat.items() if not _is_free(key)}


def _is_free(key: str) -> bool:
    return any(key == free or key.startswith(f"{free}.") for free in FREE)


def _flat(value: Any, path: str) -> dict[str, Any]:  # noqa: ANN401 - what TOML holds
    if not isinstance(value, dict):
        return {path: value}
    flat: dict[str, Any] = {}
    for key, part in value.items():
        flat |= _flat(part, f"{path}.{key}" if path else str(key))
    return flat
