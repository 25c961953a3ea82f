"""Models that stay where they came: to copy every number once more costs as much as to mix it.

A chunk is a message of its own, and ZeroMQ has memory for it anyway. Where nothing is remembered
of models beyond their exchange, a large field may lie in as many places as it has chunks.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from p2pfl.learning.pieces import Pieces
from p2pfl.peer.events import Received
from p2pfl.peer.letters import WIDE
from p2pfl.runtime.chunks import Field, Incoming, Piece, Schema, check_values, fresh
from p2pfl.runtime.wire import Header

MOST = 32 << 20  # bytes of models in a round, for which glibc keeps memory
SMALL = 1 << 13  # bytes, up to which several messages may lie in one block of ZeroMQ's memory


def can_stay(schema: Schema, heard: int) -> bool:
    """Say whether it is worth it, where so many neighbours are heard in a round.

    Messages must have large fields, and chunks that cut no number in two. And they must be few:
    glibc gives memory back to the system if it held much at a time, and new memory is slow.
    """
    sizes = [field.dtype.itemsize for field in schema.fields]
    pieces = [piece for chunk in schema.layout for piece in chunk]
    few = heard * schema.nbytes <= MOST
    return (
        few
        and any(map(_is_large, schema.fields))
        and not any(
            piece.start % sizes[piece.field] or piece.stop % sizes[piece.field] for piece in pieces
        )
    )


def _is_large(field: Field) -> bool:
    """Say whether a field is too large for an inbox to lay it side by side with others."""
    return len(field.shape) == 2 and field.shape[1] > WIDE


class Parted(Incoming):
    """A model whose large fields stay in the memory that their chunks came in.

    Args:
        header: of its first chunk.
        schema: of the messages of this phase; they `can_stay`.
    """

    def __init__(self, header: Header, schema: Schema) -> None:
        super().__init__(header, schema)
        self._parts: list[list[Tensor]] = [[] for _ in schema.fields]

    def received(self) -> Received:
        """Return the model, once it is complete."""
        return self._received(*map(self._whole, range(len(self.schema.fields))))

    def _whole(self, k: int) -> Tensor | Pieces:
        field, parts = self.schema.fields[k], self._parts[k]
        if _is_large(field):
            return Pieces([part.unsqueeze(0) for part in parts], self.schema.columns(k))
        return torch.cat(parts).reshape(field.shape) if parts else fresh(field.shape, field.dtype)

    def _keep(self, pieces: Sequence[Piece], frames: Sequence[memoryview]) -> None:
        for (k, _, _), frame in zip(pieces, frames, strict=True):
            field = self.schema.fields[k]
            data = frame if len(frame) > SMALL else bytearray(frame)
            values = torch.frombuffer(data, dtype=field.dtype)
            check_values(values, field)
            self._parts[k].append(values)
