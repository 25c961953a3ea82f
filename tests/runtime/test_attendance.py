"""Who is waited for, when others and our own links say different things of it."""

from __future__ import annotations

from types import SimpleNamespace
from unittest.mock import Mock

from p2pfl.peer.events import PeerSuspected, PeerUp
from p2pfl.runtime.attendance import Attendance


def test_who_is_there_for_others_is_not_waited_for_until_we_reach_it():
    link = SimpleNamespace(welcomed=False, trouble="")
    one = Mock(link=link, seems_wrong=False)
    one.has_left.return_value = one.is_lost.return_value = one.has_broken.return_value = False
    one.is_cut_off.side_effect = lambda grace: not link.welcomed
    meeting = Mock(neighbours={1: one}, met={}, handshake=Mock(refused={}))
    attendance = Attendance(meeting, Mock(), Mock())
    attendance.lookout = lookout = Mock()
    lookout.strangers.return_value = []

    def changes(*heard):
        lookout.tend.return_value = [*heard]
        return attendance.changes({1: one}, 1)

    assert changes() == [PeerSuspected(1)]
    assert changes() == []
    assert changes(PeerUp(1)) == [PeerUp(1), PeerSuspected(1)]  # it has objected to a suspicion
    link.welcomed = True
    assert changes() == [PeerUp(1)]
    assert changes(PeerUp(1)) == [PeerUp(1)]
