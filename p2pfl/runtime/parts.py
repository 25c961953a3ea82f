"""Models that stay where they came: to copy every number once more costs as much as to mix it.

A chunk is a message of its own, and ZeroMQ has memory for it anyway. Where models are only
mixed, the large field of a message may lie in as many places as there are chunks.
"""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from p2pfl.peer.events import Received
from p2pfl.peer.letters import WIDE, Pieces
from p2pfl.runtime.chunks import Incoming, Piece, Schema, check_finite
from p2pfl.runtime.wire import Header

LEAD = 4096  # bytes that the small fields of a message may have


class Wide(NamedTuple):
    """The one large field of a message, and which of its columns each chunk brings."""

    field: int
    columns: tuple[tuple[int, int], ...]


def wide_field(schema: Schema) -> Wide | None:
    """Return the one large field of a message; None: it is not made like that.

    Chunks must bring whole numbers of it, and all the rest must lie in the first one. It must
    be too large for an inbox to lay side by side with others.
    """
    sizes = [field.nbytes for field in schema.fields]
    largest = sizes.index(max(sizes))
    rest, field = sum(sizes) - sizes[largest], schema.fields[largest]
    if rest > LEAD or rest % field.dtype.itemsize or math.prod(field.shape) <= WIDE:
        return None
    pieces = [piece for chunk in schema.layout for piece in chunk if piece.field == largest]
    size = field.dtype.itemsize
    return Wide(largest, tuple((piece.start // size, piece.stop // size) for piece in pieces))


class InPlace(Incoming):
    """A model whose large field stays in the memory that its chunks came in.

    Args:
        header: of its first chunk.
        schema: of the messages of this phase; they have a `wide_field`.
    """

    def __init__(self, header: Header, schema: Schema) -> None:
        super().__init__(header, schema)
        wide = wide_field(schema)
        assert wide is not None
        self._wide, self._field = wide, schema.fields[wide.field]
        self._small: dict[int, Tensor] = {}

    def _with(self, large: object) -> Received:
        """Return the model, with something that stands for its large field."""
        fields: list[Any] = [self._small.get(k, large) for k in range(len(self.schema.fields))]
        return self._received(*fields)

    def _keep(self, pieces: Sequence[Piece], frames: Sequence[memoryview]) -> None:
        for (k, _, _), frame in zip(pieces, frames, strict=True):
            if k == self._wide.field:
                self._keep_large(frame)
            else:
                field = self.schema.fields[k]
                small = torch.frombuffer(bytearray(frame), dtype=field.dtype)
                check_finite(small, field)
                self._small[k] = small.reshape(field.shape)

    @abstractmethod
    def _keep_large(self, frame: memoryview) -> None:
        """Do with the next columns of the large field what is to be done."""


class Parted(InPlace):
    """A model that is mixed once all of it is there."""

    def __init__(self, header: Header, schema: Schema) -> None:
        super().__init__(header, schema)
        self._parts: list[Tensor] = []

    def received(self) -> Received:
        """Return the model, once it is complete."""
        return self._with(Pieces(self._parts, self._wide.columns))

    def _keep_large(self, frame: memoryview) -> None:
        values = torch.frombuffer(frame, dtype=self._field.dtype)
        check_finite(values, self._field)
        self._parts.append(values.unsqueeze(0))
