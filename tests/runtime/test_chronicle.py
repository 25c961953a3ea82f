"""What a chronicle makes of a run, against stories whose truth is known."""

from __future__ import annotations

import itertools

import pytest

from p2pfl.churn.script import Happening
from p2pfl.membership.members import Status
from p2pfl.membership.swim import Statistics
from p2pfl.runtime.chronicle import Chronicle

ALIVE, SUSPECT, DEAD, LEFT = Status.ALIVE, Status.SUSPECT, Status.DEAD, Status.LEFT
END = 100.0


def told(*story, absent=(), ends=range(101), nodes=4):
    """Return the summary of a run of 100 s; peers end a round every second.

    The story is of ``(time, kind, peer, ...)`` and of ``(time, observer, peer, status)``.
    """
    chronicle = Chronicle(absent)
    rounds = [(float(t), "round", peer) for t in ends for peer in range(nodes)]
    for time, what, *more in sorted([*story, *rounds], key=lambda one: one[0]):
        match what:
            case "round":
                chronicle.ended_round(time, *more)
            case "partition":
                chronicle.happened(time, Happening("partition", groups=tuple(more)))
            case "slow":
                chronicle.happened(time, Happening("slow", nodes=tuple(more), value=5.0))
            case str():
                chronicle.happened(time, Happening(what, nodes=tuple(more)))
            case observer:
                chronicle.noticed(time, observer, *more)
    return chronicle.summary(END)


def test_nothing_has_happened():
    summary = told()
    assert summary["first_s"] is None
    assert summary["happenings"] == {}
    assert summary["survivors"] == 4
    assert summary["stall_s"] == {"median": 0, "max": 0}
    counts = ("unnoticed_kills", "false_suspicions", "false_deaths")
    assert not any(summary[key] for key in (*counts, "membership_bytes_per_s"))
    times = [key for key in summary if "suspected" in key or "dead" in key or "known" in key]
    assert len(times) == 6
    assert all(summary[key] is None for key in times)


def test_how_long_it_takes_to_detect_a_crash():
    summary = told(
        (10, "kill", 3),
        (11, 0, 3, SUSPECT),
        (12, 1, 3, SUSPECT),
        (14, 0, 3, DEAD),
        (15, 2, 3, DEAD),  # has not suspected it before
        (16, 0, 3, DEAD),  # a second time does not count
        (20, "restart", 3),
        (30, "kill", 2),
        (33, 0, 2, SUSPECT),
    )
    assert summary["first_s"] == 10
    assert summary["happenings"] == {"kill": 2, "restart": 1}
    assert summary["first_suspected_s"] == {"median": 2, "max": 3}
    assert summary["suspected_by_all_s"] == {"median": 4, "max": 5}
    assert summary["first_dead_s"] == {"median": 4, "max": 4}
    assert summary["known_dead_to_all_s"] == {"median": 5, "max": 5}
    assert summary["unnoticed_kills"] == 0
    assert summary["false_suspicions"] == summary["false_deaths"] == 0


def test_a_kill_that_nobody_notices():
    summary = told((10, "kill", 1, 2), (10.2, "restart", 1), (11, 0, 2, SUSPECT))
    assert summary["unnoticed_kills"] == 1


@pytest.mark.parametrize(
    "trouble",
    [
        [(9, "kill", 1), (40, "restart", 1), (41, 0, 1, ALIVE)],
        [(9, "stop", 1), (40, "cont", 1)],
        [(11, "stop", 1), (12, "cont", 1)],
        [(9, "partition", (0, 3, 2), (1,)), (40, "heal")],
        [(9, "partition", (0, 3), (1, 2)), (10.5, "heal")],
    ],
)
def test_who_could_not_watch_is_no_measure_of_detection(trouble):
    summary = told(*trouble, (10, "kill", 3), (11, 0, 3, DEAD), (50, 1, 3, DEAD))
    assert summary["known_dead_to_all_s"]["max"] == 1
    fair = told((10, "kill", 3), (11, 0, 3, DEAD), (50, 1, 3, DEAD))
    assert fair["known_dead_to_all_s"]["max"] == 40


def test_who_comes_and_who_comes_back():
    summary = told(
        (5, "join", 3),
        (7, 0, 3, ALIVE),
        (8, 1, 3, ALIVE),
        (20, "kill", 2),
        (30, "restart", 2),
        (30.5, 0, 2, ALIVE),
        (31, 0, 2, ALIVE),
        (40, "kill", 2),
        (41, 1, 2, ALIVE),  # late news of its former life
        absent=[3],
    )
    assert summary["known_back_to_all_s"] == {"median": 1.75, "max": 3}


def test_a_goodbye():
    summary = told((10, "leave", 2), (10.5, 0, 2, LEFT), (11, 1, 2, LEFT), (12, 3, 2, DEAD))
    assert summary["known_left_to_all_s"] == {"median": 1, "max": 1}
    assert summary["known_dead_to_all_s"] is None
    assert summary["false_deaths"] == 0


def test_false_is_what_is_said_of_a_peer_that_could_be_heard():
    summary = told((50, 0, 1, SUSPECT), (51, 2, 1, SUSPECT), (53, 0, 1, DEAD), (54, 0, 1, ALIVE))
    assert (summary["false_suspicions"], summary["false_deaths"]) == (2, 1)


@pytest.mark.parametrize(
    "story",
    [
        [(49, "kill", 1)],
        [(49, "leave", 1)],
        [(49, "stop", 1)],
        [(49, "stop", 0)],
        [(40, "stop", 1), (41, 3, 1, ALIVE)],  # from before
        [(40, "stop", 1), (49, "cont", 1)],  # rumours go on a little
        [(49, "partition", (0, 2), (1, 3))],
        [(40, "partition", (0, 2), (1, 3)), (49, "heal")],
        [(30, "kill", 1), (40, "restart", 1)],  # it has started again, and not been heard yet
        [(30, "kill", 1), (40, "restart", 1), (49, 3, 1, ALIVE)],
        [(47, 3, 1, LEFT)],  # it has come to its end
    ],
)
def test_what_is_not_false(story):
    summary = told(*story, (50, 0, 1, SUSPECT), (50, 0, 1, DEAD))
    assert (summary["false_suspicions"], summary["false_deaths"]) == (0, 0)


@pytest.mark.parametrize(
    "story",
    [
        [(40, "stop", 1), (45, "cont", 1)],
        [(40, "partition", (0, 2), (1, 3)), (45, "heal")],
        [(40, "partition", (0, 1), (2, 3))],
        [(40, "partition", (0, 2), (1, 3)), (45, "partition", (0, 1), (2, 3))],
        [(30, "kill", 1), (40, "restart", 1), (41, 3, 1, ALIVE)],
        [(30, "leave", 1), (40, "join", 1), (41, 3, 1, ALIVE)],
        [(20, "stop", 1), (30, "kill", 1), (40, "restart", 1), (41, 3, 1, ALIVE)],
        [(40, "restart", 1), (49, "cont", 1)],  # which cannot happen to it
    ],
)
def test_trouble_that_is_over_excuses_nobody(story):
    summary = told(*story, (50, 0, 1, SUSPECT))
    assert summary["false_suspicions"] == 1


def test_who_never_ends_a_round_again_was_not_accused_falsely():
    assert told((50, 0, 1, DEAD), ends=range(50))["false_deaths"] == 0


def test_a_stall_is_what_rounds_take_beyond_twice_the_usual():
    summary = told(ends=[*range(41), *range(50, 60), *range(65, 100)])
    assert summary["stall_s"] == {"median": 8 + 4, "max": 8 + 4}
    assert told(ends=[5], nodes=2)["stall_s"] == {"median": 0, "max": 0}


@pytest.mark.parametrize(
    ("happens", "survivors"),
    [
        ([(1, "kill", 0)], 3),
        ([(1, "leave", 0)], 3),
        ([(1, "stop", 0), (2, "cont", 0)], 3),
        ([(1, "join", 0)], 3),
        ([(1, "slow", 0)], 3),
        ([(1, "kill", 0, 1, 2, 3)], 0),
        ([(60, 1, 0, LEFT), (61, "kill", 0)], 4),  # it was done already
        ([(1, "drop")], 4),
        ([(1, "partition", (0,), (1, 2, 3))], 4),
    ],
)
def test_only_survivors_stand_still(happens, survivors):
    absent = [0] if happens[0][1] == "join" else []
    summary = told(*happens, absent=absent, ends=[*range(41), *range(50, 101)])
    assert summary["survivors"] == survivors
    assert (summary["stall_s"] is None) == (survivors == 0)


def test_time_behind_a_partition_is_no_stall_of_the_smaller_side():
    ends = [*range(41), *range(50, 101)]
    cut = told((43, "partition", (0,), (1, 2, 3)), (47, "heal"), ends=ends)
    assert cut["stall_s"] == {"median": 8, "max": 8}
    cut = told((43, "partition", (0, 1), (2,), (3,)), (47, "heal"), ends=ends)
    assert cut["stall_s"] == {"median": (8 + 4) / 2, "max": 8}
    to_the_end = told((43, "partition", (0, 1), (2,), (3,)), ends=ends)
    assert to_the_end["stall_s"] == {"median": (8 + 1) / 2, "max": 8}
    halves = told((43, "partition", (0, 1), (2, 3)), (47, "heal"), ends=ends)
    assert halves["stall_s"] == {"median": 8, "max": 8}


def test_membership_costs_bytes_for_every_second_that_a_peer_is_there():
    chronicle = Chronicle(absent=[2])
    events = [
        (20, Happening("kill", nodes=(0,))),
        (30, Happening("join", nodes=(2,))),
        (50, Happening("restart", nodes=(0,))),
        (90, Happening("leave", nodes=(2,))),
        (95, Happening("kill", nodes=(2,))),  # which is not there
    ]
    for time, happening in events:
        chronicle.happened(time, happening)
    for time, peer in itertools.product((40, 80), range(3)):
        chronicle.ended_round(time, peer)
    for _ in range(3):
        chronicle.spoke(Statistics(messages=23, bytes=2300))
    summary = chronicle.summary(END)
    there = (20 + 50) + 100 + 60
    assert summary["membership_messages_per_s"] == pytest.approx(69 / there)
    assert summary["membership_bytes_per_s"] == pytest.approx(6900 / there)
