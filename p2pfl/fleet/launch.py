"""``p2pfl up``: check all hosts, start the peers, follow them, and collect what they leave."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import NamedTuple

from p2pfl.errors import RunError, UserError
from p2pfl.experiment.experiment import Experiment
from p2pfl.fleet.collect import fetch, gather, open_folder, set_aside
from p2pfl.fleet.host import Fleet, Host
from p2pfl.fleet.interrupts import (
    completing,
    heeding_signals,
    pointing_to_down,
    unless_interrupted,
)
from p2pfl.fleet.parcel import data_files, parcel
from p2pfl.fleet.preflight import Checks, preflight, refuse_shared
from p2pfl.fleet.record import Ending, Place, Record, locked, read_record
from p2pfl.fleet.ssh import HostError, Shell, everywhere
from p2pfl.fleet.watch import OnFailure, View, Watching
from p2pfl.launch.membership import IN_CLEAR
from p2pfl.results.runs import read_summary
from p2pfl.runtime.setup import Status


@dataclass(frozen=True)
class Launch:
    """What is to be started.

    Attributes:
        experiment: what is trained.
        fleet: where.
        insecure: whether links between machines may be in clear.
        max_skew: seconds that the clock of a host may be off.
        on_failure: whether the others are stopped when a peer fails.
        detach: whether to leave as soon as all have started.
    """

    experiment: Experiment
    fleet: Fleet
    insecure: bool = False
    max_skew: float = 5.0
    on_failure: OnFailure = "stop"
    detach: bool = False

    @property
    def warning(self) -> str:
        """What to tell who asked for links in clear, if these leave a machine."""
        in_clear = self.insecure and not (self.fleet.seats[0].keys or self.fleet.is_loopback)
        return IN_CLEAR if in_clear else ""

    def check(self) -> None:
        """Check what can be checked before any host is asked.

        Raises:
            UserError: experiment and hosts do not go together.
        """
        seats, nodes = self.fleet.seats, self.experiment.nodes
        if self.insecure and seats[0].keys:
            raise UserError(
                "the hosts file has `keys`, which encrypt every link, --insecure none: give one of"
                " them"
            )
        if len(seats) != nodes:
            raise UserError(
                f"the hosts file has {len(seats)} ports, one for each peer, but the experiment"
                f" has nodes = {nodes}"
            )
        if not (self.insecure or self.fleet.is_loopback or seats[0].keys):
            raise UserError(
                "the hosts file has no `keys`, and peers of different machines would talk in"
                ' clear: add  keys = "~/.config/p2pfl/keys.toml"  to its [defaults], or accept'
                " this with --insecure"
            )
        for seat in seats:
            data_files(self.experiment, seat)


class Ended(NamedTuple):
    """How a launch has ended, or ``"running"``: it goes on without us.

    Attributes:
        folder: the run folder.
        status: how the run has ended.
        error: what went wrong.
        away: which part of it is that something was not collected, and may go on.
    """

    folder: Path
    status: Status
    error: str | None = None
    away: str | None = None


async def up(launch: Launch, make: Callable[[], Path], view: View) -> Ended:
    """Run an experiment on the hosts.

    SIGINT and SIGTERM end all peers, or the sending of files before there are any; SIGHUP, a
    terminal that was closed, leaves them alone.

    Args:
        launch: what is to be started.
        make: makes the local run folder, once all hosts have been checked.
        view: shown how it goes on.

    Raises:
        UserError: experiment and hosts do not go together, or hosts share keys.
        RunError: hosts are not ready, a line for each fault; nothing has started.
    """
    launch.check()
    shells: dict[str, Shell] = {}
    try:
        keys = await _check_all(launch, shells)
        files = parcel(launch.experiment, launch.fleet, keys)
        folder = make()
        open_folder(folder, launch.experiment)
        detach = asyncio.Event()
        with completing(folder):
            record = await unless_interrupted(_send(launch, files, shells), detach)
            if record is None:
                gather(folder, {}, "interrupted", None)
                return Ended(folder, "interrupted")
            record.save(folder)
        with pointing_to_down(folder, view):
            watching = Watching(record, shells, view, launch.on_failure, detach)
            with heeding_signals(watching.interrupt, detach):
                await _start(launch, watching)
                if launch.detach and not (watching.endings or watching.interrupted):
                    return Ended(folder, "running")
                if not await watching.until_the_end():
                    return Ended(folder, "running")
            return await conclude(folder, record, shells, watching.endings, watching.interrupted)
    finally:
        for shell in shells.values():
            shell.close()


async def conclude(
    folder: Path,
    record: Record,
    shells: Mapping[str, Shell],
    endings: Mapping[int, Ending],
    interrupted: bool,
) -> Ended:
    """Collect what is there, and say how the run has ended.

    A host that is out of reach, or whose peers go on, keeps its part, and `p2pfl down` can end
    them and fetch it later. A peer whose
    metrics are damaged has failed. What somebody else has collected meanwhile is left as it is.
    """
    async with locked(folder):
        if read_record(folder).collected:
            return ended_before(folder)
        away = None
        try:
            fetching = (_fetch(folder, place, shells) for place in record.places)
            await everywhere(fetching, "have not given all they have")
            record.collected = True
        except RunError as fault:
            away = str(fault).replace("\n", ": ")
        damaged = {n: _damaged(endings.get(n), why) for n, why in set_aside(folder).items()}
        endings = {**endings, **damaged}
        error = "; ".join(filter(None, (record.error(endings), away))) or None
        status: Status = "interrupted" if interrupted else "failed" if error else "finished"
        gather(folder, endings, status, error)
        if record.collected:
            record.endings = {node: dict(ending) for node, ending in endings.items()}
        record.save(folder)
        return Ended(folder, status, error, away)


def ended_before(folder: Path) -> Ended:
    """Say how a run has ended that was collected already."""
    summary = read_summary(folder)
    return Ended(folder, summary["status"], summary.get("error"))


def _damaged(ending: Ending | None, fault: str) -> Ending:
    before = f"{ending['why']}; " if ending and ending["status"] == "failed" else ""
    return {"status": "failed", "why": before + fault}


async def _fetch(folder: Path, place: Place, shells: Mapping[str, Shell]) -> None:
    if place.host.name not in shells:
        raise HostError(f"{place.host.name}: nothing was collected, because it is out of reach")
    try:
        going = await _fetch_ended(folder, place, shells[place.host.name])
    except HostError:  # nobody may have followed it any more when its connection was lost
        async with Shell.to(place.host) as shell:
            going = await _fetch_ended(folder, place, shell)
    if going:
        raise HostError(f"{place.host.name}: peers still at work: {', '.join(map(str, going))}")


async def _fetch_ended(folder: Path, place: Place, shell: Shell) -> list[int]:
    """Collect from a host, if all of its peers have ended; return which have not."""
    told = await shell.ask("status", folder=place.folder, nodes=place.nodes)
    if going := [peer["node"] for peer in told["peers"] if "ended" not in peer]:
        return going
    await fetch(folder, place, shell)
    return []


async def _check_all(launch: Launch, shells: dict[str, Shell]) -> dict[int, str]:
    """Connect to all hosts and check them; return the public keys of all peers."""
    checks = Checks(launch.experiment, launch.fleet, launch.max_skew)

    async def ready(host: Host) -> dict[int, str]:
        shells[host.name] = await Shell.connect(host)
        return await preflight(shells[host.name], checks)

    keys = await everywhere(map(ready, launch.fleet.hosts), "cannot take part")
    known = {node: key for part in keys for node, key in part.items()}
    refuse_shared(launch.fleet, known)
    return known


async def _send(launch: Launch, files: Mapping[str, bytes], shells: Mapping[str, Shell]) -> Record:
    now = datetime.now()
    name = f"{launch.experiment.name}-{now:%Y%m%d-%H%M%S}"

    async def send(host: Host) -> Place:
        shell = shells[host.name]
        made = await shell.ask("make", workdir=host.workdir, name=name)
        await shell.send(made["folder"], files)
        return Place(host, made["folder"], [seat.node for seat in launch.fleet.on(host)])

    places = await everywhere(map(send, launch.fleet.hosts), "cannot take part")
    return Record(f"{now:%Y-%m-%d %H:%M:%S}", launch.experiment.rounds, places)


async def _start(launch: Launch, watching: Watching) -> None:
    """Start the peers; those of a host where that cannot be done have failed, and are stopped."""

    async def start(place: Place) -> None:
        peers = [
            {
                "node": seat.node,
                "data": seat.data,
                "device": seat.device,
                "threads": seat.threads,
                "keys": seat.keys,
                "insecure": launch.insecure,
            }
            for seat in launch.fleet.on(place.host)
        ]
        try:
            shell = watching.shells[place.host.name]
            await shell.ask("start", folder=place.folder, peers=peers)
        except HostError as error:
            watching.lost(place, f"{error}{await _undone(place)}")

    await asyncio.gather(*map(start, watching.record.places))


async def _undone(place: Place) -> str:
    """Stop what may have started on a host, and return what to add if that cannot be done."""
    try:
        async with Shell.to(place.host) as shell:  # the connection may have been what failed
            await shell.ask("stop", folder=place.folder, nodes=place.nodes)
    except HostError:
        return ", and it may still go on"
    return ""
