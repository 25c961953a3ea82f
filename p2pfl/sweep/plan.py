"""The sweep file: which experiment, what is varied, and over which seeds."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from p2pfl.errors import UserError
from p2pfl.experiment.config import Kind, Value, read
from p2pfl.experiment.files import check_name, find, load_toml, shipped
from p2pfl.files import is_file
from p2pfl.launch.books import On
from p2pfl.sweep.values import flatten, inline, quoted

Seeds = int | list[int]


class Case(NamedTuple):
    """Changes that belong together, and what they are called."""

    label: str
    changes: dict[str, Value]  # by dotted key


@dataclass(frozen=True)
class Plan:
    """A checked sweep file: cases x grid x seeds, all of one experiment.

    Attributes:
        experiment: a file, a shipped name, or the experiment itself as in a file.
        on: the runtime.
        seeds: as they stand in the file; a number counts from the experiment's own seed.
        common: changes in all runs, by dotted key.
        grid: the values of each key that is varied.
        cases: combinations that are no grid; a single one without a label if there are none.
        name: what the sweep's folder is called.
    """

    experiment: str | dict[str, Value]
    on: On
    seeds: Seeds
    common: dict[str, Value]
    grid: dict[str, list[Value]]
    cases: tuple[Case, ...]
    name: str

    def to_toml(self, seeds: list[int]) -> str:
        """Return the plan as the text of a sweep file which means the same in any folder.

        Args:
            seeds: the seeds one by one.
        """
        tables = {
            "name": self.name,
            "experiment": self.experiment,
            "on": self.on,
            "seeds": seeds,
            "set": self.common,
        }
        lines = [*_lines(tables), "", "[grid]", *_lines(self.grid)]
        for case in self.cases:
            if case.label:
                lines += ["", "[[cases]]", *_lines({"label": case.label, "set": case.changes})]
        return "\n".join(lines) + "\n"


def _lines(table: Mapping[str, Value]) -> list[str]:
    """Return a table line by line; the order of its keys is that of the parts of labels."""
    return [f"{quoted(key)} = {inline(value)}" for key, value in table.items()]


def read_plan(source: str | Path | Mapping[str, Value]) -> Plan:
    """Read and check a sweep file, or a sweep given as nested dictionaries.

    Args:
        source: a TOML file, or dictionaries laid out as in one; their relative paths start
            where we are.

    Raises:
        UserError: the file is missing or no TOML, or something in it cannot be; the message
            names the file.
    """
    if isinstance(source, Mapping):
        return _checked(source, Path.cwd(), "sweep")
    path = Path(source)
    tables = load_toml(path)
    try:
        return _checked(tables, path.resolve().parent, path.stem)
    except UserError as error:
        raise UserError(f"{path}: {error}") from error


class _File(NamedTuple):
    """What a sweep file holds; `read` checks the file against it."""

    experiment: str | dict[str, Any]
    on: On = "simulate"
    seeds: Seeds = 1
    name: str = ""
    set: dict[str, Any] | None = None
    grid: dict[str, Any] | None = None
    cases: list[dict[str, Any]] | None = None


class _FileCase(NamedTuple):
    """What a case in the file holds."""

    label: str
    set: dict[str, Any] | None = None  # None: the experiment as it is


def _checked(tables: Mapping[str, Value], base: Path, name: str) -> Plan:
    given: _File = read("sweep", tables, Kind({"": _File})).build("sweep")
    name = given.name or name
    check_name(name)
    plan = Plan(
        _experiment(given.experiment, base),
        given.on,
        _seeds(given.seeds),
        dict(flatten(given.set or {})),
        _grid(given.grid or {}),
        _cases(given.cases),
        name,
    )
    _check_keys(plan)
    return plan


def _cases(given: list[dict[str, Value]] | None) -> tuple[Case, ...]:
    if given is None:
        return (Case("", {}),)
    if not given:
        raise UserError("cases = []: expected at least one case")
    cases = []
    for i, table in enumerate(given):
        case: _FileCase = read(f"cases[{i}]", table, Kind({"": _FileCase})).build(f"cases[{i}]")
        if not case.label.strip():
            raise UserError(f"cases[{i}].label = {case.label!r}: expected a text")
        cases.append(Case(case.label, dict(flatten(case.set or {}))))
    _refuse_repeated("cases", [case.label for case in cases])
    return tuple(cases)


def _experiment(given: str | dict[str, Value], base: Path) -> str | dict[str, Value]:
    """Return the experiment with its place spelled out, so that it means the same anywhere."""
    if isinstance(given, dict):
        return {**given, "base": str((base / str(given.get("base", "."))).resolve())}
    path = base / given
    if not is_file(path) and given in shipped():
        return given
    is_path = bool(path.suffix) or "/" in given
    return str(find(path if is_path else given).resolve())


def _seeds(given: Seeds) -> Seeds:
    if isinstance(given, int):
        if given < 1:
            raise UserError(f"seeds = {given}: expected how many, at least 1, or a list")
        return given
    if not given:
        raise UserError("seeds = []: expected at least one seed")
    _refuse_repeated("seeds", given)
    return given


def _grid(given: Mapping[str, Value]) -> dict[str, list[Value]]:
    """Return the values by dotted key; ``pace.rounds = [1, 2]`` may stand without quotes."""
    grid: dict[str, list[Value]] = {}
    for key, values in flatten(given):
        if not isinstance(values, list) or not values:
            raise UserError(f"grid.{key} = {values!r}: expected a list of at least one value")
        _refuse_repeated(f"grid.{key}", values)
        grid[key] = values
    return grid


def _refuse_repeated(key: str, values: Iterable[Value]) -> None:
    seen: set[str] = set()
    for value in values:
        if (text := inline(value)) in seen:
            raise UserError(f"{key} holds {value!r} twice; expected different values")
        seen.add(text)


def _check_keys(plan: Plan) -> None:
    if any("seed" in keys for keys in (plan.grid, *(case.changes for case in plan.cases))):
        raise UserError("seed stands in the grid or a case; expected `seeds` at the top instead")
    for case in plan.cases:
        for key in plan.grid:
            if lost := [k for k in case.changes if f"{k}.".startswith(f"{key}.")]:
                raise UserError(
                    f"grid.{key} would undo {lost[0]} of case {case.label!r};"
                    " expected it in either of them"
                )
