"""Files that may not be read, that others may be reading, or that a crash must not leave half."""

from __future__ import annotations

import os
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
    draft = path.with_name(f".{path.name}.tmp")
    try:
        with draft.open("wb") as file:
            file.write(data)
            file.flush()
            if path.exists():
                os.fchmod(file.fileno(), path.stat().st_mode & 0o777)
            os.fsync(file.fileno())
        draft.replace(path)
    except OSError:
        draft.unlink(missing_ok=True)
        raise
