"""Churn scripts on real processes: what they do to a run, and what is told of it."""

from __future__ import annotations

import itertools
import json
import multiprocessing
import os
import signal
from pathlib import Path
from typing import Any

import pytest
import tomli_w
from launch_cases import (
    command,
    longest_pauses,
    metrics,
    p2pfl,
    rounds_done,
    session,
    small,
    summary,
    wait_for,
)

import p2pfl as package
from p2pfl.results.runs import Result

pytestmark = pytest.mark.processes


def churned(folder: Path, rounds: int, script: str, **sections: Any) -> dict[str, Any]:
    """An experiment on four peers, and a script."""
    (folder / "churn.toml").write_text(script)
    return small(
        nodes=4,
        topology={"name": "complete"},
        pace={"rounds": rounds, "local_steps": 4, "patience": 5.0},
        evaluation={"every": rounds},
        churn={"name": "script", "path": str(folder / "churn.toml")},
        **sections,
    )


def events(folder: Path, kind: str) -> list[dict[str, Any]]:
    lines = (folder / "events.jsonl").read_text().splitlines()
    return [event for event in map(json.loads, lines) if event["event"] == kind]


def rounds_of(run: Path, node: int) -> list[int]:
    return [int(row["round"]) for row in metrics(run / "peers" / f"{node:03d}")]


LIVES = """
[[event]]
at = "round 10"
stop = 1
for = "20 rounds"

[[event]]
at = "round 60"
kill = 2
for = "40 rounds"

[[event]]
at = "round 180"
leave = 3

[[event]]
at = "round 200"
kill = 1
"""
ROUNDS = 220


@pytest.fixture(scope="module")
def lives(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Result]:
    """A run in which 1 is stopped for a while, 2 comes back, 3 leaves and 1 is killed."""
    folder = tmp_path_factory.mktemp("lives")
    result = package.run(churned(folder, ROUNDS, LIVES), on="local", out=folder / "run")
    return folder / "run", result


def test_who_is_killed_or_leaves_by_the_script_is_no_failure(lives):
    run, result = lives
    assert result.summary["status"] == "finished"
    assert "error" not in result.summary
    assert not multiprocessing.active_children()
    for node in (0, 2):
        assert result.model(node)
        assert summary(run / "peers" / f"{node:03d}")["status"] == "finished"
    for node, reason in ((1, "killed"), (3, "interrupted")):
        told = summary(run / "peers" / f"{node:03d}")
        assert (told["status"], told["reason"]) == ("interrupted", reason)
        with pytest.raises(KeyError, match=f"node {node} has no final model"):
            result.model(node)


def test_everything_that_happens_is_noted_in_its_order(lives):
    run, result = lives
    happened = [(event["kind"], event["nodes"]) for event in events(run, "churn")]
    assert happened == [
        ("stop", [1]),
        ("cont", [1]),
        ("kill", [2]),
        ("restart", [2]),
        ("leave", [3]),
        ("kill", [1]),
    ]
    assert events(run, "churn_dropped") == []
    told = summary(run)["churn"]
    assert told == result.summary["churn"]
    assert told["happenings"] == {"cont": 1, "kill": 2, "leave": 1, "restart": 1, "stop": 1}
    assert told["stall_s"]["max"] > 0
    assert 0 < told["mean_drift"] < 0.1


def test_a_peer_that_is_started_again_goes_on_in_its_folder(lives):
    run, _ = lives
    rounds = rounds_of(run, 2)
    assert rounds == sorted({*rounds})
    assert rounds[-1] == ROUNDS - 1
    # On a busy machine a peer leaves out a round or two besides, to keep up.
    before, after = max(itertools.pairwise(rounds), key=lambda pair: pair[1] - pair[0])
    assert before < 70
    assert after >= 100
    assert len(events(run / "peers" / "002", "training")) == 2
    times = [float(row["wall_s"]) for row in metrics(run / "peers" / "002")]
    assert times == sorted(times)


def test_the_others_go_on_without_those_who_are_away(lives):
    run, _ = lives
    rounds = rounds_of(run, 0)
    assert rounds == sorted({*rounds})
    assert rounds[-1] == ROUNDS - 1
    assert 170 <= rounds_of(run, 3)[-1] < 200
    assert 190 <= rounds_of(run, 1)[-1] < ROUNDS - 1
    assert longest_pauses(run, 0)[0] < 15  # and not the patience of 30 s


LINKS = """
[[event]]
at = "100ms"
join = 3

[[event]]
at = "500ms"
partition = [0, 1]
for = "3s"

[[event]]
at = "4s"
slow = { nodes = 1, factor = 3 }
for = "500ms"

[[event]]
at = "1h"
delay = "50ms"

[[event]]
at = "round 580"
stop = 2
"""


@pytest.fixture(scope="module")
def links(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Result]:
    """A run in which 3 comes late, links are cut for a while, and 2 is frozen to the end."""
    folder = tmp_path_factory.mktemp("links")
    result = package.run(churned(folder, 600, LINKS), on="local", out=folder / "run")
    return folder / "run", result


def test_a_run_does_not_wait_for_whom_its_script_has_stopped(links):
    run, result = links
    assert result.summary["status"] == "finished"
    assert [event["happenings"] for event in events(run, "churn_dropped")] == [1]
    assert not multiprocessing.active_children()
    with pytest.raises(KeyError, match="node 2 has no final model"):
        result.model(2)


def test_a_peer_that_comes_late_takes_part_to_the_end(links):
    run, result = links
    rounds = rounds_of(run, 3)
    assert rounds == sorted({*rounds})
    assert (rounds[0] > 0, rounds[-1]) == (True, 599)
    assert result.model(3)


def test_a_partition_is_noticed_across_it_only_and_heals(links):
    run, result = links
    assert result.summary["churn"]["happenings"] == {
        "heal": 1,
        "join": 1,
        "partition": 1,
        "slow": 2,
        "stop": 1,
    }
    cut, healed = (e["wall_s"] for e in events(run, "churn") if e["kind"] in ("partition", "heal"))
    assert healed - cut == pytest.approx(3, abs=0.5)
    for side in ({0, 1}, {2, 3}):
        noticed = [events(run / "peers" / f"{node:03d}", "noticed") for node in sorted(side)]
        far = [[e["status"] for e in seen if e["peer"] not in side] for seen in noticed]
        assert any("suspect" in seen and "alive" in seen[seen.index("suspect") :] for seen in far)
    assert [rounds_of(run, node)[-1] for node in (0, 1, 3)] == [599] * 3


def test_ctrl_c_ends_those_who_are_stopped_too(tmp_path: Path):
    script = '[[event]]\nat = "round 5"\nstop = [1, 2]\n'
    (tmp_path / "e.toml").write_text(tomli_w.dumps(churned(tmp_path, 100_000, script)))
    words = p2pfl("run", "e.toml", "--on", "local", "--out", "run", "--quiet")
    with command(*words, cwd=tmp_path) as run:
        wait_for(lambda: events_so_far(tmp_path / "run", "churn") or run.poll() is not None)
        os.kill(run.pid, signal.SIGINT)
        _, err = run.communicate(timeout=60)
        assert run.returncode == 130, err
        wait_for(lambda: not session(run.pid), 10)
    assert summary(tmp_path / "run")["status"] == "interrupted"
    assert rounds_done(tmp_path / "run") >= 4
    for node in range(4):
        assert summary(tmp_path / "run" / "peers" / f"{node:03d}")["status"] == "interrupted"


def test_who_comes_back_as_the_last_one_ends_is_no_failure(tmp_path: Path):
    script = '[[event]]\nat = "round 35"\nkill = [0, 1, 2]\nfor = "4 rounds"\n'
    result = package.run(churned(tmp_path, 40, script), on="local", out=tmp_path / "run")
    assert (result.summary["status"], result.summary["reason"]) == ("finished", "all rounds done")
    assert result.model(3)
    assert len(events(tmp_path / "run", "churn")) == 2


def events_so_far(folder: Path, kind: str) -> list[dict[str, Any]]:
    return events(folder, kind) if (folder / "events.jsonl").is_file() else []
