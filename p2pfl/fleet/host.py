"""Hosts, and the peers on them."""

from __future__ import annotations

import ipaddress
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Host:
    """A machine with peers on it.

    Paths are those of the host, and relative ones start at the home of the user there. Only
    `ssh_key` and `known_hosts` are files of this machine, and relative ones start at the hosts
    file.

    Attributes:
        name: what messages call it.
        address: the IPv4 address its peers listen on.
        ports: one peer listens on each.
        user: who logs in; None: as ``~/.ssh/config`` says, or the user here.
        ssh_host: where SSH listens, if not at `address`.
        ssh_port: its port; None: as ``~/.ssh/config`` says, or 22.
        ssh_key: a private key; None: those ``ssh`` would offer.
        known_hosts: the host keys to believe; None: ``~/.ssh/known_hosts``.
        python: the interpreter that has this package.
        venv: instead of `python`, the virtual environment that has it.
        workdir: where run folders are made.
        data: the folder that relative data paths start from.
        device: where to compute.
        threads: how many each peer computes with; 0: the cores, evenly divided.
        keys: a file with the keys of its peer, made if it is missing. On a host with several
            ports each peer has its own, with the port in its name.
        peers: what single peers have for themselves.
    """

    name: str = ""
    address: str = ""
    ports: tuple[int, ...] = ()
    user: str | None = None
    ssh_host: str | None = None
    ssh_port: int | None = None
    ssh_key: str | None = None
    known_hosts: str | None = None
    python: str | None = None
    venv: str | None = None
    workdir: str = "~/.local/state/p2pfl"
    data: str | None = None
    device: str = "cpu"
    threads: int = 0
    keys: str | None = None
    peers: tuple[dict[str, Any], ...] = ()

    @property
    def interpreter(self) -> str:
        """The Python to run there."""
        return f"{self.venv}/bin/python" if self.venv else self.python or "python3"


@dataclass(frozen=True)
class Seat:
    """One peer's place: which host, which port, and what may differ from peer to peer."""

    node: int
    host: str
    name: str  # that of the host, and if it has several peers the port
    address: str  # as in ``"tcp://10.0.0.1:7000"``
    data: str | None
    device: str
    threads: int
    keys: str | None

    def entry(self, key: str | None = None) -> dict[str, Any]:
        """Return what the peers file lists of it, with its public key if links have keys."""
        entry = {"id": self.node, "name": self.name, "address": self.address}
        return entry | ({"key": key} if key else {})


@dataclass(frozen=True)
class Fleet:
    """All hosts, and the peers on them in the order of the file."""

    hosts: tuple[Host, ...]
    seats: tuple[Seat, ...]

    @property
    def is_loopback(self) -> bool:
        """Whether no peer can be reached from another machine."""
        return all(ipaddress.ip_address(host.address).is_loopback for host in self.hosts)

    def on(self, host: Host) -> list[Seat]:
        """Return the peers of a host."""
        return [seat for seat in self.seats if seat.host == host.name]
