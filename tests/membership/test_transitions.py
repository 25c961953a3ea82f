"""Every transition: what is believed, and what becomes of it."""

from __future__ import annotations

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
from p2pfl.membership.members import MOST_INCARNATION, MOST_MEMBERS, incarnation
from p2pfl.membership.messages import Kind

SAME, LESS, MORE = BASE, BASE - 1, BASE + 1


@pytest.mark.parametrize(
    ("held", "said", "number", "then"),
    [
        (ALIVE, ALIVE, SAME, ALIVE),
        (ALIVE, SUSPECT, LESS, ALIVE),
        (ALIVE, SUSPECT, SAME, SUSPECT),
        (ALIVE, SUSPECT, MORE, SUSPECT),
        (ALIVE, DEAD, LESS, ALIVE),
        (ALIVE, DEAD, SAME, DEAD),
        (ALIVE, LEFT, LESS, ALIVE),
        (ALIVE, LEFT, SAME, LEFT),
        (SUSPECT, ALIVE, LESS, SUSPECT),
        (SUSPECT, ALIVE, SAME, SUSPECT),
        (SUSPECT, ALIVE, MORE, ALIVE),
        (SUSPECT, SUSPECT, MORE, SUSPECT),
        (SUSPECT, DEAD, LESS, SUSPECT),
        (SUSPECT, DEAD, SAME, DEAD),
        (SUSPECT, LEFT, SAME, LEFT),
        (DEAD, ALIVE, SAME, DEAD),
        (DEAD, ALIVE, MORE, ALIVE),
        (DEAD, SUSPECT, SAME, DEAD),
        (DEAD, SUSPECT, MORE, SUSPECT),
        (DEAD, DEAD, MORE, DEAD),
        (DEAD, LEFT, SAME, LEFT),
        (LEFT, ALIVE, SAME, LEFT),
        (LEFT, ALIVE, MORE, ALIVE),
        (LEFT, SUSPECT, SAME, LEFT),
        (LEFT, DEAD, SAME, LEFT),
    ],
)
def test_gossip(held, said, number, then):
    swim = make()
    if held is not ALIVE:
        swim.hear(1.0, 2, message(Kind.GOSSIP, claim(1, held)))
        assert changes(swim) == [(1, held)]
    swim.hear(2.0, 2, message(Kind.GOSSIP, claim(1, said, number)))
    one = swim.members[1]
    assert one.status is then
    assert one.incarnation == (number if (number, said) > (SAME, held) else SAME)
    assert changes(swim) == ([(1, then)] if then is not held else [])
    assert swim.live == ((0, 1, 2, 3) if then in (ALIVE, SUSPECT) else (0, 2, 3))


@pytest.mark.parametrize(
    ("held", "said", "then"),
    [
        (ALIVE, SUSPECT, SUSPECT),
        (ALIVE, DEAD, SUSPECT),
        (ALIVE, LEFT, LEFT),
        (SUSPECT, DEAD, SUSPECT),
        (DEAD, SUSPECT, DEAD),
    ],
)
def test_hearsay_kills_nobody_we_know(held, said, then):
    swim = make()
    swim.hear(1.0, 2, message(Kind.GOSSIP, claim(1, held)))
    swim.hear(2.0, 2, message(Kind.EXCHANGE, claim(1, said)))
    assert swim.members[1].status is then


def test_hearsay_about_somebody_new_is_believed():
    swim = make()
    told = (claim(7, DEAD), claim(8, ALIVE, address="tcp://h8:1"), claim(9, SUSPECT))
    swim.hear(1.0, 2, message(Kind.EXCHANGE, *told))
    assert changes(swim) == [(7, DEAD), (8, ALIVE), (9, SUSPECT)]
    assert swim.live == (0, 1, 2, 3, 8, 9)
    assert swim.members[8].address == "tcp://h8:1"


@pytest.mark.parametrize("said", [SUSPECT, DEAD, LEFT])
@pytest.mark.parametrize("number", [SAME, MORE, MORE + 5])
@pytest.mark.parametrize("kind", [Kind.GOSSIP, Kind.EXCHANGE])
def test_what_is_said_of_us_is_refuted(said, number, kind):
    swim = make()
    run(swim, 1.0, answering=(1, 2, 3))
    swim.hear(1.0, 2, message(kind, claim(0, said, number)))
    assert (swim.members[0].status, swim.members[0].incarnation) == (ALIVE, number + 1)
    assert swim.statistics.refutations == 1
    sent = run(swim, 1.2, answering=(1, 2, 3))
    assert any(claim(0, ALIVE, number + 1, by=0) in body.claims for _, body in sent)
    assert changes(swim) == []


def test_old_claims_about_us_are_nothing():
    swim = make()
    swim.hear(1.0, 2, message(Kind.GOSSIP, claim(0, DEAD, LESS), claim(0, ALIVE, SAME)))
    assert swim.members[0].incarnation == SAME
    assert swim.statistics.refutations == 0


def test_nobody_but_us_raises_our_incarnation():
    swim = make()
    swim.hear(1.0, 2, message(Kind.GOSSIP, claim(0, ALIVE, MORE + 3)))
    assert swim.members[0].incarnation == MORE + 4


def test_the_highest_incarnation_of_all_starts_no_endless_talk():
    one, two = make(), make()
    for swim in (one, two):
        swim.hear(1.0, 2, message(Kind.GOSSIP, claim(1, DEAD, MOST_INCARNATION)))
        swim.hear(1.0, 2, message(Kind.GOSSIP, claim(0, DEAD, MOST_INCARNATION)))
        swim.letters()
    one.hear(1.1, 1, message(Kind.GOSSIP, claim(1, DEAD, by=1)))
    told = message(Kind.GOSSIP, claim(0, DEAD, MOST_INCARNATION))
    one.hear(1.2, 1, told)
    assert one.members[0].incarnation == BASE
    assert letters(one) == []


def test_a_suspect_dies_in_time_and_not_before():
    swim = make(n=3)
    run(swim, 1.0, answering=(1, 2))
    swim.hear(1.0, 2, message(Kind.GOSSIP, claim(1, SUSPECT)))
    run(swim, 3.99, answering=(1, 2))
    assert swim.members[1].status is SUSPECT
    run(swim, 4.0, answering=(1, 2))
    assert swim.members[1].status is DEAD
    assert changes(swim) == [(1, SUSPECT), (1, DEAD)]


def test_a_suspect_that_objects_lives():
    swim = make(n=3)
    run(swim, 1.0, answering=(1, 2))
    swim.hear(1.0, 2, message(Kind.GOSSIP, claim(1, SUSPECT)))
    run(swim, 1.5, answering=(2,))
    swim.hear(1.5, 1, message(said=MORE))
    assert changes(swim) == [(1, SUSPECT), (1, ALIVE)]
    assert swim.statistics.refuted == 1
    run(swim, 3.5, answering=(1, 2))
    swim.hear(3.5, 2, message(Kind.GOSSIP, claim(1, SUSPECT, MORE)))
    run(swim, 6.49, answering=(1, 2))  # the time of the first is over: the second has its own
    assert swim.members[1].status is SUSPECT


def test_who_is_gone_is_told_so_whatever_it_sends():
    for kind in (Kind.GOSSIP, Kind.ACK, Kind.NACK, Kind.PING):
        swim = make()
        swim.hear(1.0, 2, message(Kind.GOSSIP, claim(1, DEAD)))
        swim.letters()
        swim.hear(2.0, 1, message(kind))
        ((to, body),) = letters(swim)
        assert to == 1
        assert body.claims[0] == claim(1, DEAD, by=0, address="tcp://h1:1")
        swim.hear(2.1, 1, message(Kind.GOSSIP, said=MORE))
        assert swim.members[1].status is ALIVE


def test_a_restart_shows_even_if_nobody_had_noticed_the_end():
    swim = make()
    swim.round = 7
    swim.hear(1.0, 1, message(round=9))
    swim.hear(2.0, 1, message(said=incarnation(2), round=3, address="tcp://new:1"))
    assert changes(swim) == [(1, ALIVE)]
    one = swim.members[1]
    assert (one.round, one.progressed_at, one.address) == (3, 2.0, "tcp://new:1")
    swim.hear(3.0, 1, message(said=BASE, round=11))  # from before
    assert swim.members[1] == one


def test_rounds_are_heard_from_others_too_and_never_go_back():
    swim = make()
    swim.hear(1.0, 2, message(Kind.EXCHANGE, claim(1, ALIVE, round=5)))
    swim.hear(2.0, 1, message(round=4))
    assert (swim.members[1].round, swim.members[1].progressed_at) == (5, 1.0)
    swim.hear(3.0, 1, message(round=6))
    assert (swim.members[1].round, swim.members[1].progressed_at) == (6, 3.0)
    assert changes(swim) == []


def test_an_address_is_not_forgotten():
    swim = make()
    swim.hear(1.0, 2, message(Kind.GOSSIP, claim(1, SUSPECT, MORE)))
    assert swim.members[1].address == "tcp://h1:1"


def test_made_up_members_do_not_fill_the_memory():
    swim = make()
    for first in range(8, MOST_MEMBERS, 8):
        told = (claim(k, DEAD) for k in range(first, first + 8))
        swim.hear(1.0, 2, message(Kind.GOSSIP, *told))
        swim.letters()
    with pytest.raises(RemoteProtocolError):
        swim.hear(1.0, 2, message(Kind.GOSSIP, claim(MOST_MEMBERS, DEAD)))
    for k in range(4, 8):
        swim.hear(1.0, k, message())
    assert len(swim.members) == MOST_MEMBERS
    assert 10 in swim.members
