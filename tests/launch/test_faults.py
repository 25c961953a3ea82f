"""Peers and parents that die, freeze or are told to stop: what it costs the others."""

from __future__ import annotations

import multiprocessing
import os
import signal
import statistics
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import tomli_w
from launch_cases import (
    command,
    longest_pauses,
    metrics,
    p2pfl,
    peers_of,
    rounds_done,
    session,
    small,
    summary,
    wait_for,
)

import p2pfl as package
from p2pfl.launch import crew, local
from p2pfl.launch.books import Watch
from p2pfl.results.runs import read_run
from p2pfl.runtime.setup import Row

pytestmark = pytest.mark.processes

ROUNDS = 150


def long_run(**sections: Any) -> dict[str, Any]:
    """A run of some seconds: what is disturbed in it has time to show."""
    pace = {"rounds": ROUNDS, "local_steps": 4, **sections.pop("pace", {})}
    return small(nodes=4, pace=pace, evaluation={"every": ROUNDS}, **sections)


class Disturb:
    """Does something to one peer process when that peer has ended a round; see `Watch`."""

    def __init__(self, node: int, number: signal.Signals, at: int = 20) -> None:
        self.node, self.number, self.at = node, number, at
        self.pid = 0
        self.known = {process.pid for process in multiprocessing.active_children()}

    def rows(self, rows: Sequence[Row]) -> None:
        for row in rows:
            if row.node == self.node and row.round >= self.at and not self.pid:
                started = {p.name: p for p in multiprocessing.active_children()}
                ours = [p for p in started.values() if p.pid not in self.known]
                ours.sort(key=lambda process: int(process.name.rpartition("-")[2]))
                self.pid = ours[self.node].pid or 0
                os.kill(self.pid, self.number)


@pytest.mark.parametrize("topology", ["ring", pytest.param("complete", marks=pytest.mark.slow)])
def test_a_peer_that_is_killed_costs_the_others_a_second(topology: str, tmp_path: Path):
    disturb = Disturb(2, signal.SIGKILL)
    result = package.run(
        long_run(topology={"name": topology}),
        on="local",
        out=tmp_path / "run",
        watch=Watch(rows=disturb.rows),
    )
    assert disturb.pid
    assert result.summary["status"] == "failed"
    assert result.summary["error"] == "peer 2 was killed by SIGKILL"
    for node in (0, 1, 3):
        assert len(metrics(tmp_path / "run" / "peers" / f"{node:03d}")) == ROUNDS
        result.model(node)
    with pytest.raises(KeyError, match="node 2 has no final model"):
        result.model(2)
    pauses = longest_pauses(tmp_path / "run", 1)
    assert 0.5 < pauses[0] < 15  # GRACE, and not the patience of 30 s
    assert statistics.median(pauses) < 0.5  # and not in every round
    assert not multiprocessing.active_children()


def test_a_peer_that_freezes_costs_the_others_one_deadline_at_most(tmp_path: Path, monkeypatch):
    monkeypatch.setattr(crew, "SILENCE", 3.0)
    monkeypatch.setattr(local, "LINGER", 1.0)
    disturb = Disturb(2, signal.SIGSTOP)
    result = package.run(
        long_run(topology={"name": "complete"}, pace={"patience": 2.0}),
        on="local",
        out=tmp_path / "run",
        watch=Watch(rows=disturb.rows),
    )
    assert result.summary["status"] == "failed"
    assert result.summary["error"] == "peer 2 had stopped answering and was ended"
    for node in (0, 1, 3):
        assert len(metrics(tmp_path / "run" / "peers" / f"{node:03d}")) == ROUNDS
        assert statistics.median(longest_pauses(tmp_path / "run", node)) < 0.5
    # Thawed at the end, the frozen one has written down how it went, but is not counted.
    assert summary(tmp_path / "run" / "peers" / "002")["status"] == "interrupted"
    with pytest.raises(KeyError, match="node 2"):
        result.model(2)
    assert not multiprocessing.active_children()


def test_a_peer_that_somebody_else_ends_is_named(tmp_path: Path):
    disturb = Disturb(1, signal.SIGTERM)
    result = package.run(
        long_run(), on="local", out=tmp_path / "run", watch=Watch(rows=disturb.rows)
    )
    assert result.summary["status"] == "failed"
    assert result.summary["error"] == "peer 1 was asked to end by somebody else"
    assert len(metrics(tmp_path / "run" / "peers" / "003")) == ROUNDS
    assert longest_pauses(tmp_path / "run", 0)[0] < 15  # and not the patience of 30 s


@contextmanager
def running(tmp_path: Path, rounds: int, *more: str) -> Iterator[Any]:
    """A run from the command line that has got some rounds behind it."""
    pace = {"rounds": rounds, "local_steps": 4}
    experiment = small(nodes=4, pace=pace, evaluation={"every": rounds})
    (tmp_path / "e.toml").write_text(tomli_w.dumps(experiment))
    words = p2pfl("run", "e.toml", "--on", "local", "--out", "run", *more)
    with command(*words, cwd=tmp_path) as run:
        wait_for(lambda: rounds_done(tmp_path / "run") >= 20 or run.poll() is not None)
        yield run


def test_the_command_names_who_was_killed(tmp_path: Path):
    with running(tmp_path, 2 * ROUNDS) as run:
        peers = wait_for(lambda: peers_of(run.pid))
        assert len(peers) == 4
        os.kill(peers[1], signal.SIGKILL)
        _, err = run.communicate(timeout=60)
        assert run.returncode == 1
        assert "was killed by SIGKILL (the others' results are in run)" in err.splitlines()[-1]
        assert "Traceback" not in err
        wait_for(lambda: not session(run.pid))
    told = summary(tmp_path / "run")
    assert told["status"] == "failed"
    assert "was killed by SIGKILL" in told["error"]
    assert told["rounds"] == 2 * ROUNDS
    read_run(tmp_path / "run")


def test_ctrl_c_ends_all_and_keeps_what_there_is(tmp_path: Path):
    with running(tmp_path, 100_000) as run:
        for pid in session(run.pid):  # a terminal tells everybody
            os.kill(pid, signal.SIGINT)
        asked = time.monotonic()
        _, err = run.communicate(timeout=60)
        assert time.monotonic() - asked < 10
        assert run.returncode == 130
        assert "Traceback" not in err
        wait_for(lambda: not session(run.pid), 10)
    told = summary(tmp_path / "run")
    assert told["status"] == "interrupted"
    assert told["rounds"] >= 20
    run_ = read_run(tmp_path / "run")
    assert len(run_.metrics["round"]) >= 80
    assert sorted({*run_.metrics["node"].tolist()}) == [0, 1, 2, 3]
    package.load(tmp_path / "run", node=0)
    package.load(tmp_path / "run")
    for node in range(4):
        assert summary(tmp_path / "run" / "peers" / f"{node:03d}")["status"] == "interrupted"


KEPT = "the folder holds what there was"


@pytest.mark.parametrize(
    "delay",
    [0.7, *(pytest.param(d, marks=pytest.mark.slow) for d in (0.0, 0.3, 1.0, 1.4, 1.8, 2.5))],
)
def test_ctrl_c_is_heard_at_any_moment_of_the_start(delay: float, tmp_path: Path):
    """It may meet a process that is only about to import, to fork or to listen."""
    words = p2pfl("run", "digits", "--on", "local", "--out", "run", "--quiet")
    with command(*words, cwd=tmp_path) as run:
        wait_for(lambda: (tmp_path / "run" / "summary.json").is_file())
        alarm = threading.Event()
        alarm.wait(delay)
        for pid in session(run.pid):
            os.kill(pid, signal.SIGINT)
        _, err = run.communicate(timeout=30)
        assert run.returncode == 130
        assert err in ("", "p2pfl: interrupted\n", f"p2pfl: interrupted; {KEPT}\n")
        wait_for(lambda: not session(run.pid), 10)
    assert summary(tmp_path / "run")["status"] == "interrupted"


def test_peers_whose_parent_is_killed_end_by_themselves(tmp_path: Path):
    with running(tmp_path, 100_000) as run:
        run.kill()
        run.communicate(timeout=10)
        wait_for(lambda: not session(run.pid), 10)
    for node in range(4):
        folder = tmp_path / "run" / "peers" / f"{node:03d}"
        assert summary(folder)["status"] == "interrupted"
    assert len(read_run(tmp_path / "run").metrics["round"]) >= 80


def test_a_long_round_does_not_keep_a_peer_from_ending(tmp_path: Path):
    """Local steps are broken off between two of them."""
    with command(
        *p2pfl("run", "digits", "--on", "local", "--out", "run", "--quiet"),
        *("--set", "pace.local_steps=10000000", "--set", "nodes=2"),
        cwd=tmp_path,
    ) as run:
        wait_for(lambda: all_in_training(tmp_path / "run", 2))
        os.kill(run.pid, signal.SIGINT)
        asked = time.monotonic()
        run.communicate(timeout=60)
        assert time.monotonic() - asked < 8
        assert run.returncode == 130
        wait_for(lambda: not session(run.pid), 10)
    assert summary(tmp_path / "run")["status"] == "interrupted"


def all_in_training(run: Path, nodes: int) -> bool:
    told = [path.read_text() for path in run.glob("peers/*/events.jsonl")]
    return len(told) == nodes and all('"training"' in text for text in told)
