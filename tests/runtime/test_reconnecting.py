"""Connections made again and again: no link is lost by it, and nothing piles up behind."""

from __future__ import annotations

import errno
import math
import time
from contextlib import contextmanager

import pytest
import zmq
from links_cases import (
    address_of,
    events_until,
    expect,
    hello,
    meet,
    rounds_of,
    send,
    small,
    stranger,
    turn,
    vanish,
)

from p2pfl.membership.members import Claim, Status, incarnation
from p2pfl.membership.messages import IN_EXCHANGE, Message, encode
from p2pfl.membership.messages import Kind as About
from p2pfl.membership.timers import Timers
from p2pfl.runtime import meeting, neighbour, sockets
from p2pfl.runtime.endpoint import Endpoint
from p2pfl.runtime.wire import Kind
from p2pfl.security.gate import News


@pytest.fixture
def dialled(monkeypatch):
    """Whom anybody has dialled, in order."""
    peers, dial = [], Endpoint.dial

    def noted(self, peer, address, hello):
        peers.append(peer)
        return dial(self, peer, address, hello)

    monkeypatch.setattr(Endpoint, "dial", noted)
    return peers


@pytest.fixture
def three(stage):
    """Three peers that look after each other."""
    made = stage(3)
    made.timers = Timers()
    return made


@contextmanager
def no_more_sockets(monkeypatch):
    """Let no socket be made; yield how often somebody tried."""
    tried = []

    def full(context, kind):
        tried.append(kind)
        raise zmq.ZMQError(errno.EMFILE)

    with monkeypatch.context() as patched:
        patched.setattr(zmq.Context, "socket", full)
        yield tried


def met(b, last: int):
    """Return a message that says that a peer is in ever later lives."""
    claims = [
        Claim(b.me, Status.ALIVE, incarnation(life), 0, address_of(b), 2)
        for life in range(last - IN_EXCHANGE, last)
    ]
    return encode(Message(About.EXCHANGE, 0, 0, incarnation(5), 0, "", tuple(claims)))


def still_train(a, b) -> bool:
    turn(lambda: 1 in a._neighbours and a._neighbours[1].link.welcomed, a, b)
    turn(lambda: a._meeting.giving[1].connection is not None, a, b)
    b.send(send(0, round=7))
    return rounds_of(events_until(lambda seen: 7 in rounds_of(seen), a, b))[-1] == 7


def test_lives_that_somebody_makes_up_for_another_cost_a_link_or_two(three, dialled):
    with three.scripted() as (a, other, b):
        dialled.clear()
        for k in range(1, 4):
            other.say(small(Kind.MEMBERS, other.me), met(b, 10 + k * IN_EXCHANGE))
        turn(lambda: a.lookout.noticed, a, b)
        assert still_train(a, b)
        assert 0 < dialled.count(1) <= 5


def test_hellos_of_ever_later_lives_cost_a_few_links(three, dialled):
    with three.scripted() as (a, other, b):
        dialled.clear()
        for life in range(6, 300):
            other.say(*hello(other.me, life=life))
        turn(lambda: a._handshake.lives[other.me] == 299, a, b)
        began = time.monotonic()
        assert still_train(a, b)
        assert dialled.count(other.me) <= meeting.DIALS + 2 + time.monotonic() - began


def test_a_link_that_has_dialled_again_is_still_guarded(stage):
    """What the gate hears of the socket before, however late, is not of this one."""
    a, b = stage(2).all_met()
    link = a._neighbours[1].link
    for _ in range(100):
        a._endpoint.dial_again(link)
        turn(lambda: link.welcomed, a, b)
        time.sleep(0.001)
        connections = a._endpoint.gate._connections
        turn(lambda: any(one.link is not None for one in connections._open.values()), a, b)


def test_the_end_of_the_last_connection_is_not_that_of_the_next(stage, monkeypatch):
    a, b = stage(2).all_met()
    link = a._neighbours[1].link
    before = link.number
    a._endpoint.dial_again(link)
    turn(lambda: link.welcomed, a, b)
    late = [News(before, zmq.EVENT_DISCONNECTED, 0)]
    with monkeypatch.context() as patched:
        patched.setattr(a._endpoint.gate, "news", lambda: late)
        a._endpoint.tend()
    assert link.welcomed


def test_where_there_is_no_room_for_a_socket_it_is_tried_again(stage, monkeypatch):
    monkeypatch.setattr(sockets, "TRY_AGAIN", 0.05)
    a, b = stage(2).all_met()
    link = a._neighbours[1].link
    with no_more_sockets(monkeypatch) as tried, monkeypatch.context() as patched:
        # That the first connection stands may be heard only now, and it would do as well.
        patched.setattr(a._endpoint.gate, "news", list)
        a._endpoint.dial_again(link)
        turn(lambda: len(tried) > 2, a, b)
        assert not link.welcomed
    turn(lambda: link.welcomed, a, b)
    assert still_train(a, b)


def test_a_peer_that_there_is_no_room_to_dial_is_counted_and_dialled_later(stage, monkeypatch):
    a, b = stage(2).all_met()
    a._meeting.drop(1)
    with no_more_sockets(monkeypatch):
        assert a._meeting.reach(1) is None
    why = "peer 1: too many links: Too many open files (see `ulimit -n`)"
    assert a.report()["rejections"] == {why: 1}
    assert a._meeting.reach(1)
    assert still_train(a, b)


def test_of_many_connections_of_one_neighbour_the_last_two_stay(stage):
    with stage(2).scripted() as (a, other), zmq.Context() as context:
        dialled = []
        for round in range(6):
            one = context.socket(zmq.DEALER)
            one.linger = 0
            one.connect(address_of(a))
            one.send_multipart(hello(other.me))
            dialled.append(one)
            turn(lambda one=one: one.poll(0), a)
            a.send(send(1, round=round))
        cut = "127.0.0.1: a later connection of the same peer"
        turn(lambda: a._endpoint.gate.refused() == {cut: 5}, a)  # of seven
        dialled[-1].recv()
        dialled[-1].send(small(Kind.CREDIT, number=1))
        turn(lambda: dialled[-1].poll(0), a)
        for one in dialled:
            one.close()


def test_somebody_elses_connection_with_a_descriptor_of_before_is_not_cut(stage):
    with stage(2).scripted() as (a, _), stranger(address_of(a)) as sock:
        turn(lambda: len(a._endpoint.gate._connections._open) == 3, a)
        sock.send_multipart([b"anything"])
        for descriptor in [*a._endpoint.gate._connections._open]:
            a._endpoint.gate.cut(descriptor, "it is another", (("127.0.0.1", 1),) * 2)
        assert still_there(a, sock)


def still_there(a, sock) -> bool:
    sock.send_multipart(hello(9))
    turn(lambda: sock.poll(0), a)
    return not a._endpoint.gate.refused()


@pytest.mark.parametrize("says_goodbye", [True, False])
def test_nothing_is_kept_for_those_who_are_gone(stage, says_goodbye: bool):
    three = stage(3)
    a, b, c = (three.peer(node, None if node == 0 else (0,)) for node in range(3))
    meet(a, b, c)
    expect(a, b, c)
    a.send(send(1, 2, round=0))
    events_until(lambda seen: 0 in rounds_of(seen), b, a, c)
    assert a._meeting.giving[1].outflow.kept
    if says_goodbye:
        b._attendance.leave()
        for one in b._neighbours.values():
            one.say_goodbye(b._about(Kind.BYE), b"")
        turn(lambda: 1 not in a._neighbours, a, b, c)
    else:
        vanish(b)
        turn(lambda: 1 not in a._neighbours, a, c)
    assert 1 not in a._meeting.giving
    assert 2 in a._meeting.giving


def test_offences_are_forgiven_one_by_one(stage, monkeypatch):
    a, _ = stage(2).all_met()
    one, now = a._neighbours[1], time.monotonic()
    for k in range(3 * neighbour.MOST_OFFENCES):
        monkeypatch.setattr(time, "monotonic", lambda k=k: now + k * neighbour.FORGIVEN)
        one.offend()
        assert one.offences <= 2
    for _ in range(neighbour.MOST_OFFENCES):
        one.offend()
    assert one.is_lost(math.inf, 8)
