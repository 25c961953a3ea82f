"""Models in chunks: what is cut up comes together again, and nothing else does."""

import math
from collections.abc import Iterator
from typing import NamedTuple

import hypothesis.strategies as st
import numpy as np
import pytest
import torch
import zmq
from hypothesis import given
from links_cases import chunks_of

from p2pfl.errors import RemoteProtocolError
from p2pfl.peer.events import Received, Send
from p2pfl.runtime import chunks, wire
from p2pfl.runtime.chunks import Arriving, Damaged, Outgoing
from p2pfl.runtime.wire import Header, Kind


class Message(NamedTuple):
    values: torch.Tensor
    columns: torch.Tensor
    weight: torch.Tensor


class One(NamedTuple):
    values: torch.Tensor


NUMBERS = st.integers(0, 2**53 - 1)
HEADER = Header(Kind.CHUNK, b"12345678", 1, 3, 7, 2, 0.5)
FLOATS = [torch.float16, torch.bfloat16, torch.float32, torch.float64]
INTEGERS = [torch.int8, torch.uint8, torch.int16, torch.int32, torch.int64]


def message(k: int = 3, dtype: torch.dtype = torch.float32) -> Message:
    values = torch.arange(1.0, k + 1).to(dtype).reshape(1, k)
    columns = torch.arange(k, dtype=torch.int32).reshape(1, k)
    return Message(values, columns, torch.ones(1, 1, dtype=torch.float64))


@pytest.fixture
def tiny_chunks() -> Iterator[None]:
    """Chunks of 30 bytes, which cut numbers in two."""
    with chunks_of(30):
        yield


def travel(outgoing: Outgoing, schema: chunks.Schema) -> Received:
    """Let a model travel, and return what comes out at the other end."""
    arriving = None
    for index in range(len(outgoing)):
        header, *frames = copies(outgoing.chunk(index))
        arriving = arriving or Arriving(wire.unpack(header), schema)
        assert arriving.left
        arriving.take(wire.unpack(header), frames)
    assert arriving is not None
    assert not arriving.left
    return arriving.received()


def copies(frames: list[zmq.Frame]) -> list[memoryview]:
    return [memoryview(bytes(frame)) for frame in frames]


def sealed(header: Header, *pieces: bytes) -> tuple[Header, list[memoryview]]:
    """Return a chunk whose checksum is right, whatever else may be wrong."""
    header = header._replace(check=chunks.checksum(header, pieces))
    return header, [memoryview(piece) for piece in pieces]


# There and back


@given(
    st.integers(0, 50),
    st.sampled_from([*FLOATS, *INTEGERS]),
    st.builds(HEADER._replace, phase=NUMBERS, sender=NUMBERS, round=NUMBERS, degree=NUMBERS),
    st.floats(allow_nan=False),
)
def test_a_model_comes_back_to_the_bit(k, dtype: torch.dtype, header: Header, score: float):
    sent = message(k, dtype)
    received = travel(Outgoing(header._replace(score=score), sent), chunks.schema(sent))
    assert_same(received.message, sent)
    about = received.sender, received.round, received.degree, received.score
    assert about == (header.sender, header.round, header.degree, score)


def assert_same(received: tuple[torch.Tensor, ...], sent: tuple[torch.Tensor, ...]) -> None:
    assert type(received) is type(sent)
    for ours, theirs in zip(sent, received, strict=True):
        assert theirs.dtype == ours.dtype
        assert torch.equal(theirs, ours)


@pytest.mark.usefixtures("tiny_chunks")
@pytest.mark.parametrize("dtype", [*FLOATS, *INTEGERS, torch.bool])
@pytest.mark.parametrize("k", [0, 1, 7, 8, 30, 100])
def test_models_of_many_chunks_and_any_type_come_back(dtype: torch.dtype, k: int):
    numbers = torch.randn(1, k, generator=torch.Generator().manual_seed(k)) * 50
    sent = message(k)._replace(values=numbers.to(dtype))
    outgoing = Outgoing(HEADER, sent)
    assert len(outgoing) == max(1, -(-chunks.schema(sent).nbytes // 30))
    assert_same(travel(outgoing, chunks.schema(sent)).message, sent)


def test_a_model_of_nothing_is_one_chunk_without_pieces():
    sent = One(torch.empty(1, 0))
    outgoing = Outgoing(HEADER, sent)
    assert len(outgoing) == 1
    assert len(outgoing.chunk(0)) == 1
    assert travel(outgoing, chunks.schema(sent)).message.values.shape == (1, 0)


def test_a_number_that_is_not_finite_is_found_where_it_is_cut_in_two(tiny_chunks):
    values = torch.ones(1, 20, dtype=torch.float64)  # 30 bytes are three numbers and a half
    values[0, 3] = math.inf
    outgoing = Outgoing(HEADER, One(values))
    arriving = Arriving(HEADER, chunks.schema(One(values)))
    header, *frames = copies(outgoing.chunk(0))
    arriving.take(wire.unpack(header), frames)
    header, *frames = copies(outgoing.chunk(1))
    with pytest.raises(RemoteProtocolError, match="values has values which are not finite"):
        arriving.take(wire.unpack(header), frames)


def test_the_smallest_field_comes_first_and_ties_keep_their_order(tiny_chunks):
    layout = chunks.layout((40, 0, 8, 8))
    assert layout == (((2, 0, 8), (3, 0, 8), (0, 0, 14)), ((0, 14, 40),))


@given(st.lists(st.integers(0, 3 * wire.CHUNK), min_size=1, max_size=6))
def test_a_layout_is_every_byte_once_in_full_chunks(sizes: list[int]):
    layout = chunks.layout(tuple(sizes))
    covered = dict.fromkeys(range(len(sizes)), 0)
    for chunk in layout:
        for field, start, stop in chunk:
            assert covered[field] == start < stop
            covered[field] = stop
    assert list(covered.values()) == sizes
    lengths = [sum(stop - start for _, start, stop in chunk) for chunk in layout]
    assert all(length == wire.CHUNK for length in lengths[:-1])
    assert lengths[-1] <= wire.CHUNK


def test_sending_copies_no_parameters():
    sent = message(50_000)  # a few bytes ZeroMQ would copy
    buffer = np.frombuffer(Outgoing(HEADER, sent).chunk(0)[3], dtype=np.int32)
    assert buffer[5] == 5
    sent.columns[0, 5] = 42
    assert buffer[5] == 42


def test_all_neighbours_get_the_same_frames():
    outgoing = Outgoing(HEADER, message())
    assert outgoing.chunk(0) is outgoing.chunk(0)


def test_what_was_received_is_ours_to_keep():
    header, *pieces = Outgoing(HEADER, message()).chunk(0)
    buffers = [bytearray(piece) for piece in pieces]
    arriving = Arriving(HEADER, chunks.schema(message()))
    arriving.take(wire.unpack(header), [memoryview(buffer) for buffer in buffers])
    for buffer in buffers:
        buffer[:] = bytes(len(buffer))
    assert_same(arriving.received().message, message())


# Sizes


@given(NUMBERS, NUMBERS, NUMBERS, st.integers(0, 50))
def test_the_size_reckoned_is_that_of_the_frames(sender: int, round: int, degree: int, k: int):
    assert_size(message(k), sender, round, degree)


@given(st.integers(0, 12_000))
def test_the_size_reckoned_is_that_of_the_frames_of_many_chunks(payload: int):
    """With more chunks than 7 and 8 bits can number."""
    with chunks_of(30):
        assert_size(One(torch.zeros(1, payload, dtype=torch.uint8)), 3, 7, 2)


def assert_size(sent: tuple[torch.Tensor, ...], sender: int, round: int, degree: int) -> None:
    header = HEADER._replace(sender=sender, round=round, degree=degree, score=-math.inf)
    outgoing = Outgoing(header, sent)
    total = sum(len(f) for index in range(len(outgoing)) for f in outgoing.chunk(index))
    assert chunks.size(sender, Send((1,), round, degree, -math.inf, sent)) == total
    assert wire.model_size(sender, round, degree, chunks.schema(sent).nbytes) == total
    assert travel(outgoing, chunks.schema(sent)).size == total


@pytest.mark.parametrize("count", [127, 128, 129, 255, 256, 257, 65_535, 65_536, 65_537])
def test_sizes_are_right_where_headers_get_longer(count: int):
    headers = (HEADER._replace(degree=2, number=number, score=0.0) for number in range(count))
    total = sum(len(wire.pack(header)) for header in headers)
    assert wire.model_size(3, 7, 2, count * wire.CHUNK) == total + count * wire.CHUNK


@given(NUMBERS)
def test_numbers_alike_make_headers_of_one_length(number: int):
    smallest = wire.alike(number)
    assert smallest <= number
    long = len(wire.pack(HEADER._replace(round=number)))
    assert len(wire.pack(HEADER._replace(round=smallest))) == long
    assert smallest == 0 or len(wire.pack(HEADER._replace(round=smallest - 1))) < long


# What is refused


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda f: f[:-1], "2 buffers instead of 3"),
        (lambda f: [*f, b""], "4 buffers instead of 3"),
        (lambda f: [], "0 buffers instead of 3"),
        (lambda f: [f[0][:-1], *f[1:]], "weight has 7 bytes instead of 8"),
        (lambda f: [f[0], bytes(13), f[2]], "values has 13 bytes instead of 12"),
        (lambda f: [f[0], f[1], b""], "columns has 0 bytes instead of 12"),
    ],
)
def test_pieces_must_be_those_of_the_layout(change, reason: str):
    _, *pieces = map(bytes, Outgoing(HEADER, message()).chunk(0))
    header, frames = sealed(HEADER, *change(pieces))
    arriving = Arriving(HEADER, chunks.schema(message()))
    with pytest.raises(RemoteProtocolError, match=reason):
        arriving.take(header, frames)
    assert arriving.left


@pytest.mark.parametrize("bit", range(0, 8 * 32, 5))
def test_one_bit_that_flipped_in_the_data_is_noticed(bit: int):
    header, *frames = copies(Outgoing(HEADER, message()).chunk(0))
    damaged = bytearray(b"".join(frames))
    damaged[bit // 8] ^= 1 << bit % 8
    pieces = [memoryview(damaged)[:8], memoryview(damaged)[8:20], memoryview(damaged)[20:]]
    with pytest.raises(Damaged, match="damaged on its way"):
        chunks.check_intact(wire.unpack(header), pieces)


@pytest.mark.parametrize(
    "change",
    [
        {"kind": Kind.PING},
        {"run": b"another!"},
        {"phase": 2},
        {"sender": 4},
        {"round": 8},
        {"degree": 3},
        {"score": 0.25},
        {"check": b"checksum"},
    ],
    ids=lambda change: next(iter(change)),
)
def test_a_header_that_was_damaged_is_noticed(change):
    header, *frames = copies(Outgoing(HEADER, message()).chunk(0))
    changed = wire.unpack(header)._replace(**change)
    with pytest.raises(Damaged, match="damaged on its way"):
        chunks.check_intact(changed, frames)


@pytest.mark.parametrize("order", [[1], [0, 0], [0, 2], [0, 1, 0], [0, 1, 2, 3, 3]])
def test_chunks_come_one_after_the_other_and_each_once(order: list[int], tiny_chunks):
    sent = One(torch.zeros(1, 30))
    outgoing = Outgoing(HEADER, sent)
    assert len(outgoing) == 4
    arriving = Arriving(HEADER, chunks.schema(sent))
    *good, bad = (copies(outgoing.chunk(index)) for index in order)
    for header, *frames in good:
        arriving.take(wire.unpack(header), frames)
    with pytest.raises(RemoteProtocolError, match=rf"chunk {order[-1]} instead of {len(good)}"):
        arriving.take(wire.unpack(bad[0]), bad[1:])


@pytest.mark.parametrize("key", ["run", "phase", "sender", "round", "degree", "score"])
def test_chunks_of_two_models_are_not_put_together(key: str, tiny_chunks):
    sent = One(torch.zeros(1, 30))
    other = HEADER._replace(**{key: b"another!" if key == "run" else 9})
    arriving = Arriving(HEADER, chunks.schema(sent))
    header, *frames = copies(Outgoing(HEADER, sent).chunk(0))
    arriving.take(wire.unpack(header), frames)
    header, *frames = copies(Outgoing(other._replace(score=float(other.score)), sent).chunk(1))
    with pytest.raises(RemoteProtocolError, match="chunk 1 instead of 1"):
        arriving.take(wire.unpack(header), frames)


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("at", [0, 1, 2])
def test_values_which_are_not_finite_are_refused(value: float, dtype: torch.dtype, at: int):
    sent = message(3, dtype)
    sent.values[0, at] = value
    with pytest.raises(RemoteProtocolError, match="values has values which are not finite"):
        travel(Outgoing(HEADER, sent), chunks.schema(sent))


@pytest.mark.parametrize("value", [0.0, 0.5, 2.0**53])
def test_counts_may_be_anything_from_0_up(value: float):
    sent = message()._replace(weight=torch.tensor([[value]], dtype=torch.float64))
    assert_same(travel(Outgoing(HEADER, sent), chunks.schema(sent, ("weight",))).message, sent)


@pytest.mark.parametrize("value", [-1e-300, -20.0, 2.0**54])
def test_counts_that_nobody_has_are_refused(value: float):
    sent = message()._replace(weight=torch.tensor([[value]], dtype=torch.float64))
    with pytest.raises(RemoteProtocolError, match="weight has values below 0, or above all counts"):
        travel(Outgoing(HEADER, sent), chunks.schema(sent, ("weight",)))
    assert_same(travel(Outgoing(HEADER, sent), chunks.schema(sent)).message, sent)


def test_infinities_do_not_cancel():
    sent = message()
    sent.values[0, 0], sent.values[0, 1] = math.inf, -math.inf
    with pytest.raises(RemoteProtocolError, match="not finite"):
        travel(Outgoing(HEADER, sent), chunks.schema(sent))


def test_values_whose_sum_no_single_precision_can_hold_are_fine():
    sent = One(torch.full((1, 8), torch.finfo(torch.float32).max))
    assert_same(travel(Outgoing(HEADER, sent), chunks.schema(sent)).message, sent)
