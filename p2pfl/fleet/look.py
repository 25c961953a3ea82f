"""What is looked at on a host before anything starts: what its peers need, and is not there."""

from __future__ import annotations

import errno
import importlib
import socket
import sys
from pathlib import Path
from typing import Any

from p2pfl.errors import reason


def look(
    ports: list[tuple[str, int]],
    folders: list[str],
    files: list[str],
    modules: list[str],
    devices: list[str],
) -> dict[str, Any]:
    """Say what is not there of that which peers need.

    Args:
        ports: are to be free, each with an address of this machine.
        folders: are to be there.
        files: as well; without the folders they are not looked at.
        modules: can be imported; tried only if all of the above is well, since it takes a while.
        devices: can be computed on; without the modules they are not looked at.
    """
    faults = [fault for address, port in ports if (fault := _taken(address, port))]
    faults += [f"there is no data folder {f}" for f in folders if not path(f).is_dir()]
    if not faults:
        faults += [f"there is no data file {f}" for f in files if not path(f).exists()]
    if not faults:
        faults = [fault for module in modules if (fault := _missing(module))][:1]
    if not faults:
        faults = [fault for device in devices if (fault := _unusable(device))]
    return {"faults": list(dict.fromkeys(faults))}


def path(text: str) -> Path:
    """Return a path that may start at the home of the user."""
    return Path(text).expanduser()


def _taken(address: str, port: int) -> str | None:
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((address, port))
            probe.listen()  # with REUSEADDR, only this finds another listener
        except OSError as error:
            if error.errno == errno.EADDRINUSE:
                return f"port {port} is in use"
            if error.errno == errno.EADDRNOTAVAIL:
                return f"{address} is none of its addresses"
            return f"cannot listen on {address}:{port}: {error.strerror}"
    return None


def _missing(module: str) -> str | None:
    try:
        importlib.import_module(module)
    except Exception as error:  # whatever a broken package raises
        why = reason(error)
        return f"{sys.executable} cannot run a peer: {why}; install p2pfl-gossip there anew"
    return None


def _unusable(device: str) -> str | None:
    if device == "cpu":
        return None
    from p2pfl.launch.books import why_unusable  # which takes seconds, and is of no use for a CPU

    why = why_unusable(device)
    return f"device {device} cannot be used: {why}" if why else None
