"""Sections: a table in the experiment file is a call, and the factory's signature its schema.

    algorithm = {name = "choco", gamma = 0.3, codec = {name = "top_k", share = 0.1}}

calls ``choco(optimiser, gamma=0.3, codec=top_k(share=0.1))``. Values are checked against
the annotations, so an unknown name, an unknown key or a wrong type is an error that says
which key, which value, and what would do. ``"torus:rows=4,cols=6"`` is short for a section.
"""

from __future__ import annotations

import difflib
import inspect
import math
import tomllib
import types
import typing
from collections.abc import Callable, Collection, Iterable, Mapping
from typing import Any, NamedTuple

import msgspec

from p2pfl.aggregation import AGGREGATIONS, Aggregation
from p2pfl.attacks import ATTACKS, Attack
from p2pfl.codec import CODECS, Codec
from p2pfl.errors import UserError
from p2pfl.learning.optim import OPTIMISERS, Optimiser
from p2pfl.learning.schedules import SCHEDULES, Schedule
from p2pfl.peer.stopping import STOP_RULES, StopRule

Value = Any  # what TOML holds: str, int, float, bool, list, dict
Table = Mapping[str, Callable[..., Any]]

WHOLE = 2**63  # whole numbers are below it, as those of tensors are
LARGEST = 1e38  # of numbers: what float32 and bfloat16 hold

# Sections which may stand inside other sections, by the type they make.
NESTED: dict[Any, Table] = {
    Aggregation: AGGREGATIONS,
    Attack: ATTACKS,
    Codec: CODECS,
    Optimiser: OPTIMISERS,
    Schedule: SCHEDULES,
    StopRule: STOP_RULES,
}


class Kind(NamedTuple):
    """What may stand in a section.

    Attributes:
        table: the factories by name. A section with one factory named ``""`` has no name.
        default: the name when none is given.
        given: how many leading parameters the program supplies itself.
        told: others that it supplies, by name, to factories which ask for them.
    """

    table: Table
    default: str | None = None
    given: int = 0
    told: tuple[str, ...] = ()


class Section(NamedTuple):
    """A checked section: what to call and with what, defaults included."""

    name: str
    values: dict[str, Value]  # as in the file; nested sections are `Section`s
    factory: Callable[..., Any]

    def build(self, path: str, *given: Any, **told: Any) -> Any:  # noqa: ANN401
        """Call the factory; a `ValueError` becomes a `UserError` which names the section.

        Args:
            path: where the section stands, for error messages.
            given: the leading arguments of the factory.
            told: others by name, of which it is given those that it asks for.
        """
        values = {key: _build(value, f"{path}.{key}") for key, value in self.values.items()}
        asked = inspect.signature(self.factory).parameters if told else ()
        try:
            return self.factory(*given, **values, **{k: told[k] for k in told if k in asked})
        except ValueError as error:
            raise UserError(f"{path}: {error}") from error

    def plain(self) -> dict[str, Value]:
        """Return the section as it could stand in a file, every value spelled out."""
        named = {"name": self.name} if self.name else {}
        plain = {key: _plain(value) for key, value in self.values.items()}
        return named | {key: value for key, value in plain.items() if value is not None}


def read(path: str, value: Value, kind: Kind) -> Section:
    """Check the value of a section.

    Args:
        path: where it stands, for error messages, as ``"algorithm.codec"``.
        value: a table, or a string ``"name:key=value,..."``.
        kind: what may stand there.

    Raises:
        UserError: it names the key, the value and the choices.
    """
    table = dict(parse_spec(value) if isinstance(value, str) else _table(path, value))
    if list(kind.table) == [""]:
        name = ""
    else:
        name = table.pop("name", kind.default)
        if name is None:
            raise UserError(f"{path}.name is missing; choices: {_list(kind.table)}")
        if name not in kind.table:
            raise UserError(f"{path}.name = {name!r} is unknown{_choices(name, kind.table)}")
    factory = kind.table[name]
    hints = typing.get_type_hints(factory)
    known = parameters(factory, kind.given, kind.told)
    for key in table:
        if key not in known:
            raise UserError(f"{path}.{key} is unknown{_choices(key, known, name)}")
    values = {
        key: _value(f"{path}.{key}", table.get(key, parameter.default), hints[key])
        for key, parameter in known.items()
    }
    return Section(name, values, factory)


def parameters(
    factory: Callable[..., Any], given: int, told: Collection[str] = ()
) -> dict[str, inspect.Parameter]:
    """Return the parameters of a factory that a file may set, by name.

    Args:
        factory: what stands in a section.
        given: how many leading parameters the program supplies itself.
        told: others that it supplies, by name.
    """
    listed = list(inspect.signature(factory).parameters.values())[given:]
    return {parameter.name: parameter for parameter in listed if parameter.name not in told}


def parse_spec(text: str) -> dict[str, Value]:
    """Read ``name:key=value,key=value``; values are written as in TOML, quotes are optional.

    >>> parse_spec("torus:rows=4,cols=6")
    {'name': 'torus', 'rows': 4, 'cols': 6}
    """
    name, _, rest = text.partition(":")
    table: dict[str, Value] = {"name": name.strip()}
    for part in _split(rest):
        key, equals, value = part.partition("=")
        if not equals:
            raise UserError(f"{text!r}: {part!r} is not of the form key=value")
        table[key.strip()] = parse_value(value.strip())
    return table


def parse_value(text: str) -> Value:
    """Read a value as TOML would, or take it for a string.

    >>> parse_value("0.5"), parse_value("ring"), parse_value("[1, 2]")
    (0.5, 'ring', [1, 2])
    """
    try:
        return tomllib.loads(f"value = {text}")["value"]
    except ValueError:  # also of a number of thousands of digits
        return text


def _split(text: str) -> list[str]:
    """Cut at commas which are not inside brackets."""
    parts, depth = [""], 0
    for character in text:
        depth += (character in "[{") - (character in "]}")
        if character == "," and depth == 0:
            parts.append("")
        else:
            parts[-1] += character
    return [part for part in parts if part.strip()]


def _value(path: str, value: Value, hint: Any) -> Value:  # noqa: ANN401
    if value is inspect.Parameter.empty:
        raise UserError(f"{path} is missing")
    table, several = _nested(hint)
    if table is not None and several and isinstance(value, list):
        return [read(f"{path}[{i}]", part, Kind(table)) for i, part in enumerate(value)]
    if table is not None and not several and isinstance(value, str | dict):
        return read(path, value, Kind(table))
    if table is not None and value is None:
        return None
    try:
        converted = msgspec.convert(value, _without_nested(hint), strict=True)
    except msgspec.ValidationError as error:
        text = str(error).replace("`", "").replace("Expected", "expected", 1)
        raise UserError(f"{path} = {value!r}: {text}{_literals(hint)}") from None
    _check_held(path, converted)
    return converted


def _check_held(path: str, value: Value) -> None:
    """Refuse numbers that no tensor can hold, and texts that no path can, wherever they stand."""
    if isinstance(value, dict):
        for key, part in value.items():
            _check_held(f"{path}.{key}", part)
    elif isinstance(value, list | tuple):
        for i, part in enumerate(value):
            _check_held(f"{path}[{i}]", part)
    elif isinstance(value, str) and "\0" in value:
        raise UserError(f"{path} = {value!r}: expected a text without the character zero")
    elif isinstance(value, int) and not -WHOLE <= value < WHOLE:
        raise UserError(f"{path} = {value}: expected a whole number below 2^63")
    elif isinstance(value, float) and LARGEST < abs(value) < math.inf:
        raise UserError(f"{path} = {value}: expected a number of at most {LARGEST:g}")


def _nested(hint: Any) -> tuple[Table | None, bool]:  # noqa: ANN401
    """Return which sections a parameter takes, if any, and whether it takes a list of them."""
    for part in _alternatives(hint):
        origin = typing.get_origin(part)
        if origin is list:
            table, _ = _nested(typing.get_args(part)[0])
            return table, True
        for made, table in NESTED.items():
            if part == made or origin is made:
                return table, False
    return None, False


def _without_nested(hint: Any) -> Any:  # noqa: ANN401
    parts = tuple(part for part in _alternatives(hint) if _nested(part)[0] is None)
    return typing.Union[parts] if parts else None  # noqa: UP007 - built at run time


def _alternatives(hint: Any) -> tuple[Any, ...]:  # noqa: ANN401
    if typing.get_origin(hint) in (typing.Union, types.UnionType):
        return typing.get_args(hint)
    return (hint,)


def _build(value: Value, path: str) -> Value:
    if isinstance(value, Section):
        return value.build(path)
    if isinstance(value, list):
        return [_build(part, f"{path}[{i}]") for i, part in enumerate(value)]
    return value


def _plain(value: Value) -> Value:
    if isinstance(value, Section):
        return value.plain()
    if isinstance(value, Mapping):
        return {str(key): _plain(part) for key, part in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(part) for part in value]
    return value


def _table(path: str, value: Value) -> Mapping[str, Value]:
    if not isinstance(value, Mapping):
        raise UserError(f"{path} = {value!r}: a section or a string is wanted here")
    return value


def _choices(wrong: Any, right: Iterable[str], of: str = "") -> str:  # noqa: ANN401
    if of and not list(right):
        return f"; {of} takes no keys"
    near = difflib.get_close_matches(str(wrong), list(right), 1)
    hint = f"; did you mean {near[0]!r}?" if near else ""
    listed = _list(right)
    return f"{hint or ';'} {of} takes: {listed}" if of else f"{hint or ';'} choices: {listed}"


def _list(names: Iterable[str]) -> str:
    return ", ".join(sorted(names))


def _literals(hint: Any) -> str:  # noqa: ANN401
    values = [
        value
        for part in _alternatives(hint)
        if typing.get_origin(part) is typing.Literal
        for value in typing.get_args(part)
    ]
    return f" (choices: {', '.join(map(repr, values))})" if values else ""
