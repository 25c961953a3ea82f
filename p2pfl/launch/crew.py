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
BACKLOG = 1024  # all peers dial at once


def reserve(count: int) -> list[socket.socket]:
    """Return so many sockets that have an address on loopback each, and do not listen yet.

    The peers take them over. Were they only told the addresses, another program, or the
    far end of a link, could have taken one before its peer was up.
    """
    held = [socket.socket() for _ in range(count)]
    for one in held:
        one.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        one.bind(("127.0.0.1", 0))
    return held


def warm_up(preload: Sequence[str]) -> None:
    """Start the process that the peers are forked from, and do not wait until it is ready.

    It keeps what it was told to import the first time.
    """
    context = mp.get_context("forkserver")
    context.set_forkserver_preload(list(preload))
    # Signals that are blocked here are blocked in all processes to come: Ctrl-C at a terminal, or
    # its end, goes to all of them, and is ours to deal with. The resource tracker would unblock it.
    resource_tracker.ensure_running()
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT, signal.SIGHUP})
    try:
        forkserver.ensure_running()
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


class Crew:
    """The peer processes of one run.

    Args:
        entry: what each runs, a function of a module; it is given a job, and a pipe on which
            it says JSON.
        preload: modules that the processes share.
    """

    def __init__(self, entry: Entry, preload: Sequence[str]) -> None:
        warm_up(preload)
        self._entry, self._context = entry, mp.get_context("forkserver")
        self._processes: dict[int, BaseProcess] = {}
        self._heard: dict[int, float] = {}  # when (monotonic) each had news last
        self._pipes: dict[connection.Connection[Any, Any], int] = {}

    def start(self, number: int, job: dict[str, Any]) -> None:
        """Start a process, or start it again after it has ended.

        Args:
            number: what it is called.
            job: what it is to do. Sockets in it listen from now on, are handed over and closed
                here.
        """
        held = [part for part in job.values() if isinstance(part, socket.socket)]
        ours, theirs = self._context.Pipe(duplex=False)
        try:
            for one in held:
                one.listen(BACKLOG)
            with theirs, _without_main():
                process = self._context.Process(target=self._entry, args=(job, theirs), daemon=True)
                process.start()
        finally:
            for one in held:
                one.close()
        self._processes[number], self._pipes[ours] = process, number
        self._heard[number] = time.monotonic()

    @property
    def running(self) -> set[int]:
        """The processes that have not ended, as far as has been heard."""
        return set(self._pipes.values())

    def hear(self, timeout: float) -> Iterator[tuple[int, News]]:
        """Yield what the processes have to report, for which `timeout` seconds are waited.

        Their last news is ``{"exit": code}``, negative for a signal.
        """
        for pipe in connection.wait(list(self._pipes), max(0.0, timeout)):
            assert isinstance(pipe, connection.Connection)
            number = self._pipes[pipe]
            self._heard[number] = time.monotonic()
            try:
                yield number, json.loads(pipe.recv_bytes())
            except (EOFError, OSError):
                del self._pipes[pipe]
                pipe.close()
                self._processes[number].join(GRACE)
                yield number, {"exit": self._processes[number].exitcode}

    def silent(self) -> set[int]:
        """Return the processes that go on and have had no news for long."""
        since = time.monotonic() - SILENCE
        return {number for number in self.running if self._heard[number] < since}

    def signal(self, number: int, what: signal.Signals) -> None:
        """Send a process a signal, unless it has ended."""
        _signal(self._processes[number], what)
        if what is signal.SIGCONT:
            self._heard[number] = time.monotonic()  # it could not say anything

    def ask_to_end(self) -> None:
        """Ask every process to end."""
        for process in self._processes.values():
            _signal(process, signal.SIGTERM)
            _signal(process, signal.SIGCONT)  # a stopped process cannot hear

    def end(self) -> None:
        """Ask every process to end, and kill those that have not after some seconds."""
        self.ask_to_end()
        deadline = time.monotonic() + GRACE
        for process in self._processes.values():
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
