"""Frames: what is sent can be read, and nothing else is read."""

from __future__ import annotations

import contextlib
import random

import msgpack
import pytest
from hypothesis import given
from hypothesis import strategies as st

from p2pfl.errors import RemoteProtocolError
from p2pfl.membership.members import Claim, Status, incarnation
from p2pfl.membership.messages import (
    IN_EXCHANGE,
    MOST_BYTES,
    RIDING,
    Kind,
    Message,
    decode,
    encode,
    parts,
)

ids = st.integers(0, 2**31)
numbers = st.integers(0, 2**64 - 1)
rounds = st.integers(0, 2**53)
addresses = st.text(max_size=200).filter(lambda text: len(text.encode()) <= 200)
claims = st.builds(Claim, ids, st.sampled_from(Status), numbers, rounds, addresses, ids)


messages = st.builds(
    Message,
    st.sampled_from(Kind),
    rounds,
    ids,
    numbers,
    rounds,
    addresses,
    st.lists(claims, max_size=RIDING).map(tuple),
)


@given(messages)
def test_what_is_written_is_read(message):
    assert decode(encode(message)) == message
    assert len(encode(message)) < 3000


@given(st.binary(max_size=300))
def test_noise_is_refused(frame):
    with contextlib.suppress(RemoteProtocolError):
        decode(frame)


def largest(count):
    one = Claim(2**31, Status.LEFT, 2**64 - 1, 2**53, "x" * 200, 2**31)
    return Message(Kind.EXCHANGE, 1, 0, 2**64 - 1, 2**53, "x" * 200, (one,) * count)


def test_the_largest_part_of_an_exchange_fits():
    assert 28_000 < len(encode(largest(IN_EXCHANGE))) <= MOST_BYTES
    told = largest(300).claims
    assert [len(part) for part in parts(told)] == [128, 128, 44]
    assert parts([]) == [()]


def good():
    return [1, 5, 0, 7, 3, "tcp://a:1", [[2, 1, 8, 4, "tcp://b:1", 3]]]


def changed(path, value):
    message = good()
    at = message
    for step in path[:-1]:
        at = at[step]
    at[path[-1]] = value
    return message


@pytest.mark.parametrize(
    "values",
    [
        *(changed([0], kind) for kind in (0, 7, 1.0, "1", None)),
        *(changed([1], number) for number in (-1, 2**53 + 1, True, 1.0)),
        *(changed([2], target) for target in (-1, 2**31 + 1, False)),
        *(changed([3], said) for said in (-1, 1.5, None, [])),
        *(changed([4], round) for round in (-1, 2**53 + 1)),
        *(changed([5], address) for address in (5, "x" * 201, "é" * 101, b"tcp", None)),
        *(changed([6], told) for told in (None, {}, 5, [5], [[]], good()[6] * 9)),
        *(changed([6, 0, 0], peer) for peer in (-1, 2**31 + 1, True)),
        *(changed([6, 0, 1], status) for status in (-1, 4, True, "DEAD")),
        *(changed([6, 0, 2], said) for said in (-1, 0.5)),
        *(changed([6, 0, 5], by) for by in (-1, None)),
        changed([6, 0], [2, 1, 8, 4, ""]),
        changed([6, 0], [2, 1, 8, 4, "", 3, 3]),
        good()[:-1],
        [*good(), 1],
        {},
        None,
        7,
        [[[]]] * 7,
    ],
    ids=repr,
)
def test_what_is_not_as_it_should_be_is_refused(values):
    assert decode(msgpack.packb(good())).kind is Kind.PING
    with pytest.raises(RemoteProtocolError):
        decode(msgpack.packb(values))


@pytest.mark.parametrize(
    "frame",
    [
        b"",
        encode(largest(10)) + b"\x00",
        encode(largest(10))[:-1],
        encode(largest(200)),
        b"\x91" * MOST_BYTES,
        b"\xdd\xff\xff\xff\xff",
        b"\xdf\xff\xff\xff\xff",
        b"\xdb\xff\xff\xff\xff",
        b"\xa2\xff\xfe",
        b"\x97\x01\x00\x00\xcf" + b"\xff" * 9,
    ],
    ids=lambda frame: frame[:8].hex(),
)
def test_frames_that_lie_about_their_length_are_refused(frame):
    with pytest.raises(RemoteProtocolError):
        decode(frame)


def test_damaged_frames_are_read_or_refused():
    rng = random.Random(1)
    frames = [msgpack.packb(good()), encode(largest(3))]
    read = 0
    for _ in range(20_000):
        frame = bytearray(rng.choice(frames))
        for _ in range(rng.randint(1, 3)):
            frame[rng.randrange(len(frame))] = rng.randrange(256)
        try:
            decode(frame)
            read += 1
        except RemoteProtocolError:
            pass
    assert 100 < read < 19_900


def test_incarnations_of_a_later_life_are_higher():
    assert incarnation(2) > incarnation(1) + 2**20 - 1
    for boot in (0, -1, 2**44):
        with pytest.raises(ValueError, match="boot"):
            incarnation(boot)
