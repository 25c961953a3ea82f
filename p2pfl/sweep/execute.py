"""Run a plan: worker processes side by side, and books that a second call can go on with."""

from __future__ import annotations

import multiprocessing
import os
import shutil
import threading
import time
import tomllib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import joblib
import torch
from joblib.externals.loky.process_executor import TerminatedWorkerError

from p2pfl.errors import P2pflError, RunError, UserError
from p2pfl.experiment.experiment import Experiment
from p2pfl.launch.books import On, Watch, Where, check_device
from p2pfl.launch.session import Place, run_checked
from p2pfl.sweep import folder as folders
from p2pfl.sweep.combine import Run, runs
from p2pfl.sweep.plan import Plan, read_plan
from p2pfl.sweep.table import Row, aggregate, row, write_csv

LOOK = 0.05  # seconds between two looks of a worker at whether its parent is there

Outcome = tuple[int, str]
"""Which of the jobs has ended, and what went wrong, if anything."""


@dataclass(frozen=True)
class SweepWatch:
    """Who is told how a sweep goes on.

    Attributes:
        opened: told the folder, how many runs are to be done, and how many are finished.
        ended: told of every run that has ended; its row in the table.
        note: told what else the user should know.
    """

    opened: Callable[[Path, int, int], None] = lambda folder, to_do, finished: None
    ended: Callable[[Row], None] = lambda row: None
    note: Callable[[str], None] = lambda text: None


@dataclass(frozen=True)
class Sweep:
    """What came out of a sweep.

    Attributes:
        folder: where it was written.
        table: a row for each run, as in ``results.csv``.
        summary: a row for each combination: mean and standard deviation over its seeds.
        skipped: how many runs had finished before.
    """

    folder: Path
    table: list[Row]
    summary: list[Row]
    skipped: int

    @property
    def failed(self) -> list[Row]:
        """The rows of the runs that did not finish."""
        return [row for row in self.table if row["status"] != "finished"]


class Job(NamedTuple):
    """A run as a worker process is told of it; only texts and numbers cross over."""

    number: int
    text: str  # the experiment, as the text of a file
    folder: str
    on: On
    data: str | None
    device: str


def run_sweep(
    sweep: str | Path | Mapping[str, Any],
    out: str | Path | None = None,
    jobs: int | None = None,
    *,
    data: str | Path | None = None,
    device: str = "cpu",
    watch: SweepWatch | None = None,
) -> Sweep:
    """Run every combination of a sweep with every seed, several at a time.

    A run that fails is noted, and the others go on. In the folder of a sweep that was broken
    off, runs that finished are skipped and the others are done again.

    Args:
        sweep: a sweep file, or nested dictionaries laid out as in one.
        out: the folder to write or to go on with; None: a new one below ``runs``.
        jobs: how many runs at a time; None: as many as there are cores, but one after
            another where every run has a process for each peer.
        data: the folder that relative data paths start from.
        device: where to compute.
        watch: told how it goes on.

    Raises:
        UserError: the plan cannot work, or does not fit the folder.
        RunError: a worker process was killed. Its run is done again by the next call.
    """
    if jobs is not None and jobs < 1:
        raise UserError(f"jobs = {jobs}: expected a whole number, at least 1")
    check_device(device)
    plan, watch = read_plan(sweep), watch or SweepWatch()
    planned = runs(plan)
    if jobs is None:
        jobs = 1 if plan.on == "local" else joblib.cpu_count()
    where = Where(Path(data).resolve() if data else None, device)
    with folders.opened(plan, planned, Path(out) if out else None) as folder:
        to_do = [r for r in planned if folders.summary(folder, r).get("status") != "finished"]
        watch.opened(folder, len(to_do), len(planned) - len(to_do))
        errors: dict[str, str] = {}
        try:
            for number, error in _outcomes(_jobs(to_do, plan, folder, where), jobs):
                run = to_do[number]
                errors[run.name] = error
                watch.ended(row(run, folders.summary(folder, run), error))
        finally:
            table = [row(r, folders.summary(folder, r), errors.get(r.name, "")) for r in planned]
            summary = aggregate(planned, table)
            write_csv(folder / "results.csv", table)
            write_csv(folder / "summary.csv", summary)
        _draw(planned, table, folder, watch)
    return Sweep(folder, table, summary, len(planned) - len(to_do))


def _jobs(to_do: Sequence[Run], plan: Plan, folder: Path, where: Where) -> list[Job]:
    data = str(where.data) if where.data else None
    return [
        Job(i, run.text, str(folder / folders.RUNS / run.name), plan.on, data, where.device)
        for i, run in enumerate(to_do)
    ]


def _outcomes(jobs: Sequence[Job], most: int) -> Iterator[Outcome]:
    """Run all jobs, at most so many at a time, and yield each as it ends."""
    workers = min(most, len(jobs))
    if workers <= 1:  # here, with all the threads that torch is given
        yield from map(_run, jobs)
        return
    threads = max(1, min(joblib.cpu_count() // workers, torch.get_num_threads()))
    parallel = joblib.Parallel(workers, "loky", "generator_unordered", batch_size=1)
    try:
        yield from parallel(joblib.delayed(_work)(job, threads, os.getpid()) for job in jobs)
    except TerminatedWorkerError as error:
        raise RunError(
            "a worker process was killed, perhaps for want of memory; the same command with"
            " --out goes on, and --jobs runs fewer at a time"
        ) from error


def _work(job: Job, threads: int, parent: int) -> Outcome:
    """Run a job in a worker process of this parent."""
    if os.getpid() != parent:  # joblib starts none where it may not
        _end_with(parent)
        # Peers would take over how we were started, a way that is joblib's alone.
        multiprocessing.set_start_method(None, force=True)
    torch.set_num_threads(threads)
    return _run(job, alone=False)


@cache  # a worker runs one job after another
def _end_with(parent: int) -> None:
    """Let this process end as soon as its parent has.

    A parent that is killed cannot end its workers, and its lock of the folder goes with it.
    """

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(LOOK)  # nothing tells that a parent has gone
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


def _run(job: Job, alone: bool = True) -> Outcome:
    """Run a job and say what went wrong, if anything; the rest stands in its folder.

    Args:
        job: what is to be run.
        alone: whether no other runs beside it, whose peers would be bound to the same cores.
    """
    folder, data = Path(job.folder), Path(job.data) if job.data else None
    where = Where(data, job.device, bind=alone)
    if folder.is_dir():  # what an attempt that did not finish has left
        shutil.rmtree(folder)
    try:
        experiment = Experiment.from_dict(tomllib.loads(job.text))
        summary = run_checked(experiment, job.on, Place(folder), where, Watch()).summary
    except P2pflError as error:
        return job.number, str(error)
    except Exception as error:  # a user's model may raise anything, and the others go on
        return job.number, repr(error)
    if summary["status"] == "interrupted":
        raise KeyboardInterrupt
    return job.number, summary.get("error", "")


def _draw(planned: Sequence[Run], table: Sequence[Row], folder: Path, watch: SweepWatch) -> None:
    """Draw the comparison; what was computed is not lost for want of a picture."""
    from p2pfl.sweep.plot import draw_sweep

    finished = [r for r, row in zip(planned, table, strict=True) if row["status"] == "finished"]
    try:
        draw_sweep(finished, folder)
    except UserError as error:
        watch.note(f"nothing drawn: {error}")
