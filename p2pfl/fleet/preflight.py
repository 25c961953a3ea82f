"""What is looked at on a host before anything starts on any of them."""

from __future__ import annotations

import json
import time
from collections.abc import Mapping
from typing import NamedTuple

from p2pfl import __version__
from p2pfl.errors import UserError
from p2pfl.experiment.experiment import Experiment
from p2pfl.fleet.host import Fleet, Seat
from p2pfl.fleet.parcel import data_files
from p2pfl.fleet.ssh import Done, HostError, Shell, last_line, quoted

NOT_FOUND = (126, 127)  # a shell's codes for commands that are not there or cannot be run
NEEDED = ("p2pfl.cli.peer", "p2pfl.launch.local", "safetensors.torch")  # to run a peer
VERSION = "from p2pfl import __version__; print(__version__)"
# What Python says where p2pfl is not installed; of a folder ~/p2pfl it makes an empty package.
ABSENT = ("No module named 'p2pfl'", "cannot import name '__version__'")


class Checks(NamedTuple):
    """What all hosts are checked against."""

    experiment: Experiment
    fleet: Fleet
    max_skew: float  # seconds that a clock may be off


async def preflight(shell: Shell, checks: Checks) -> dict[int, str]:
    """Check a host, and return the public keys of its peers.

    Keys that are missing are made, once all else is well.

    Raises:
        HostError: its first fault, or of what `p2pfl.fleet.look` looks at several, a line each.
    """
    host, seats = shell.host, checks.fleet.on(shell.host)
    await _check_python(shell)
    await _check_clock(shell, checks.max_skew)
    files = [file for seat in seats for file in data_files(checks.experiment, seat)]
    answer = await shell.ask(
        "look",
        ports=[(host.address, port) for port in host.ports],
        folders=sorted({seat.data for seat in seats if seat.data}),
        files=sorted(set(files)),
        modules=NEEDED,
        devices=sorted({seat.device for seat in seats}),
    )
    if answer["faults"]:
        raise HostError("\n".join(f"{host.name}: {fault}" for fault in answer["faults"]))
    await shell.fetch(())  # nothing: whether files can be copied at all
    return {seat.node: await _key(shell, seat) for seat in seats if seat.keys}


def refuse_shared(fleet: Fleet, keys: Mapping[int, str]) -> None:
    """Refuse peers that would be taken for one another: homes may be shared between hosts.

    Raises:
        UserError: two have the same keys.
    """
    owners: dict[str, Seat] = {}
    for node, key in sorted(keys.items()):
        seat = fleet.seats[node]
        if (other := owners.setdefault(key, seat)) is not seat:
            raise UserError(
                f"{other.name} and {seat.name} have the same keys: do they share a home?"
                " Give each host another `keys`"
            )


async def _check_python(shell: Shell) -> None:
    name, python = shell.host.name, shell.host.interpreter
    done = await shell.python(f"-c '{VERSION}'")
    if done.code in NOT_FOUND:
        raise HostError(f"{name}: there is no Python at {python}: {last_line(done.err)}")
    if any(text in done.err for text in ABSENT):
        raise HostError(f"{name}: {python} has no p2pfl; install p2pfl-gossip {__version__} there")
    if done.code:
        raise HostError(f"{name}: {python} cannot import p2pfl: {last_line(done.err)}")
    if (version := last_line(done.out)) != __version__:
        raise HostError(f"{name}: {python} has p2pfl {version}, but here it is {__version__}")


async def _check_clock(shell: Shell, most: float) -> None:
    """Compare clocks at the middle of the round trip; whole seconds are exact enough."""
    before = time.time()
    done = await shell.run("date +%s")
    middle = (before + time.time()) / 2
    try:
        ahead = int(last_line(done.out)) + 0.5 - middle
    except ValueError:
        raise HostError(f"{shell.host.name}: its clock cannot be read: {_said(done)}") from None
    if abs(ahead) > most:
        way = "fast" if ahead > 0 else "slow"
        raise HostError(
            f"{shell.host.name}: its clock is {abs(ahead):.0f} s {way}; set it, or --max-skew"
        )


async def _key(shell: Shell, seat: Seat) -> str:
    """Return a peer's public key; the secret one never leaves its host."""
    words = f"-m p2pfl keys new --if-missing --format json --keys {quoted(seat.keys or '')}"
    done = await shell.python(words)
    try:
        return str(json.loads(last_line(done.out))["public"])
    except (ValueError, KeyError, TypeError):
        raise HostError(f"{shell.host.name}: no keys in {seat.keys}: {_said(done)}") from None


def _said(done: Done) -> str:
    return last_line(done.err) or last_line(done.out) or f"exit code {done.code}"
