"""What a peer keeps so that it can come back after it was killed: checkpoints, and its lives."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from p2pfl.errors import RunError
from p2pfl.experiment.sections import Checkpointing
from p2pfl.launch.keeping import Keeper
from p2pfl.learning.packing import unpack
from p2pfl.peer.events import Position
from p2pfl.results.durable import DRAFT, Disk, write_durably

LIFE = "life"  # the file that says which was the last
Told = Callable[..., None]  # of an event: its kind, and what belongs to it


class Comeback:
    """The checkpoints of one peer, in its run folder.

    Args:
        home: the run folder.
        run: which run it is, as in `resuming.digest`.
        settings: when checkpoints are written.
        tell: told of events.
    """

    def __init__(self, home: Path, run: str, settings: Checkpointing, tell: Told) -> None:
        self._keeper, self._tell = Keeper(home, run, settings), tell

    def last(self, fresh: Any) -> Position | None:  # noqa: ANN401 - whatever the algorithm keeps
        """Return where the peer stood at its newest checkpoint that can be read, if any.

        Args:
            fresh: a state of its algorithm as it is at the outset.
        """
        try:
            found = self._keeper.checkpoints.newest()
        except RunError as error:
            self._tell("checkpoint_unreadable", error=str(error))
            return None
        if found is None:
            return None
        for skipped in found.skipped:
            self._tell("checkpoint_unreadable", error=skipped)
        try:
            like = Position(0, 0, fresh)
            return unpack(found.tensors, found.about.get("state", {}), like)
        except ValueError as error:
            self._tell("checkpoint_unreadable", error=str(error))
            return None

    def keep(self, position: Position) -> tuple[str, dict[str, Any]] | None:
        """Write a checkpoint, if it is due; return what to say of it, and None if it was not.

        The peer goes on without, if it cannot be written.
        """
        return self._keeper.offer(position.round, lambda: position)


def next_life(home: Path | None, tell: Told) -> int:
    """Return a number larger than that of any earlier life of the peer, and write it down.

    It is the time in milliseconds, unless the clock has been put back.

    Args:
        home: the run folder; None: there is none.
        tell: told if the last life cannot be read, so that only the clock counts.

    Raises:
        RunError: it cannot be written.
    """
    now = int(1000 * time.time())
    if home is None:
        return now
    path = home / LIFE
    try:
        life = max(_last_life(path, tell) + 1, now)
        path.with_name(f".{LIFE}{DRAFT}").unlink(missing_ok=True)  # of a life that was short
        write_durably(Disk(), path, [memoryview(f"{life}\n".encode())])
    except OSError as error:
        raise RunError(f"{path} cannot be read or written: {error}") from error
    return life


def _last_life(path: Path, tell: Told) -> int:
    if not path.exists():
        return 0
    try:
        return int(path.read_text(encoding="ascii"))
    except ValueError as error:
        tell("life_unreadable", error=f"{path}: {error}; the time is taken instead")
        return 0
