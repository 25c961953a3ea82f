"""Models between two neighbours: every one once, in order, whatever happens to the connection."""

from collections import deque
from collections.abc import Iterator
from contextlib import ExitStack
from typing import NamedTuple

import hypothesis.strategies as st
import pytest
import torch
import zmq
from hypothesis import settings
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule
from links_cases import chunks_of

from p2pfl.errors import RemoteProtocolError
from p2pfl.runtime import chunks, flows, wire
from p2pfl.runtime.chunks import Damaged, Outgoing
from p2pfl.runtime.flows import MOST_CREDIT, PHASES, Expected, Inflow, Outflow
from p2pfl.runtime.wire import Header, Kind

RUN = b"12345678"
CHUNK = 16  # bytes: four numbers
WINDOW = 3


class Message(NamedTuple):
    values: torch.Tensor


@pytest.fixture(autouse=True)
def tiny_chunks() -> Iterator[None]:
    with chunks_of(CHUNK):
        yield


def message(round: int, d: int) -> Message:
    return Message(torch.arange(d, dtype=torch.float32).reshape(1, d) + 100 * round)


def outgoing(round: int = 0, d: int = 10, phase: int = 2, sender: int = 0) -> Outgoing:
    return Outgoing(Header(Kind.CHUNK, RUN, phase, sender, round, 1, 0.5), message(round, d))


def credit(number: int, next: int = 0, phase: int = 2) -> Header:
    return Header(Kind.CREDIT, RUN, phase, 1, next, number=number)


def inflow(d: int = 10, window: int = WINDOW, phase: int = 2) -> Inflow:
    flow = Inflow()
    flow.expect(phase, Expected(chunks.schema(message(0, d)), window))
    return flow


def arrive(flow: Inflow, frames: list[zmq.Frame]) -> list[int]:
    """Let a chunk arrive; return the rounds of the models that are complete with it."""
    header, *pieces = (memoryview(bytes(frame)) for frame in frames)
    received = flow.take(wire.unpack(header), pieces)
    return [] if received is None else [received.round]


class Wires:
    """A pipe from the sender to the receiver, whose end is full or broken when told to be."""

    def __init__(self) -> None:
        self.frames: list[list[zmq.Frame]] = []
        self.room = 10**6

    def hand_over(self, connection: bytes, frames: list[zmq.Frame]) -> bool:
        if len(self.frames) >= self.room:
            return False
        self.frames.append(frames)
        return True

    @property
    def numbers(self) -> list[tuple[int, int]]:
        """The round and the number of each chunk."""
        headers = [wire.unpack(frames[0]) for frames in self.frames]
        return [(header.round, header.number) for header in headers]


def drain(flow: Outflow, wires: Wires) -> None:
    while flow.flush(wires.hand_over):
        pass


# Who sends


def test_nothing_leaves_before_it_is_asked_for():
    flow, wires = Outflow(), Wires()
    flow.put(outgoing(), False)
    drain(flow, wires)
    flow.connected(b"one")
    drain(flow, wires)
    flow.asked(credit(5, phase=1))  # for messages of another phase
    drain(flow, wires)
    assert wires.numbers == []
    flow.asked(credit(2))
    drain(flow, wires)
    assert wires.numbers == [(0, 0), (0, 1)]
    assert flow.waiting == 1
    flow.asked(credit(2))
    drain(flow, wires)
    assert wires.numbers == [(0, 0), (0, 1), (0, 2)]
    assert flow.waiting == 0


def test_a_chunk_there_was_no_room_for_goes_out_later_and_costs_no_credit():
    flow, wires = Outflow(), Wires()
    flow.connected(b"one")
    flow.put(outgoing(), False)
    flow.asked(credit(3))
    wires.room = 1
    drain(flow, wires)
    assert wires.numbers == [(0, 0)]
    wires.room = 10
    drain(flow, wires)
    assert wires.numbers == [(0, 0), (0, 1), (0, 2)]


def test_the_newest_model_takes_the_place_of_those_that_have_not_begun_to_leave():
    flow, wires = Outflow(), Wires()
    flow.connected(b"one")
    flow.asked(credit(1))
    flow.put(outgoing(0), True)
    drain(flow, wires)
    for round in range(1, 6):
        flow.put(outgoing(round), True)
        assert flow.waiting == 2  # the one that has begun is not broken off
    flow.asked(credit(10))
    drain(flow, wires)
    assert wires.numbers == [(0, 0), (0, 1), (0, 2), (5, 0), (5, 1), (5, 2)]


def test_nothing_is_replaced_where_every_model_counts():
    flow = Outflow()
    for round in range(5):
        flow.put(outgoing(round), False)
    assert flow.waiting == 5


def test_what_was_not_acknowledged_goes_out_again_and_what_was_does_not():
    flow, wires = Outflow(), Wires()
    flow.connected(b"one")
    for round in range(3):
        flow.put(outgoing(round), False)
    flow.asked(credit(8))
    drain(flow, wires)
    assert wires.numbers[-1] == (2, 1)
    flow.connected(b"two")
    wires.frames.clear()
    drain(flow, wires)
    assert wires.numbers == []  # what was asked for on the other connection is void
    assert flow.last == (2, 2)
    flow.asked(credit(9, next=1))
    drain(flow, wires)
    assert wires.numbers == [(1, 0), (1, 1), (1, 2), (2, 0), (2, 1), (2, 2)]
    flow.asked(credit(0, next=3))
    assert flow.last is None


def test_a_phase_that_has_begun_acknowledges_those_before_it():
    flow = Outflow()
    flow.connected(b"one")
    flow.put(outgoing(0, phase=1), False)
    flow.put(outgoing(0, phase=2), False)
    flow.asked(credit(1, phase=2))
    assert flow.last == (2, 0)
    assert flow.waiting == 1


@pytest.mark.parametrize("numbers", [[MOST_CREDIT + 1], [MOST_CREDIT, 1], [2**53 - 1], [9, 9]])
def test_more_credit_than_is_given_is_refused(numbers: list[int]):
    flow = Outflow()
    flow.connected(b"one")
    *fine, last = numbers
    for number in fine:
        flow.asked(credit(number))
    with pytest.raises(RemoteProtocolError, match="more credit than is given"):
        flow.asked(credit(last))


def test_credit_is_kept_for_a_few_phases_only():
    flow = Outflow()
    flow.connected(b"one")
    for phase in range(PHASES):
        flow.asked(credit(1, phase=phase))
    with pytest.raises(RemoteProtocolError, match="more credit"):
        flow.asked(credit(1, phase=PHASES))
    assert len(flow._credit) == PHASES


# Who receives


def test_credit_is_given_when_it_is_worth_a_message():
    flow, one = inflow(d=32, window=4), outgoing(0, d=32)  # of 8 chunks
    assert flow.owed() == 4
    assert flow.owed() == 0
    arrive(flow, one.chunk(0))
    assert flow.owed() == 0
    arrive(flow, one.chunk(1))
    assert flow.owed() == 2


def test_no_more_credit_is_given_while_there_is_enough_for_the_rest_of_a_model():
    flow, one = inflow(window=4), outgoing(0)
    assert flow.owed() == 4
    arrive(flow, one.chunk(0))
    arrive(flow, one.chunk(1))
    assert flow.owed() == 0  # the last of three is on its way
    arrive(flow, one.chunk(2))
    assert flow.owed() == 3  # and with it goes word that the model has come


def test_the_window_is_a_share_of_the_budget_and_never_nothing():
    large = chunks.schema(message(0, 10**6))
    assert flows.window(large, 1) == flows.WINDOW <= MOST_CREDIT
    wide = 4 * flows.BUDGET // CHUNK
    assert flows.window(large, wide) == 1
    assert flows.window(chunks.schema(message(0, 0)), 0) == flows.WINDOW


def test_chunks_nobody_asked_for_are_refused():
    flow, one = inflow(window=2), outgoing(0)
    with pytest.raises(RemoteProtocolError, match="nobody has asked for"):
        arrive(flow, one.chunk(0))
    assert flow.owed() == 2
    with pytest.raises(RemoteProtocolError, match="nobody has asked for"):
        arrive(flow, outgoing(0, phase=1).chunk(0))
    arrive(flow, one.chunk(0))
    arrive(flow, one.chunk(1))
    with pytest.raises(RemoteProtocolError, match="nobody has asked for"):
        arrive(flow, one.chunk(2))


def test_a_round_comes_once_and_none_comes_after_a_later_one():
    flow = inflow(d=4, window=8)
    flow.owed()
    assert arrive(flow, outgoing(3, 4).chunk(0)) == [3]
    for late in (3, 2, 0):
        with pytest.raises(RemoteProtocolError, match=f"round {late} again, or out of order"):
            arrive(flow, outgoing(late, 4).chunk(0))
    assert arrive(flow, outgoing(4, 4).chunk(0)) == [4]
    assert flow.has((2, 4))
    assert not flow.has((2, 5))


@pytest.mark.parametrize("at", [0, 1, 2])
@pytest.mark.parametrize("part", ["data", "round", "degree"])
def test_a_damaged_chunk_is_for_a_new_connection_to_bring(at: int, part: str):
    """A wrong number in a header must not make its receiver wait for rounds far ahead."""
    flow, sent = inflow(window=9), outgoing(0)
    flow.owed()
    for k in range(at):
        assert arrive(flow, sent.chunk(k)) == []
    header, *pieces = sent.chunk(at)
    if part == "data":
        pieces = [bytes(len(piece)) for piece in pieces] if at else [b"\1" * CHUNK]
    else:
        header = wire.pack(wire.unpack(header)._replace(**{part: 2**53 - 1}))
    with pytest.raises(Damaged):
        arrive(flow, [header, *pieces])
    flow.broken()
    assert flow.next == 0
    flow.owed()
    assert [arrive(flow, sent.chunk(k)) for k in range(3)] == [[], [], [0]]


def test_a_model_that_is_not_finite_is_acknowledged():
    flow = inflow(d=4)
    flow.owed()
    bad = Outgoing(Header(Kind.CHUNK, RUN, 2, 0, 7), Message(torch.full((1, 4), torch.nan)))
    with pytest.raises(RemoteProtocolError, match="not finite"):
        arrive(flow, bad.chunk(0))
    assert flow.next == 8  # its sender need not keep it, and may leave


# Both, and a connection that breaks


class Connection(RuleBasedStateMachine):
    """One neighbour sends models to another; what is on its way when it breaks is lost."""

    replaceable = False

    def __init__(self) -> None:
        super().__init__()
        self.stack = ExitStack()
        self.stack.enter_context(chunks_of(CHUNK))
        self.outflow, self.inflow = Outflow(), inflow()
        self.asking: deque[Header] = deque()
        self.wires = Wires()
        self.up, self.connections = False, 0
        self.round = 0
        self.due: dict[int, Message] = {}  # what has not been replaced
        self.received: list[int] = []
        self.connect()

    @rule(ahead=st.integers(0, 2))
    def put(self, ahead: int) -> None:
        round = self.round + (ahead if self.replaceable else 0)
        sent = message(round, 10)
        header = Header(Kind.CHUNK, RUN, 2, 0, round, 1, 0.5)
        self.outflow.put(Outgoing(header, sent), self.replaceable)
        self.round, self.due[round] = round + 1, sent
        kept = {model.round for model in self.outflow._queue}
        if self.replaceable:
            self.due = {r: m for r, m in self.due.items() if r in kept or r in self.received}

    @precondition(lambda self: self.up)
    @rule(arrives=st.booleans())
    def ask(self, arrives: bool = True) -> None:
        if owed := self.inflow.owed():
            self.asking.append(credit(owed, self.inflow.next))
        while self.asking and arrives:
            self.credit_arrives()

    @precondition(lambda self: self.asking)
    @rule()
    def credit_arrives(self) -> None:
        self.outflow.asked(wire.unpack(wire.pack(self.asking.popleft())))

    @precondition(lambda self: self.outflow.waiting)
    @rule(more=st.integers(1, 3))
    def send(self, more: int) -> None:
        self.wires.room = len(self.wires.frames) + more
        drain(self.outflow, self.wires)
        self.wires.room = 10**6
        if not self.up:  # the sender has not noticed: it talks into the void
            self.wires.frames.clear()

    @precondition(lambda self: self.wires.frames)
    @rule()
    def chunk_arrives(self) -> None:
        header, *frames = (memoryview(bytes(frame)) for frame in self.wires.frames.pop(0))
        received = self.inflow.take(wire.unpack(header), frames)
        if received is not None:
            self.received.append(received.round)
            assert torch.equal(received.message.values, message(received.round, 10).values)

    @precondition(lambda self: self.wires.frames)
    @rule(at=st.integers(0, 10**6), bit=st.integers(0, 8 * CHUNK - 1), in_header=st.booleans())
    def chunk_arrives_damaged(self, at: int, bit: int, in_header: bool) -> None:
        first, *pieces = self.wires.frames.pop(0)
        header = wire.unpack(first)
        if in_header:
            key = ("round", "degree", "number")[at % 3]
            header = header._replace(**{key: getattr(header, key) ^ (1 << at % 53)})
        else:
            data = bytearray(pieces[0])
            data[bit // 8 % len(data)] ^= 1 << bit % 8
            pieces = [data]
        with pytest.raises(Damaged):
            self.inflow.take(header, [memoryview(bytes(piece)) for piece in pieces])
        self.breaks()

    @precondition(lambda self: self.up)
    @rule()
    def breaks(self) -> None:
        self.up = False
        self.asking.clear()
        self.wires.frames.clear()
        self.inflow.broken()

    @precondition(lambda self: not self.up)
    @rule()
    def connect(self) -> None:
        self.up, self.connections = True, self.connections + 1
        self.outflow.connected(b"%d" % self.connections)

    @invariant()
    def every_round_at_most_once_and_in_order(self) -> None:
        assert all(a < b for a, b in zip(self.received, self.received[1:], strict=False))

    @invariant()
    def little_is_on_its_way(self) -> None:
        asked = sum(header.number for header in self.asking)
        under_way = asked + self.outflow._credit.total() + len(self.wires.frames)
        if self.up:
            assert under_way <= self.inflow._given <= WINDOW
        assert self.outflow._at <= MOST_CREDIT

    def teardown(self) -> None:
        """Left alone, the connection brings everything that is due."""
        if not self.up:
            self.connect()
        for _ in range(10 * (self.round + 2)):
            self.ask()
            self.send(WINDOW)
            while self.wires.frames:
                self.chunk_arrives()
        try:
            assert self.due.keys() <= set(self.received)
            assert self.outflow.waiting == 0
        finally:
            self.stack.close()


class Replacing(Connection):
    """The same where a newer model takes the place of an older one."""

    replaceable = True


EXAMPLES = settings(max_examples=200, stateful_step_count=50, deadline=None, derandomize=True)
Connection.TestCase.settings = EXAMPLES
Replacing.TestCase.settings = EXAMPLES
TestConnection = Connection.TestCase
TestReplacing = Replacing.TestCase
