"""``fleet.json`` in a run folder: what was started where, so that any shell can go on from it."""

from __future__ import annotations

import asyncio
import fcntl
import os
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from pathlib import Path

import msgspec

from p2pfl import files
from p2pfl.errors import RunError, UserError
from p2pfl.fleet.host import Host

NAME = "fleet.json"
POLL = 0.1  # seconds between two looks whether a folder is free

Ending = Mapping[str, str]
"""How a peer has ended: ``"status"``, as in its summary, and ``"why"``."""


class Place(msgspec.Struct):
    """A host, the run folder there, and its peers."""

    host: Host
    folder: str
    nodes: list[int]


class Record(msgspec.Struct):
    """A launch.

    Attributes:
        started: when, in local time.
        rounds: how many there are to be at most.
        places: the hosts.
        collected: whether all has ended and its results are here.
        endings: then, how each peer has ended.
    """

    started: str
    rounds: int
    places: list[Place]
    collected: bool = False
    endings: dict[int, dict[str, str]] = {}

    def save(self, folder: Path) -> None:
        """Write it, so that at every moment the old or the new one is there, whole."""
        text = msgspec.json.format(msgspec.json.encode(self), indent=2)
        files.replace(folder / NAME, text + b"\n")

    @property
    def hosts(self) -> dict[int, str]:
        """The name of each peer's host."""
        return {node: place.host.name for place in self.places for node in place.nodes}

    def error(self, endings: Mapping[int, Ending]) -> str | None:
        """Say which peers failed and how, in the order of `endings`."""
        failed = [
            f"peer {node} on {self.hosts[node]} failed: {ending['why']}"
            for node, ending in endings.items()
            if ending["status"] == "failed"
        ]
        return "; ".join(failed) or None


@asynccontextmanager
async def locked(folder: Path) -> AsyncIterator[None]:
    """Keep a run folder to ourselves, once nobody else does: `up` and `down` both complete it.

    Raises:
        RunError: it is not there any more.
    """
    try:
        descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    except OSError as error:
        raise RunError(
            f"{folder} is there no more ({error.strerror}); where it is now,"
            " `p2pfl down` collects what the peers have left"
        ) from error
    try:
        while True:
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                await asyncio.sleep(POLL)
        yield
    finally:
        os.close(descriptor)


def read_record(folder: Path) -> Record:
    """Read the record of a run folder.

    Raises:
        UserError: the folder is not that of a launch, or its record is damaged.
    """
    path = folder / NAME
    try:
        return msgspec.json.decode(path.read_bytes(), type=Record)
    except FileNotFoundError as error:
        what = f"it has no {NAME}" if folder.is_dir() else "it is not there"
        raise UserError(f"{folder} is no run of `p2pfl up`: {what}") from error
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror}") from error
    except (msgspec.MsgspecError, UnicodeDecodeError) as error:
        raise UserError(f"{path} is damaged: {error}") from error
