"""How the raw text of a table becomes numbers, kept so that new rows can be encoded alike."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from p2pfl.errors import UserError

MISSING = ("", "?", "NA", "NaN", "nan")
"""The texts that stand for a missing value unless a section says otherwise."""

Where = Callable[[int, str], str]
"""Says in words where a value stands, given its row and its column."""

Floats = npt.NDArray[np.float32]

_WHOLE = re.compile(r"([+-]?\d+)\.0*")
_LARGEST = float(np.finfo(np.float32).max)
_SHOWN = 12


class Column(NamedTuple):
    """One raw column: a number, or one of a closed list of values."""

    name: str
    values: tuple[str, ...] | None = None  # None: a number


@dataclass(frozen=True, slots=True)
class Encoder:
    """What it takes to turn raw rows (column name -> text) into features.

    A number becomes one feature; a categorical column becomes one feature of 0 and 1 for
    each of its values, named ``column=value``. A missing value is NaN in every feature
    of its column.

    >>> encoder = Encoder((Column("age"), Column("kind", ("a", "b"))))
    >>> encoder.features
    ('age', 'kind=a', 'kind=b')
    >>> encoder.encode([{"age": "41", "kind": "b"}, {"age": "?", "kind": "a"}]).tolist()
    [[41.0, 0.0, 1.0], [nan, 1.0, 0.0]]
    """

    columns: tuple[Column, ...]
    missing: tuple[str, ...] = MISSING

    @property
    def features(self) -> tuple[str, ...]:
        """The names of the encoded features, ``f`` of them."""
        return tuple(name for column in self.columns for name in _feature_names(column))

    @property
    def numeric(self) -> Tensor:
        """Which features are numbers, to be standardised: bool ``[f]``."""
        flags = [c.values is None for c in self.columns for _ in _feature_names(c)]
        return torch.tensor(flags, dtype=torch.bool)

    def encode(self, rows: Sequence[Mapping[str, str]]) -> Tensor:
        """Return the features of raw rows, ``[N, f]`` float32.

        A :class:`UserError` names a column that is lacking, a text where a number is
        due or a value that the training data did not know.
        """
        texts = {}
        for column in self.columns:
            lacking = next((i for i, row in enumerate(rows) if column.name not in row), None)
            if lacking is not None:
                raise UserError(f"{_where_row(lacking, column.name)} is not there")
            texts[column.name] = [row[column.name] for row in rows]
        return self.encode_columns(texts, len(rows), _where_row)

    def encode_columns(
        self, texts: Mapping[str, Sequence[str]], count: int, where: Where
    ) -> Tensor:
        """Return the features of `count` rows given column by column, ``[N, f]`` float32."""
        blocks = [np.empty((count, 0), dtype=np.float32)]
        for column in self.columns:
            encode = _number if column.values is None else _one_hot
            blocks.append(encode(column, texts[column.name], self.missing, where))
        return torch.from_numpy(np.concatenate(blocks, axis=1))

    def to_json(self) -> str:
        """Return the encoder as JSON text, for :meth:`from_json`."""
        columns = [{"name": name, "values": values} for name, values in self.columns]
        return json.dumps({"columns": columns, "missing": self.missing}, ensure_ascii=False)

    @classmethod
    def from_json(cls, text: str) -> Encoder:
        """Return the encoder that :meth:`to_json` wrote; a :class:`UserError` if none did."""
        try:
            data = json.loads(text)
            columns = tuple(_column(item) for item in data["columns"])
            return cls(columns, _strings(data["missing"]))
        except (ValueError, KeyError, TypeError) as error:
            raise UserError(f"this is not the JSON of an encoder: {error!r}") from error


def parse_number(text: str, place: str, hint: str = "") -> float:
    """Return the number that `text` says; a :class:`UserError` naming its place otherwise."""
    try:
        number = float(text)
    except ValueError:
        raise UserError(f"{place}: {text!r} is not a number{hint}") from None
    if not abs(number) <= _LARGEST:  # also true of nan
        raise UserError(f"{place}: {text!r} is not a finite number")
    return number


def canonical(text: str) -> str:
    """Return the one spelling of a category, whichever way its file writes whole numbers.

    >>> canonical("3.0"), canonical(" 3"), canonical("3.5"), canonical("A30")
    ('3', '3', '3.5', 'A30')
    """
    text = text.strip()
    whole = _WHOLE.fullmatch(text)
    return whole.group(1) if whole else text


def vocabulary(texts: Iterable[str]) -> tuple[str, ...]:
    """Return the distinct categories, sorted; by value where all are numbers.

    >>> vocabulary(["10", "9", "9.0"]), vocabulary(["b", "a"])
    (('9', '10'), ('a', 'b'))
    """
    distinct = sorted({canonical(text) for text in texts})
    try:
        numbers = {text: float(text) for text in distinct}
    except ValueError:
        return tuple(distinct)
    if any(math.isnan(number) for number in numbers.values()):
        return tuple(distinct)
    return tuple(sorted(distinct, key=numbers.__getitem__))


def choices(names: Iterable[str]) -> str:
    """Return names as a readable list, cut when it is long.

    >>> choices(["a", "b"])
    "'a', 'b'"
    """
    names = list(names)
    shown = ", ".join(repr(name) for name in names[:_SHOWN])
    return shown if len(names) <= _SHOWN else f"{shown}, … ({len(names)} in all)"


def _number(column: Column, texts: Sequence[str], missing: tuple[str, ...], where: Where) -> Floats:
    hint = "; name the column under categorical, or under drop, or its value under missing"
    out = np.full((len(texts), 1), np.nan, dtype=np.float32)
    for i, text in enumerate(texts):
        if text.strip() not in missing:
            out[i, 0] = parse_number(text, where(i, column.name), hint)
    return out


def _one_hot(
    column: Column, texts: Sequence[str], missing: tuple[str, ...], where: Where
) -> Floats:
    values = column.values or ()
    place = {value: i for i, value in enumerate(values)}
    out = np.zeros((len(texts), len(values)), dtype=np.float32)
    for i, text in enumerate(texts):
        at = place.get(canonical(text))
        if at is not None:
            out[i, at] = 1.0
        elif text.strip() in missing:
            out[i] = np.nan
        else:
            raise UserError(
                f"{where(i, column.name)}: unknown category {text!r}; known are {choices(values)}"
            )
    return out


def _feature_names(column: Column) -> tuple[str, ...]:
    if column.values is None:
        return (column.name,)
    return tuple(f"{column.name}={value}" for value in column.values)


def _where_row(row: int, column: str) -> str:
    return f"row {row + 1}, column {column!r}"


def _column(data: Mapping[str, Any]) -> Column:
    values = data["values"]
    (name,) = _strings([data["name"]])
    return Column(name, None if values is None else _strings(values))


def _strings(data: object) -> tuple[str, ...]:
    if not isinstance(data, list) or not all(isinstance(item, str) for item in data):
        raise TypeError(f"expected a list of texts, not {data!r}")
    return tuple(data)
