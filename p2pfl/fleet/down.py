"""``p2pfl down``: end a launch that goes on without its launcher, and collect what it leaves."""

from __future__ import annotations

import asyncio
from pathlib import Path

from p2pfl.fleet.control import PeerStatus, status
from p2pfl.fleet.launch import Ended, conclude, ended_before
from p2pfl.fleet.record import Ending, Place, read_record
from p2pfl.fleet.ssh import HostError, Shell


async def down(folder: Path) -> Ended:
    """Stop what still runs of a launch, and collect what all peers have left.

    A run that was collected already is left as it is, and `up` may still be following this one.
    Where a host is out of reach, or a peer does not end, the others are stopped and collected,
    and another call can end and fetch the rest.

    Raises:
        UserError: the folder is not that of a launch.
    """
    record = read_record(folder)
    if record.collected:
        return ended_before(folder)
    shells: dict[str, Shell] = {}
    try:
        await asyncio.gather(*(_stop(place, shells) for place in record.places))
        peers = await status(folder)
        interrupted = any(peer.phase == "interrupted" for peer in peers)
        endings = {peer.node: _ending(peer) for peer in peers}
        return await conclude(folder, record, shells, endings, interrupted)
    finally:
        for shell in shells.values():
            shell.close()


async def _stop(place: Place, shells: dict[str, Shell]) -> None:
    try:
        shells[place.host.name] = await Shell.connect(place.host)
        await shells[place.host.name].ask("stop", folder=place.folder, nodes=place.nodes)
    except HostError:  # whether it has ended is asked again before anything is collected
        pass


def _ending(peer: PeerStatus) -> Ending:
    if peer.phase in ("finished", "interrupted", "failed"):
        return {"status": peer.phase, "why": peer.why}
    return {"status": "failed", "why": peer.why or "it still goes on"}
