"""Experiment files: where they are, and what is changed in them before they are checked."""

from __future__ import annotations

import tomllib
from collections.abc import Iterable, Mapping
from importlib import resources
from pathlib import Path
from typing import Any

from p2pfl.errors import UserError
from p2pfl.experiment.config import Value, parse_spec, parse_value


def find(path: str | Path) -> Path:
    """Return the file a user means: a path, or the name of an experiment that ships with us."""
    given, names = Path(path), shipped()
    try:
        if given.is_file():
            return given
    except OSError as error:  # a folder that is closed to us, a name that is too long
        raise UserError(f"{path} cannot be read: {error.strerror}") from error
    if given.suffix or "/" in str(path):
        raise UserError(f"there is no experiment file {path}")
    if str(path) not in names:
        raise UserError(
            f"there is no experiment {str(path)!r}; give a .toml file or one of: "
            + ", ".join(names)
        )
    return names[str(path)]


def load_toml(path: Path) -> dict[str, Any]:
    """Return the tables of a file.

    Raises:
        UserError: it is missing, or no TOML.
    """
    try:
        return tomllib.loads(path.read_text(encoding="utf-8"))
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise UserError(f"{path} is not valid TOML: {error}") from error
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror}") from error


def shipped() -> dict[str, Path]:
    """Return the experiments that ship with the package, by name."""
    folder = Path(str(resources.files("p2pfl") / "experiments"))
    return {file.stem: file for file in sorted(folder.glob("*.toml"))}


def change(tables: Mapping[str, Value], changes: Iterable[str]) -> dict[str, Value]:
    """Return the tables with ``key.key=value`` changes made.

    >>> change({"pace": {"rounds": 20}}, ["pace.rounds=2", "topology=ring"])
    {'pace': {'rounds': 2}, 'topology': 'ring'}
    """
    changed: dict[str, Value] = _copy(tables)
    for text in changes:
        path, equals, value = text.partition("=")
        if not equals or not path.strip():
            raise UserError(f"--set {text!r} is not of the form key=value, as in pace.rounds=2")
        *above, last = path.strip().split(".")
        table = changed
        for key in above:
            inner = table.setdefault(key, {})
            if isinstance(inner, str):  # a section written short, as "torus:rows=2,cols=4"
                inner = table[key] = parse_spec(inner)
            if not isinstance(inner, dict):
                raise UserError(f"--set {text!r}: {key} is not a section")
            table = inner
        table[last] = parse_value(value.strip())
    return changed


def _copy(value: Value) -> Value:
    if isinstance(value, Mapping):
        return {key: _copy(part) for key, part in value.items()}
    return value


def located(key: str, value: Value, base: Path) -> Value:
    """Let relative paths of files which belong to the experiment start at its folder."""
    if key == "topology" and isinstance(value, str) and Path(value).suffix and ":" not in value:
        value = {"name": "file", "path": value}
    if key == "churn" and isinstance(value, str) and value.endswith(".toml") and ":" not in value:
        value = {"name": "script", "path": value}
    if key in ("topology", "churn", "model") and isinstance(value, str):
        value = parse_spec(value)  # a path may stand in it
    if not isinstance(value, dict):
        return value
    if key in ("topology", "churn") and isinstance(value.get("path"), str):
        return {**value, "path": str(base / value["path"])}
    if key == "model" and isinstance(value.get("factory"), str):
        place, colon, function = value["factory"].rpartition(":")
        if place.endswith(".py"):
            return {**value, "factory": f"{base / place}{colon}{function}"}
    return value
