"""From the tables of a file to checked sections, every default spelled out."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

from p2pfl.errors import UserError
from p2pfl.experiment.config import Section, Value, parse_spec, read
from p2pfl.experiment.files import located
from p2pfl.experiment.nodes import count_nodes
from p2pfl.experiment.pairing import default_mixing
from p2pfl.experiment.sections import DEFAULTS, SECTIONS
from p2pfl.experiment.wrapping import honest_algorithm

TOP = ("name", "seed", "nodes", "base")


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
    if not isinstance(name, str) or not name or "/" in name:
        raise UserError(f"name = {name!r}: expected a text without '/'")
    if type(seed) is not int or not 0 <= seed < 2**63:
        raise UserError(f"seed = {seed!r}: expected a whole number from 0 to 2^63 - 1")
    base = (Path(base) / str(tables.get("base", "."))).resolve()
    sections = {
        key: read(key, located(key, tables.get(key, {}), base), kind)
        for key, kind in SECTIONS.items()
        if key != "mixing"
    }
    for key in ("topology", "algorithm"):
        _seed(sections[key], tables.get(key, {}), seed)
    nodes = count_nodes(tables.get("nodes"), sections)
    mixing = tables.get("mixing") or default_mixing(honest_algorithm(sections, nodes).needs)
    sections["mixing"] = read("mixing", mixing, SECTIONS["mixing"])
    return Tables(name, seed, nodes, sections, base)


def _seed(section: Section, given: Value, seed: int) -> None:
    """Let what draws lots follow the experiment's seed, unless the file gives it its own."""
    written = parse_spec(given) if isinstance(given, str) else given
    if "seed" in section.values and "seed" not in written:
        section.values["seed"] = seed


def _with_defaults(tables: Mapping[str, Value]) -> dict[str, Value]:
    """Fill in the sections that say nothing else, not even a name."""
    filled = dict(tables)
    for key, default in DEFAULTS.items():
        given = tables.get(key, {})
        if isinstance(given, dict) and "name" not in given:
            filled[key] = {**default, **given}
    return filled
