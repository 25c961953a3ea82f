"""What a script does to processes, with a clock and processes that are made up."""

from __future__ import annotations

import signal
from types import SimpleNamespace

import pytest

from p2pfl.churn.script import Happening, Script
from p2pfl.errors import RunError
from p2pfl.launch import nemesis as nemesis_module
from p2pfl.launch.books import Watch
from p2pfl.launch.nemesis import PERIOD, Nemesis
from p2pfl.launch.watching import Watching
from p2pfl.runtime.setup import Row

ROW = Row(*(0,) * len(Row._fields))


class Crew:
    """Processes that do nothing but run, stop and end."""

    def __init__(self, running):
        self.running, self.stopped, self.signals = set(running), set(), []
        self.reports = []

    def start(self, number):
        assert number not in self.running
        self.running.add(number)
        self.stopped.discard(number)

    def signal(self, number, what):
        self.signals.append((number, what.name))
        {"SIGSTOP": self.stopped.add, "SIGCONT": self.stopped.discard}.get(
            what.name, lambda number: None
        )(number)

    def hear(self, seconds):
        number, news = self.reports.pop(0)
        if "exit" in news:
            self.running.discard(number)
        yield number, news

    def silent(self):
        return set()


class Stage:
    """A script that is carried out on a crew."""

    def __init__(self, monkeypatch, *happenings, nodes=3, founders=None):
        self.now = 100.0
        clock = SimpleNamespace(monotonic=lambda: self.now)
        monkeypatch.setattr(nemesis_module, "time", clock)
        timed = tuple(one for one in happenings if one.seconds is not None)
        by_round = tuple(one for one in happenings if one.round is not None)
        founders = tuple(range(nodes)) if founders is None else founders
        self.script = Script("test", nodes, founders, timed, by_round)
        self.crew = Crew(founders)
        self.nemesis = Nemesis(self.script, self.crew, self.crew.start, None)

    def at(self, seconds):
        """Go on to some seconds of the script and return what happens then."""
        self.now = 100.0 + seconds
        return [(one.kind, one.nodes) for one in self.nemesis.carry_out()]

    def end(self, peer):
        self.crew.running.discard(peer)
        self.nemesis.ended(peer)


def by_time(seconds, kind, *nodes, value=0.0):
    return Happening(kind, seconds, None, nodes, value=value)


def by_round(round, kind, *nodes):
    return Happening(kind, None, round, nodes)


def test_nothing_happens_before_all_are_training(monkeypatch):
    stage = Stage(monkeypatch, by_time(0.0, "kill", 0), by_round(0, "stop", 1))
    stage.nemesis.came_to(5)
    assert stage.at(50.0) == []
    assert stage.nemesis.seconds_left(0.2) == 0.2
    stage.nemesis.begin()
    assert stage.at(50.0) == [("kill", (0,)), ("stop", (1,))]
    assert stage.crew.signals == [(0, "SIGKILL"), (0, "SIGCONT"), (1, "SIGSTOP")]


def test_what_happens_is_due_at_its_time_or_round(monkeypatch):
    stage = Stage(monkeypatch, by_time(1.5, "stop", 0), by_round(3, "kill", 1, 2))
    stage.nemesis.begin()
    assert stage.at(1.0) == []
    assert stage.nemesis.seconds_left(0.2) == 0.2
    assert stage.nemesis.seconds_left(10) == pytest.approx(0.5)
    stage.nemesis.came_to(2)
    assert stage.at(1.6) == [("stop", (0,))]
    stage.nemesis.came_to(3)
    assert stage.at(1.6) == [("kill", (1, 2))]
    assert stage.nemesis.left == 0


def test_a_peer_comes_back_when_its_old_process_has_ended(monkeypatch):
    stage = Stage(monkeypatch, by_time(1.0, "leave", 1), by_time(1.1, "join", 1))
    stage.nemesis.begin()
    stage.at(1.0)
    assert stage.crew.signals == [(1, "SIGTERM"), (1, "SIGCONT")]
    assert stage.at(1.2) == [("join", (1,))]
    assert 1 in stage.nemesis.down
    assert 1 not in stage.nemesis.idle  # it is waited for
    stage.end(1)
    assert 1 in stage.crew.running
    assert stage.nemesis.down == set()


def test_a_peer_that_is_killed_while_it_waits_to_come_back_stays_away(monkeypatch):
    events = [by_time(1.0 + k / 10, kind, 1) for k, kind in enumerate(("kill", "restart", "kill"))]
    stage = Stage(monkeypatch, *events)
    stage.nemesis.begin()
    assert len(stage.at(2.0)) == 3
    stage.end(1)
    assert 1 not in stage.crew.running


def test_what_is_not_possible_has_no_effect(monkeypatch):
    stage = Stage(
        monkeypatch,
        by_time(1.0, "kill", 0, 1),
        by_time(2.0, "restart", 0, 2),
        by_time(3.0, "cont", 2),
        by_time(4.0, "join", 2),
    )
    stage.nemesis.begin()
    stage.nemesis.done(1)
    assert stage.at(1.0) == [("kill", (0,))]
    stage.end(0)
    assert stage.at(2.0) == [("restart", (0,))]
    assert stage.at(5.0) == []
    assert (1, "SIGKILL") not in stage.crew.signals


def test_a_slow_peer_runs_for_its_share_of_the_time(monkeypatch):
    stage = Stage(monkeypatch, by_time(0.0, "slow", 1, value=4.0), by_time(9.0, "slow", 1, value=1))
    stage.nemesis.begin()
    ran = total = 0.0
    while stage.now < 108.0:
        stage.at(stage.now - 100.0)
        ahead = max(0.0, stage.nemesis.seconds_left(PERIOD)) + 0.003  # we are always a bit late
        ran += 0.0 if 1 in stage.crew.stopped else ahead
        total += ahead
        stage.now += ahead
    assert ran / total == pytest.approx(1 / 4, abs=0.02)
    stage.at(9.0)
    assert 1 not in stage.crew.stopped
    assert stage.nemesis.seconds_left(50.0) == 50.0


def test_a_slow_peer_that_is_stopped_does_not_run_until_it_may(monkeypatch):
    stage = Stage(
        monkeypatch,
        by_time(0.0, "slow", 1, value=2.0),
        by_time(1.0, "stop", 1),
        by_time(2.0, "cont", 1),
        by_time(3.0, "kill", 1),
    )
    stage.nemesis.begin()
    seen = {0: set(), 1: set(), 2: set(), 3: set()}  # what it did in each second
    while stage.now < 104.0:
        stage.at(stage.now - 100.0)
        if stage.now - int(stage.now) > 0.001:
            seen[int(stage.now) - 100].add(1 in stage.crew.stopped)
        stage.now += 0.01
    assert seen == {0: {False, True}, 1: {True}, 2: {False, True}, 3: {False}}


def test_the_end_does_not_wait_for_whom_the_script_keeps_away(monkeypatch):
    stage = Stage(
        monkeypatch, by_time(1.0, "stop", 0), by_time(1.0, "kill", 1), by_time(60.0, "restart", 1)
    )
    stage.nemesis.begin()
    stage.at(1.0)
    stage.end(1)
    assert not stage.nemesis.is_over
    stage.nemesis.done(2)
    assert not stage.nemesis.is_over  # it has said so, and writes on
    stage.end(2)
    assert stage.nemesis.is_over
    assert stage.nemesis.left == 1


def test_while_nobody_has_finished_those_who_come_back_are_waited_for(monkeypatch):
    stage = Stage(monkeypatch, by_time(1.0, "stop", 0, 1, 2), by_time(2.0, "cont", 0, 1, 2))
    stage.nemesis.begin()
    stage.at(1.0)
    assert not stage.nemesis.is_over
    stage.at(2.0)
    assert stage.nemesis.idle == set()
    assert not stage.nemesis.is_over


def test_when_all_have_failed_nothing_more_is_waited_for(monkeypatch):
    stage = Stage(monkeypatch, by_time(9.0, "kill", 0), nodes=1)
    stage.nemesis.begin()
    stage.end(0)
    assert stage.nemesis.is_over


def test_a_peer_stopped_as_it_finishes_is_let_go(monkeypatch):
    stage = Stage(monkeypatch, by_time(1.0, "stop", 0), by_time(2.0, "cont", 0))
    stage.nemesis.begin()
    stage.at(1.0)
    stage.nemesis.done(0)
    assert stage.crew.stopped == stage.nemesis.frozen == set()
    assert stage.at(2.0) == []


# What the parent makes of it


def watched(stage, *reports, rows=lambda rows: None, alone=False):
    """Let all founders train, some report, and the others finish; return who watches that."""
    founders = stage.script.founders
    books = SimpleNamespace(event=lambda kind, /, **fields: None)
    others = [node for node in founders if (node, "exit") not in ((n, *r) for n, r in reports)]
    stage.crew.reports = [
        *((node, {"phase": "training"}) for node in founders),
        *reports,
        *((node, {"status": "finished"}) for node in others),
        *((node, {"exit": 0}) for node in others),
    ]
    return Watching(stage.crew, stage.nemesis, founders, books, Watch(rows=rows), alone)


def test_who_is_killed_by_the_script_has_not_failed(monkeypatch):
    stage = Stage(monkeypatch, by_time(0.0, "kill", 1))
    watching = watched(stage, (1, {"exit": -9}))
    watching.until_the_end()
    assert watching.error() is None
    assert watching.absent == {1}
    assert watching.churn()["happenings"] == {"kill": 1}


def test_who_is_killed_by_somebody_else_has(monkeypatch):
    stage = Stage(monkeypatch, by_time(0.0, "kill", 1))
    watching = watched(stage, (1, {"exit": -9}), (2, {"exit": -9}))
    watching.until_the_end()
    assert watching.error() == "peer 2 was killed by SIGKILL"


def test_who_leaves_when_asked_has_not_failed(monkeypatch):
    stage = Stage(monkeypatch, by_time(0.0, "leave", 1))
    watching = watched(stage, (1, {"status": "interrupted"}), (1, {"exit": 0}))
    watching.until_the_end()
    assert watching.error() is None
    assert watching.absent == {1}


FINISHED = [(node, {"status": "finished"}) for node in (0, 2)]
WAITS = [(1, {"exit": -9}), (1, {"phase": "loading"}), (1, {"phase": "meeting"})]
ENDED = [(node, {"exit": 0}) for node in (0, 2)]


@pytest.mark.parametrize("first", [[*FINISHED, *WAITS], [*WAITS, *FINISHED]])
def test_who_comes_back_when_the_others_have_ended_is_not_waited_for(monkeypatch, first):
    stage = Stage(monkeypatch, by_time(0.0, "kill", 1), by_time(0.0, "restart", 1))
    watching = watched(stage, *first, *ENDED)
    watching.until_the_end()
    assert watching.error() is None
    assert watching.absent == {1}
    assert stage.crew.running == {1}  # whoever has started it ends it


@pytest.mark.parametrize("alone", [False, True])
def test_while_somebody_can_train_who_comes_back_is_waited_for(monkeypatch, alone):
    stage = Stage(monkeypatch, by_time(0.0, "kill", 1), by_time(0.0, "restart", 1))
    trains = [(1, {"phase": "training"}), (1, {"status": "finished"}), (1, {"exit": 0})]
    course = [*WAITS, *FINISHED, *trains] if alone else [*WAITS, FINISHED[0], *trains, FINISHED[1]]
    watching = watched(stage, *course, *ENDED, alone=alone)
    watching.until_the_end()
    assert (watching.error(), watching.absent) == (None, set())


def test_a_late_peer_that_cannot_join_does_not_end_the_others(monkeypatch):
    stage = Stage(monkeypatch, by_time(0.0, "join", 2), founders=(0, 1))
    failed = [(2, {"error": "port taken"}), (2, {"exit": 1})]
    watching = watched(stage, (0, {"row": ROW._asdict()}), *failed)
    watching.until_the_end()
    assert watching.error() == "peer 2 failed: port taken"


def test_a_founder_that_fails_before_all_are_training_ends_the_run(monkeypatch):
    stage = Stage(monkeypatch, by_time(0.0, "kill", 0))
    watching = watched(stage)
    stage.crew.reports = [(1, {"phase": "training"}), (0, {"error": "no data"})]
    with pytest.raises(RunError, match="no data"):
        watching.until_the_end()
    assert stage.crew.signals == []


def test_after_ctrl_c_nobody_is_started_any_more(monkeypatch):
    stage = Stage(monkeypatch, by_time(0.0, "kill", 1), by_time(0.0, "restart", 1))
    watching = watched(stage, (0, {"row": ROW._asdict()}), rows=interrupt)
    stage.crew.ask_to_end = lambda: stage.crew.reports.insert(0, (1, {"exit": -9}))
    watching.until_the_end()
    assert watching.interrupted
    assert 1 not in stage.crew.running


def interrupt(rows):
    raise KeyboardInterrupt


def test_rounds_that_are_reported_let_things_happen(monkeypatch):
    stage = Stage(monkeypatch, by_round(8, "stop", 2))
    news = {"row": ROW._replace(round=7)._asdict()}
    watching = watched(stage, (0, news), (1, news))
    watching.until_the_end()
    assert (2, signal.SIGSTOP.name) in stage.crew.signals
