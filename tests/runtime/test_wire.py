"""Frames: what is packed comes back, and nothing else ever gets through."""

import doctest
import math
import re
import string
from pathlib import Path

import hypothesis.strategies as st
import msgpack
import pytest
from hypothesis import given, settings

from p2pfl.errors import RemoteProtocolError, UserError
from p2pfl.runtime import flows, handshake, links, neighbour, sockets, wire
from p2pfl.runtime.wire import Header, Kind
from p2pfl.security import curve

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
    NUMBERS,
    st.binary(min_size=8, max_size=8),
)
TEXTS = st.text(st.characters(codec="utf-8"), max_size=300)


@given(HEADERS)
def test_a_header_comes_back_as_it_was(header: Header):
    packed = wire.pack(header)
    assert wire.unpack(packed) == header
    assert wire.unpack(memoryview(packed)) == header
    assert len(packed) <= wire.MAX_HEADER


GOOD = [1, 4, b"12345678", 1, 3, 7, 2, 0.5, 6, b"checksum"]


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
        *[[1, kind, *GOOD[2:]] for kind in (0, max(Kind) + 1, 4.0, True, "4", None, 2**60)],
        *[[1, 4, run, *GOOD[3:]] for run in (b"", b"1234567", b"123456789", "12345678", None)],
        *[
            [*GOOD[:at], number, *GOOD[at + 1 :]]
            for at in (3, 4, 5, 6, 8)
            for number in (-1, 2**53, 2**64 - 1, True, 1.0, "1", None, [1])
        ],
        *[[*GOOD[:7], score, *GOOD[8:]] for score in (math.nan, 1, True, None, "0.5")],
        *[[*GOOD[:-1], check] for check in (b"", b"checksu", b"checksums", "checksum", None)],
    ],
)
def test_a_malformed_header_is_refused(values: object):
    with pytest.raises(RemoteProtocolError):
        wire.unpack(msgpack.packb(values))


def test_the_header_those_are_variations_of_is_fine():
    header = Header(Kind.CHUNK, b"12345678", 1, 3, 7, 2, 0.5, 6, b"checksum")
    assert wire.unpack(msgpack.packb(GOOD)) == header


def test_a_header_that_is_too_long_is_not_even_parsed():
    with pytest.raises(RemoteProtocolError, match="a header of 129 bytes"):
        wire.unpack(msgpack.packb(GOOD).ljust(129, b"\0"))


def test_another_version_is_named():
    with pytest.raises(wire.OtherVersion, match="protocol version 2, ours is 1"):
        wire.unpack(msgpack.packb([2, "whatever", "comes", "then"]))


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


def test_the_examples_of_the_specification():
    page = Path(__file__).parents[2] / "docs" / "wire.md"
    failed, tried = doctest.testfile(str(page), module_relative=False)
    assert (failed, tried > 5) == (0, True)


def test_the_table_of_limits_is_that_of_the_code():
    page = (Path(__file__).parents[2] / "docs" / "wire.md").read_text(encoding="utf-8")
    for kind in Kind:
        assert f"{kind.value} {kind.name}" in page
    limits = dict(re.findall(r"^\| ([a-z, ]+) \| (.+) \|$", page.split("## Limits")[1], re.M))
    assert limits["header"] == f"{wire.MAX_HEADER} bytes"
    assert limits["frame to a listener, as it is on its way"] == f"{curve.LARGEST >> 10} KiB"
    assert limits["terms"].startswith(f"{wire.MAX_HELLO >> 10} KiB")
    assert limits["bytes of a model in a chunk"] == f"{wire.CHUNK >> 20} MiB"
    slack = f"1 MiB and {sockets.SLACK} bytes"
    assert limits["frame to who dials, as it is on its way"] == slack
    assert limits["frames of a message"] == str(sockets.MOST_FRAMES)
    assert limits["credit open to one neighbour"] == f"{wire.MOST_CREDIT} chunks"
    assert limits["credit open to all neighbours"].startswith(f"{flows.BUDGET >> 20} MiB")
    assert limits["phases with credit"] == str(flows.PHASES)
    waiting = limits["models that wait for a neighbour to ask"]
    assert waiting.startswith(f"{links.MANY}, or {links.PLENTY >> 20} MiB")
    assert limits["reason of a refusal or goodbye"] == f"{handshake.MOST_REASON:,} bytes"
    assert limits["between two heartbeats"] == f"{neighbour.HEARTBEAT:g} s"
    broken = next(value for name, value in limits.items() if name.startswith("broken connection"))
    assert broken == f"{links.GRACE:g} s"
