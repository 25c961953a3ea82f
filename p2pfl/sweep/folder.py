"""The folder of a sweep: its plan, the runs in it, and what may be added to it."""

from __future__ import annotations

import fcntl
import tomllib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from p2pfl import files
from p2pfl.errors import UserError
from p2pfl.results.record import SUMMARY, check_idle, new_folder
from p2pfl.results.runs import read_experiment, read_summary
from p2pfl.sweep.combine import Run, seeds
from p2pfl.sweep.plan import Plan, read_plan
from p2pfl.sweep.values import inline

PLAN, RUNS, LOCK = "sweep.toml", "runs", ".lock"


@contextmanager
def opened(plan: Plan, runs: Sequence[Run], out: Path | None) -> Iterator[Path]:
    """Make the folder of a sweep, or take one that is there on, and write the plan to it.

    Args:
        plan: what is to be run.
        runs: its runs.
        out: the folder; None: a new one below ``runs``.

    Raises:
        UserError: the folder holds something else, or runs that this plan does not ask for,
            or another sweep is at work in it, or a process that a sweep has left.
    """
    folder = new_folder(Path(RUNS), plan.name) if out is None else out
    try:
        folder.mkdir(parents=True, exist_ok=True)
        is_new = not (folder / PLAN).exists()
        if is_new and any(path.name != LOCK for path in folder.iterdir()):
            raise UserError(f"{folder} holds files already and is no sweep; choose another --out")
        with (folder / LOCK).open("w") as lock:
            _lock(lock, folder)
            if not is_new:
                _check_grown(read_plan(folder / PLAN), plan, folder)
                _check_same(runs, folder)
                _check_idle(runs, folder)
            files.replace(folder / PLAN, plan.to_toml(seeds(plan)).encode())
            yield folder
    except OSError as error:
        raise UserError(f"{folder} cannot be written: {error.strerror or error}") from error


def summary(folder: Path, run: Run) -> dict[str, Any]:
    """Return what a run's folder says of it, nothing if there is none."""
    path = folder / RUNS / run.name
    return read_summary(path) if (path / SUMMARY).is_file() else {}


def _lock(file: Any, folder: Path) -> None:  # noqa: ANN401
    """Keep a second sweep from clearing away runs that are going on."""
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        raise UserError(f"another sweep is at work in {folder}; choose another --out") from error


def _check_grown(old: Plan, new: Plan, folder: Path) -> None:
    """Refuse a plan that does not ask for all that the folder's own plan asks for."""
    lost = [key for key in ("experiment", "on", "common") if getattr(old, key) != getattr(new, key)]
    lost += [] if set(seeds(old)) <= set(seeds(new)) else ["seeds"]
    lost += [] if list(old.grid) == list(new.grid) else ["grid"]
    lost += [
        f"grid.{key}"
        for key, values in old.grid.items()
        if key in new.grid and not _texts(values) <= _texts(new.grid[key])
    ]
    lost += [] if _texts(old.cases) <= _texts(new.cases) else ["cases"]
    if lost:
        key = {"common": "set"}.get(lost[0], lost[0])
        raise UserError(
            f"{key} differs from {folder / PLAN}: a plan may only add seeds, values and cases;"
            " choose another --out"
        )


def _check_same(runs: Sequence[Run], folder: Path) -> None:
    """Refuse to mix runs of an experiment that was changed in between."""
    for run in runs:
        if not summary(folder, run):
            continue
        before, now = read_experiment(folder / RUNS / run.name), tomllib.loads(run.text)
        for key in sorted(before.keys() | now.keys()):
            # Where relative paths start may differ: experiments that ship with us have no place.
            if key != "base" and before.get(key) != now.get(key):
                raise UserError(
                    f"{key} of the experiment was changed since {run.name} was run in {folder};"
                    " choose another --out"
                )


def _check_idle(runs: Sequence[Run], folder: Path) -> None:
    """Refuse to clear away what a worker or a peer writes whose sweep was killed."""
    for run in runs:
        if summary(folder, run).get("status") == "running":
            check_idle(folder / RUNS / run.name)


def _texts(values: Any) -> set[str]:  # noqa: ANN401
    return {inline(value) for value in values}
