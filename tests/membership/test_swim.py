"""What a peer does by itself: probing, telling, joining, leaving, waking up late."""

from __future__ import annotations

import math

import pytest
from swim_cases import (
    ALIVE,
    BASE,
    DEAD,
    LEFT,
    SUSPECT,
    changes,
    claim,
    letters,
    make,
    message,
    run,
)

from p2pfl.errors import RemoteProtocolError
from p2pfl.membership.messages import Kind
from p2pfl.membership.swim import Swim
from p2pfl.membership.timers import Timers


def first_ping(swim):
    """Return when somebody is probed, who, and the number."""
    while True:
        now = swim.due()
        swim.tick(now)
        for to, body in letters(swim):
            if body.kind is Kind.PING:
                return now, to, body.number


def test_all_are_probed_once_in_a_pass():
    swim = make(n=5)
    pinged = []
    while len(pinged) < 12:
        now = swim.due()
        swim.tick(now)
        for to, body in letters(swim):
            if body.kind is Kind.PING:
                pinged.append(to)
                swim.hear(now, to, message(Kind.ACK, number=body.number, target=to))
    assert [sorted(pinged[i : i + 4]) for i in (0, 4, 8)] == [[1, 2, 3, 4]] * 3


def test_who_does_not_answer_is_probed_by_others_and_then_suspected():
    swim = make(n=6)
    began, target, number = first_ping(swim)
    asked = [to for to, body in run(swim, began + 0.3) if body.kind is Kind.PREQ]
    assert len(set(asked)) == 3
    assert target not in asked
    for relay in asked:
        swim.hear(began + 0.45, relay, message(Kind.NACK, number=number, target=target))
    swim.letters()
    run(swim, began + 0.5)
    assert swim.members[target].status is SUSPECT
    assert swim._prober.health == 0  # all relays were heard: it is not us


def test_silent_relays_make_us_doubt_ourselves():
    swim = make(n=6)
    began, *_ = first_ping(swim)
    run(swim, began + 0.5)
    assert swim._prober.health == 3
    assert swim.due() - began <= 4 * 0.5


def test_an_answer_through_another_saves():
    swim = make(n=6)
    began, target, number = first_ping(swim)
    asked = [to for to, body in run(swim, began + 0.3) if body.kind is Kind.PREQ]
    swim.hear(began + 0.4, asked[0], message(Kind.ACK, number=number, target=target))
    run(swim, began + 0.6)
    assert swim.members[target].status is ALIVE
    assert swim.statistics.rescued == 1


@pytest.mark.parametrize("wrong", ["number", "sender", "target"])
def test_answers_to_other_questions_save_nobody(wrong):
    swim = make(n=3, timers=Timers(indirect=1))
    began, target, number = first_ping(swim)
    other = 3 - target
    ack = {"number": number + (wrong == "number"), "target": other if wrong == "target" else target}
    swim.hear(began + 0.1, other if wrong == "sender" else target, message(Kind.ACK, **ack))
    run(swim, began + 0.5)
    assert swim.members[target].status is SUSPECT


def test_a_relay_passes_on_an_ack_or_says_that_there_is_none():
    swim = make()
    swim.hear(0.0, 1, message(Kind.PREQ, number=77, target=2))
    ((to, ping),) = letters(swim)
    assert (to, ping.kind) == (2, Kind.PING)
    swim.hear(0.1, 2, message(Kind.ACK, number=ping.number, target=2))
    ((to, ack),) = letters(swim)
    assert (to, ack.kind, ack.number, ack.target) == (1, Kind.ACK, 77, 2)
    swim.hear(0.2, 1, message(Kind.PREQ, number=78, target=2))
    sent = run(swim, 0.2 + 0.8 * (0.5 - 0.3) + 1e-6)
    assert [(to, m.number, m.target) for to, m in sent if m.kind is Kind.NACK] == [(1, 78, 2)]
    assert not swim._prober.relays


def test_a_flood_of_requests_to_probe_is_bounded():
    swim = make()
    for number in range(1000):
        swim.hear(0.0, 1, message(Kind.PREQ, number=number, target=2))
    assert len(swim._prober.relays) == len(letters(swim)) == 256


def test_a_hint_probes_at_once_and_once():
    swim = make()
    swim.probe(0.0, 2)
    swim.probe(0.0, 2)
    swim.probe(0.0, 0)
    swim.probe(0.0, 99)
    assert [(to, body.kind) for to, body in letters(swim)] == [(2, Kind.PING)]
    assert swim.members[2].status is ALIVE


def test_a_suspect_hears_of_it_with_the_next_ping():
    swim = make(n=3)
    swim.hear(0.0, 2, message(Kind.GOSSIP, claim(1, SUSPECT)))
    swim.probe(0.0, 1)
    ((_, ping),) = letters(swim)
    assert ping.claims[0] == claim(1, SUSPECT, by=0, address="tcp://h1:1")


def test_who_fires_late_accuses_nobody():
    swim = make(n=3)
    began, target, _ = first_ping(swim)
    swim.hear(began + 0.1, target, message(Kind.GOSSIP, claim(3 - target, SUSPECT)))
    own = swim.members[0].incarnation
    swim.tick(began + 4.0)  # a verdict was due at 0.5, a death at 3.1
    assert swim.members[target].status is ALIVE
    assert swim.members[3 - target].status is SUSPECT
    assert swim.members[0].incarnation == own + 1  # before anybody says anything
    assert swim.statistics.stalls == 1
    run(swim, began + 6.9, answering=(1, 2))
    assert swim.members[3 - target].status is SUSPECT
    run(swim, began + 7.7, answering=(1, 2))
    assert swim.members[3 - target].status is DEAD


def test_a_little_late_is_nothing():
    swim = make(n=3)
    swim.tick(swim.due() + 0.2)
    assert swim.statistics.stalls == 0
    assert swim.members[0].incarnation == BASE


def test_few_letters_while_nothing_happens():
    swim = make(n=3)
    run(swim, 30.0)
    for peer in (1, 2):
        assert swim.members[peer].status is DEAD  # nobody answered
    swim.letters()
    sent = run(swim, 90.0)
    assert {body.kind for _, body in sent} == {Kind.EXCHANGE}  # the dead are tried again
    assert 5 <= len(sent) <= 30


def test_joining_is_one_exchange_and_is_tried_again():
    swim = Swim(5, BASE, Timers(), {}, 1, "tcp://me:1")
    swim.start(0.0)
    swim.join(0.0, [3, 5])
    ((to, body),) = letters(swim)
    assert (to, body.kind, body.number, body.address) == (3, Kind.EXCHANGE, 1, "tcp://me:1")
    again = run(swim, 20.0)
    assert again
    assert {to for to, _ in again} == {3}
    told = (claim(1, ALIVE, address="tcp://h1:1"), claim(2, LEFT))
    swim.hear(20.0, 3, message(Kind.EXCHANGE, *told, address="tcp://h3:1"))
    assert swim.live == (1, 3, 5)
    assert changes(swim) == [(3, ALIVE), (1, ALIVE), (2, LEFT)]


def test_an_exchange_of_many_comes_in_parts():
    swim = make(n=300)
    swim.hear(1.0, 1, message(Kind.EXCHANGE, number=1))
    answer = [body for to, body in letters(swim) if to == 1]
    assert [body.kind for body in answer] == [Kind.EXCHANGE] * 3
    assert [body.number for body in answer] == [0, 0, 0]
    assert sorted(one.peer for body in answer for one in body.claims) == list(range(1, 300))


def test_leaving_is_the_last_word():
    swim = make(n=12)
    swim.leave(1.0)
    farewell = letters(swim)
    assert len({to for to, _ in farewell}) == 8
    assert all(claim(0, LEFT, by=0) in body.claims for _, body in farewell)
    swim.hear(2.0, 1, b"anything")
    swim.hear(2.0, 1, message(Kind.PING, claim(0, DEAD)))
    swim.probe(2.0, 1)
    swim.join(2.0, [1])
    swim.leave(2.0)
    swim.tick(100.0)
    assert swim.due() == math.inf
    assert letters(swim) == []
    assert swim.members[0].status is LEFT
    assert 0 not in swim.live


@pytest.mark.parametrize(
    ("sender", "body"),
    [
        (0, message()),
        (1, message(Kind.PREQ, number=1, target=0)),
        (1, b""),
        (1, message(Kind.GOSSIP, claim(2, DEAD))[:-1]),
    ],
)
def test_nothing_changes_with_what_is_malformed(sender, body):
    swim = make()
    before = dict(swim.members)
    with pytest.raises(RemoteProtocolError):
        swim.hear(1.0, sender, body)
    assert dict(swim.members) == before
    assert letters(swim) == []
