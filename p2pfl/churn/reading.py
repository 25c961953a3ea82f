"""A churn script as it stands in a TOML file: its tables, and in which line each begins.

::

    [[event]]
    at = "30s"                  # or "round 12"
    kill = "random 2"
    for = "10s"                 # or "3 rounds"; optional

    [[generate]]
    churn = "20% a minute"

    [[trace]]
    path = "machines.csv"
"""

from __future__ import annotations

import re
import tomllib
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple, get_args

from p2pfl.churn import values
from p2pfl.churn.script import Kind
from p2pfl.churn.values import Clock, Selection, Value
from p2pfl.errors import UserError

LARGEST = 1 << 22  # bytes of a script
KINDS: tuple[Kind, ...] = get_args(Kind)
LASTING = ("kill", "stop", "leave", "partition", "slow", "drop", "delay", "corrupt")
# What a fault of links is called with, besides the links.
_MEASURES = {"drop": "probability", "corrupt": "probability", "delay": "by"}


class Place(NamedTuple):
    """Where something stands, for messages."""

    source: str
    where: str  # "line 4", or "event 2" where lines are not known
    line: int = 0

    def __str__(self) -> str:
        return f"{self.source}, {self.where}" if self.where else self.source


class Table(NamedTuple):
    """A table of the file."""

    header: str  # event, generate or trace
    place: Place
    keys: Mapping[str, Value]


class Event(NamedTuple):
    """An event as written, its values checked one by one."""

    place: Place
    clock: Clock
    at: float
    kind: Kind
    text: str  # the action as written, for messages
    lasting: float | None
    nodes: Selection | None = None
    groups: tuple[tuple[int, ...], ...] = ()
    links: tuple[tuple[int, int], ...] | None = None
    value: float = 0.0


@contextmanager
def blamed_on(place: Place) -> Iterator[None]:
    """Turn a `ValueError` into a `UserError` that says where."""
    try:
        yield
    except ValueError as error:
        raise UserError(f"{place}: {error}") from None


def read_text(path: Path, most: int) -> str:
    """Return the text of a file of at most so many bytes.

    Raises:
        UserError: it is missing, too large or no text.
    """
    try:
        if path.stat().st_size > most:
            raise UserError(f"{path} has more than {most >> 20} MiB")
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise UserError(f"{path} is no text: {error}") from None
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror or error}") from None


def read_tables(text: str, source: str) -> list[Table]:
    """Return the tables of a script, those of each kind in the order of the file.

    Raises:
        UserError: it is no TOML, or holds what is no table of a script.
    """
    try:
        document = tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        raise UserError(f"{source} is not valid TOML: {error}") from None
    with blamed_on(Place(source, "")):
        values.check_keys(document, ("event", "generate", "trace"), "a churn script")
        for header, tables in document.items():
            if not isinstance(tables, list) or not all(isinstance(one, dict) for one in tables):
                raise ValueError(f"expected [[{header}]], with two brackets")
    return [
        Table(header, place, keys)
        for header, tables in document.items()
        for place, keys in zip(_places(text, source, header, len(tables)), tables, strict=True)
    ]


def _places(text: str, source: str, header: str, count: int) -> list[Place]:
    pattern = re.compile(rf"\s*\[\[\s*{header}\s*\]\]")
    lines = [i for i, line in enumerate(text.splitlines(), 1) if pattern.match(line)]
    if len(lines) != count:  # tables written as `event = [{...}]`
        return [Place(source, f"{header} {i}") for i in range(1, count + 1)]
    return [Place(source, f"line {line}", line) for line in lines]


def read_event(table: Table, n: int) -> Event:
    """Check an event by itself.

    Args:
        table: the event.
        n: how many peers there are.

    Raises:
        ValueError: it says what cannot be.
    """
    keys = table.keys
    values.check_keys(keys, ("at", "for", *KINDS), "an event")
    if "at" not in keys:
        raise ValueError("at is missing: say when, as in at = '30s' or at = 'round 12'")
    clock, at = values.moment(keys["at"])
    kinds: list[Kind] = [kind for kind in KINDS if kind in keys]
    if len(kinds) != 1:
        told = f"there are {', '.join(kinds)}" if kinds else f"choices: {', '.join(KINDS)}"
        raise ValueError(f"expected one action in an event; {told}")
    (kind,) = kinds
    text = f"{kind} = {keys[kind]!r}"
    lasting = _lasting(clock, kind, keys["for"]) if "for" in keys else None
    return Event(table.place, clock, at, kind, text, lasting, **_READERS[kind](kind, keys[kind], n))


def _lasting(clock: Clock, kind: Kind, value: Value) -> float:
    if kind not in LASTING:
        raise ValueError(f"for: {kind} is over at once; it goes with {', '.join(LASTING)}")
    other, length = values.span(value)
    if other != clock:
        wanted = "'30s'" if clock == "time" else "'3 rounds'"
        raise ValueError(f"for = {value!r}: an event by {clock} lasts as in for = {wanted}")
    return length


def _nodes(kind: Kind, value: Value, n: int) -> dict[str, Any]:
    return {"nodes": values.selection(value, n)}


def _heal(kind: Kind, value: Value, n: int) -> dict[str, Any]:
    if value is not True:
        raise ValueError(f"heal = {value!r}: expected true")
    return {}


def _slow(kind: Kind, value: Value, n: int) -> dict[str, Any]:
    table = _table(kind, value, ("nodes", "factor"), "{ nodes = [5], factor = 10 }")
    factor = table["factor"]
    if type(factor) not in (int, float) or not 1 <= factor < float("inf"):
        raise ValueError(f"factor = {factor!r}: expected a number, at least 1 (1: as before)")
    return {"nodes": values.selection(table["nodes"], n), "value": float(factor)}


def _partition(kind: Kind, value: Value, n: int) -> dict[str, Any]:
    """Read groups, or one group that is cut off from the rest."""
    if not isinstance(value, list) or all(type(one) is int for one in value):
        return {"nodes": values.selection(value, n)}
    groups = [values.ids(group, n) for group in value]
    seen: set[int] = set()
    for group in groups:
        if both := seen.intersection(group):
            raise ValueError(f"node {min(both)} is in two groups")
        seen.update(group)
    return {"groups": tuple(groups)}


def _links(kind: Kind, value: Value, n: int) -> dict[str, Any]:
    """Read a fault of links; a bare measure is for all of them."""
    measure = _MEASURES[kind]
    read: Callable[[Value], float] = values.duration if kind == "delay" else values.share
    if not isinstance(value, dict):
        return {"value": read(value)}
    example = f"{{ links = [[0, 1]], {measure} = {'0.1' if read is values.share else '1s'!r} }}"
    values.check_keys(value, ("links", "nodes", measure), kind)
    if measure not in value or ("links" in value) == ("nodes" in value):
        raise ValueError(f"expected {measure}, and either links or nodes, as in {example}")
    who: dict[str, Any] = (
        {"links": values.links(value["links"], n)}
        if "links" in value
        else {"nodes": values.selection(value["nodes"], n)}
    )
    return {**who, "value": read(value[measure])}


def _table(kind: str, value: Value, keys: tuple[str, ...], example: str) -> Mapping[str, Value]:
    if not isinstance(value, dict):
        raise ValueError(f"{kind} = {value!r}: expected a table as {example}")
    values.check_keys(value, keys, kind)
    for key in keys:
        if key not in value:
            raise ValueError(f"{kind}.{key} is missing, as in {example}")
    return value


_READERS: dict[str, Callable[[Kind, Value, int], dict[str, Any]]] = {
    **dict.fromkeys(("kill", "stop", "cont", "leave", "join", "restart"), _nodes),
    "partition": _partition,
    "heal": _heal,
    "slow": _slow,
    **dict.fromkeys(_MEASURES, _links),
}
