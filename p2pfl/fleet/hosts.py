"""The hosts file: on which machines peers run, and how they are reached."""

from __future__ import annotations

import ipaddress
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path, PurePosixPath
from typing import Any

from p2pfl.errors import UserError
from p2pfl.experiment.config import Kind, read
from p2pfl.experiment.files import load_toml
from p2pfl.files import is_file
from p2pfl.fleet.host import Fleet, Host, Seat
from p2pfl.launch.books import check_threads
from p2pfl.security.roster import check_entries


@dataclass(frozen=True)
class Override:
    """What one of several peers on a host has for itself; None: as the host says."""

    port: int
    data: str | None = None
    device: str | None = None
    threads: int | None = None


def read_hosts(path: Path) -> Fleet:
    """Read and check a hosts file.

    Raises:
        UserError: the file is missing or no TOML, or something in it cannot be.
    """
    tables = load_toml(path)
    try:
        return _checked(tables, path.parent)
    except UserError as error:
        raise UserError(f"{path}: {error}") from error


@dataclass(frozen=True)
class _File:
    hosts: tuple[dict[str, Any], ...]
    defaults: dict[str, Any] | None = None


def _checked(tables: Mapping[str, Any], base: Path) -> Fleet:
    kind = Kind({"": Host})
    given: _File = read("the file", tables, Kind({"": _File})).build("the file")
    defaults = given.defaults or {}
    read("defaults", defaults, kind)
    hosts: list[Host] = []
    seats: list[Seat] = []
    for number, table in enumerate(given.hosts):
        place = f"hosts[{number}]"
        host: Host = read(place, {**defaults, **table}, kind).build(place)
        host = replace(host, **_located(host, base), **_at_home(host))
        _check(host, place)
        hosts.append(host)
        seats += _seats(host, place, len(seats))
    if not hosts:
        raise UserError("there are no [[hosts]]")
    _refuse_apart(hosts)
    _refuse_repeated("host name", [host.name for host in hosts])
    _refuse_repeated("address", [seat.address for seat in seats])
    check_entries("as listed for the peers", [seat.entry() for seat in seats])
    without = [seat.host for seat in seats if seat.keys is None]
    if 0 < len(without) < len(seats):
        raise UserError(f"{without[0]} has no `keys`, but others have; all need them, or none")
    return Fleet(tuple(hosts), tuple(seats))


def _check(host: Host, place: str) -> None:
    for key in ("name", "address", "ports"):
        if not getattr(host, key):
            raise UserError(f"{place}.{key} is missing")
    _check_address(host.address, f"{place}.address")
    for port in host.ports:
        _check_port(port, f"{place}.ports")
    if host.ssh_port is not None:
        _check_port(host.ssh_port, f"{place}.ssh_port")
    if host.python and host.venv:
        raise UserError(f"{place} has both python and venv; expected one of them")
    for key in ("ssh_key", "known_hosts"):
        file = getattr(host, key)
        if file is not None and not is_file(Path(file)):
            raise UserError(f"{place}.{key} = {file!r}: there is no such file here")


def _check_port(port: int, place: str) -> None:
    if not 0 < port < 65536:
        raise UserError(f"{place}: {port} is no port; expected 1 to 65535")


def _check_address(text: str, place: str) -> None:
    try:
        address = ipaddress.IPv4Address(text)
    except ValueError:
        raise UserError(
            f"{place} = {text!r}: expected an IPv4 address that peers can listen"
            " on, as 10.0.0.1; the name that ssh uses can stand in ssh_host"
        ) from None
    if address.is_unspecified or address.is_multicast or address.is_reserved:
        raise UserError(
            f"{place} = {text!r} is that of no machine: the others could not dial it; expected one"
            " of the host's own, as 10.0.0.1"
        )


def _located(host: Host, base: Path) -> dict[str, Any]:
    """Return the files of this machine by their whole paths: they are used from any folder."""
    files = {"ssh_key": host.ssh_key, "known_hosts": host.known_hosts}
    try:
        return {
            key: str((base / Path(file).expanduser()).absolute())
            for key, file in files.items()
            if file
        }
    except RuntimeError as error:  # ~ of somebody who is not there
        raise UserError(f"host {host.name}: ssh_key or known_hosts: {error}") from error


def _at_home(host: Host) -> dict[str, Any]:
    """Return the paths of the host such that they mean the same in any folder there."""
    paths = {key: getattr(host, key) for key in ("venv", "workdir", "data", "keys")}
    if host.python and host.python.startswith("~"):  # others are looked for in PATH
        paths["python"] = host.python
    return {key: _from_home(path) for key, path in paths.items() if path}


def _from_home(path: str) -> str:
    """Return where a path starts; not at the home of somebody else, which no quoting finds."""
    if path.startswith("~") and path.partition("/")[0] != "~":
        raise UserError(f"{path!r}: of all homes only that of `user` can be named, as in ~/data")
    return path if path.startswith(("/", "~")) else f"~/{path}"


def _refuse_apart(hosts: list[Host]) -> None:
    """Refuse addresses of loopback beside others: neither side could dial the other."""
    inside = [host for host in hosts if ipaddress.ip_address(host.address).is_loopback]
    outside = [host for host in hosts if host not in inside]
    if inside and outside:
        raise UserError(
            f"{inside[0].name} has the address {inside[0].address}, at which only peers of the"
            f" same machine reach it, but {outside[0].name} has {outside[0].address}"
        )


def _seats(host: Host, place: str, first: int) -> list[Seat]:
    own: dict[int, Override] = {}
    for number, table in enumerate(host.peers):
        here = f"{place}.peers[{number}]"
        override: Override = read(here, table, Kind({"": Override})).build(here)
        if override.port not in host.ports:
            raise UserError(f"{here}.port = {override.port} is none of the host's ports")
        if override.port in own:
            raise UserError(f"{here}.port = {override.port} stands there twice")
        own[override.port] = override
    seats = []
    for node, port in enumerate(host.ports, first):
        mine = own.get(port, Override(port))
        threads = host.threads if mine.threads is None else mine.threads
        check_threads(f"{place}: threads =", threads)
        seats.append(
            Seat(
                node,
                host.name,
                host.name if len(host.ports) == 1 else f"{host.name}-{port}",
                f"tcp://{host.address}:{port}",
                _from_home(mine.data) if mine.data else host.data,
                mine.device or host.device,
                threads,
                _keys(host, port),
            )
        )
    return seats


def _keys(host: Host, port: int) -> str | None:
    """A peer is known by its key, so no two peers have the same."""
    if not host.keys:  # "" where the defaults have some
        return None
    if len(host.ports) == 1:
        return host.keys
    path = PurePosixPath(host.keys)
    return str(path.with_stem(f"{path.stem}-{port}"))


def _refuse_repeated(what: str, values: list[str]) -> None:
    for value in values:
        if values.count(value) > 1:
            raise UserError(f"the {what} {value} stands there twice")
