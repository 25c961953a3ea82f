"""The books of a run: who is told how it goes on, and what is kept of it."""

from __future__ import annotations

import math
import shutil
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from p2pfl.errors import UserError, reason
from p2pfl.experiment.experiment import Experiment
from p2pfl.experiment.sections import Timer
from p2pfl.launch.outcome import Outcome
from p2pfl.results.churned import recovery
from p2pfl.results.record import CHECKPOINTS, Mark, Recorder
from p2pfl.results.runs import Facts, Metrics, Result, columns, read_run, summarise
from p2pfl.runtime.setup import Ending, Row, Seconds, Status

On = Literal["simulate", "emulate", "local"]

MOST_THREADS = 1024  # of one peer; no system starts as many as torch would take


@dataclass(frozen=True)
class Watch:
    """Who is told how a run goes on.

    Attributes:
        rows: told of nodes that have ended a round.
        phase: told what a peer process is doing, by node.
        note: told what memory a run needs and how it is computed.
        warn: told what the user should know although the run goes on.
    """

    rows: Callable[[Sequence[Row]], None] = lambda rows: None
    phase: Callable[[int, str], None] = lambda node, phase: None
    note: Callable[[str], None] = lambda text: None
    warn: Callable[[str], None] = lambda text: None


@dataclass(frozen=True)
class Where:
    """What may differ from machine to machine.

    Attributes:
        data: the folder relative data paths start from; default: the experiment file's.
        device: where to compute, as ``"cpu"`` or ``"cuda:0"``.
        join_timeout: seconds that peer processes wait for each other at the start.
        bind: keep each of several peer processes on cores of its own, where there are enough.
    """

    data: Path | None = None
    device: str = "cpu"
    join_timeout: float = 60.0
    bind: bool = True


def check_device(device: str) -> None:
    """Refuse a device that is not there.

    Raises:
        UserError: it names the device.
    """
    if why := why_unusable(device):
        raise UserError(f"--device {device}: {why}")


def check_threads(place: str, threads: int) -> None:
    """Refuse a number of threads to compute with that cannot be.

    Raises:
        UserError: it begins with `place`, where the number stands.
    """
    if not 0 <= threads <= MOST_THREADS:
        raise UserError(f"{place} {threads}: expected 0 to {MOST_THREADS}")


def why_unusable(device: str) -> str:
    """Return in one line why nothing can be computed on a device; empty: it can."""
    try:
        torch.zeros(1, device=device).item()  # "meta" is there, but holds no numbers
    except (RuntimeError, AssertionError, ImportError) as error:
        return reason(error)
    return ""


class Books:
    """The rows of a run, in memory and, if there is a folder, on disk.

    Args:
        experiment: what is run.
        on: where.
        folder: the run folder; None: nothing is written.
        resume: go on with the books of a run that was broken off, from where they were then.
    """

    def __init__(
        self, experiment: Experiment, on: On, folder: Path | None, resume: Mark | None = None
    ) -> None:
        self.experiment, self.on, self.folder = experiment, on, folder
        self._kept: list[Metrics] = [columns([])]
        self._clock = time.perf_counter() - (resume.wall_s if resume else 0.0)
        self._noted: dict[str, Any] = {}
        self.recorder: Recorder | None = None
        if folder is not None:
            text = experiment.to_toml()
            about = self._facts(None)._asdict() | {"base": str(experiment.base)}
            self.recorder = Recorder(folder, text, resume, **about)
            if resume is not None and resume.metrics:
                self._kept.append(read_run(folder).metrics)

    def add(self, rows: Sequence[Row]) -> None:
        """Take note of rows."""
        self._kept.append(columns(rows))
        if self.recorder:
            self.recorder.rows(rows)

    def event(self, kind: str, /, **fields: Any) -> None:  # noqa: ANN401
        """Take note that something happened."""
        if self.recorder:
            self.recorder.event(kind, **fields)

    @property
    def metrics(self) -> Metrics:
        """All rows so far, as columns."""
        parts = self._kept
        return {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}

    def timed(self, seconds: Seconds, path: str) -> None:
        """Take note of where the time has gone, and how gradients were computed."""
        parts = {f"{name}_s": value for name, value in asdict(seconds).items()}
        self.note(**parts, backend=path)

    def note(self, **about: Any) -> None:  # noqa: ANN401
        """Take note of something for the summary."""
        self._noted |= about

    def save(self, outcome: Outcome) -> None:
        """Save the final models."""
        if self.recorder:
            rounds = self.metrics["round"]
            outcome.save(self.recorder, int(rounds.max()) + 1 if len(rounds) else 0)

    def steps_done(self, outcome: Outcome) -> Tensor:
        """Return how many local steps each node has taken, ``[n]``.

        Where steps follow arrivals they are only known in sum, and shared out evenly.
        """
        n = self.experiment.nodes
        if isinstance(self.experiment.pace, Timer):
            return torch.full((n,), outcome.ending.updates // n)
        nodes = self.metrics["node"]
        examples = torch.zeros(n, dtype=torch.int64)
        examples[nodes] = torch.from_numpy(self.metrics["num_examples"])
        trained = self.metrics["round"] % self.experiment.pace.train_every == 0
        rounds = torch.from_numpy(np.bincount(nodes[trained], minlength=n))
        return rounds * self.experiment.local_steps(examples)

    def close(
        self,
        status: Status,
        outcome: Outcome | None = None,
        more: Mapping[str, Any] | None = None,
        error: str | None = None,
    ) -> Result:
        """Write the summary and return the result."""
        metrics = self.metrics
        summary = summarise(metrics, self._facts(outcome.ending if outcome else None))
        if outcome is not None:
            summary |= outcome.summary()
        if churn := self._noted.get("churn"):
            churn |= recovery(metrics, churn["first_s"])
        summary |= {**self._noted, **(more or {}), "status": status}
        if error is not None:
            summary["error"] = error
        if self.recorder:
            self.recorder.finish(status, summary, error)
            if status == "finished":  # there is nothing to go on with any more
                shutil.rmtree(self.recorder.folder / CHECKPOINTS, ignore_errors=True)
        return Result(self.folder, summary, metrics, outcome.model if outcome else _no_model)

    def _facts(self, ending: Ending | None) -> Facts:
        experiment = self.experiment
        return Facts(
            experiment=experiment.name,
            on=self.on,
            algorithm=experiment.sections["algorithm"].name,
            topology=experiment.sections["topology"].name,
            seed=experiment.seed,
            nodes=experiment.nodes,
            node_updates=ending.updates if ending else 0,
            wall_s=time.perf_counter() - self._clock,
            virtual_s=ending.virtual_s if ending else math.nan,
            reason=ending.reason if ending else "",
            missed=ending.missed if ending else 0,
            rejected=ending.rejected if ending else 0,
            one_sided=ending.one_sided if ending else 0,
            attackers=list(experiment.attackers.who) or None,
            attack=experiment.attack,
        )


def _no_model(node: int | None) -> Any:  # noqa: ANN401
    raise UserError("the run did not get as far as a model")
