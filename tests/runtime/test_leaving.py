"""Calls that come too late, neighbours that never acknowledge, and what may not be dialled."""

from __future__ import annotations

import math

import pytest
from links_cases import ANYWHERE, events_until, expect, frames, model, rounds_of, send, small, turn

from p2pfl.errors import RunError, UserError
from p2pfl.peer.events import PeerDown
from p2pfl.runtime import attendance, chunks, wire
from p2pfl.runtime.endpoint import Endpoint
from p2pfl.runtime.wire import MOST_CREDIT, Header, Kind


def test_who_has_left_cannot_call_the_run_off(stage):
    with stage(3).scripted() as (a, other, b):
        other.serve(*frames(other.me, round=0)[0])
        events_until(bool, a, b)
        other.say(small(Kind.BYE, other.me, round=1), b"done")
        assert events_until(bool, a, b) == [PeerDown(other.me)]
        other.say(small(Kind.ABORT, other.me), b"and now for something else")
        b.send(send(0))
        assert rounds_of(events_until(bool, a, b)) == [0]


def test_nobody_calls_off_a_run_that_trains(stage):
    """Even who was there from the start and has sent no model yet; it is taken for a goodbye."""
    with stage(3).scripted() as (a, other, b):
        expect(a, b, phase=wire.TRAINING)
        other.say(small(Kind.ABORT, other.me), b"nothing heard of you")
        assert events_until(bool, a, b) == [PeerDown(other.me)]
        assert a.events() == []


def test_nor_does_who_was_not_to_be_there_from_the_start(stage):
    with stage(2).scripted() as (a, other):
        a._meeting._awaited = frozenset()  # as where it comes late
        other.say(small(Kind.ABORT), b"nothing heard of the others")
        assert events_until(bool, a) == [PeerDown(1)]


def test_a_goodbye_waits_for_the_last_model_also_over_a_connection_that_broke(stage, monkeypatch):
    monkeypatch.setattr(attendance, "GRACE", 0.5)
    with stage(2).scripted() as (a, other):
        other.say(small(Kind.BYE, round=6), b"done")
        turn(lambda: a._neighbours[1]._goodbye is not None, a)
        a._endpoint.dial_again(a._neighbours[1].link)
        assert a.events() == []  # not at once: the model may still come
        assert events_until(bool, a) == [PeerDown(1)]


def test_who_takes_models_and_acknowledges_none_is_given_up(stage):
    with stage(2).scripted() as (a, other):
        a.expect(1, chunks.schema(model()), False)
        a._room = 2
        sent, lost = 0, []
        while not lost:
            other.say(small(Kind.CREDIT, number=1))
            sent += 1
            assert sent < 100
            a.send(send(1, round=sent))
            turn(lambda: other.dialler.poll(0) or 1 not in a._neighbours, a)
            lost = [1] if 1 not in a._neighbours else []
            other.served()
        assert sent > MOST_CREDIT


def test_what_only_who_dials_may_say_is_counted_on_the_other_link_too(stage):
    with stage(2).scripted() as (a, other):
        other.serve(small(Kind.CREDIT, number=3))
        other.serve(wire.pack(Header(Kind.WELCOME, b"another!", 1, 1)))
        turn(lambda: a.rejected.total() == 2, a)
        assert a.rejected == {"peer 1: an unexpected CREDIT": 1, "peer 1: an unexpected WELCOME": 1}


def test_heartbeats_of_one_who_reads_no_answers_pile_nothing_up(stage):
    with stage(2).scripted() as (a, _):
        one = a._neighbours[1]
        one.link.broken_since = math.inf  # as if nothing could be handed over
        for _ in range(50):
            one.hear(b"", wire.unpack(small(Kind.PING)), a._about(Kind.PONG))
        assert len(one.link.unsent) == 1
        one.link.broken_since = None


@pytest.mark.parametrize(
    ("address", "why"),
    [
        ("tcp://192.0.2.7:7000", "beyond this machine: that needs keys"),
        # To ZeroMQ the first is where a connection comes from, and the second where it goes.
        ("tcp://127.0.0.1:0;192.0.2.7:7000", "which is no address"),
        ("tcp://lo;192.0.2.7:7000", "which is no address"),
        ("tcp://[x]:7000", "which is no address"),
        ("udp://127.0.0.1:7000", "which is no address"),
    ],
)
def test_nobody_is_dialled_in_clear_beyond_this_machine(address: str, why: str):
    endpoint = Endpoint("tcp://127.0.0.1:*", 1)
    try:
        with pytest.raises(UserError, match=why):
            endpoint.dial(1, address, [b""])
    finally:
        endpoint.close()


@pytest.mark.parametrize("address", ["tcp://[x]:7000", "tcp://192.0.2.7:7000", "nonsense", ""])
def test_an_address_of_no_use_that_somebody_says_is_its_own_harms_nobody(stage, address: str):
    stage = stage(2)
    a = stage.add(0, ANYWHERE, [1])
    a._meeting.drop(1)
    a._book._certain.pop(1)
    assert a._meeting.reach(1, address) is None


def test_an_address_of_no_use_that_was_told_is_only_noted(stage):
    stage = stage(2)
    a = stage.add(0, ANYWHERE, [1])
    a._meeting.drop(1)
    del a._handshake.addresses[1], a._book._certain[1]
    a._book.learn({1: "tcp://192.0.2.7:7000"})
    with pytest.raises(RunError, match=r"nothing heard .* of peer 1 .*that needs keys"):
        a.meet(0.1)


def test_reasons_of_others_stand_in_one_harmless_line():
    assert wire.reason([b"\x1b[2Jgone\nnow \xff"]) == "?[2Jgone?now \ufffd"
    assert len(wire.reason([b"x" * 5000, b"more"])) == wire.MOST_REASON
    assert wire.reason([]) == ""
