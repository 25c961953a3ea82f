"""Headers as frames: what every message begins with, and what two ends must agree on.

Nothing that arrives can execute, and nothing is allocated because a message says so.
docs/wire.md describes the whole protocol; models are cut up in `chunks`.

    header = [version, kind, run, phase, sender, round, degree, score, number, check]

`run` is the first 8 bytes of the digest of everything both ends must agree on; `phase` is 0
while means of the data are averaged, 1 while squared distances from them are, 2 in training,
and 3 for models that are given to who comes late.
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

from p2pfl.errors import RemoteProtocolError, UserError
from p2pfl.peer.events import PeerId

VERSION = 1
TRAINING, OFFERS = 2, 3  # phases; the first two are those of the statistics
RUN = 8  # bytes of the digest of the terms
CHECK = 8  # bytes of the checksum of a chunk
CHUNK = 1 << 20  # bytes of a model in one message: the size that reaches line rate
MOST_REASON = 1000  # bytes that say why
MOST_CREDIT = 16  # chunks that a neighbour may have on its way to us
MAX_HEADER = 128
MAX_HELLO = 60 * 1024  # with encryption less than the 64 KiB a listener takes in
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
    CHUNK = 4  # of a model
    BYE = 5
    ABORT = 6  # a goodbye before the run has begun
    CREDIT = 7  # asks for chunks
    PING = 8
    PONG = 9
    WHERE = 10  # asks for addresses
    BOOK = 11
    MEMBERS = 12  # what the membership machines tell each other
    SKIP = 13  # nothing counts in a round
    PULL = 14  # asks for the model of who is in training
    ANEW = 15  # a chunk of a message that builds on nothing said before


_KINDS = {int(kind): kind for kind in Kind}


class OtherVersion(RemoteProtocolError):
    """Somebody speaks another version of this protocol."""


class Header(NamedTuple):
    """The first frame of every message; docs/wire.md says what each kind makes of the fields."""

    kind: Kind
    run: bytes
    phase: int
    sender: PeerId
    round: int = 0
    degree: int = 0
    score: float = -math.inf
    number: int = 0
    check: bytes = bytes(CHECK)


def pack(header: Header) -> bytes:
    """Return a header as it travels."""
    packed: bytes = msgpack.packb((VERSION, *header), buf_size=MAX_HEADER)
    return packed


def unpack(frame: bytes | memoryview) -> Header:
    """Return the header in `frame`; raises `RemoteProtocolError` if there is none."""
    if len(frame) > MAX_HEADER:
        raise RemoteProtocolError(f"a header of {len(frame)} bytes")
    values = _unpack(frame)
    _check_version(values)
    if len(values) != 1 + len(Header._fields):
        raise RemoteProtocolError("malformed header")
    _, kind, run, phase, sender, round, degree, score, number, check = values
    _check_naturals(phase, sender, round, degree, number)
    for text, length in ((run, RUN), (check, CHECK)):
        if type(text) is not bytes or len(text) != length:
            raise RemoteProtocolError("malformed header")
    if type(score) is not float or math.isnan(score):
        raise RemoteProtocolError("malformed header")
    if type(kind) is not int or kind not in _KINDS:
        raise RemoteProtocolError("a message of unknown kind")
    return Header(_KINDS[kind], run, phase, sender, round, degree, score, number, check)


def _check_version(values: Any) -> None:  # noqa: ANN401 - whatever has come
    if not isinstance(values, list) or not values or type(values[0]) is not int:
        raise RemoteProtocolError("not a message of this protocol")
    if values[0] != VERSION:
        raise OtherVersion(f"protocol version {values[0]}, ours is {VERSION}")


def _check_naturals(*numbers: Any) -> None:  # noqa: ANN401
    for number in numbers:
        if type(number) is not int or not 0 <= number < 2**53:
            raise RemoteProtocolError("malformed header")


@functools.lru_cache(maxsize=4096)
def model_size(sender: PeerId, round: int, degree: int, payload: int) -> int:
    """Return the bytes of all frames of a model of `payload` bytes."""
    count = chunk_count(payload)
    header = Header(Kind.CHUNK, bytes(RUN), 1, sender, round, degree)
    # Headers differ by how long the number of their chunk is.
    total, ends = payload, (*_SMALLEST[1:], 1 << 64)
    for start, end in zip(_SMALLEST, ends, strict=True):
        total += max(0, min(count, end) - start) * len(pack(header._replace(number=start)))
    return total


def chunk_count(payload: int) -> int:
    """Return in how many chunks a model of `payload` bytes travels."""
    return max(1, -(-payload // CHUNK))


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
    other = [k for k in sorted(ours.keys() | theirs.keys()) if ours.get(k) != theirs.get(k)]
    parts = []
    for key in other[:4]:
        here, there = _shown(ours.get(key), theirs.get(key))
        parts.append(f"{key}: {here} here, {there} there")
    return "; ".join(parts) + (f"; and {len(other) - 4} more" if len(other) > 4 else "")


def reason(body: Sequence[bytes | memoryview]) -> str:
    """Return what somebody gives as a reason, fit to stand in a line that people read."""
    text = b"".join(body[:1])[:MOST_REASON].decode(errors="replace")
    return "".join(letter if letter.isprintable() else "?" for letter in text)


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
