"""What becomes of changes in who is there: events for a peer, and lines for its folder."""

from __future__ import annotations

from p2pfl.membership.members import Change, Status, incarnation
from p2pfl.peer.events import PeerDown, PeerUp
from p2pfl.runtime.notices import MOST, Notices
from p2pfl.runtime.presence import Lives

ALIVE, SUSPECT, DEAD, _ = Status
ANEW = [PeerDown(1), PeerUp(1, anew=True)]


def told(life: int) -> Change:
    return Change(1, ALIVE, incarnation(life), "")


def test_a_new_life_is_told_once_whoever_tells_first():
    lives = Lives()
    assert lives.meet(1, 10) == []
    assert lives.events(told(20)) == ANEW
    assert lives.meet(1, 20) == []
    assert lives.meet(1, 30) == ANEW
    assert lives.events(told(30)) == [PeerUp(1)]
    assert lives.meet(1, 20) == []  # a hello that was long under way


def test_a_life_that_was_made_up_hides_no_new_one():
    lives = Lives()
    lives.meet(1, 10)
    assert lives.events(told(1000)) == ANEW
    assert lives.meet(1, 10) == []  # it connects again
    assert lives.meet(1, 20) == ANEW
    assert lives.meet(1, 20) == []
    assert lives.events(told(1000)) == [PeerUp(1)]  # it has outbid what was said


def test_who_changes_without_end_is_written_down_now_and_then_and_as_it_is_at_last():
    notices, found = Notices(), []
    for step in range(1000):
        now = step / 100
        notices.note((now, 1, DEAD if step % 2 else ALIVE))
        found += notices.take(now)
    assert MOST + 8 <= len(found) <= MOST + 10
    assert [status for _, _, status in found[:MOST]] == [ALIVE, DEAD] * (MOST // 2)
    assert notices.take(11.0) == [(9.99, 1, DEAD)]
    assert notices.take(100.0) == []


def test_what_becomes_of_one_peer_at_once_is_written_down_in_order():
    notices = Notices()
    for number in range(100):
        for status in (SUSPECT, DEAD, ALIVE):
            notices.note((5.0, number, status))
    found = notices.take(5.0)
    assert found == [(5.0, k, status) for k in range(100) for status in (SUSPECT, DEAD, ALIVE)]
