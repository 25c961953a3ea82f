"""How many messages of one sender may lie unopened."""

import math

import pytest
import torch

from p2pfl.algorithms import choco, dpsgd
from p2pfl.algorithms.averaging import Params
from p2pfl.codec import identity
from p2pfl.codec.base import Dense
from p2pfl.errors import RemoteProtocolError
from p2pfl.learning.optim import sgd
from p2pfl.peer.events import Received
from p2pfl.peer.mail import FAR, ROOM, Mail
from p2pfl.peer.plan import BACKLOG, Pace
from p2pfl.topology import metropolis


def fill(mail: Mail, count: int, size: int, kind: type = Params) -> None:
    for round in range(len(mail.unopened[0]), count):
        mail.put(Received(0, round, 1, -math.inf, kind(torch.zeros(1, 2)), size), 0)


@pytest.mark.parametrize(
    ("algorithm", "kind", "patience"),
    [(dpsgd(sgd(0.1)), Params, math.inf), (choco(sgd(0.1), identity()), Dense, 5.0)],
)
@pytest.mark.parametrize(("size", "most"), [(ROOM, FAR * BACKLOG), (ROOM // 100, 100)])
def test_where_none_may_be_dropped_there_is_an_end_to_them(algorithm, kind, patience, size, most):
    mail = Mail(1, algorithm, metropolis(), 2, Pace(10**6, patience=patience))
    fill(mail, most, size, kind)
    with pytest.raises(RemoteProtocolError, match="0 is too far ahead: there is no room"):
        fill(mail, most + 1, size, kind)
    assert len(mail.unopened[0]) == most
    assert mail.newest(0) == most - 1


def test_where_only_the_newest_counts_older_ones_make_room():
    mail = Mail(1, dpsgd(sgd(0.1)), metropolis(), 2, Pace(10**6, patience=5.0))
    fill(mail, 100, ROOM)
    assert [one.round for one in mail.unopened[0]] == list(range(100 - BACKLOG, 100))
