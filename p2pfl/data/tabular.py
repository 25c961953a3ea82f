"""Tables in delimited text files, all in one place or one file for each natural owner."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from p2pfl.data.dataset import Dataset, Source
from p2pfl.data.encoder import MISSING, Column, Encoder, canonical, choices, vocabulary
from p2pfl.data.table import Form, Table, read_table
from p2pfl.data.target import Label, Target, Task, make_target
from p2pfl.errors import UserError

Categories = tuple[str, ...] | dict[str, tuple[Label, ...]]


def csv(  # noqa: PLR0913  (a config section: each parameter is a key the user may write)
    path: str | tuple[str, ...],
    target: str,
    *,
    task: Task = "classification",
    classes: tuple[Label, ...] = (),
    positive: Label | tuple[Label, ...] | None = None,
    target_above: float | None = None,
    features: tuple[str, ...] = (),
    drop: tuple[str, ...] = (),
    categorical: Categories = (),
    missing: tuple[str, ...] = MISSING,
    drop_missing: bool = False,
    group: str | None = None,
    group_prefix: int | None = None,
    columns: tuple[str, ...] = (),
    delimiter: str = ",",
    row_numbers: bool = False,
) -> Source:
    """Read a table from text files in columns, or one table per node from a list of files.

    A list of paths gives each natural owner (hospital, factory) a file of its own, unless
    `group` names the owners; a peer then reads no other's file. Because it cannot see the
    others' rows, whatever must be the same everywhere has to be written in the section:
    `categorical` as a table of allowed values, and the classes.

    Args:
        path: one file, or a list of files of the same columns.
        target: the column to predict.
        task: "classification" or "regression".
        classes: the target's values, in order; by default those in the file, sorted.
        positive: the value, or values, that make a binary target 1; all others make it 0.
        target_above: a binary target: 1 where the number is greater than this.
        features: the columns to learn from, in this order; by default all the others.
        drop: columns to leave out instead.
        categorical: columns of values instead of numbers, as a list (the values are
            taken from the file) or as a table of column -> allowed values. Whole numbers
            are the same category with and without a decimal point.
        missing: the texts that stand for a missing value.
        drop_missing: leave out rows that miss the target or a feature in use.
        group: the column that names the natural owner of a row; not a feature, unless
            `features` or `categorical` names it too.
        group_prefix: take only so many characters of it (10 for the day of a timestamp).
        columns: names of the columns, for files without a header row.
        delimiter: one character between fields; blanks after it do not count.
        row_numbers: every row starts with a number that the header does not name.

    Raises:
        UserError: naming the file, line, column and value that cannot be used.
    """
    files = (path,) if isinstance(path, str) else tuple(path)
    section = _Section(
        files,
        per_node=not isinstance(path, str) and group is None,
        form=Form(tuple(columns), delimiter, row_numbers),
        target=make_target(target, task, tuple(classes), positive, target_above),
        features=tuple(features),
        drop=tuple(drop),
        categorical=categorical if isinstance(categorical, dict) else tuple(categorical),
        missing=tuple(missing),
        drop_missing=drop_missing,
        group=group,
        group_prefix=group_prefix,
    )
    section.check()
    return Source(section.load, len(files) if section.per_node else None)


@dataclass(frozen=True, slots=True)
class _Section:
    """A checked `csv` section."""

    files: tuple[str, ...]
    per_node: bool
    form: Form
    target: Target
    features: tuple[str, ...]
    drop: tuple[str, ...]
    categorical: Categories
    missing: tuple[str, ...]
    drop_missing: bool
    group: str | None
    group_prefix: int | None

    def check(self) -> None:
        """Refuse what can be seen to be wrong before any file is read."""
        if not self.files:
            raise UserError("csv: path = [] names no file")
        if len(self.form.delimiter) != 1:
            raise UserError(f"csv: delimiter = {self.form.delimiter!r} must be one character")
        if self.features and self.drop:
            raise UserError("csv: features and drop exclude each other; give one of them")
        if self.target.column in (*self.features, *self.categorical, self.group):
            raise UserError(
                f"csv: the target {self.target.column!r} cannot be a feature or the group too"
            )
        if self.group_prefix is not None and (self.group is None or self.group_prefix < 1):
            raise UserError("csv: group_prefix is a number of characters, at least 1, of group")
        if self.per_node:
            self._check_agreed()

    def _check_agreed(self) -> None:
        if self.categorical and not isinstance(self.categorical, dict):
            name = self.categorical[0]
            raise UserError(
                "csv: with one file per node no peer sees all values of a column: write "
                f'categorical = {{"{name}" = ["…", "…"], …}}, a table of allowed values'
            )
        if not self.target.agreed:
            raise UserError(
                "csv: with one file per node no peer sees all classes of the target "
                f"{self.target.column!r}: give classes = [...], positive or target_above"
            )

    def load(self, data_dir: Path, only: int | None = None) -> Dataset:
        """Read the files, or only the file of one peer."""
        alone = only if self.per_node else None
        files = self.files if alone is None else (self._file_of(alone),)
        table = read_table([data_dir / file for file in files], self.form)
        columns = self._columns(table)
        used = (self.target.column, *columns, *([self.group] if self.group else []))
        if self.drop_missing:
            table = table.complete(used, self.missing)
            if not table.rows:
                raise UserError(f"{table.files[0]}: drop_missing = true leaves no row")
        encoder = Encoder(tuple(self._column(name, table) for name in columns), self.missing)
        texts = {name: table.column(name) for name in columns}
        # A single peer's rows may well be all of one class.
        y, classes = self.target.read(table, self.missing, varied=alone is None)
        groups, names = self._owners(table, alone)
        return Dataset(
            x=encoder.encode_columns(texts, len(table.rows), table.where),
            y=y,
            features=encoder.features,
            classes=classes,
            numeric=encoder.numeric,
            groups=groups,
            group_names=names,
            encoder=encoder,
            only=alone,
        )

    def _file_of(self, peer: int) -> str:
        if not 0 <= peer < len(self.files):
            raise UserError(
                f"csv: there is no file for node {peer}: path lists {len(self.files)} files, "
                f"for the nodes 0 to {len(self.files) - 1}"
            )
        return self.files[peer]

    def _columns(self, table: Table) -> list[str]:
        """Return the names of the raw columns to learn from."""
        for key, names in (
            ("target", [self.target.column]),
            ("group", [self.group] if self.group else []),
            ("features", self.features),
            ("drop", self.drop),
            ("categorical", self.categorical),
        ):
            _check_known(key, names, table)
        # The owner is no feature, unless the section says so by naming it as one.
        owner = None if self.group in self.categorical else self.group
        unused = {self.target.column, owner, *self.drop}
        chosen = list(self.features) or [name for name in table.header if name not in unused]
        idle = [name for name in self.categorical if name not in chosen]
        if idle:
            raise UserError(
                f"csv: categorical names {choices(idle)}, which the other keys leave out"
            )
        if not chosen:
            raise UserError("csv: no column is left to learn from")
        return chosen

    def _column(self, name: str, table: Table) -> Column:
        if name not in self.categorical:
            return Column(name)
        if isinstance(self.categorical, dict):
            return Column(name, tuple(canonical(str(v)) for v in self.categorical[name]))
        texts = (text for text in table.column(name) if text not in self.missing)
        return Column(name, vocabulary(texts))

    def _owners(self, table: Table, alone: int | None) -> tuple[Tensor | None, tuple[str, ...]]:
        """Return the owner of each row ``[N]`` and the owners' names."""
        if self.per_node:
            files = [place.file if alone is None else alone for place in table.places]
            return torch.tensor(files, dtype=torch.int64), self.files
        if self.group is None:
            return None, ()
        texts = [canonical(text[: self.group_prefix]) for text in table.column(self.group)]
        for row, text in enumerate(texts):
            if text in self.missing:
                raise UserError(f"{table.where(row, self.group)}: the owner is missing")
        names = vocabulary(texts)
        place = {name: i for i, name in enumerate(names)}
        return torch.tensor([place[text] for text in texts], dtype=torch.int64), names


def _check_known(key: str, names: Collection[str], table: Table) -> None:
    for name in names:
        if name not in table.header:
            raise UserError(
                f"{table.files[0]}: {key} names the column {name!r}, which is not there; "
                f"the columns are {choices(table.header)}"
            )
