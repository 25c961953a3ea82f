"""The cores of peers that share a machine: where there are enough, each peer has its own.

A peer is several threads: one trains, one of ZeroMQ's encrypts, one checks and mixes what has come.
On cores of their own they find in its cache what the one before has written, and peers do not move
each other about. MPI and Slurm bind processes likewise. Where there are more peers than cores, the
system knows better who is to run.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

TOLD = Path("/sys/devices/system/cpu")  # where Linux tells which threads a core consists of


def usable() -> list[int]:
    """Return the cores that this process may use, those side by side that are one in truth.

    To the system every thread that a core can run at once is a core.
    """
    if hasattr(os, "sched_getaffinity"):
        return sorted(os.sched_getaffinity(0), key=_place)
    return list(range(os.cpu_count() or 1))


def _place(core: int) -> tuple[int, int, int]:
    folder = TOLD / f"cpu{core}" / "topology"
    try:
        package, inside = (
            int((folder / name).read_text()) for name in ("physical_package_id", "core_id")
        )
    except (OSError, ValueError):  # as in some containers
        return 0, core, core
    return package, inside, core


def threads_each(peers: int) -> int:
    """Return how many threads each of some peers best computes with."""
    return max(1, len(usable()) // peers)


def deal(peers: int) -> list[list[int]]:
    """Return the cores of each peer: as many as of any other, or all where there are too few."""
    cores = usable()
    each = len(cores) // peers
    if not each:
        return [cores] * peers
    return [cores[k * each : (k + 1) * each] for k in range(peers)]


def bind(cores: Iterable[int]) -> None:
    """Keep this thread, and what it starts from now on, on some cores, if the system can."""
    if hasattr(os, "sched_setaffinity"):
        with contextlib.suppress(OSError):  # they have been taken from us meanwhile
            os.sched_setaffinity(0, cores)


@contextmanager
def bound(cores: Iterable[int]) -> Iterator[None]:
    """Start something that is to stay on some cores."""
    before = usable()
    bind(cores)
    try:
        yield
    finally:
        bind(before)
