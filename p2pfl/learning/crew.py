"""Threads that share out blocks of work, each of which computes alone.

Threads that share out a single operation wait for each other many times in a step, and when
something else wants a core, for long. Those which share out blocks wait once, at the end.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor, wait
from functools import cache
from types import TracebackType
from typing import Any, Self

import torch

WAITING = 2  # jobs for each thread that are kept ready, so that what they hold is bounded


def shares(rows: int, most: int, threads: int) -> list[slice]:
    """Return the blocks in which threads best share out some rows, so that they end together.

    All have as many blocks to do as any other. But where there are fewer rows than threads, those
    do them together.

    Args:
        rows: how many there are.
        most: how many a block may have.
        threads: how many take blocks.
    """
    if rows <= threads:
        threads = 1
    blocks = threads * -(-rows // (threads * most))
    size = -(-rows // max(1, blocks))
    return [slice(start, min(rows, start + size)) for start in range(0, rows, max(1, size))]


class Crew:
    """A context in which work is shared out; at its end all of it is done.

    Args:
        threads: how many; at most 1 is no thread but the caller's own.
    """

    def __init__(self, threads: int) -> None:
        self._pool = _pool(threads) if threads > 1 else None
        self._most = WAITING * threads
        self._jobs: deque[Future[Any]] = deque()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        try:
            while self._jobs and error is None:
                self._jobs.popleft().result()
        finally:
            for job in self._jobs:
                job.cancel()
            wait(self._jobs)  # nobody writes behind the back of who handles the error

    def do(self, work: Callable[..., object], *given: Any) -> None:  # noqa: ANN401
        """Have ``work(*given)`` done; an error shows here or at the end."""
        if self._pool is None:
            work(*given)
            return
        while len(self._jobs) >= self._most:
            self._jobs.popleft().result()
        self._jobs.append(self._pool.submit(work, *given))


def share_out(
    work: Callable[[slice], object], rows: int, most: int, parallel: bool, done: int = 0
) -> None:
    """Have ``work(block)`` done for each block of some rows, by all threads that torch may use.

    Args:
        work: what is to be done.
        rows: how many there are.
        most: how many a block may have.
        parallel: whether threads take blocks of their own; else all work on one at a time.
        done: how many, the first ones, are done already.
    """
    threads = torch.get_num_threads() if parallel else 1
    blocks = shares(rows - done, most, threads)
    with Crew(threads if len(blocks) > 1 else 1) as crew:
        for block in blocks:
            crew.do(work, slice(done + block.start, done + block.stop))


@cache
def _pool(threads: int) -> ThreadPoolExecutor:
    """Return threads that stay, as does the memory they use again and again."""
    # An operation in one of these threads is not shared out any further.
    return ThreadPoolExecutor(threads, initializer=torch.set_num_threads, initargs=(1,))
