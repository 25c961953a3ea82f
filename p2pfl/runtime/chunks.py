"""Models in chunks: cut up where they lie, checked one by one, put together if need be.

A model message is one vector of bytes: its fields one after the other, the smallest first. It
travels in chunks of `wire.CHUNK` bytes, each a message of its own, whose first frame is a
header and whose other frames are the pieces of fields which lie in it. How many bytes a
field has is known from our own algorithm, and the two ends compared theirs when they met:
nothing is allocated because a message says so.
"""

from __future__ import annotations

import functools
import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
import xxhash
import zmq
from torch import Tensor

from p2pfl.errors import RemoteProtocolError
from p2pfl.learning.tree import is_finite
from p2pfl.peer.events import Received, Send
from p2pfl.runtime import wire
from p2pfl.runtime.wire import Header, Kind

Frame = bytes | memoryview
MOST_COUNTED = 2**53  # the largest of whole numbers all of which double precision has
UNCHECKED = bytes(wire.CHECK)  # stands for no checksum
Empty = Callable[[tuple[int, ...], torch.dtype], Tensor]  # makes a block, whatever is in it


class Damaged(RemoteProtocolError):
    """A chunk is not what was sent."""


class Field(NamedTuple):
    """One block of a model message."""

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]
    counts: bool = False  # whether it counts something, as of `Needs`

    @property
    def nbytes(self) -> int:
        """Bytes on the wire."""
        return math.prod(self.shape) * self.dtype.itemsize


class Piece(NamedTuple):
    """Some bytes of a field."""

    field: int  # which one, in the order of the message
    start: int
    stop: int


Layout = tuple[tuple[Piece, ...], ...]


class Schema(NamedTuple):
    """What a model message of this run consists of."""

    kind: type[tuple[Tensor, ...]]
    fields: tuple[Field, ...]

    @property
    def nbytes(self) -> int:
        """Bytes of all fields."""
        return sum(field.nbytes for field in self.fields)

    @property
    def layout(self) -> Layout:
        """What lies in each chunk."""
        return layout(tuple(field.nbytes for field in self.fields))

    def columns(self, field: int) -> tuple[tuple[int, int], ...]:
        """Return which numbers of a field each chunk brings, where none is cut in two."""
        size = self.fields[field].dtype.itemsize
        pieces = (piece for chunk in self.layout for piece in chunk if piece.field == field)
        return tuple((piece.start // size, piece.stop // size) for piece in pieces)


def schema(message: tuple[Tensor, ...], counts: Sequence[str] = ()) -> Schema:
    """Return the schema of messages like `message`, a NamedTuple of blocks with one row.

    Args:
        message: one of them.
        counts: which fields count something, as of `Needs`.
    """
    names: Sequence[str] = getattr(message, "_fields", ())
    fields = []
    for name, block in zip(names, message, strict=True):
        fields.append(Field(name, block.dtype, tuple(block.shape), name in counts))
    return Schema(type(message), tuple(fields))


@functools.lru_cache(maxsize=256)
def layout(sizes: tuple[int, ...]) -> Layout:
    """Return what lies in each chunk, given the bytes of each field.

    >>> layout((12, 4))
    ((Piece(field=1, start=0, stop=4), Piece(field=0, start=0, stop=12)),)
    """
    chunks: list[list[Piece]] = [[] for _ in range(wire.chunk_count(sum(sizes)))]
    at = 0
    for field in sorted(range(len(sizes)), key=lambda field: sizes[field]):
        start = 0
        while start < sizes[field]:
            stop = min(sizes[field], start + wire.CHUNK - at % wire.CHUNK)
            chunks[at // wire.CHUNK].append(Piece(field, start, stop))
            at, start = at + stop - start, stop
    return tuple(map(tuple, chunks))


class Outgoing:
    """A model to be sent, of which nothing is copied.

    Args:
        header: of any of its chunks.
        message: its fields, which nobody may write to any more.
    """

    def __init__(self, header: Header, message: tuple[Tensor, ...]) -> None:
        self.phase, self.round = header.phase, header.round
        self._header, self._bytes = header, [as_bytes(block) for block in message]
        self._layout = layout(tuple(map(len, self._bytes)))
        # The same for all neighbours: ZeroMQ counts who still needs the memory they stand for.
        self._frames: dict[tuple[int, bool], list[zmq.Frame]] = {}

    def __len__(self) -> int:
        return len(self._layout)

    def chunk(self, index: int, checked: bool = True) -> list[zmq.Frame]:
        """Return the frames of a chunk, with or without a checksum."""
        if (index, checked) not in self._frames:
            pieces = [self._bytes[k][start:stop] for k, start, stop in self._layout[index]]
            header = self._header._replace(number=index)
            if checked:
                header = header._replace(check=checksum(header, pieces))
            self._frames[index, checked] = [zmq.Frame(f) for f in (wire.pack(header), *pieces)]
        return self._frames[index, checked]


def fresh(shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """Return a block in memory of its own, whatever is in it."""
    return torch.empty(shape, dtype=dtype)


class Incoming(ABC):
    """A model that arrives, chunk by chunk.

    Args:
        header: of its first chunk.
        schema: of the messages of this phase.
    """

    def __init__(self, header: Header, schema: Schema) -> None:
        self.schema, self.layout = schema, schema.layout
        self.round = header.round
        self._about, self._next = _about(header), 0
        self._fresh = header.kind is Kind.ANEW

    @property
    def left(self) -> int:
        """How many chunks are still to come."""
        return len(self.layout) - self._next

    def take(self, header: Header, frames: Sequence[memoryview]) -> None:
        """Take in the next chunk.

        Raises:
            RemoteProtocolError: it is not the next, not of this schema, or has values that
                nobody honest sends.
        """
        if _about(header) != self._about or header.number != self._next or not self.left:
            raise RemoteProtocolError(f"chunk {header.number} instead of {self._next}")
        pieces = self.layout[self._next]
        _check(header, frames, pieces, self.schema)
        self._keep(pieces, frames)
        self._next += 1

    @abstractmethod
    def _keep(self, pieces: Sequence[Piece], frames: Sequence[memoryview]) -> None:
        """Do with a checked chunk what is to be done."""

    def _received(self, *fields: Any) -> Received:  # noqa: ANN401 - blocks, or what stands for them
        _, _, sender, round, degree, score = self._about
        size = wire.model_size(sender, round, degree, self.schema.nbytes)
        message = self.schema.kind(*fields)
        return Received(sender, round, degree, score, message, size, self._fresh)


class Arriving(Incoming):
    """A model that is put together in memory of ours; `empty` provides it."""

    def __init__(self, header: Header, schema: Schema, empty: Empty = fresh) -> None:
        super().__init__(header, schema)
        self._empty, self._blocks = empty, list[Tensor]()
        self._flat: list[tuple[memoryview, Tensor]] = []  # the same, as bytes and as numbers

    def _keep(self, pieces: Sequence[Piece], frames: Sequence[memoryview]) -> None:
        if not self._blocks:
            self._blocks = [self._empty(f.shape, f.dtype) for f in self.schema.fields]
            self._flat = [(as_bytes(block), block.view(-1)) for block in self._blocks]
        for (field, start, stop), frame in zip(pieces, frames, strict=True):
            octets, values = self._flat[field]
            octets[start:stop] = frame
            size = values.dtype.itemsize  # a number cut in two is looked at with its second half
            check_values(values[start // size : stop // size], self.schema.fields[field])

    def received(self) -> Received:
        """Return the model, once it is complete."""
        blocks = self._blocks or [fresh(f.shape, f.dtype) for f in self.schema.fields]
        return self._received(*blocks)


def _about(header: Header) -> tuple[Any, ...]:
    """Return what the chunks of one model have in common."""
    return header.run, header.phase, header.sender, header.round, header.degree, header.score


def _check(
    header: Header, frames: Sequence[memoryview], pieces: Sequence[Piece], schema: Schema
) -> None:
    """Check that the frames of a chunk are as long as its pieces.

    Raises:
        RemoteProtocolError: they are not.
    """
    if len(frames) != len(pieces):
        raise RemoteProtocolError(f"{len(frames)} buffers instead of {len(pieces)}")
    for frame, (field, start, stop) in zip(frames, pieces, strict=True):
        if len(frame) != stop - start:
            name = schema.fields[field].name
            raise RemoteProtocolError(f"{name} has {len(frame)} bytes instead of {stop - start}")


def check_intact(header: Header, pieces: Sequence[Frame]) -> None:
    """Check that a chunk is what was sent, as far as its sender lets us know.

    Raises:
        Damaged: it is not.
    """
    if header.check != UNCHECKED and header.check != checksum(header, pieces):
        raise Damaged("a chunk that was damaged on its way")


def checksum(header: Header, pieces: Sequence[Frame]) -> bytes:
    """Return the 8 bytes that stand for a chunk: its header, but for these bytes, and its data.

    Against accidents, as of a network card: who means harm can work them out as well. Where links
    are encrypted, or never leave a machine's memory, it is left out.
    """
    digest = xxhash.xxh3_64(wire.pack(header._replace(check=bytes(wire.CHECK))))
    for piece in pieces:
        digest.update(piece)
    return digest.digest()


def size(sender: int, send: Send) -> int:
    """Return how many bytes of frames a `Send` puts on the wire for each receiver."""
    payload = sum(block.nbytes for block in send.message)
    return wire.model_size(sender, send.round, send.degree, payload)


def as_bytes(block: Tensor) -> memoryview:
    """Return the bytes of a block, as they lie in memory if it is a contiguous one of the CPU."""
    flat = block.detach().cpu().contiguous().reshape(-1)
    return flat.view(torch.uint8).numpy().data


def check_values(values: Tensor, field: Field) -> None:
    """Refuse values of a field, ``[k]``, which are not finite, or are no counts where they must be.

    Raises:
        RemoteProtocolError: there are some.
    """
    if not is_finite(values):
        raise RemoteProtocolError(f"{field.name} has values which are not finite")
    if field.counts and not all(0 <= value <= MOST_COUNTED for value in values.tolist()):
        raise RemoteProtocolError(f"{field.name} has values below 0, or above all counts")
