"""Checkpoints: a few files, each of which holds all that a run needs to go on.

::

    DIR/checkpoints/00000040.safetensors    after 40 rounds
    DIR/checkpoints/00000041.safetensors    after 41; when it is on the disk, 39 is removed

A checkpoint that has been saved survives a crash of the process and of the machine. One that is
damaged all the same is recognised, and the one before it is taken.
"""

from __future__ import annotations

import json
import re
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from torch import Tensor

from p2pfl.errors import RunError
from p2pfl.results.durable import DRAFT, Disk, FileSystem, write_durably
from p2pfl.results.tensor_file import Damaged, Header, encode, read_header, read_tensors

FORMAT = "p2pfl-checkpoint 1"
NAME = re.compile(r"(\d{8,18})\.safetensors")
DISK = Disk()


class CheckpointError(RunError):
    """A checkpoint could not be written, or none of those there are could be read."""


class Found(NamedTuple):
    """A checkpoint that was read.

    Attributes:
        number: of rounds that had been done.
        tensors: what was saved.
        about: also that.
        skipped: newer ones that are not valid, and why.
    """

    number: int
    tensors: dict[str, Tensor]
    about: dict[str, Any]
    skipped: list[str]


class Checkpoints:
    """The checkpoints of one run.

    Args:
        folder: where; made by the first `save`.
        run: says in some text which run it is; those of another run are not read.
        keep: how many are kept.
        files: the file system.
    """

    def __init__(self, folder: Path, run: str, keep: int = 2, files: FileSystem = DISK) -> None:
        self.folder, self._run, self._keep, self._files = folder, run, keep, files
        self._begun = False

    def save(self, number: int, tensors: Mapping[str, Tensor], about: Mapping[str, Any]) -> None:
        """Write a checkpoint, and then remove those that are no longer kept.

        Those of higher numbers are removed, too: a run that has gone on from an older one makes
        them anew.

        Args:
            number: of rounds done, from 0 to 10^18 - 1.
            tensors: on whichever device; they may not change meanwhile.
            about: whatever JSON can hold.

        Raises:
            CheckpointError: it could not be written. Those there were are there still, unless
                only removing them has failed.
        """
        texts = {
            "format": FORMAT,
            "run": self._run,
            "number": str(number),
            "about": json.dumps(about, allow_nan=False),
        }
        try:
            if not self._begun:
                self._begin()
            write_durably(self._files, self._path(number), encode(tensors, texts))
            numbers = self._numbers()
            kept = sorted(other for other in numbers if other <= number)[-self._keep :]
            for other in numbers:
                if other not in kept:
                    self._files.remove(self._path(other))
        except OSError as error:
            raise CheckpointError(
                f"no checkpoint can be written in {self.folder}: {error.strerror or error}"
            ) from error

    def newest(self, like: Mapping[str, Tensor] | None = None) -> Found | None:
        """Read the newest checkpoint that is valid; None if there is none at all.

        Args:
            like: tensors of the names, shapes and types that are expected, on any device, also
                meta; None: whatever there is.

        Raises:
            CheckpointError: there are some, but none is valid; it says why.
        """
        skipped: list[str] = []
        try:
            numbers = sorted(self._numbers(), reverse=True)
        except OSError as error:
            raise CheckpointError(f"{self.folder} cannot be read: {error}") from error
        for number in numbers:
            path = self._path(number)
            try:
                with self._files.open(path) as file:
                    header = read_header(file)
                    about = self._check(header, number, like)
                    return Found(number, read_tensors(file, header), about, skipped)
            except Damaged as error:
                skipped.append(f"{path.name}: {error}")
            except OSError as error:
                skipped.append(f"{path.name} cannot be read: {error.strerror or error}")
        if skipped:
            raise CheckpointError(f"no valid checkpoint in {self.folder}: {'; '.join(skipped)}")
        return None

    def _begin(self) -> None:
        """Make the folder, and remove what writers that were killed have left there."""
        self._files.make(self.folder)
        for name in self._files.names(self.folder):
            if name.endswith(DRAFT):
                self._files.remove(self.folder / name)
        self._begun = True

    def _numbers(self) -> list[int]:
        names = map(NAME.fullmatch, self._files.names(self.folder))
        return [int(name[1]) for name in names if name]

    def _path(self, number: int) -> Path:
        return self.folder / f"{number:08d}.safetensors"

    def _check(
        self, header: Header, number: int, like: Mapping[str, Tensor] | None
    ) -> dict[str, Any]:
        texts = header.texts
        if texts.get("format") != FORMAT:
            raise Damaged(f"it is not of the format {FORMAT!r}")
        if texts.get("run") != self._run:
            raise Damaged("it is of another experiment, or of another version of p2pfl")
        if texts.get("number") != str(number):
            raise Damaged(f"it is number {texts.get('number')}, whatever its name says")
        if like is not None:
            forms = {name: (part.dtype, tuple(part.shape)) for name, part in like.items()}
            wrong = sorted({name for name, _ in forms.items() ^ header.forms.items()})
            if wrong:
                raise Damaged(f"its tensors are not those of this run: {', '.join(wrong)}")
        try:
            about = json.loads(texts["about"])
        except (KeyError, ValueError, RecursionError):
            raise Damaged("its header is damaged") from None
        if not isinstance(about, dict):
            raise Damaged("its header is damaged")
        return about


class Timetable:
    """When the next checkpoint is due.

    Args:
        every: rounds at least between two; 0: never.
        seconds: at least so long between two, and `SHARE` times as long as the last one took,
            so that a run spends no more than about 5 % of its time on them; 0: neither.
        number: of rounds that have been done at the outset.
        clock: in seconds.
    """

    SHARE = 20

    def __init__(
        self,
        every: int,
        seconds: float,
        number: int = 0,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._every, self._seconds, self._clock = every, seconds, clock
        self._last, self._next = number, clock() + seconds
        self._began = 0.0

    def due(self, number: int) -> bool:
        """Say, after so many rounds, whether one is due."""
        enough = self._every > 0 and number - self._last >= self._every
        return enough and self._clock() >= self._next

    def begin(self, number: int) -> None:
        """Take note that one is begun, after so many rounds."""
        self._last, self._began = number, self._clock()

    def end(self) -> float:
        """Take note that it is written, or has failed; return how many seconds it took."""
        now = self._clock()
        took = now - self._began
        if self._seconds:
            self._next = now + max(self._seconds, self.SHARE * took)
        return took
