"""Files that are there in whole after a crash of the process, of the system, or of the power.

What was written is on the disk only after it was flushed, and so is a new name only after its
folder was. So a file is written under another name, flushed, renamed, and the folder flushed.
"""

from __future__ import annotations

import os
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path
from typing import BinaryIO, Protocol

DRAFT = ".tmp"  # what names end in while a file is being written


class FileSystem(Protocol):
    """What is asked of a file system. Every call may raise `OSError`."""

    def make(self, folder: Path) -> None:
        """Make a folder below one that is there, for good, if it is missing."""

    def names(self, folder: Path) -> list[str]:
        """Return the names in a folder; of one that is missing, none."""

    def create(self, path: Path) -> BinaryIO:
        """Make a file that only its owner may read, and open it unbuffered for writing.

        Raises:
            FileExistsError: there is one already.
        """

    def open(self, path: Path) -> BinaryIO:
        """Open a file for reading."""

    def flush(self, file: BinaryIO) -> None:
        """Return when what was written is on the disk."""

    def flush_folder(self, folder: Path) -> None:
        """Return when what was renamed and removed in a folder is so on the disk."""

    def rename(self, old: Path, new: Path) -> None:
        """Give a file another name, and take that from whichever file had it."""

    def remove(self, path: Path) -> None:
        """Remove a file."""


class Disk:
    """The file system of the operating system."""

    def make(self, folder: Path) -> None:
        """Make a folder."""
        if not folder.is_dir():
            folder.mkdir()
            self.flush_folder(folder.parent)

    def names(self, folder: Path) -> list[str]:
        """Return the names in a folder."""
        return os.listdir(folder) if folder.is_dir() else []  # noqa: PTH208 - names are wanted

    def create(self, path: Path) -> BinaryIO:
        """Make a file."""
        handle = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
        return os.fdopen(handle, "wb", buffering=0)

    def open(self, path: Path) -> BinaryIO:
        """Open a file."""
        return path.open("rb")

    def flush(self, file: BinaryIO) -> None:
        """Flush a file."""
        os.fsync(file.fileno())

    def flush_folder(self, folder: Path) -> None:
        """Flush a folder."""
        handle = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)

    def rename(self, old: Path, new: Path) -> None:
        """Rename a file."""
        old.replace(new)

    def remove(self, path: Path) -> None:
        """Remove a file."""
        path.unlink()


def write_durably(files: FileSystem, path: Path, chunks: Iterable[memoryview]) -> None:
    """Write a file so that, whatever happens, it is there in whole or not at all.

    If it returns, the file is on the disk. If it raises, what was there before is there still.

    Raises:
        OSError: the disk is full, or worse; nothing is left lying about.
    """
    draft = path.with_name(f".{path.name}{DRAFT}")
    try:
        with files.create(draft) as file:
            for chunk in chunks:
                left = chunk
                while len(left):  # the system may take a part of it only
                    left = left[file.write(left) :]
            files.flush(file)
        files.rename(draft, path)
        files.flush_folder(path.parent)
    except BaseException:
        with suppress(OSError):
            files.remove(draft)
        raise
