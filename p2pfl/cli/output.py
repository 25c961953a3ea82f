"""Standard output that says in one line that it cannot be written."""

from __future__ import annotations

import errno
import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, TextIO

from p2pfl.errors import RunError, reason


class Output:
    """A text file whose failures, as of a full disk, are a `RunError`.

    A pipe that was closed is none, as who reads it has seen enough, nor is a closed terminal.
    """

    def __init__(self, file: TextIO) -> None:
        self._file = file

    def write(self, text: str) -> int:
        """Write some text; it raises `RunError`."""
        if text == "":  # click finds out in this way what kind of file this is
            return 0
        with self._checked():
            return self._file.write(text)

    def flush(self) -> None:
        """Hand on what has been written; it raises `RunError`."""
        with self._checked():
            self._file.flush()

    def __getattr__(self, name: str) -> Any:  # noqa: ANN401
        return getattr(self._file, name)

    @contextmanager
    def _checked(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            if error.errno in (errno.EPIPE, errno.EIO):
                raise
            # What is still in the buffer must not fail once more when the program ends.
            os.dup2(os.open(os.devnull, os.O_WRONLY), self._file.fileno())
            why = error.strerror or reason(error)
            raise RunError(f"standard output cannot be written: {why}") from error
