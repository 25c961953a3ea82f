"""Run an experiment in one of the three runtimes, keep its books, and say how it went."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from torch import Tensor

from p2pfl.data.shards import Federation
from p2pfl.data.statistics import Affine
from p2pfl.errors import P2pflError, RunError, UserError
from p2pfl.experiment.experiment import Experiment
from p2pfl.launch.books import Books, On, Watch, Where, check_device
from p2pfl.launch.keeping import Keeper
from p2pfl.launch.outcome import (
    ALONE,
    Outcome,
    baselines,
    conserved,
    gathered,
    honest_only,
    middle,
    pooled_task,
)
from p2pfl.launch.resuming import Resumed, digest, restore, unfinished
from p2pfl.learning.task import ModelTask
from p2pfl.results.record import Mark, new_folder
from p2pfl.results.runs import Result
from p2pfl.runtime.emulate import Emulator
from p2pfl.runtime.memory import Needed, check, needed
from p2pfl.runtime.ranks import Ranks
from p2pfl.runtime.setup import Ending, Status
from p2pfl.runtime.simulate import Simulator


def run(  # noqa: PLR0913 - the front door of the package
    experiment: Experiment | str | Path | Mapping[str, Any] | None = None,
    on: On | None = None,
    *,
    out: str | Path | None = None,
    resume: str | Path | None = None,
    changes: Iterable[str] = (),
    data: str | Path | None = None,
    device: str = "cpu",
    bind: bool = True,
    watch: Watch | None = None,
) -> Result:
    """Run an experiment.

    Args:
        experiment: an `Experiment`, a file, the name of one that ships with the package, or
            nested dictionaries laid out as in a file.
        on: ``"simulate"`` (the default), ``"emulate"`` or ``"local"`` (a process for each peer).
        out: the folder to write; None keeps results in memory (``"local"`` makes a new
            folder where the experiment says).
        resume: instead of an experiment, the folder of a run that was broken off: go on from its
            newest checkpoint, to the same result as if nothing had happened.
        changes: ``"pace.rounds=2"`` and the like; in a run that goes on ``pace.rounds``,
            ``pace.seconds``, and the sections ``output`` and ``checkpoint`` only.
        data: the folder that relative data paths start from.
        device: where to compute.
        bind: keep each of several peer processes on cores of its own, where there are enough.
        watch: told how it goes on.

    Returns:
        the result. If only some peer processes died, it is that of the others, and its
        summary says ``"failed"``; if Ctrl-C ended the run, it says ``"interrupted"``.

    Raises:
        UserError: the experiment cannot work, or the folder holds something already, or there is
            nothing in it to go on from.
        RunError: the run failed. Its folder, if any, is valid and says so.
    """
    where = Where(Path(data) if data else None, device, bind=bind)
    watch = watch or Watch()
    if resume is not None:
        if experiment is not None or out is not None:
            raise UserError("resume takes experiment and folder from a run: give no others")
        checked, on = unfinished(Path(resume), on, changes)
        return run_checked(checked, on, Place(Path(resume), resume=True), where, watch)
    if experiment is None:
        raise UserError("nothing to run: give an experiment, or a run folder to resume")
    on = on or "simulate"
    if isinstance(experiment, Experiment):
        checked = experiment
        if changes:
            checked = Experiment.from_dict(experiment.to_dict(), experiment.base, changes)
    elif isinstance(experiment, Mapping):
        checked = Experiment.from_dict(experiment, changes=changes)
    else:
        checked = Experiment.load(experiment, changes)
    make = on == "local" and out is None
    folder = Path(checked.output.dir) if make else Path(out) if out else None
    return run_checked(checked, on, Place(folder, make), where, watch)


@dataclass(frozen=True)
class Place:
    """Where a run is written.

    Attributes:
        folder: the run folder; None keeps the run in memory.
        make: take a new folder below `folder` instead, named after the experiment.
        resume: go on with the run that is there.
    """

    folder: Path | None
    make: bool = False
    resume: bool = False


def run_checked(
    experiment: Experiment,
    on: On,
    place: Place,
    where: Where,
    watch: Watch,
    ranks: Ranks = ALONE,
) -> Result:
    """Run a checked experiment and write what it leaves; see `run`.

    Where several ranks run it together, the first of them writes.
    """
    check_device(where.device)
    # Whatever the user got wrong shows before there is a folder.
    ready = None if on == "local" else prepare(experiment, on, where, ranks)
    resumed = _resumed(place, ready)
    folder = place.folder if ranks.rank == 0 else None
    if place.make and folder is not None:
        folder = new_folder(folder, experiment.name)
    books = Books(experiment, on, folder, resumed.mark if resumed else None)
    try:
        if resumed:
            resumed.tell(books, watch)
        if ready is None:
            from p2pfl.launch.local import run_local  # sockets and processes: only here

            outcome, status, error = run_local(experiment, books, where, watch, place.resume)
        else:
            watch.note(f"memory: {ready.needed}")
            (outcome, status), error = ready.drive(books, watch), None
        books.save(outcome)
        more = {}
        if experiment.evaluation.baselines and status == "finished":
            more = _compared(outcome, books.steps_done(outcome))
        return books.close(status, outcome, more, error)
    except KeyboardInterrupt:
        books.close("interrupted")
        raise
    except P2pflError as error:
        books.close("failed", error=str(error))
        raise
    except BaseException as error:
        books.close("failed", error=repr(error))
        raise


def _resumed(place: Place, ready: Ready | None) -> Resumed | None:
    """Let a run go on from where it was, if that is wanted."""
    if not place.resume:
        return None
    assert place.folder is not None
    if ready is None:
        return Resumed(None, Mark(), [])  # every peer goes on from a checkpoint of its own
    if ready.ranks.size > 1:
        raise UserError("--resume is for one process: ranks of torchrun keep no checkpoints")
    assert isinstance(ready.driver, Simulator)
    return restore(ready.driver, place.folder, ready.digest)


def _compared(outcome: Outcome, steps: Tensor) -> dict[str, Any]:
    """Return the baselines; the run is over, and nothing that happens here may undo it."""
    try:
        return baselines(outcome, steps)
    except RunError as error:
        return {"baselines_error": str(error)}
    except KeyboardInterrupt:
        return {"baselines_error": "interrupted"}


@dataclass(frozen=True)
class Ready:
    """A run in this process that could begin."""

    experiment: Experiment
    federation: Federation
    task: ModelTask
    affine: Affine | None
    pooled: ModelTask
    driver: Simulator | Emulator
    needed: Needed
    ranks: Ranks

    def drive(self, books: Books, watch: Watch) -> tuple[Outcome, Status]:
        """Run to the end, or until Ctrl-C."""
        status: Status = "finished"
        told, keeper = False, self._keeper(books)
        try:
            for rows in self.driver.rounds():
                books.add(rows)
                watch.rows(rows)
                if not told:
                    told = True
                    watch.note(self._path())
                    if isinstance(self.driver, Simulator):
                        watch.note(f"exchange: {self.driver.exchange_path}")
                self._note_mean(books, rows[0].round)
                self._keep(keeper, rows[0].round + 1, books, watch)
        except KeyboardInterrupt:
            if self.ranks.size > 1:  # nothing can be gathered from ranks which leave as well
                raise
            status = "interrupted"
        ending = self.driver.ending
        if status == "interrupted":
            ending = ending._replace(reason="interrupted")
        books.timed(self.driver.seconds, self.task.backend.reason)
        if isinstance(self.driver, Emulator) and self.experiment.churn:
            _tell_churn(self.driver, ending, books)
        between = middle(honest_only(ending, self.experiment), self.ranks)
        ending = gathered(ending, self.experiment.nodes, self.ranks)
        held = (self.experiment, self.federation, self.task, self.affine)
        return Outcome(*held, ending, self.pooled, between, self.ranks), status

    def _keeper(self, books: Books) -> Keeper | None:
        """Return who writes the checkpoints of this run; nobody if it could not go on from them."""
        driver, settings = self.driver, self.experiment.checkpoint
        if not isinstance(driver, Simulator) or books.recorder is None or self.ranks.size > 1:
            return None
        return Keeper(books.recorder.folder, self.digest, settings, driver.done)

    def _keep(self, keeper: Keeper | None, done: int, books: Books, watch: Watch) -> None:
        driver, recorder = self.driver, books.recorder
        if keeper is None or recorder is None or not isinstance(driver, Simulator) or driver.over:
            return
        told = keeper.offer(done, driver.snapshot, lambda: {"mark": recorder.mark()._asdict()})
        if told:
            kind, fields = told
            books.event(kind, **fields)
            if error := fields.get("error"):
                watch.warn(f"{error}; the run goes on")

    @property
    def digest(self) -> str:
        """What tells this run from those of other experiments."""
        return digest(self.experiment, self.task.spec)

    def _path(self) -> str:
        """Say how training is done, which is known once it has begun."""
        task = self.task
        block = f"{min(task.block, self.experiment.nodes)} nodes at a time"
        fused = "straight into the parameters" if self._fused else "gradients kept"
        types = {str(dtype).removeprefix("torch.") for dtype in (task.dtype, task.compute)}
        return f"training: {task.backend.reason}; {block}, {fused}, {' and '.join(sorted(types))}"

    @property
    def _fused(self) -> bool:
        return self.driver.setup.algorithm.factor is not None

    def _note_mean(self, books: Books, round: int) -> None:
        """Note how good the mean model was, if it has just been measured."""
        if isinstance(self.driver, Simulator) and self.driver.scores is not None:
            loss, acc = (field.item() for field in self.driver.scores)
            books.event("mean_model", round=round, eval_loss=loss, eval_acc=acc)
            self.driver.scores = None


def _tell_churn(driver: Emulator, ending: Ending, books: Books) -> None:
    """Note what has happened to the peers, and what came of it."""
    chronicle = driver.churning.chronicle
    for at, happening in chronicle.story:
        books.event("churn", virtual_s=at, **happening.about())
    kept = conserved(ending, driver.drift.take() if driver.drift else None)
    books.note(churn={**chronicle.summary(driver.time), **kept})


def prepare(experiment: Experiment, on: On, where: Where, ranks: Ranks = ALONE) -> Ready:
    """Load the data and build everything a run in this process needs.

    The first rank keeps everybody's data, for the mean model and the baselines; the others
    those of their nodes.
    """
    if ranks.size > 1 and experiment.attackers.who:
        raise UserError("attackers: a simulation shared out with torchrun cannot have any")
    federation = experiment.federation(where.data)
    affine = experiment.affine(federation)
    nodes = ranks.nodes(experiment.nodes)
    if ranks.rank:
        own_test = federation.own_test
        federation = replace(
            federation,
            train=federation.train.subset(nodes),
            own_test=own_test.subset(nodes) if own_test else None,
        )
        affine = Affine(*(field[nodes] for field in affine)) if affine else None
    task = experiment.task(federation, affine, where.device)
    pooled = pooled_task(experiment, federation, affine, where.device)
    setup = experiment.setup(task, None if ranks.rank else pooled)
    need = needed(setup, len(nodes), on == "emulate", experiment.evaluation.baselines)
    check(need)
    driver: Simulator | Emulator
    driver = Simulator(setup, ranks) if on == "simulate" else Emulator(setup, experiment.network)
    return Ready(experiment, federation, task, affine, pooled, driver, need, ranks)
