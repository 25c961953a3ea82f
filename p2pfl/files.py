"""Files that may not be read, that others may be reading, or that a crash must not leave half."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from p2pfl.errors import UserError


def is_file(path: Path) -> bool:
    """Say whether there is a file.

    Raises:
        UserError: one cannot know, as when its folder may not be read.
    """
    try:
        return path.is_file()
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror}") from error


def replace(path: Path, data: bytes) -> None:
    """Write a file so that at every moment either the old or the new one is there, whole.

    Who may read the old one may read the new one.

    Raises:
        OSError: the disk is full, or worse; what was there before is there still.
    """
    with replacing(path) as draft:
        draft.write_bytes(data)


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Have a file written under the name that is yielded, to be called `path` when it is whole.

    Raises:
        OSError: as of `replace`.
    """
    draft = path.with_name(f".{path.name}.tmp")
    try:
        draft.touch()
        mode = (path if path.exists() else draft).stat().st_mode & 0o777
        yield draft
        with draft.open("rb") as file:
            os.fchmod(file.fileno(), mode)  # who writes it may have put another in its place
            os.fsync(file.fileno())
        draft.replace(path)
    except BaseException:
        draft.unlink(missing_ok=True)
        raise
