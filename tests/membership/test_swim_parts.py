"""The parts of a peer by themselves: alarms, suspicions, rumours, and what is refused."""

from __future__ import annotations

import ast
import math
from pathlib import Path

import pytest
from swim_cases import ALIVE, BASE, DEAD, LEFT, SUSPECT, claim, make

import p2pfl.membership
from p2pfl.membership.alarms import Alarms
from p2pfl.membership.members import Status
from p2pfl.membership.rumours import Rumours, times
from p2pfl.membership.suspicion import Suspicion
from p2pfl.membership.swim import Swim
from p2pfl.membership.timers import Timers

SOURCES = sorted(Path(p2pfl.membership.__file__).parent.glob("*.py"))


def test_rumours_are_told_a_number_of_times_those_told_least_first():
    rumours = Rumours()
    for peer in (1, 2, 3):
        rumours.add(claim(peer, DEAD), peers=9)
    assert [one.peer for one in rumours.take(2)] == [3, 2]
    assert [one.peer for one in rumours.take(2)] == [1, 3]
    rumours.add(claim(3, ALIVE), peers=9)
    told = []
    while rumours:
        told += rumours.take(8)
    assert times(9) == 4
    assert [sum(one.peer == peer for one in told) for peer in (1, 2, 3)] == [3, 3, 4]
    assert claim(3, DEAD) not in told
    assert (times(10), times(200)) == (8, 12)


def test_more_accusers_leave_less_time():
    times = []
    suspicion = Suspicion(10.0, 1, 32, Timers())
    for accuser in (1, 1, 2, 3, 4, 5, 6):
        suspicion.confirm(accuser)
        times.append(suspicion.deadline - 10.0)
    shortest = 6 * 0.5 * math.log10(32)
    assert times[0] == times[1] == pytest.approx(4 * shortest)
    assert times[1] > times[2] > times[3] > times[4] > times[5]
    assert times[5] == times[6] == pytest.approx(shortest)
    assert Suspicion(10.0, 1, 5, Timers()).deadline == 13.0  # too few for anybody to agree


def test_alarms_move_and_are_called_off():
    rung = []
    alarms = Alarms()

    def ring(now, about):
        rung.append((now, about))

    for time, about in ((3.0, 1), (2.0, 2), (1.0, 3), (2.0, 4)):
        alarms.set(time, ring, about)
    alarms.set(2.5, ring, 3)
    alarms.cancel(ring, 1)
    assert (alarms.due(), len(alarms)) == (2.0, 3)
    alarms.ring(2.6)
    assert rung == [(2.6, 2), (2.6, 4), (2.6, 3)]
    assert alarms.due() == math.inf


@pytest.mark.parametrize(
    "wrong",
    [
        {"probe": 0.0},
        {"probe": math.inf},
        {"gossip": math.nan},
        {"timeout": 0.5},
        {"indirect": 0},
        {"fanout": 1.5},
        {"suspicion_mult": -1},
    ],
)
def test_timers_that_make_no_sense_are_refused(wrong):
    with pytest.raises(ValueError, match=next(iter(wrong))):
        Swim(0, BASE, Timers(**wrong), {}, 1)


@pytest.mark.parametrize(
    "wrong",
    [
        {"me": -1},
        {"me": 2**31 + 1},
        {"incarnation": 0},
        {"incarnation": 2**64},
        {"others": {-3: ""}},
        {"others": {3: "x" * 201}},
        {"address": "é" * 101},
    ],
)
def test_arguments_out_of_range_are_refused(wrong):
    right = {"me": 0, "incarnation": BASE, "timers": Timers(), "others": {}, "seed": 1}
    with pytest.raises(ValueError, match=r"peer|incarnation|address"):
        Swim(**{**right, **wrong})


def test_a_round_out_of_range_is_refused():
    swim = make()
    swim.round = 3
    assert swim.round == swim.members[0].round == 3
    with pytest.raises(ValueError, match="round"):
        swim.round = -1


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: path.stem)
def test_there_is_no_clock_socket_thread_or_shared_randomness(path):
    world = {"time", "os", "threading", "socket", "asyncio", "zmq", "subprocess", "torch", "numpy"}
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            assert not world & {alias.name.split(".")[0] for alias in node.names}
        if isinstance(node, ast.ImportFrom):
            assert node.module.split(".")[0] not in world | {"random"}
            if node.module.startswith("p2pfl"):
                assert node.module.startswith(("p2pfl.membership", "p2pfl.errors"))
        if isinstance(node, ast.Attribute) and ast.unparse(node.value) == "random":
            assert node.attr == "Random"
        if isinstance(node, ast.For | ast.comprehension):
            assert "set(" not in ast.unparse(node.iter)


def test_statuses_are_ordered_by_gravity():
    assert sorted(Status) == [ALIVE, SUSPECT, DEAD, LEFT]
