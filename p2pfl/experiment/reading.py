"""From the tables of a file to checked sections, every default spelled out."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

from p2pfl.errors import UserError
from p2pfl.experiment.config import Section, Value, parameters, parse_spec, read
from p2pfl.experiment.files import check_name, located
from p2pfl.experiment.nodes import count_nodes
from p2pfl.experiment.pairing import default_mixing
from p2pfl.experiment.sections import DEFAULTS, SECTIONS
from p2pfl.experiment.wrapping import honest_algorithm

TOP = ("name", "seed", "nodes", "base")
# What algorithms need not be told in a file: it stands elsewhere in it.
FOLLOWED = ("seed", "nodes", "rounds")


class Tables(NamedTuple):
    """What an experiment is made of; see `p2pfl.experiment.experiment.Experiment`."""

    name: str
    seed: int
    nodes: int
    sections: Mapping[str, Section]
    base: Path


def read_tables(tables: Mapping[str, Value], base: str | Path) -> Tables:
    """Check the tables of an experiment one by one.

    Args:
        tables: nested dictionaries, laid out as in a file.
        base: the folder that relative paths start from.

    Raises:
        UserError: it names the key, the value and the choices.
    """
    tables = _with_defaults(tables)
    for key in tables:
        if key not in SECTIONS and key not in TOP:
            choices = ", ".join([*TOP, *SECTIONS])
            raise UserError(f"{key} is no section of an experiment; choices: {choices}")
    name, seed = tables.get("name", "experiment"), tables.get("seed", 0)
    check_name(name)
    if type(seed) is not int or not 0 <= seed < 2**63:
        raise UserError(f"seed = {seed!r}: expected a whole number from 0 to 2^63 - 1")
    base = _based(Path(base), tables.get("base", "."))
    sections = {
        key: read(key, located(key, tables.get(key, {}), base), kind)
        for key, kind in SECTIONS.items()
        if key not in ("topology", "algorithm", "mixing")
    }
    drawn = located("topology", tables.get("topology", {}), base)
    sections["topology"] = _read("topology", drawn, {"seed": seed})
    nodes, pace = count_nodes(tables.get("nodes"), sections), sections["pace"].values
    rounds = pace.get("rounds", pace.get("ticks"))
    known = dict(zip(FOLLOWED, (seed, nodes, rounds), strict=True))
    sections["algorithm"] = _read("algorithm", tables.get("algorithm", {}), known)
    mixing = tables.get("mixing", {})
    if mixing == {}:
        mixing = default_mixing(honest_algorithm(sections, nodes).needs)
    sections["mixing"] = read("mixing", mixing, SECTIONS["mixing"])
    sections = {key: sections[key] for key in SECTIONS}
    return Tables(name, seed, nodes, sections, base)


def _based(folder: Path, below: Value) -> Path:
    """Return where paths start, as what a run leaves can name it, which is written in UTF-8."""
    if not isinstance(below, str) or "\0" in below:
        raise UserError(f"base = {below!r}: expected the path of a folder")
    base = (folder / below).resolve()
    try:
        str(base).encode()
    except UnicodeEncodeError as error:
        raise UserError(f"{str(base)!r}: the name of a folder here is not UTF-8") from error
    return base


def _read(key: str, given: Value, known: Mapping[str, Value]) -> Section:
    """Check a section which follows the experiment in what is known, unless the file says more."""
    kind = SECTIONS[key]
    table = parse_spec(given) if isinstance(given, str) else given
    name = table.get("name", kind.default) if isinstance(table, Mapping) else None
    if isinstance(name, str) and name in kind.table:
        takes = parameters(kind.table[name], kind.given, kind.told)
        table = {**{each: value for each, value in known.items() if each in takes}, **table}
    return read(key, table, kind)


def _with_defaults(tables: Mapping[str, Value]) -> dict[str, Value]:
    """Fill in the sections that say nothing else, not even a name."""
    filled = dict(tables)
    for key, default in DEFAULTS.items():
        given = tables.get(key, {})
        if isinstance(given, dict) and "name" not in given:
            filled[key] = {**default, **given}
    return filled
