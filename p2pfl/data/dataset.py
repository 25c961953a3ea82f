"""A data set as it is before anybody owns a part of it, and where it comes from."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from torch import Tensor

from p2pfl.data.encoder import Encoder


@dataclass(frozen=True, slots=True, eq=False)
class Dataset:
    """Rows as they were measured: nothing is standardised, a missing value is NaN.

    What the model sees, ``nan_to_num((x - shift) * scale)``, is made on the fly by the
    learning task, with constants of each node (see :mod:`p2pfl.data.statistics`).
    """

    x: Tensor  # [N, ...] float32
    y: Tensor  # [N] int64 classes, or float32 for regression
    features: tuple[str, ...] = ()  # names of the encoded columns; () for images
    classes: tuple[str, ...] = ()  # names of the classes; () for regression
    numeric: Tensor | None = None  # [f] bool: which features to standardise; None: nothing
    groups: Tensor | None = None  # [N] int64: the natural owner of each row
    group_names: tuple[str, ...] = ()
    encoder: Encoder | None = None  # how raw rows became x
    only: int | None = None  # the rows are this owner's; the others' files were not read

    @property
    def outputs(self) -> int:
        """How many numbers a model returns: one per class, or 1 for regression."""
        return len(self.classes) or 1

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape of one example."""
        return tuple(self.x.shape[1:])


class Source(NamedTuple):
    """Where a data set comes from.

    ``load(data_dir, only)`` reads it; relative paths start at `data_dir`. ``only=k``
    means "this is peer k": where the data come as one file per node, just that file is
    read (`Dataset.only` then says so); elsewhere it changes nothing.
    """

    load: Callable[[Path, int | None], Dataset]
    files: int | None = None  # how many per-node files; None: all rows are in one place
