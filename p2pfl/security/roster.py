"""The peers file: who takes part, where they listen, and which keys they prove.

::

    [[peers]]
    id = 0
    name = "ward-a"                  # optional
    address = "tcp://10.0.0.1:7000"  # optional
    key = "..."                      # optional: the public key, 40 characters
    revoked = true                   # optional: not to be let in any more

A short form holds addresses alone, in lines such as ``0 = "tcp://10.0.0.1:7000"``.
"""

from __future__ import annotations

import fcntl
import os
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import tomlkit
from tomlkit.exceptions import TOMLKitError
from tomlkit.items import AoT

from p2pfl import files
from p2pfl.addresses import is_address
from p2pfl.errors import UserError
from p2pfl.security.keys import is_key

LARGEST = 1 << 22  # bytes


@dataclass(frozen=True, slots=True)
class Member:
    """One peer as listed."""

    id: int
    name: str | None = None
    address: str | None = None
    key: str | None = None
    revoked: bool = False


class Roster:
    """All peers as listed.

    Attributes:
        members: all of them, also those that are revoked.
        addresses: by id, where the others listen.
        keys: by id, the public keys of those that may come in.
        revoked: the ids of those that may not any more.
    """

    def __init__(self, members: list[Member]) -> None:
        self.members = tuple(members)
        self.revoked = frozenset(one.id for one in members if one.revoked)
        present = [one for one in members if not one.revoked]
        self.addresses = {one.id: one.address for one in present if one.address is not None}
        self.keys = {one.id: one.key for one in present if one.key is not None}
        self._ids = {key: id for id, key in self.keys.items()}

    def id_of(self, key: str) -> int | None:
        """Return whose key this is; None if it may not come in."""
        return self._ids.get(key)


def read_roster(path: Path) -> Roster:
    """Read a peers file, its short form, or a network file with addresses.

    Raises:
        UserError: the file is missing or malformed, or lists something twice.
    """
    document = _parse(path)
    if "nodes" in document:
        from p2pfl.topology import read_network  # which brings torch along: a second or two

        addresses = read_network(path).addresses
        return Roster([Member(id, address=address) for id, address in addresses.items()])
    if document and "peers" not in document:
        return Roster(_short_form(path, document))
    return Roster(_members(path, document))


def check_entries(place: object, entries: Iterable[dict[str, Any]]) -> list[Member]:
    """Return the members that ``[[peers]]`` lists.

    Args:
        place: where they are listed, for messages.
        entries: the tables.

    Raises:
        UserError: something in them cannot be, or is there twice.
    """
    members = [_member(place, entry) for entry in entries]
    for key in ("id", "name", "address", "key"):
        seen: set[object] = set()
        for one in members:
            value = getattr(one, key)
            if value is not None and value in seen:
                raise UserError(f"{place}: {key} = {value!r} is listed twice")
            seen.add(value)
    return members


def allow(path: Path, member: Member) -> None:
    """List a member, or add to what is listed of it; a revoked one is allowed again.

    Raises:
        UserError: the file is malformed, or the id, name, address or key is another's.
    """
    with _changing(path) as document:
        members = {one.id: one for one in _members(path, document)}
        known = members.get(member.id)
        if known and known.key and not known.revoked and member.key not in (None, known.key):
            raise UserError(f"{path}: peer {member.id} has another key; revoke that one first")
        if known is None:
            document.setdefault("peers", tomlkit.aot()).append(tomlkit.table())
        entry = document["peers"][-1 if known is None else list(members).index(member.id)]
        entry["id"] = member.id
        given = {"name": member.name, "address": member.address, "key": member.key}
        entry.update({key: value for key, value in given.items() if value is not None})
        entry.pop("revoked", None)


def revoke(path: Path, which: str) -> Member:
    """Mark a member as revoked, by its id, name or key, and return it.

    Raises:
        UserError: the file is malformed, or lists nobody of that id, name or key.
    """
    with _changing(path) as document:
        members = _members(path, document)
        for one, entry in zip(members, document.get("peers", []), strict=True):
            if which in (str(one.id), one.name, one.key):
                entry["revoked"] = True
                return one
        raise UserError(f"{path} lists no peer of the id, name or key {which!r}")


@contextmanager
def _changing(path: Path) -> Iterator[tomlkit.TOMLDocument]:
    """Yield what a file holds, and replace the file by what has become of it."""
    try:
        path = path.resolve()  # a link stays one
    except RuntimeError:
        raise UserError(f"{path} cannot be read: links that lead to themselves") from None
    try:
        folder = os.open(path.parent, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    except OSError as error:
        raise UserError(f"{path.parent} cannot be opened: {error.strerror}") from None
    try:
        fcntl.flock(folder, fcntl.LOCK_EX)  # two changes at once would lose one of them
        document = _parse(path) if path.exists() else tomlkit.document()
        if document and "peers" not in document:
            raise UserError(f"{path} lists no [[peers]], which is where keys stand")
        yield document
        text = tomlkit.dumps(document).encode()
        _members(path, _parsed(path, text))  # what is written, and not what was meant
        files.replace(path, text)
        os.fsync(folder)
    except OSError as error:
        raise UserError(f"{path} cannot be written: {error.strerror}") from None
    finally:
        os.close(folder)


def _parse(path: Path) -> tomlkit.TOMLDocument:
    try:
        with path.open("rb") as file:
            data = file.read(LARGEST + 1)
        if len(data) > LARGEST:
            raise UserError(f"{path} is larger than {LARGEST >> 20} MB")
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror}") from None
    # To a last line without an end, tomlkit would append what belongs on the next.
    return _parsed(path, data if data.endswith(b"\n") else data + b"\n")


def _parsed(path: Path, data: bytes) -> tomlkit.TOMLDocument:
    try:
        return tomlkit.parse(data)
    except (TOMLKitError, UnicodeDecodeError) as error:
        raise UserError(f"{path} is not valid TOML: {error}") from None


def _short_form(path: Path, document: tomlkit.TOMLDocument) -> list[Member]:
    for id, address in document.items():
        if not (id.isascii() and id.isdecimal() and is_address(address)):
            raise UserError(f'{path}: {id} = {address!r}: expected 0 = "tcp://HOST:PORT"')
    entries = ({"id": int(id), "address": str(address)} for id, address in document.items())
    return check_entries(path, entries)


def _members(path: Path, document: tomlkit.TOMLDocument) -> list[Member]:
    if not isinstance(document.get("peers", tomlkit.aot()), AoT):
        raise UserError(f"{path}: peers must be tables that begin with [[peers]]")
    return check_entries(path, document.unwrap().get("peers", []))


def _member(place: object, entry: dict[str, Any]) -> Member:
    checks: dict[str, tuple[Callable[[object], bool], str]] = {
        "id": (_is_id, "a number from 0 on"),
        "name": (_is_name, "a text of 1 to 100 characters, not a number and not a key"),
        "address": (is_address, "like tcp://host:port"),
        "key": (is_key, "a public key, of 40 characters"),
        "revoked": (lambda value: type(value) is bool, "true or false"),
    }
    place = f"{place}: peer {entry.get('id', '?')}"
    for key, value in entry.items():
        if key not in checks:
            raise UserError(f"{place}: {key!r} is none of {', '.join(checks)}")
        is_right, wanted = checks[key]
        if not is_right(value):
            raise UserError(f"{place}: {key} = {value!r} must be {wanted}")
    if "id" not in entry:
        raise UserError(f"{place} has no id")
    return Member(**entry)


def _is_id(value: object) -> bool:
    return type(value) is int and 0 <= value < 2**31


def _is_name(value: object) -> bool:
    """Say whether something can be a name; what looks like an id or a key cannot."""
    if not isinstance(value, str) or not 0 < len(value) <= 100:
        return False
    return value.isprintable() and not value.isdecimal() and not is_key(value)
