"""Messages as frames: a msgpack header, then one raw buffer per field.

Nothing that arrives can execute, and nothing is allocated because a message says so: the
number of buffers and the size of each are known beforehand from our own algorithm, and the
two ends have compared theirs in the handshake.

    header = [version, kind, run, phase, sender, round, degree, score]

`run` is the first 8 bytes of the digest of everything both ends must agree on; `phase` is 0
while means of the data are averaged, 1 while squared distances from them are, and 2 in
training. In a hello, `round` is a number
the sending process has drawn for itself, so that a process started again is told from a
connection made again.
"""

from __future__ import annotations

import functools
import hashlib
import json
import math
from bisect import bisect_right
from collections.abc import Mapping, Sequence
from enum import IntEnum
from typing import Any, NamedTuple

import msgpack
import torch
from torch import Tensor

from p2pfl.errors import RemoteProtocolError, UserError
from p2pfl.peer.events import PeerId, Received, Send

VERSION = 1
RUN = 8  # bytes of the digest of the terms
MAX_HEADER = 128
MAX_HELLO = 64 * 1024
MAX_TERM = 200  # characters; of a longer one the beginning and a digest travel
# The smallest numbers of every length that msgpack has for integers: 1, 2, 3, 5 and 9 bytes.
_SMALLEST = (0, 1 << 7, 1 << 8, 1 << 16, 1 << 32)
# Without limits of its own, msgpack allocates thousands of times what it has been sent.
_LIMITS: dict[str, Any] = {
    "max_str_len": 4 * MAX_TERM,
    "max_bin_len": 64,
    "max_array_len": 64,
    "max_map_len": 4096,
    "max_ext_len": 0,
}


class Kind(IntEnum):
    """What a message is."""

    HELLO = 1
    WELCOME = 2
    REFUSE = 3
    MODEL = 4
    BYE = 5
    ABORT = 6  # a goodbye before the run has begun


class OtherVersion(RemoteProtocolError):
    """Somebody speaks another version of this protocol."""


class Header(NamedTuple):
    """The first frame of every message."""

    kind: Kind
    run: bytes
    phase: int
    sender: PeerId
    round: int = 0
    degree: int = 0
    score: float = -math.inf


class Field(NamedTuple):
    """One buffer of a model message."""

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        """Bytes on the wire."""
        return math.prod(self.shape) * self.dtype.itemsize


class Schema(NamedTuple):
    """What a model message of this run consists of."""

    kind: type[tuple[Tensor, ...]]
    fields: tuple[Field, ...]


def schema(message: tuple[Tensor, ...]) -> Schema:
    """Return the schema of messages like `message`, a NamedTuple of blocks with one row."""
    names: Sequence[str] = getattr(message, "_fields", ())
    fields = []
    for name, block in zip(names, message, strict=True):
        fields.append(Field(name, block.dtype, tuple(block.shape)))
    return Schema(type(message), tuple(fields))


def pack(header: Header) -> bytes:
    """Return a header as it travels."""
    packed: bytes = msgpack.packb((VERSION, *header))
    return packed


def unpack(frame: bytes | memoryview) -> Header:
    """Return the header in `frame`; raises `RemoteProtocolError` if there is none."""
    if len(frame) > MAX_HEADER:
        raise RemoteProtocolError(f"a header of {len(frame)} bytes")
    values = _unpack(frame)
    if not isinstance(values, list) or not values or type(values[0]) is not int:
        raise RemoteProtocolError("not a message of this protocol")
    if values[0] != VERSION:
        raise OtherVersion(f"protocol version {values[0]}, ours is {VERSION}")
    if len(values) != 1 + len(Header._fields):
        raise RemoteProtocolError("malformed header")
    kind, run, *numbers, score = values[1:]
    if type(run) is not bytes or len(run) != RUN or type(score) is not float or math.isnan(score):
        raise RemoteProtocolError("malformed header")
    if any(type(number) is not int or not 0 <= number < 2**53 for number in numbers):
        raise RemoteProtocolError("malformed header")
    if type(kind) is not int or kind not in list(Kind):
        raise RemoteProtocolError("a message of unknown kind")
    phase, sender, round, degree = numbers
    return Header(Kind(kind), run, phase, sender, round, degree, score)


def dump(header: Header, message: tuple[Tensor, ...]) -> list[bytes | memoryview]:
    """Return the frames of a model message. Buffers are not copied."""
    return [pack(header), *(_bytes(block) for block in message)]


def load(header: Header, frames: Sequence[memoryview], schema: Schema) -> Received:
    """Return the model message in `frames`, header frame excluded.

    Raises:
        RemoteProtocolError: it is not of this schema, or has values which are not finite.
    """
    if len(frames) != len(schema.fields):
        raise RemoteProtocolError(f"{len(frames)} buffers instead of {len(schema.fields)}")
    blocks = []
    for frame, field in zip(frames, schema.fields, strict=True):
        if len(frame) != field.nbytes:
            raise RemoteProtocolError(
                f"{field.name} has {len(frame)} bytes instead of {field.nbytes}"
            )
        block = torch.empty(field.shape, dtype=field.dtype)
        _bytes(block)[:] = frame
        if block.is_floating_point() and not _is_finite(block):
            raise RemoteProtocolError(f"{field.name} has values which are not finite")
        blocks.append(block)
    size = header_size(header.sender, header.round, header.degree) + sum(map(len, frames))
    message = schema.kind(*blocks)
    return Received(header.sender, header.round, header.degree, header.score, message, size)


def size(sender: PeerId, send: Send) -> int:
    """Return how many bytes of frames a `Send` puts on the wire for each receiver."""
    payload = sum(block.nbytes for block in send.message)
    return header_size(sender, send.round, send.degree) + payload


@functools.lru_cache(maxsize=4096)
def header_size(sender: PeerId, round: int, degree: int) -> int:
    """Return the size of the header of a model message."""
    return len(pack(Header(Kind.MODEL, bytes(RUN), 1, sender, round, degree)))


def alike(number: int) -> int:
    """Return the smallest number that makes a header as long as this one does."""
    return _SMALLEST[bisect_right(_SMALLEST, number) - 1]


def digest(terms: Mapping[str, str]) -> bytes:
    """Return the 8 bytes which stand for what both ends of a link must agree on."""
    text = json.dumps(dict(terms), sort_keys=True)
    return hashlib.sha256(text.encode()).digest()[:RUN]


def shorten(terms: Mapping[str, str]) -> dict[str, str]:
    """Return terms short enough to travel, and different whenever the terms are.

    >>> shorten({"data.columns": "x" * 500})["data.columns"][-29:]
    'xx... sha256 c38c2bf3055c516a'
    """
    return {_short(key): _short(value) for key, value in terms.items()}


def _short(text: str) -> str:
    if len(text) <= MAX_TERM:
        return text
    return f"{text[: MAX_TERM - 40]}... sha256 {hashlib.sha256(text.encode()).hexdigest()[:16]}"


def pack_terms(terms: Mapping[str, str]) -> bytes:
    """Return the body of a hello.

    Raises:
        UserError: there are too many terms for one.
    """
    packed: bytes = msgpack.packb(dict(terms))
    if len(packed) > MAX_HELLO or len(terms) > _LIMITS["max_map_len"]:
        raise UserError(
            f"the experiment spells out {len(terms)} settings in {len(packed)} bytes;"
            f" peers can compare {MAX_HELLO} bytes"
        )
    return packed


def unpack_terms(frame: bytes | memoryview) -> dict[str, str]:
    """Return the terms in the body of a hello; raises `RemoteProtocolError` if it has none."""
    if len(frame) > MAX_HELLO:
        raise RemoteProtocolError(f"a hello of {len(frame)} bytes")
    terms = _unpack(frame)
    if not isinstance(terms, dict) or not all(
        isinstance(key, str) and isinstance(value, str) for key, value in terms.items()
    ):
        raise RemoteProtocolError("malformed hello")
    return terms


def difference(ours: Mapping[str, str], theirs: Mapping[str, str]) -> str:
    """Say in one line what two ends do not agree on, or return the empty string.

    >>> difference({"seed": "1", "algorithm.name": "choco"}, {"seed": "2"})
    "algorithm.name: 'choco' here, absent there; seed: '1' here, '2' there"
    """
    parts = []
    for key in sorted(ours.keys() | theirs.keys()):
        if ours.get(key) != theirs.get(key):
            here, there = _shown(ours.get(key), theirs.get(key))
            parts.append(f"{key}: {here} here, {there} there")
    return "; ".join(parts[:4]) + (f"; and {len(parts) - 4} more" if len(parts) > 4 else "")


def _shown(*values: str | None) -> list[str]:
    """Return texts as they are quoted: of long ones, the part where they begin to differ."""
    texts = [value for value in values if value is not None]
    letters = enumerate(zip(*texts, strict=False))
    alike = next((i for i, pair in letters if len({*pair}) > 1), min(map(len, texts)))
    start = max(0, alike - 20) if len(texts) > 1 and max(map(len, texts)) > 80 else 0
    dots = "..." if start else ""
    return [
        "absent" if value is None else repr(dots + value[start : start + 80]) for value in values
    ]


def _unpack(frame: bytes | memoryview) -> Any:  # noqa: ANN401
    try:
        return msgpack.unpackb(frame, **_LIMITS)
    except (ValueError, msgpack.UnpackException, RecursionError) as error:
        raise RemoteProtocolError("not a message of this protocol") from error


def _is_finite(block: Tensor) -> bool:
    return math.isfinite(block.sum(dtype=torch.float64))  # one pass, and no copy


def _bytes(block: Tensor) -> memoryview:
    flat = block.detach().cpu().contiguous().reshape(-1)
    return flat.view(torch.uint8).numpy().data
