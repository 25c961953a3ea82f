"""A peer that may take part and lies: how long others believe it, and what it can cost them."""

from __future__ import annotations

import pytest
from swim_cases import ALIVE, BASE, DEAD, LEFT, SUSPECT, claim, letters, make, message, run

from p2pfl.errors import RemoteProtocolError
from p2pfl.membership.cluster import Cluster
from p2pfl.membership.members import FAR, MOST_INCARNATION, incarnation
from p2pfl.membership.messages import Kind
from p2pfl.membership.ration import Ration
from p2pfl.membership.timers import Timers

N = 12
VICTIM, LIAR = 3, 11
LIES = {
    "the highest": MOST_INCARNATION,
    "the highest but one": MOST_INCARNATION - 1,
    "what the victim just objects to": BASE + 2 * FAR,
    "what others just believe": BASE + FAR,
    "another life": incarnation(2),
    "the last of its life": incarnation(2) - 1,
}


def network():
    cluster = Cluster(Timers(), seed=1)
    cluster.boot_all(N)
    cluster.run(10.0)
    return cluster


def lie(cluster, to, *claims):
    body = message(Kind.GOSSIP, *claims, said=incarnation(cluster.processes[LIAR].boot))
    for peer in to:
        cluster._deliver(LIAR, peer, body)


def believed(cluster, victim=VICTIM):
    """Return what the honest ones believe of the victim, itself included."""
    return {k: swim.members[victim].status for k, swim in cluster.swims().items() if k != LIAR}


def all_agree(cluster):
    return set(believed(cluster).values()) == {ALIVE}


HEARERS = {
    "all": range(LIAR),
    "all others": [k for k in range(LIAR) if k != VICTIM],
    "the victim": [VICTIM],
    "one other": [0],
}


@pytest.mark.parametrize("number", LIES.values(), ids=LIES)
@pytest.mark.parametrize("hearers", HEARERS.values(), ids=HEARERS)
@pytest.mark.parametrize("status", [ALIVE, SUSPECT, DEAD, LEFT], ids=lambda one: one.name)
def test_whatever_is_said_of_a_peer_it_objects_within_a_second(status, hearers, number):
    cluster = network()
    lie(cluster, hearers, claim(VICTIM, status, number, by=LIAR))
    cluster.run(11.5)
    assert all_agree(cluster)
    cluster.run(25.0)
    assert all_agree(cluster)


def test_lies_of_many_kinds_one_after_the_other_bar_nobody():
    """The victim is led to where only it is believed, and others are told that it is dead."""
    cluster = network()
    lie(cluster, [VICTIM], claim(VICTIM, ALIVE, BASE + 2 * FAR))
    for time in range(10, 40):
        for number in LIES.values():
            lie(cluster, range(LIAR), claim(VICTIM, DEAD, number, by=LIAR))
        cluster.run(time + 0.9)
        assert all_agree(cluster)


@pytest.mark.parametrize("number", LIES.values(), ids=LIES)
@pytest.mark.parametrize("status", [ALIVE, DEAD, LEFT], ids=lambda one: one.name)
def test_who_was_lied_about_can_be_lost_and_comes_back(status, number):
    cluster = network()
    lie(cluster, range(LIAR), claim(VICTIM, status, number, by=LIAR))
    cluster.run(11.0)
    cluster.crash(LIAR)  # its key is revoked
    cluster.crash(VICTIM)
    cluster.run(50.0)
    assert set(believed(cluster).values()) == {DEAD}
    cluster.boot(VICTIM, contacts=[0])
    cluster.run(53.0)
    assert all_agree(cluster)


@pytest.mark.parametrize("number", LIES.values(), ids=LIES)
def test_who_knows_nothing_of_a_peer_is_no_easier_to_deceive(number):
    cluster = network()
    newcomer = N
    cluster.boot(newcomer)  # it has heard of nobody
    for status in (DEAD, LEFT, ALIVE):
        lie(cluster, [newcomer], claim(VICTIM, status, number, by=LIAR))
    cluster.processes[newcomer].swim.join(cluster.now, [0])
    cluster.run(12.0)
    assert all_agree(cluster)


def test_the_word_of_the_member_itself_counts_however_high():
    swim = make()
    swim.hear(1.0, 1, message(said=BASE + 3 * FAR))
    assert swim.members[1].incarnation == BASE + 3 * FAR
    swim.hear(2.0, 1, message(Kind.GOSSIP, claim(1, LEFT, BASE + 3 * FAR, by=1)))
    assert swim.members[1].status is LEFT


def test_what_others_believe_whose_clocks_are_ahead_is_objected_to():
    swim = make()
    said = BASE + 3 * FAR // 2
    swim.hear(1.0, 2, message(Kind.GOSSIP, claim(0, DEAD, said)))
    assert swim.members[0].incarnation == said + 1


def test_who_is_misled_says_itself_to_all_that_it_is_there_but_not_without_end():
    swim = make(n=20)
    run(swim, 1.0, answering=range(20))
    for number in range(1000):
        swim.hear(1.0, 2, message(Kind.GOSSIP, claim(0, DEAD, incarnation(2) + number)))
    sent = run(swim, 1.1, answering=range(20))
    assert {to for to, _ in sent} == set(range(1, 20))
    assert len(sent) < 30
    assert all(body.incarnation == incarnation(2) + 1000 for _, body in sent)


@pytest.mark.parametrize(
    "told",
    [
        message(Kind.GOSSIP, claim(4, DEAD)),
        message(Kind.EXCHANGE, claim(1, ALIVE), claim(2**31, ALIVE)),
        message(Kind.GOSSIP, claim(1, SUSPECT, by=4)),
        message(Kind.PREQ, number=1, target=4),
    ],
)
def test_nobody_is_heard_of_who_cannot_be(told):
    swim = make(n=4, among=4)
    before = dict(swim.members)
    with pytest.raises(RemoteProtocolError, match="out of range"):
        swim.hear(1.0, 2, told)
    assert dict(swim.members) == before
    assert letters(swim) == []


def test_who_asks_without_end_for_all_that_is_known_gets_ten_answers_and_one_a_second():
    swim = make(n=300)
    for _ in range(1000):
        swim.hear(1.0, 1, message(Kind.EXCHANGE, number=1))
    sent = letters(swim)
    assert len(sent) == 10 * 3  # of three parts each
    swim.hear(1.0, 2, message(Kind.EXCHANGE, number=1))
    assert [to for to, _ in letters(swim)] == [2] * 3  # others do not wait for that
    sent = [(to, m.kind) for to, m in run(swim, 1.99, answering=range(300))]
    assert (1, Kind.EXCHANGE) not in sent
    sent = [(to, m.kind) for to, m in run(swim, 2.01, answering=range(300))]
    assert sent.count((1, Kind.EXCHANGE)) == 3  # what was asked is answered in the end


def test_alarms_called_off_take_no_memory():
    swim = make()
    for number in range(20_000):
        status = SUSPECT if number % 2 else ALIVE
        swim.hear(1.0, 2, message(Kind.GOSSIP, claim(1, status, BASE + number)))
        swim.letters()
    swim.changes()
    assert len(swim._alarms._heap) <= 2 * len(swim._alarms) + 65


def test_a_ration_is_for_each_and_is_saved_up_to_its_size():
    ration = Ration(3, 2.0)
    taken = []
    for time in (0.0, 0.0, 0.0, 0.0, 1.0, 2.0, 2.0, 100.0, 100.0, 100.0, 100.0):
        taken.append(not ration.wait(time, 7))
        if taken[-1]:
            ration.take(time, 7)
    assert taken == [True, True, True, False, False, True, False, True, True, True, False]
    assert ration.wait(100.5, 7) == 1.5
    assert ration.wait(100.5, 8) == 0.0
