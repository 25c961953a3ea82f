"""Messages as frames: a msgpack header, then one raw buffer per field.

Nothing that arrives can execute, and nothing is allocated because a message says so: the
number of buffers and the size of each are known beforehand from our own algorithm, and the
two ends have compared theirs in the handshake.

    header = [version, kind, run, phase, sender, round, degree, score]

`run` is the first 8 bytes of the digest of everything both ends must agree on; `phase` is 0
while statistics of the data are averaged and 1 in training.
"""

from __future__ import annotations

import functools
import hashlib
import json
import math
from collections.abc import Mapping, Sequence
from enum import IntEnum
from typing import Any, NamedTuple

import msgpack
import numpy as np
import torch
from torch import Tensor

from p2pfl.errors import RemoteProtocolError
from p2pfl.peer.events import PeerId, Received, Send

VERSION = 1
MAX_HEADER = 128
MAX_HELLO = 64 * 1024
_LIMITS: dict[str, Any] = {
    "max_str_len": 1024,
    "max_bin_len": 64,
    "max_array_len": 256,
    "max_map_len": 512,
    "max_ext_len": 0,
}


class Kind(IntEnum):
    """What a message is."""

    HELLO = 1
    WELCOME = 2
    REFUSE = 3
    MODEL = 4
    BYE = 5


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
    dtype: str
    shape: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        """Bytes on the wire."""
        return math.prod(self.shape) * np.dtype(self.dtype).itemsize


class Schema(NamedTuple):
    """What a model message of this run consists of."""

    kind: type[tuple[Tensor, ...]]
    fields: tuple[Field, ...]


def schema(message: tuple[Tensor, ...]) -> Schema:
    """Return the schema of messages like `message`, a NamedTuple of blocks with one row."""
    names: Sequence[str] = getattr(message, "_fields", ())
    fields = []
    for name, block in zip(names, message, strict=True):
        fields.append(Field(name, _numpy(block).dtype.str, tuple(block.shape)))
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
    if not isinstance(values, list) or len(values) != 1 + len(Header._fields):
        raise RemoteProtocolError("not a message of this protocol")
    version, kind, *rest = values
    if version != VERSION:
        raise RemoteProtocolError(f"protocol version {version!r}, ours is {VERSION}")
    run, *numbers, score = rest
    if not isinstance(run, bytes) or type(score) is not float or math.isnan(score):
        raise RemoteProtocolError("malformed header")
    if any(type(number) is not int or not 0 <= number < 2**53 for number in numbers):
        raise RemoteProtocolError("malformed header")
    if type(kind) is not int or kind not in list(Kind):
        raise RemoteProtocolError(f"message of unknown kind {kind!r}")
    phase, sender, round, degree = numbers
    return Header(Kind(kind), run, phase, sender, round, degree, score)


def dump(header: Header, message: tuple[Tensor, ...]) -> list[bytes | memoryview]:
    """Return the frames of a model message. Buffers are not copied."""
    return [pack(header), *(_numpy(block).reshape(-1).view(np.uint8).data for block in message)]


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
        array = np.frombuffer(frame, np.dtype(field.dtype)).reshape(field.shape).copy()
        if array.dtype.kind == "f" and not np.isfinite(array.sum(dtype=np.float64)):
            raise RemoteProtocolError(f"{field.name} has values which are not finite")
        blocks.append(torch.from_numpy(array))
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
    return len(pack(Header(Kind.MODEL, bytes(8), 1, sender, round, degree)))


def digest(terms: Mapping[str, str]) -> bytes:
    """Return the 8 bytes which stand for what both ends of a link must agree on."""
    text = json.dumps(dict(terms), sort_keys=True)
    return hashlib.sha256(text.encode()).digest()[:8]


def pack_terms(terms: Mapping[str, str]) -> bytes:
    """Return the body of a hello."""
    packed: bytes = msgpack.packb(dict(terms))
    if len(packed) > MAX_HELLO:
        raise ValueError(f"the terms of this run take {len(packed)} bytes, over {MAX_HELLO}")
    return packed


def unpack_terms(frame: bytes | memoryview) -> dict[str, str]:
    """Return the terms in the body of a hello."""
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
        here, there = (repr(t[key])[:80] if key in t else "absent" for t in (ours, theirs))
        if here != there:
            parts.append(f"{key}: {here} here, {there} there")
    return "; ".join(parts[:4]) + (f"; and {len(parts) - 4} more" if len(parts) > 4 else "")


def _unpack(frame: bytes | memoryview) -> Any:  # noqa: ANN401
    try:
        return msgpack.unpackb(frame, **_LIMITS)
    except (ValueError, msgpack.UnpackException, RecursionError) as error:
        raise RemoteProtocolError("not a message of this protocol") from error


def _numpy(block: Tensor) -> np.ndarray[Any, Any]:
    array: np.ndarray[Any, Any] = block.detach().contiguous().cpu().numpy()
    return array
