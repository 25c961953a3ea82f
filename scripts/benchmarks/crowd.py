"""Some processes that measure something together, and what memory each of them takes."""

from __future__ import annotations

import multiprocessing as mp
import sys
import tempfile
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any, NamedTuple

import torch.distributed as dist
import zmq

PATIENCE = 120.0  # seconds to wait for one another
_CONTEXT = mp.get_context("forkserver")
_CONTEXT.set_forkserver_preload(["torch.distributed", "zmq"])


class Measured(NamedTuple):
    """What something has come to.

    Attributes:
        seconds: it took.
        extra: MB a process needed beyond what it had before, at most.
    """

    seconds: float
    extra: float


class Meeting(NamedTuple):
    """What the processes share.

    Attributes:
        size: how many they are.
        barrier: where they wait for one another.
        ports: one for each process, to say where it listens.
        keys: public and secret, of whoever listens in private.
        folder: for files.
    """

    size: int
    barrier: Any
    ports: Any
    keys: tuple[bytes, bytes]
    folder: str

    def wait(self) -> None:
        """Wait for all the others."""
        self.barrier.wait(PATIENCE)

    def join_gloo(self, rank: int) -> None:
        """Make them a group of torch.distributed, once all have called this."""
        store, patience = f"file://{self.folder}/store", timedelta(seconds=PATIENCE)
        dist.init_process_group("gloo", store, patience, self.size, rank)


def together(work: Callable[..., Any], size: int, *given: object) -> list[Any]:
    """Let so many processes do ``work(rank, meeting, *given)``; return what each has found."""
    with tempfile.TemporaryDirectory() as folder:
        shared = (_CONTEXT.Barrier(size), _CONTEXT.Array("i", size))
        meeting = Meeting(size, *shared, zmq.curve_keypair(), folder)
        pipes = [_CONTEXT.Pipe(duplex=False) for _ in range(size)]
        for rank, (_, writer) in enumerate(pipes):
            task = (work, writer, rank, meeting, *given)
            _CONTEXT.Process(target=_run, args=task, daemon=True).start()
            writer.close()
        try:
            return [reader.recv() for reader, _ in pipes]
        except EOFError:
            sys.exit(f"{work.__module__}: a process has failed")


def _run(
    work: Callable[..., Any],
    pipe: Any,  # noqa: ANN401 - its type depends on the system
    rank: int,
    meeting: Meeting,
    *given: object,
) -> None:
    try:
        pipe.send(work(rank, meeting, *given))
    except BaseException:
        meeting.barrier.abort()  # the others need not wait
        raise


class Memory:
    """How much the memory of this process grows at most, from here on."""

    def __init__(self) -> None:
        Path("/proc/self/clear_refs").write_text("5")  # the high-water mark falls to what is there
        self._before = megabytes("VmRSS")

    def grown(self) -> float:
        """Return by how many MB the memory was larger than at the start, at its largest."""
        return megabytes("VmHWM") - self._before


def megabytes(key: str, process: int | str = "self") -> float:
    """Return what Linux says of the memory of a process, as ``VmHWM``, the most it has had."""
    lines = Path(f"/proc/{process}/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(key)) * 1024 / 1e6
