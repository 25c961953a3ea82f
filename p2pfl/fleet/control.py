"""``p2pfl status`` and ``p2pfl logs``: how a launch goes on without its launcher.

People call them again and again, so nothing here may need torch, which takes seconds to load.
"""

from __future__ import annotations

import asyncio
import csv
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple

from p2pfl.errors import UserError
from p2pfl.fleet.record import Place, Record, read_record
from p2pfl.fleet.ssh import HostError, Shell, everywhere


class PeerStatus(NamedTuple):
    """What is known of a peer."""

    node: int
    host: str
    phase: str  # what it does, or "finished", "interrupted", "failed", "out of reach"
    round: int  # how many it has behind it
    age: float | None  # seconds since its last news; None: there are none
    why: str = ""  # how it has ended, or why nothing is known


async def status(folder: Path) -> list[PeerStatus]:
    """Say what every peer of a launch does.

    Raises:
        UserError: the folder is not that of a launch.
    """
    record = read_record(folder)
    if record.collected:  # and what is there may be gone
        return [_collected(folder, record, node) for node in record.hosts]
    found = await asyncio.gather(*map(_status, record.places))
    return [peer for part in found for peer in part]


def _collected(folder: Path, record: Record, node: int) -> PeerStatus:
    """Say how a peer had ended when it was collected."""
    ending, rounds = record.endings.get(node, {}), 0
    with suppress(OSError, ValueError, KeyError, IndexError):  # it has left none, or damaged ones
        text = (folder / "peers" / f"{node:03d}" / "metrics.csv").read_text(encoding="utf-8")
        rounds = int(list(csv.DictReader(text.splitlines()))[-1]["round"]) + 1
    phase, why = ending.get("status", "finished"), ending.get("why", "")
    return PeerStatus(node, record.hosts[node], phase, rounds, None, why)


async def _status(place: Place) -> list[PeerStatus]:
    try:
        async with Shell.to(place.host) as shell:
            answer = await shell.ask("status", folder=place.folder, nodes=place.nodes)
    except HostError as error:
        name = place.host.name
        return [PeerStatus(n, name, "out of reach", 0, None, str(error)) for n in place.nodes]
    return [_peer(place, told) for told in answer["peers"]]


def _peer(place: Place, told: dict[str, Any]) -> PeerStatus:
    ended = told.get("ended", {})
    phase, why = ended.get("status", told["phase"]), ended.get("why", "")
    return PeerStatus(told["node"], place.host.name, phase, told["round"], told.get("age"), why)


async def logs(
    folder: Path,
    say: Callable[[dict[str, Any]], None],
    warn: Callable[[str], None],
    peer: int | None,
    follow: bool,
) -> None:
    """Tell what peers have said, and what went wrong with them.

    Args:
        folder: the run folder.
        say: told ``{"node": ..., "line": ...}``, and ``{"node": ..., "log": ...}`` for what
            stands in the peer's log.
        warn: told at once of a host that cannot be followed while others are.
        peer: only this one.
        follow: go on until all have ended.

    Raises:
        UserError: the folder is not that of a launch, or there is no such peer.
        RunError: a host cannot be reached, or cannot say what its peers do.
    """
    record = read_record(folder)
    if peer is not None and peer not in record.hosts:
        raise UserError(f"--peer {peer}: the peers of this run are 0 to {len(record.hosts) - 1}")

    async def read(place: Place) -> None:
        at = {node: 0 for node in place.nodes if peer in (None, node)}
        if not at:
            return
        async with Shell.to(place.host) as shell:
            async for news in shell.news(place.folder, at, follow, log=True):
                if "line" in news or "log" in news:
                    say(news)

    async def follow_on(place: Place) -> None:
        try:
            await read(place)
        except HostError as error:  # told again in the end, which may be far
            warn(str(error))
            raise

    await everywhere(map(follow_on if follow else read, record.places), "cannot be read")
