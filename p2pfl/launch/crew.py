"""Start one process for each peer on this machine, watch over them, and end them all.

The processes are forked from one that has imported torch and the package already
(`multiprocessing`'s fork server), so that sixteen of them start in a second or two and
share the memory of the libraries. They know nothing of one another but their addresses.
"""

from __future__ import annotations

import contextlib
import json
import multiprocessing as mp
import os
import signal
import socket
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from multiprocessing import connection, forkserver, resource_tracker
from multiprocessing.process import BaseProcess
from typing import Any

News = dict[str, Any]
Entry = Callable[[dict[str, Any], "connection.Connection[Any, Any]"], None]

GRACE = 10.0  # seconds a process has to end by itself before it is killed
SILENCE = 10.0  # seconds without news after which a process counts as frozen


def listen(count: int) -> list[socket.socket]:
    """Return so many sockets which listen on loopback.

    The peers take them over. Were they only told the addresses, another program, or the
    far end of a link, could have taken one before its peer was up.
    """
    return [socket.create_server(("127.0.0.1", 0), backlog=max(128, count)) for _ in range(count)]


def warm_up(preload: Sequence[str]) -> None:
    """Start the process that the peers are forked from, and do not wait until it is ready.

    It keeps what it was told to import the first time.
    """
    context = mp.get_context("forkserver")
    context.set_forkserver_preload(list(preload))
    # Signals that are blocked here are blocked in all processes to come: Ctrl-C at a terminal
    # goes to all of them, and it is ours to deal with. The resource tracker would unblock it.
    resource_tracker.ensure_running()
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        forkserver.ensure_running()
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


class Crew:
    """The peer processes of one run.

    Args:
        entry: what each runs, a function of a module; it is given a job, and a pipe on which
            it says JSON.
        jobs: one for each process. Sockets in them are handed over and closed here.
        preload: modules that the processes share.

    Attributes:
        heard: when (monotonic) each process had news last.
    """

    def __init__(
        self, entry: Entry, jobs: Sequence[dict[str, Any]], preload: Sequence[str]
    ) -> None:
        warm_up(preload)
        context = mp.get_context("forkserver")
        self.processes: list[BaseProcess] = []
        self.heard: list[float] = []
        self._pipes: dict[connection.Connection[Any, Any], int] = {}
        try:
            with _without_main():
                for number, job in enumerate(jobs):
                    ours, theirs = context.Pipe(duplex=False)
                    self._pipes[ours] = number
                    with theirs:
                        process = context.Process(target=entry, args=(job, theirs), daemon=True)
                        process.start()
                    self.processes.append(process)
                    self.heard.append(time.monotonic())
        except BaseException:
            self.end()
            raise
        finally:
            for held in (part for job in jobs for part in job.values()):
                if isinstance(held, socket.socket):
                    held.close()

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
                self.heard[number] = time.monotonic()
                try:
                    yield number, json.loads(pipe.recv_bytes())
                except (EOFError, OSError):
                    del self._pipes[pipe]
                    pipe.close()
                    self.processes[number].join(GRACE)
                    yield number, {"exit": self.processes[number].exitcode}

    def frozen(self) -> list[int]:
        """Return the processes that go on and have had no news for long, if no other goes on."""
        now = time.monotonic()
        left = list(self._pipes.values())
        silent = [number for number in left if now - self.heard[number] > SILENCE]
        return left if len(silent) == len(left) < len(self.processes) else []

    def ask_to_end(self) -> None:
        """Ask every process to end."""
        for process in self.processes:
            _signal(process, signal.SIGTERM)
            _signal(process, signal.SIGCONT)  # a stopped process cannot hear

    def end(self) -> None:
        """Ask every process to end, and kill those that have not after some seconds."""
        self.ask_to_end()
        deadline = time.monotonic() + GRACE
        for process in self.processes:
            process.join(max(0.0, deadline - time.monotonic()))
            _signal(process, signal.SIGKILL)
            process.join(1)
        for pipe in self._pipes:
            pipe.close()
        self._pipes.clear()


def _signal(process: BaseProcess, number: signal.Signals) -> None:
    if process.is_alive() and process.pid:
        with contextlib.suppress(ProcessLookupError):
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
