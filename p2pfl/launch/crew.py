"""Start one process for each peer on this machine, watch over them, and end them all.

The processes are forked from one that has imported torch and the package already
(`multiprocessing`'s fork server), so that sixteen of them start in a second or two and
share the memory of the libraries. They know nothing of one another but their addresses.
"""

from __future__ import annotations

import json
import multiprocessing as mp
import os
import signal
import socket
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from multiprocessing import connection
from multiprocessing.process import BaseProcess
from typing import Any

News = dict[str, Any]
Entry = Callable[[dict[str, Any], "connection.Connection[Any, Any]"], None]

GRACE = 10.0  # seconds a process has to end by itself before it is killed


def free_addresses(count: int) -> dict[int, str]:
    """Return so many addresses on loopback where nobody listens now."""
    with ExitStack() as stack:
        holds = [stack.enter_context(socket.socket()) for _ in range(count)]
        for hold in holds:
            hold.bind(("127.0.0.1", 0))
        return {i: f"tcp://127.0.0.1:{hold.getsockname()[1]}" for i, hold in enumerate(holds)}


class Crew:
    """The peer processes of one run."""

    def __init__(self, entry: Entry, jobs: Sequence[dict[str, Any]], preload: list[str]) -> None:
        context = mp.get_context("forkserver")
        context.set_forkserver_preload(preload)
        self.processes: list[BaseProcess] = []
        self._pipes: dict[connection.Connection[Any, Any], int] = {}
        with _without_main():
            for number, job in enumerate(jobs):
                ours, theirs = context.Pipe(duplex=False)
                process = context.Process(target=entry, args=(job, theirs), daemon=True)
                process.start()
                theirs.close()
                self.processes.append(process)
                self._pipes[ours] = number

    def news(self, timeout: float = 0.2) -> Iterator[tuple[int, News]]:
        """Yield what the peers report, until all have ended.

        A peer's last news is ``{"exit": code}``, negative for a signal. Without news,
        ``(-1, {})`` comes every `timeout` seconds, so that the caller can look around.
        """
        while self._pipes:
            ready = connection.wait(list(self._pipes), timeout)
            if not ready:
                yield -1, {}
            for pipe in ready:
                assert isinstance(pipe, connection.Connection)
                number = self._pipes[pipe]
                try:
                    yield number, json.loads(pipe.recv_bytes())
                except (EOFError, OSError):
                    del self._pipes[pipe]
                    pipe.close()
                    self.processes[number].join(GRACE)
                    yield number, {"exit": self.processes[number].exitcode}

    def end(self) -> None:
        """Ask every process to end, and kill those that have not after some seconds."""
        for process in self.processes:
            self._signal(process, signal.SIGTERM)
            self._signal(process, signal.SIGCONT)  # a stopped process cannot hear
        deadline = time.monotonic() + GRACE
        for process in self.processes:
            process.join(max(0.0, deadline - time.monotonic()))
            self._signal(process, signal.SIGKILL)
            process.join(1)

    def _signal(self, process: BaseProcess, number: signal.Signals) -> None:
        if process.is_alive() and process.pid:
            os.kill(process.pid, number)


@contextmanager
def _without_main() -> Iterator[None]:
    """Keep the children from importing the program we run in; they do not need it."""
    main = sys.modules["__main__"]
    names = vars(main)
    kept = [(key, names.pop(key)) for key in ("__file__", "__spec__") if key in names]
    main.__spec__ = None
    try:
        yield
    finally:
        names.update(kept)
