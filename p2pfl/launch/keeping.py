"""Checkpoints while a run goes on: written when they are due, and never the end of a run."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from p2pfl.errors import RunError
from p2pfl.experiment.sections import Checkpointing
from p2pfl.learning.packing import pack
from p2pfl.results.checkpoint import Checkpoints, Timetable
from p2pfl.results.record import CHECKPOINTS, Recorder


class Keeper:
    """Write the checkpoints of a run into its folder.

    Args:
        recorder: of that folder.
        run: which run it is, as in `resuming.digest`.
        settings: when they are written.
        done: rounds that have been done at the outset.
        warn: told when one cannot be written, once for every reason.
    """

    def __init__(
        self,
        recorder: Recorder,
        run: str,
        settings: Checkpointing,
        done: int,
        warn: Callable[[str], None],
    ) -> None:
        self._checkpoints = Checkpoints(recorder.folder / CHECKPOINTS, run, settings.keep)
        self._timetable = Timetable(settings.every, settings.seconds, done)
        self._recorder, self._warn = recorder, warn
        self._told: set[str] = set()

    def offer(self, done: int, state: Callable[[], Any]) -> None:
        """Write a checkpoint after so many rounds, if one is due.

        The run goes on without, if it cannot be written.

        Args:
            done: how many.
            state: gives all that the rounds to come follow from, as `pack` takes it.
        """
        if not self._timetable.due(done):
            return
        self._timetable.begin(done)
        try:
            tensors, plain = pack(state())
            about = {"state": plain, "mark": self._recorder.mark()._asdict()}
            self._checkpoints.save(done, tensors, about)
        except RunError as error:
            self._timetable.end()
            if str(error) not in self._told:
                self._told.add(str(error))
                self._recorder.event("checkpoint_failed", rounds=done, error=str(error))
                self._warn(f"{error}; the run goes on")
        else:
            self._recorder.event("checkpoint", rounds=done, took_s=self._timetable.end())
