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
from itertools import chain, groupby, pairwise
from operator import itemgetter
from pathlib import Path

TOLD = Path("/sys/devices/system/cpu")  # where Linux tells which processors are one core


def usable() -> list[int]:
    """Return the processors that this process may use, in ascending order."""
    if hasattr(os, "sched_getaffinity"):
        return sorted(os.sched_getaffinity(0))
    return list(range(os.cpu_count() or 1))


def threads_each(peers: int) -> int:
    """Return how many threads each of some peers best computes with."""
    return max(1, len(usable()) // peers)


def deal(peers: int) -> list[list[int]]:
    """Return the processors of each peer: those of whole cores, or all where there are too few.

    To the system every thread that a core runs at once is a processor.
    """
    processors = usable()
    places = sorted((_place(processor), processor) for processor in processors)
    whole = [[p for _, p in core] for _, core in groupby(places, key=itemgetter(0))]
    if len(whole) < peers:
        return [processors] * peers
    cuts = [k * len(whole) // peers for k in range(peers + 1)]
    return [sorted(chain(*whole[begin:end])) for begin, end in pairwise(cuts)]


def _place(processor: int) -> tuple[int, int]:
    """Return the package of a processor, and the first one of the same core."""
    folder = TOLD / f"cpu{processor}" / "topology"
    try:
        package = int((folder / "physical_package_id").read_text())
        siblings = (folder / "thread_siblings_list").read_text()
        return package, int(siblings.replace("-", ",").split(",")[0])
    except (OSError, ValueError):  # as in some containers
        return 0, processor


def bind(processors: Iterable[int]) -> None:
    """Keep this thread, and what it starts from now on, on some processors, if the system can."""
    if hasattr(os, "sched_setaffinity"):
        with contextlib.suppress(OSError):  # they have been taken from us meanwhile
            os.sched_setaffinity(0, processors)


@contextmanager
def bound(processors: Iterable[int]) -> Iterator[None]:
    """Start something that is to stay on some processors."""
    before = usable()
    bind(processors)
    try:
        yield
    finally:
        bind(before)
