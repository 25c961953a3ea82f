"""Churn scripts from files, texts and tables."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from p2pfl.churn.expand import expand
from p2pfl.churn.outages import How, Outage, generate
from p2pfl.churn.reading import (
    LARGEST,
    Event,
    Place,
    Table,
    blamed_on,
    read_event,
    read_tables,
    read_text,
)
from p2pfl.churn.script import Script
from p2pfl.churn.traces import read_trace
from p2pfl.churn.values import Value, check_keys


def load(path: str | Path, nodes: int, seed: int) -> Script:
    """Read a script; paths in it start at its folder.

    Args:
        path: a TOML file.
        nodes: how many peers there are.
        seed: draws whatever the script leaves to chance.

    Raises:
        UserError: the file is missing or no script, or says what cannot be; it names the line.
    """
    path = Path(path)
    text = read_text(path, LARGEST)
    return _script(read_tables(text, str(path)), str(path), path.parent, nodes, seed)


def parse(text: str, nodes: int, seed: int, source: str = "churn") -> Script:
    """Read a script from its text; paths in it start where we are. See `load`."""
    return _script(read_tables(text, source), source, Path(), nodes, seed)


def generated(header: str, keys: Mapping[str, Value], nodes: int, seed: int) -> Script:
    """Return a script of one table, ``generate`` or ``trace``, laid out as in a file."""
    return _script([Table(header, Place("churn", ""), keys)], "churn", Path(), nodes, seed)


def _script(tables: list[Table], source: str, base: Path, n: int, seed: int) -> Script:
    events: list[Event] = []
    outages: list[Outage] = []
    generators = 0
    for table in tables:
        with blamed_on(table.place):
            if table.header == "event":
                events.append(read_event(table, n))
            elif table.header == "trace":
                outages += _trace(table.keys, base, n)
            else:
                outages += generate(table.keys, n, seed, generators)
                generators += 1
    return expand(source, n, seed, events, outages)


def _trace(keys: Mapping[str, Value], base: Path, n: int) -> list[Outage]:
    check_keys(keys, ("path", "how"), "a trace")
    path, how = keys.get("path"), keys.get("how", "kill")
    if not isinstance(path, str):
        raise ValueError("path is missing: say which CSV file")
    kinds: dict[Value, How] = {"kill": "kill", "leave": "leave"}
    if how not in kinds:
        raise ValueError(f"how = {how!r}: expected 'kill' or 'leave'")
    return read_trace(base / path, n, kinds[how])
