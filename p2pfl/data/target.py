"""What is to be predicted from a table: classes, two classes, or a number."""

from __future__ import annotations

from typing import Literal, NamedTuple

import torch
from torch import Tensor

from p2pfl.data.encoder import canonical, choices, parse_number, vocabulary
from p2pfl.data.table import Table
from p2pfl.errors import UserError

Task = Literal["classification", "regression"]
Label = str | int | float

_BINARY = ("0", "1")
_FEW = 20  # so many classes are believed even of a tiny table


class Target(NamedTuple):
    """The target column and how it is read; at most one of the last three is given."""

    column: str
    task: Task
    classes: tuple[str, ...] = ()
    positive: tuple[str, ...] = ()
    above: float | None = None

    @property
    def agreed(self) -> bool:
        """Whether the classes follow from the description alone, without any row."""
        binary = bool(self.positive) or self.above is not None
        return binary or bool(self.classes) or self.task == "regression"

    def read(
        self, table: Table, missing: tuple[str, ...], varied: bool = True
    ) -> tuple[Tensor, tuple[str, ...]]:
        """Return the targets ``[N]`` and the names of the classes.

        With `varied`, rows all of one class are refused: there is nothing to learn.
        """
        texts = table.column(self.column)
        for row, text in enumerate(texts):
            if text in missing:
                raise UserError(
                    f"{table.where(row, self.column)}: the target is missing; "
                    "set drop_missing = true to leave such rows out"
                )
        if self.task == "regression":
            return torch.tensor(self._numbers(table, texts), dtype=torch.float32), ()
        y, classes = self._classify(table, texts)
        if varied and bool((y == y[0]).all()):
            raise UserError(
                f"{table.files[0]}: every row has the same class of target {self.column!r} "
                f"({texts[0]!r} in the first row); there is nothing to learn"
            )
        return y, classes

    def _classify(self, table: Table, texts: list[str]) -> tuple[Tensor, tuple[str, ...]]:
        if self.above is not None:
            flags = [number > self.above for number in self._numbers(table, texts)]
            return torch.tensor(flags).long(), _BINARY
        if self.positive:
            return torch.tensor([canonical(t) in self.positive for t in texts]).long(), _BINARY
        return self._read_classes(table, texts)

    def _numbers(self, table: Table, texts: list[str]) -> list[float]:
        places = (table.where(row, self.column) for row in range(len(texts)))
        return [parse_number(text, place) for text, place in zip(texts, places, strict=True)]

    def _read_classes(self, table: Table, texts: list[str]) -> tuple[Tensor, tuple[str, ...]]:
        classes = self.classes or vocabulary(texts)
        if not self.classes and len(classes) > max(_FEW, len(texts) // 2):
            raise UserError(
                f"{table.files[0]}: the target {self.column!r} has {len(classes)} different "
                f'values in {len(texts)} rows; for a number set task = "regression"'
            )
        place = {name: i for i, name in enumerate(classes)}
        labels = [place.get(canonical(text), -1) for text in texts]
        if -1 in labels:
            row = labels.index(-1)
            raise UserError(
                f"{table.where(row, self.column)}: unknown class {texts[row]!r}; "
                f"classes has {choices(classes)}"
            )
        return torch.tensor(labels, dtype=torch.int64), classes


def make_target(
    column: str,
    task: Task,
    classes: tuple[Label, ...],
    positive: Label | tuple[Label, ...] | None,
    above: float | None,
) -> Target:
    """Return the target a section describes; a :class:`UserError` if it contradicts itself."""
    given = {"classes": bool(classes), "positive": positive is not None}
    given["target_above"] = above is not None
    named = [name for name, there in given.items() if there]
    if len(named) > 1:
        raise UserError(f"csv: {named[0]} and {named[1]} exclude each other; give one of them")
    if task == "regression" and named:
        raise UserError(f'csv: {named[0]} is for task = "classification", not for regression')
    if classes and len(set(_labels(classes))) < max(2, len(classes)):
        raise UserError(f"csv: classes = {list(classes)} must be two or more different values")
    if positive is None:
        positive = ()
    elif not isinstance(positive, (tuple, list)):
        positive = (positive,)
    elif not positive:
        raise UserError("csv: positive = [] names no value")
    return Target(column, task, _labels(classes), _labels(tuple(positive)), above)


def _labels(values: tuple[Label, ...]) -> tuple[str, ...]:
    return tuple(canonical(str(value)) for value in values)
