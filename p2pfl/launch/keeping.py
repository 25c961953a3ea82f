"""Checkpoints while a run goes on: written when they are due, and never the end of a run."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from p2pfl.errors import RunError
from p2pfl.experiment.sections import Checkpointing
from p2pfl.learning.packing import pack
from p2pfl.results.checkpoint import Checkpoints, Timetable
from p2pfl.results.record import CHECKPOINTS


class Keeper:
    """Write the checkpoints of a run, or of a peer, into its folder.

    Args:
        folder: of the run.
        run: which run it is, as in `resuming.digest`.
        settings: when they are written.
        done: rounds that have been done at the outset.

    Attributes:
        checkpoints: those that there are.
    """

    def __init__(self, folder: Path, run: str, settings: Checkpointing, done: int = 0) -> None:
        self.checkpoints = Checkpoints(folder / CHECKPOINTS, run, settings.keep)
        self._timetable = Timetable(settings.every, settings.seconds, done)
        self._told: set[str] = set()

    def offer(
        self,
        done: int,
        state: Callable[[], Any],
        about: Callable[[], Mapping[str, Any]] = dict,
    ) -> tuple[str, dict[str, Any]] | None:
        """Write a checkpoint after so many rounds, if one is due.

        The run goes on without, if it cannot be written.

        Args:
            done: how many.
            state: gives all that the rounds to come follow from, as `pack` takes it.
            about: gives what is noted beside it.

        Returns:
            the event to tell of, its kind and what belongs to it; a failure is told once for
            every reason. None: there is nothing to tell.
        """
        if not self._timetable.due(done):
            return None
        self._timetable.begin(done)
        try:
            tensors, plain = pack(state())
            self.checkpoints.save(done, tensors, {"state": plain, **about()})
        except RunError as error:
            self._timetable.end()
            if str(error) in self._told:
                return None
            self._told.add(str(error))
            return "checkpoint_failed", {"rounds": done, "error": str(error)}
        return "checkpoint", {"rounds": done, "took_s": self._timetable.end()}
