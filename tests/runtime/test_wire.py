"""Frames: what is packed comes back, and nothing else ever gets through."""

import math
import random
import string
from typing import NamedTuple

import hypothesis.strategies as st
import msgpack
import numpy as np
import pytest
import torch
from hypothesis import given, settings

from p2pfl.errors import RemoteProtocolError, UserError
from p2pfl.peer.events import Send
from p2pfl.runtime import wire
from p2pfl.runtime.wire import Header, Kind


class Message(NamedTuple):
    values: torch.Tensor
    columns: torch.Tensor
    weight: torch.Tensor


NUMBERS = st.integers(0, 2**53 - 1)
HEADERS = st.builds(
    Header,
    st.sampled_from(Kind),
    st.binary(min_size=8, max_size=8),
    NUMBERS,
    NUMBERS,
    NUMBERS,
    NUMBERS,
    st.floats(allow_nan=False),
)
TEXTS = st.text(st.characters(codec="utf-8"), max_size=300)


def message(k: int = 3, dtype: torch.dtype = torch.float32) -> Message:
    values = torch.arange(1.0, k + 1, dtype=dtype).reshape(1, k)
    columns = torch.arange(k, dtype=torch.int32).reshape(1, k)
    return Message(values, columns, torch.ones(1, 1, dtype=torch.float64))


def frames_of(header: Header, blocks: Message) -> list[memoryview]:
    return [memoryview(bytes(frame)) for frame in wire.dump(header, blocks)]


def model_header(sender: int = 3, round: int = 7, degree: int = 2) -> Header:
    return Header(Kind.MODEL, b"12345678", 1, sender, round, degree, 0.5)


@given(HEADERS)
def test_a_header_comes_back_as_it_was(header: Header):
    packed = wire.pack(header)
    assert wire.unpack(packed) == header
    assert wire.unpack(memoryview(packed)) == header
    assert len(packed) <= wire.MAX_HEADER


@given(st.integers(0, 50), st.sampled_from([torch.float32, torch.float64]), HEADERS)
def test_a_model_comes_back_to_the_bit(k: int, dtype: torch.dtype, header: Header):
    sent = message(k, dtype)
    header = header._replace(kind=Kind.MODEL)
    first, *buffers = frames_of(header, sent)
    received = wire.load(wire.unpack(first), buffers, wire.schema(sent))
    assert isinstance(received.message, Message)
    for ours, theirs in zip(sent, received.message, strict=True):
        assert theirs.dtype == ours.dtype
        assert torch.equal(theirs, ours)
    assert received.sender == header.sender
    assert (received.round, received.degree) == (header.round, header.degree)
    assert received.score == header.score


@given(NUMBERS, NUMBERS, NUMBERS, st.integers(0, 50))
def test_the_size_reckoned_is_that_of_the_frames(sender: int, round: int, degree: int, k: int):
    sent = message(k)
    header = model_header(sender, round, degree)
    frames = frames_of(header, sent)
    total = sum(map(len, frames))
    assert wire.header_size(sender, round, degree) == len(frames[0])
    assert wire.size(sender, Send((1,), round, degree, -math.inf, sent)) == total
    assert wire.load(header, frames[1:], wire.schema(sent)).size == total


def test_sending_copies_no_parameters():
    sent = message(1000)
    buffer = np.frombuffer(wire.dump(model_header(), sent)[1], dtype=np.float32)
    sent.values[0, 0] = 42
    assert buffer[0] == 42


def test_what_was_received_is_ours_to_keep():
    frames = [bytearray(frame) for frame in wire.dump(model_header(), message())]
    received = wire.load(
        model_header(), [memoryview(f) for f in frames[1:]], wire.schema(message())
    )
    frames[1][:] = bytes(len(frames[1]))
    assert received.message[0].tolist() == [[1.0, 2.0, 3.0]]


GOOD = [1, 4, b"12345678", 1, 3, 7, 2, 0.5]


@pytest.mark.parametrize(
    "values",
    [
        [],
        {},
        None,
        7,
        "header",
        GOOD[:-1],
        [*GOOD, 0],
        [True, *GOOD[1:]],
        [1.0, *GOOD[1:]],
        *[[1, kind, *GOOD[2:]] for kind in (0, 7, 4.0, True, "4", None, 2**60)],
        *[[1, 4, run, *GOOD[3:]] for run in (b"", b"1234567", b"123456789", "12345678", None)],
        *[
            [*GOOD[:at], number, *GOOD[at + 1 :]]
            for at in (3, 4, 5, 6)
            for number in (-1, 2**53, 2**64 - 1, True, 1.0, "1", None, [1])
        ],
        *[[*GOOD[:-1], score] for score in (math.nan, 1, True, None, "0.5")],
    ],
)
def test_a_malformed_header_is_refused(values: object):
    with pytest.raises(RemoteProtocolError):
        wire.unpack(msgpack.packb(values))


def test_the_header_those_are_variations_of_is_fine():
    assert wire.unpack(msgpack.packb(GOOD)) == model_header()


def test_a_header_that_is_too_long_is_not_even_parsed():
    with pytest.raises(RemoteProtocolError, match="a header of 129 bytes"):
        wire.unpack(msgpack.packb(GOOD).ljust(129, b"\0"))


def test_another_version_is_named():
    with pytest.raises(wire.OtherVersion, match="protocol version 2, ours is 1"):
        wire.unpack(msgpack.packb([2, "whatever", "comes", "then"]))


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda b: b[:-1], "2 buffers instead of 3"),
        (lambda b: [*b, memoryview(b"")], "4 buffers instead of 3"),
        (lambda b: [b[0][:-1], *b[1:]], "values has 11 bytes instead of 12"),
        (lambda b: [memoryview(bytes(13)), *b[1:]], "values has 13 bytes instead of 12"),
        (lambda b: [b[0], memoryview(b""), b[2]], "columns has 0 bytes"),
    ],
)
def test_buffers_must_be_those_of_the_schema(change, reason: str):
    buffers = frames_of(model_header(), message())[1:]
    with pytest.raises(RemoteProtocolError, match=reason):
        wire.load(model_header(), change(buffers), wire.schema(message()))


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("at", [0, 1, 2])
def test_values_which_are_not_finite_are_refused(value: float, at: int):
    sent = message()
    sent.values[0, at] = value
    with pytest.raises(RemoteProtocolError, match="values has values which are not finite"):
        wire.load(model_header(), frames_of(model_header(), sent)[1:], wire.schema(sent))


def test_infinities_do_not_cancel():
    sent = message()
    sent.values[0, 0], sent.values[0, 1] = math.inf, -math.inf
    with pytest.raises(RemoteProtocolError, match="not finite"):
        wire.load(model_header(), frames_of(model_header(), sent)[1:], wire.schema(sent))


@settings(max_examples=200)
@given(st.dictionaries(TEXTS, TEXTS, max_size=20))
def test_terms_come_back_and_differ_when_they_differ(terms: dict[str, str]):
    short = wire.shorten(terms)
    assert wire.unpack_terms(wire.pack_terms(short)) == short
    assert len(short) == len(terms)
    assert wire.difference(short, short) == ""


def test_long_terms_are_shortened_but_not_confused():
    long = {"data.columns": "x" * 5000}
    other = {"data.columns": "x" * 4999 + "y"}
    assert len(wire.pack_terms(wire.shorten(long))) < 1000
    told = wire.difference(wire.shorten(long), wire.shorten(other))
    assert told.startswith("data.columns: '...xxx")
    assert len(told) < 250
    assert wire.digest(long) != wire.digest(other)


def test_terms_nobody_could_read_are_refused_at_home():
    with pytest.raises(UserError, match="5000 settings"):
        wire.pack_terms({str(i): "" for i in range(5000)})
    with pytest.raises(UserError, match="2000 settings"):
        wire.pack_terms({str(i): "x" * 60 for i in range(2000)})


@pytest.mark.parametrize(
    "body",
    [
        b"",
        msgpack.packb([]),
        msgpack.packb({"a": 1}),
        msgpack.packb({1: "a"}),
        msgpack.packb({"a": b"bytes"}),
        msgpack.packb({"a": {"b": "c"}}),
        msgpack.packb({"a": "b"}) + b"\0",
        msgpack.packb({"a": "b"})[:-1],
        msgpack.packb({"a": "x" * 801}),
        msgpack.packb({str(i): "" for i in range(4097)}),
        msgpack.packb(msgpack.Timestamp(1)),
        b"\x81\xa1\xff\xa1a",  # no UTF-8
        b"\x00" * (wire.MAX_HELLO + 1),
    ],
)
def test_malformed_terms_are_refused(body: bytes):
    with pytest.raises(RemoteProtocolError):
        wire.unpack_terms(body)


@pytest.mark.parametrize(
    "bomb",
    [
        b"\xdd\xff\xff\xff\xff",  # an array of 4 billion
        b"\xdf\xff\xff\xff\xff",  # a map of 4 billion
        b"\xdb\xff\xff\xff\xff",  # 4 GB of text
        b"\xc6\xff\xff\xff\xff",  # 4 GB of bytes
        b"\xc9\xff\xff\xff\xff\x00",  # 4 GB of something else
        b"\xdc\xff\xff" * 21_000,  # arrays in arrays, 63 kB that would take 11 GB
        b"\x91" * 60_000,
        b"\x81\xa1a" * 20_000,
    ],
)
def test_bombs_are_refused_and_cost_nothing(bomb: bytes):
    import tracemalloc

    tracemalloc.start()
    try:
        with pytest.raises(RemoteProtocolError):
            wire.unpack_terms(bomb)
        assert tracemalloc.get_traced_memory()[1] < 2_000_000
    finally:
        tracemalloc.stop()


def test_differences_are_told_in_one_line():
    ours = dict.fromkeys(string.ascii_lowercase[:6], "1")
    theirs = dict.fromkeys(string.ascii_lowercase[:6], "2")
    told = wire.difference(ours, theirs)
    assert told.startswith("a: '1' here, '2' there; b: ")
    assert told.endswith("; and 2 more")
    alike = "x" * 500
    told = wire.difference({"a": f"{alike}1{alike}"}, {"a": f"{alike}2"})
    assert told.startswith("a: '...xxxxxxxxxxxxxxxxxxxx1xxx")
    assert told.endswith("' here, '...xxxxxxxxxxxxxxxxxxxx2' there")
    assert len(told) < 150
    assert "\n" not in wire.difference({"a": "1\n2"}, {"a": "3"})


def _mutated(frame: bytes, draw: random.Random) -> bytes:
    """Return a frame with some bits, bytes or lengths changed."""
    data = bytearray(frame)
    for _ in range(draw.randint(1, 4)):
        at = draw.randrange(len(data) + 1)
        match draw.randrange(5):
            case 0 if at < len(data):
                data[at] ^= 1 << draw.randrange(8)
            case 1:
                data[at:at] = draw.randbytes(draw.randint(1, 4))
            case 2:
                del data[at : at + draw.randint(1, 4)]
            case 3 if at < len(data):  # a length, or a type byte
                data[at] = draw.choice(b"\x80\x90\xa0\xc0\xc1\xc4\xca\xcb\xcf\xd3\xdc\xde\xff")
            case _:
                data = data[:at]
        if not data:
            break
    return bytes(data)


def _only_protocol_errors(call, *args: object) -> bool:
    try:
        call(*args)
    except RemoteProtocolError:
        return False
    return True


@pytest.mark.parametrize("seed", range(4))
def test_frames_changed_on_the_way_do_no_harm(seed: int):
    draw, schema = random.Random(seed), wire.schema(message())
    header, *buffers = frames_of(model_header(), message())
    terms = wire.pack_terms({"seed": "1", "algorithm.name": "choco", "long": "x" * 150})
    accepted = 0
    for _ in range(2500):
        accepted += _only_protocol_errors(wire.unpack, _mutated(bytes(header), draw))
        accepted += _only_protocol_errors(wire.unpack_terms, _mutated(terms, draw))
        noise = draw.randbytes(draw.randrange(80))
        accepted += _only_protocol_errors(wire.unpack, noise)
        accepted += _only_protocol_errors(wire.unpack_terms, noise)
        changed = [memoryview(_mutated(bytes(b), draw)) for b in buffers]
        accepted += _only_protocol_errors(wire.load, model_header(), changed, schema)
    assert 0 < accepted < 12_500  # some changes leave a valid frame: a number, a letter
