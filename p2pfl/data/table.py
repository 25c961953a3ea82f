"""Delimited text files as tables of text, with the place of every row kept for messages."""

from __future__ import annotations

import csv
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from p2pfl.data.encoder import choices
from p2pfl.errors import UserError


class Form(NamedTuple):
    """How the files are written."""

    columns: tuple[str, ...] = ()  # names for files without a header row
    delimiter: str = ","
    row_numbers: bool = False  # every row starts with a number the header does not name


class Place(NamedTuple):
    """Where a row stands."""

    file: int
    line: int


@dataclass(frozen=True, slots=True)
class Table:
    """The rows of one or more files of the same columns, as text, laid end to end."""

    header: tuple[str, ...]
    rows: list[list[str]]
    places: list[Place]
    files: tuple[str, ...]

    def column(self, name: str) -> list[str]:
        """Return the texts of a column, one per row."""
        at = self.header.index(name)
        return [row[at] for row in self.rows]

    def where(self, row: int, column: str) -> str:
        """Say in words where a value stands."""
        place = self.places[row]
        return f"{self.files[place.file]}, line {place.line}, column {column!r}"

    def complete(self, columns: Collection[str], missing: Collection[str]) -> Table:
        """Return the rows that have a value in each of the columns."""
        at = [self.header.index(name) for name in columns]
        kept = [i for i, row in enumerate(self.rows) if all(row[c] not in missing for c in at)]
        rows, places = [self.rows[i] for i in kept], [self.places[i] for i in kept]
        return Table(self.header, rows, places, self.files)


def read_table(files: Sequence[Path], form: Form) -> Table:
    """Return the rows of the files, in order, without blank lines and outer spaces.

    A :class:`UserError` says which file cannot be read, is empty, or has other columns
    than the first, and which row has too many or too few fields.
    """
    tables = [_read_file(file, form) for file in files]
    first = tables[0]
    for table in tables[1:]:
        if table.header != first.header:
            raise UserError(
                f"{table.files[0]}: its columns are {choices(table.header)}; those of "
                f"{first.files[0]} are {choices(first.header)}"
            )
    rows = [row for table in tables for row in table.rows]
    places = [Place(i, place.line) for i, table in enumerate(tables) for place in table.places]
    return Table(first.header, rows, places, tuple(str(file) for file in files))


def _read_file(file: Path, form: Form) -> Table:
    try:
        # utf-8-sig: spreadsheets like to begin with a byte order mark.
        with file.open(newline="", encoding="utf-8-sig") as stream:
            reader = csv.reader(stream, delimiter=form.delimiter, skipinitialspace=True)
            lines = [(reader.line_num, [text.strip() for text in row]) for row in reader if row]
    except FileNotFoundError as error:
        raise UserError(f"{file}: there is no such file") from error
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise UserError(f"{file}: cannot be read as text in columns: {error}") from error
    header = form.columns or (tuple(lines.pop(0)[1]) if lines else ())
    if not lines:
        raise UserError(f"{file}: there are no rows in it")
    twice = next((name for name in header if header.count(name) > 1), None)
    if twice is not None:
        raise UserError(
            f"{file}: two columns are called {twice!r}; for a file without a header row "
            "name its columns under columns"
        )
    rows = list(_fields(file, header, lines, form.row_numbers))
    return Table(header, rows, [Place(0, line) for line, _ in lines], (str(file),))


def _fields(
    file: Path, header: tuple[str, ...], lines: list[tuple[int, list[str]]], numbered: bool
) -> Iterator[list[str]]:
    due = len(header) + numbered
    for line, row in lines:
        if len(row) != due:
            one_more = len(row) == due + 1 and not numbered
            hint = "; if rows start with their number, set row_numbers = true" if one_more else ""
            extra = " and row_numbers = true adds one" if numbered else ""
            raise UserError(
                f"{file}, line {line}: {len(row)} fields, but there are {len(header)} columns"
                f"{extra}{hint}"
            )
        yield row[1:] if numbered else row
