"""Threads that share out blocks of work, each of which computes alone.

Threads that share out a single operation wait for each other many times in a step, and when
something else wants a core, for long. Those which share out blocks wait once, at the end.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from types import TracebackType
from typing import Any, Self

import torch

WAITING = 2  # jobs for each thread that are kept ready, so that what they hold is bounded


class Crew:
    """A context in which work is shared out; at its end all of it is done.

    Args:
        threads: how many; at most 1 is no thread but the caller's own.
    """

    def __init__(self, threads: int) -> None:
        self._threads = threads
        self._pool: ThreadPoolExecutor | None = None
        self._jobs: deque[Future[Any]] = deque()

    def __enter__(self) -> Self:
        if self._threads > 1:
            # An operation in one of these threads is not shared out any further.
            self._pool = ThreadPoolExecutor(
                self._threads, initializer=torch.set_num_threads, initargs=(1,)
            )
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self._pool is None:
            return
        try:
            while self._jobs and error is None:
                self._jobs.popleft().result()
        finally:
            self._pool.shutdown(cancel_futures=True)

    def do(self, work: Callable[..., object], *given: Any) -> None:  # noqa: ANN401
        """Have ``work(*given)`` done; an error shows here or at the end."""
        if self._pool is None:
            work(*given)
            return
        while len(self._jobs) >= WAITING * self._threads:
            self._jobs.popleft().result()
        self._jobs.append(self._pool.submit(work, *given))
