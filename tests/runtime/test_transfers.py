"""Models on their way between peers: broken connections, slow neighbours, phases, heartbeats."""

import math
import threading
import time

import pytest
import torch
from links_cases import (
    MIB,
    PATIENCE,
    Message,
    address_of,
    events_until,
    expect,
    frames,
    hello,
    rounds_of,
    send,
    small,
    stranger,
    turn,
    vanish,
)

from p2pfl.peer.events import Event, PeerDown, Received, Send, Skip, Skipped
from p2pfl.runtime import attendance, chunks, flows, neighbour, wire
from p2pfl.runtime import links as links_module
from p2pfl.runtime.chunks import Outgoing
from p2pfl.runtime.flows import WINDOW
from p2pfl.runtime.links import MANY, Links
from p2pfl.runtime.sockets import Listener
from p2pfl.runtime.wire import MOST_CREDIT, Kind


def noise(*to: int, round: int = 0, d: int = 8 * MIB) -> Send:
    values = torch.randn(1, d, generator=torch.Generator().manual_seed(round))
    return Send(to, round, len(to), 0.0, Message(values))


def assert_exact(event: Event) -> None:
    assert isinstance(event, Received)
    expected = noise(round=event.round, d=event.message.values.shape[1])
    assert torch.equal(event.message.values, expected.message.values)


def handed_over(links: Links, monkeypatch) -> list[bytes]:
    """Return a list of the headers that are handed over to anybody from now on."""
    headers: list[bytes] = []
    hand_over = Listener.hand_over

    def counting(self: Listener, identity: bytes, message) -> bool:
        taken = hand_over(self, identity, message)
        if taken and self is links._listener:
            headers.append(message[0])
        return taken

    monkeypatch.setattr(Listener, "hand_over", counting)
    return headers


# Broken connections


@pytest.mark.parametrize("sender", [0, 1])
def test_a_connection_that_broke_is_made_again(stage, sender: int):
    scene = stage(2)
    relay = scene.relay_before(1)
    peers = scene.all_met(replaceable=False)
    cut = peers[0]._neighbours[1].link
    a, b = peers[sender], peers[1 - sender]
    for round in range(3):
        a.send(send(b.me, round=2 * round))
        assert rounds_of(events_until(bool, b, a)) == [2 * round]
        relay.cut()
        assert turn(lambda: cut.broken_since is not None, a, b) == []
        a.send(send(b.me, round=2 * round + 1))
        assert rounds_of(events_until(bool, b, a)) == [2 * round + 1]
        assert turn(lambda: cut.broken_since is None, a, b) == []
    assert relay.made == 4
    assert not b.rejected


def test_a_model_that_was_cut_in_two_is_sent_again_and_arrives_once(stage):
    scene = stage(2)
    relay = scene.relay_before(0)  # models of peer 0 come through it
    a, b = scene.all_met(d=8 * MIB, replaceable=False)
    for round in range(3):
        relay.allowance = (3 + round) * wire.CHUNK
        a.send(noise(1, round=round))
        (event,) = events_until(bool, b, a)
        assert event.round == round
        assert_exact(event)
        assert relay.cuts == round + 1
    a.send(noise(1, round=3))
    assert rounds_of(events_until(bool, b, a)) == [3]
    assert not b.rejected


def test_a_model_that_had_arrived_when_the_connection_broke_is_not_sent_again(stage, monkeypatch):
    scene = stage(2)
    relay = scene.relay_before(0)
    a, b = scene.all_met(replaceable=False)
    a.send(noise(1, d=4))
    assert rounds_of(events_until(bool, b, a)) == [0]
    assert a._neighbours[1].outflow.last == (1, 0)  # it does not know
    sent = handed_over(a, monkeypatch)
    relay.cut()
    turn(lambda: b._neighbours[0].link.broken_since is not None, b, a)
    a.send(noise(1, round=1, d=4))
    assert rounds_of(events_until(bool, b, a)) == [1]
    assert [wire.unpack(header).round for header in sent] == [1]
    assert not b.rejected


def test_credit_of_a_connection_before_this_one_does_not_count(stage):
    """What lay unread when its connection broke is read after the new hello."""
    with stage(2).scripted() as (a, other), stranger(address_of(a)) as newer:
        newer.send_multipart(hello(1))
        turn(lambda: bool(newer.poll(0)), a)
        newer.recv_multipart()
        other.say(small(Kind.CREDIT, number=MOST_CREDIT))
        other.say(small(Kind.PING))
        turn(lambda: any(header.kind is Kind.PONG for header in other.heard()), a)
        for round in range(3):
            a.send(send(1, round=round))
        newer.send(small(Kind.CREDIT, number=1))
        turn(lambda: bool(newer.poll(0)), a)
        assert wire.unpack(newer.recv_multipart()[0]).kind is Kind.CHUNK
        newer.send(small(Kind.PING))
        turn(lambda: any(header.kind is Kind.PONG for header in other.heard()), a)
        assert not newer.poll(0)


# Slow and dead neighbours


def test_a_neighbour_that_does_not_read_gets_the_newest_later(stage):
    a, b = stage(2).all_met(d=4 * MIB)
    for round in range(40):
        a.send(send(1, round=round, d=4 * MIB))
        assert not a.events()
        assert a._neighbours[1].outflow.waiting <= 2  # the newest, and one that has begun
    seen = events_until(lambda seen: 39 in rounds_of(seen), b, a)
    assert len(seen) <= 6  # what it had asked for, and the newest
    assert rounds_of(seen) == sorted(rounds_of(seen))
    assert not b.rejected


def test_for_a_neighbour_that_does_not_read_no_more_than_the_window_is_on_its_way(
    stage, monkeypatch
):
    a, b = stage(2).all_met(d=40 * MIB, replaceable=False)
    sent = handed_over(a, monkeypatch)
    a.send(noise(1, d=40 * MIB))
    turn(lambda: len(sent) == WINDOW, a)
    for _ in range(20):
        a.events()
    assert len(sent) == WINDOW
    (event,) = events_until(bool, b, a)
    assert_exact(event)


def test_a_neighbour_that_leaves_too_much_unread_is_given_up_once(stage):
    a, _b = stage(2).all_met(d=4 * MIB, replaceable=False)
    room = max(MANY, links_module.PLENTY // (4 * wire.CHUNK))
    events: list[Event] = []
    for round in range(40):
        a.send(send(1, round=round, d=4 * MIB))
        events += a.events()
        assert 1 not in a._neighbours or a._neighbours[1].outflow.waiting <= room
    assert events == [PeerDown(1)]
    started = time.monotonic()
    a.close("done", PATIENCE)  # and is not waited for
    assert time.monotonic() - started < PATIENCE / 2


def test_a_neighbour_that_died_is_noticed_after_the_grace(stage, monkeypatch):
    monkeypatch.setattr(attendance, "GRACE", 0.3)
    a, b, c = stage(3).all_met()
    vanish(b)
    started = time.monotonic()
    seen = events_until(bool, a, c)
    assert seen == [PeerDown(1)]
    assert 0.25 < time.monotonic() - started < PATIENCE / 2
    c.send(send(0))
    assert rounds_of(events_until(bool, a, c)) == [0]


def test_what_a_neighbour_sent_before_it_died_counts(stage):
    a, b = stage(2).all_met(d=4 * MIB, replaceable=False)
    b.send(noise(0, d=4 * MIB))
    (event,) = events_until(bool, a, b)
    assert_exact(event)
    b.send(noise(0, round=1, d=4 * MIB))  # the rest of it will never come
    a.poller.poll(1000)
    vanish(b)
    assert events_until(lambda seen: PeerDown(1) in seen, a)[-1] == PeerDown(1)


# Damage


@pytest.mark.parametrize("at", [0, 1, 3])
def test_a_model_with_a_damaged_chunk_is_sent_again(stage, monkeypatch, at: int):
    a, b = stage(2).all_met(d=4 * MIB, replaceable=False)
    chunk, tampered = Outgoing.chunk, []

    def damaged(self: Outgoing, index: int, checked: bool = True):
        header, *pieces = chunk(self, index, True)
        if (self.round, index) == (1, at) and not tampered:
            tampered.append(index)
            pieces = [bytearray(piece) for piece in pieces]
            pieces[0][100] ^= 1
        return [header, *pieces]

    monkeypatch.setattr(Outgoing, "chunk", damaged)
    for round in range(3):
        a.send(noise(1, round=round, d=4 * MIB))
    seen = events_until(lambda seen: len(seen) == 3, b, a)
    assert rounds_of(seen) == [0, 1, 2]
    for event in seen:
        assert_exact(event)
    assert b.rejected == {"peer 0: a chunk that was damaged on its way": 1}


# Phases


def test_models_of_a_later_phase_wait_with_their_sender(stage):
    a, b = stage(2).all_met(replaceable=False)
    expect(b, phase=2, replaceable=False)
    for round in range(MANY):
        b.send(send(0, round=round, value=2))
        assert a.events() == []
    expect(a, phase=2, replaceable=False)
    seen = events_until(lambda seen: len(seen) == MANY, a, b)
    assert rounds_of(seen) == list(range(MANY))
    assert not a.rejected


def test_every_phase_counts_its_rounds_from_nought(stage):
    peers = stage(3).all_met(replaceable=False)
    for phase, after in ((1, 2), (2, 4), (4, 5)):
        for links in peers:
            links.send(send(*({0, 1, 2} - {links.me}), value=phase))
        seen: list[Event] = []
        turn(lambda: len(seen) == 6 or seen.extend(e for one in peers for e in one.events()))
        assert rounds_of(seen) == [0] * 6
        assert {event.message.values[0, 0].item() for event in seen} == {phase}
        expect(*peers, phase=after, replaceable=False)
    assert not any(links.rejected for links in peers)


# In the midst of a model


def test_in_the_midst_of_a_model_nothing_but_chunks_is_looked_at(stage, monkeypatch):
    monkeypatch.setattr(links_module, "ALL", PATIENCE)  # else also now and then
    a, b = stage(2).all_met(d=100 * MIB, replaceable=False)
    looks, changes = list[attendance.Attendance](), attendance.Attendance.changes

    def counted(self: attendance.Attendance, *given):
        looks.append(self)
        return changes(self, *given)

    monkeypatch.setattr(attendance.Attendance, "changes", counted)
    a.send(noise(1, d=100 * MIB))
    events: list[Event] = []
    turns = 0
    while not events:
        a.events()
        if b.poller.poll(5):  # if nothing has come, there is time to look
            events += b.events()
            turns += 1
    assert_exact(events[0])
    assert 0 < looks.count(b._attendance) < turns / 2


def test_room_in_a_model_that_is_mixed_is_asked_for_whatever_wakes_us(stage, monkeypatch):
    """The word that there is room may be read, by who waits for the thread, after the poll."""
    monkeypatch.setattr(flows, "BUDGET", wire.CHUNK)  # a window of one chunk
    a, b = stage(2).all_met()
    for one, news in ((a, None), (b, threading.Condition())):
        one.expect(2, chunks.schema(Message(torch.empty(1, 40 * MIB))), news=news)
    inflow = b._neighbours[0].inflow
    a.send(noise(1, d=40 * MIB))
    turn(lambda: any(one.held == inflow._expected.window for one in inflow._streams), b, a)
    assert not inflow._given
    monkeypatch.setattr(links_module, "ALL", PATIENCE)
    b.events()  # looks at everything, and then no more
    b._next_look = math.inf
    (stream,) = inflow._streams
    while stream.held:
        stream.take_columns(0.0)
        stream.done()
    a._neighbours[1].tell(wire.pack(a._about(Kind.CREDIT)._replace(phase=2)))
    b.wait(math.inf, int(1000 * PATIENCE))  # only that
    b.events()
    assert inflow._given == inflow._expected.window


def test_what_is_said_in_the_midst_of_a_model_is_heard_before_its_end(stage):
    a, b = stage(2).all_met(d=100 * MIB, replaceable=False)
    a.send(noise(1, d=100 * MIB))
    turn(lambda: b._neighbours[0].inflow.is_midway, b, a)
    a.skip(Skip((1,), round=7))
    assert b._listener.socket.poll(1000 * PATIENCE)
    assert b.events() == [Skipped(0, 7)]
    (event,) = events_until(bool, b, a)
    assert_exact(event)


# Heartbeats


def test_heartbeats_are_answered_while_a_large_model_is_under_way(stage, monkeypatch):
    monkeypatch.setattr(neighbour, "HEARTBEAT", 0.0)
    monkeypatch.setattr(links_module, "ALL", 0.0)
    count = 100
    a, b = stage(2).all_met(d=count * MIB, replaceable=False)
    there, back = a._neighbours[1], b._neighbours[0]
    answered: set[tuple[bool, int]] = set()  # by whom, and how many chunks had come
    a.send(noise(1, d=count * MIB))

    def look(seen: list[Event]) -> bool:
        arriving = back.inflow._arriving
        for one in (there, back):
            if one.round_trips and arriving and 1 < arriving._next < count - MOST_CREDIT:
                answered.add((one is there, arriving._next))
            one.round_trips.clear()
        return bool(seen)

    (event,) = events_until(look, b, a)
    assert_exact(event)
    for who in (True, False):
        assert len({chunks for one, chunks in answered if one is who}) > 2


def test_a_heartbeat_is_timed_and_reported(stage):
    a, b = stage(2).all_met()
    a.send(noise(1))
    turn(lambda: "1" in a.report()["round_trip_ms"], a, b)
    assert 0 < a.report()["round_trip_ms"]["1"] < 1000 * PATIENCE
    assert not a.rejected


def test_an_answer_to_no_heartbeat_is_passed_over(stage):
    with stage(2).scripted() as (a, other):
        for _ in range(3):
            other.say(small(Kind.PONG))
        other.serve(*frames(round=9)[0])
        assert rounds_of(events_until(bool, a)) == [9]
        assert len(a._neighbours[1].round_trips) <= 1
