"""What is sent to every host: the experiment, the files it refers to, and who is where."""

from __future__ import annotations

from pathlib import Path

import tomli_w
import tomlkit

from p2pfl.errors import UserError
from p2pfl.experiment.experiment import Experiment
from p2pfl.fleet.host import Fleet, Seat

FILES = "files"  # a folder of their own: one may be called experiment.toml


def parcel(experiment: Experiment, fleet: Fleet, keys: dict[int, str]) -> dict[str, bytes]:
    """Return the files of a run folder by name.

    A topology file and a model's own Python file go along; data never do.

    Args:
        experiment: checked here, so its paths are those of this machine.
        fleet: who is where.
        keys: the public key of each peer; none at all if links are not encrypted.

    Raises:
        UserError: one of the files cannot be read.
    """
    tables = experiment.to_dict() | {"base": "."}
    files = {}
    for section, key in (("topology", "path"), ("model", "factory")):
        place, colon, function = str(tables[section].get(key, "")).partition(".py:")
        file = Path(f"{place}.py" if colon else place)
        if place and (colon or key == "path"):
            name = f"{FILES}/{file.name}"
            files[name] = _read(file)
            tables[section] = tables[section] | {key: f"{name}:{function}" if colon else name}
    text = tomli_w.dumps(tables)
    return {"experiment.toml": text.encode(), "peers.toml": _peers(fleet, keys).encode(), **files}


def data_files(experiment: Experiment, seat: Seat) -> list[str]:
    """Return the data files, or folders, that a peer is going to read, as paths on its host.

    Raises:
        UserError: nothing says which folder they are in.
    """
    values = experiment.sections["data"].values
    paths = values.get("path", [])
    paths = [paths] if isinstance(paths, str) else paths
    if len(paths) == experiment.nodes and values.get("group") is None:
        paths = [paths[seat.node]]  # a file for each peer, which reads no other
    if relative := [path for path in paths if not Path(path).is_absolute()]:
        if seat.data is None:
            raise UserError(
                f"data.path = {relative[0]!r} is relative: the hosts file must say with `data`"
                f" in which folder of {seat.host} it is"
            )
        return [f"{seat.data}/{path}" if path in relative else path for path in paths]
    return list(paths)


def _peers(fleet: Fleet, keys: dict[int, str]) -> str:
    peers = [seat.entry(keys.get(seat.node)) for seat in fleet.seats]
    return tomlkit.dumps({"peers": peers})  # as [[peers]], for people to edit


def _read(file: Path) -> bytes:
    try:
        return file.read_bytes()
    except OSError as error:
        raise UserError(f"{file} cannot be read: {error.strerror}") from error
