"""Peers started one by one, each with the command line of its own machine."""

from __future__ import annotations

import signal
import socket
import subprocess
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import pytest
import tomli_w
import torch
from launch_cases import command, free_address, metrics, p2pfl, small, summary, wait_for

import p2pfl as package

pytestmark = pytest.mark.processes


@pytest.fixture
def place(tmp_path: Path) -> Path:
    """A folder with an experiment of two nodes, and everybody's address."""
    (tmp_path / "e.toml").write_text(tomli_w.dumps(small(nodes=2)))
    addresses = {str(node): free_address() for node in range(2)}
    (tmp_path / "peers.toml").write_text(tomli_w.dumps(addresses))
    return tmp_path


def peer(node: int, *more: object) -> tuple[object, ...]:
    words = ("peer", "e.toml", "--id", node, "--peers", "peers.toml", "--out", f"out-{node}")
    return p2pfl(*words, "--join-timeout", 20, *more)


@contextmanager
def peers(*lines: tuple[object, ...], cwd: Path) -> Iterator[list[subprocess.Popen[str]]]:
    with ExitStack() as stack:
        yield [stack.enter_context(command(*line, cwd=cwd)) for line in lines]


def ends(processes: list[subprocess.Popen[str]]) -> list[tuple[int, str]]:
    """Return the exit code and the standard error of each."""
    told = [process.communicate(timeout=60)[1] for process in processes]
    return [(p.returncode, err) for p, err in zip(processes, told, strict=True)]


def test_two_peers_started_by_hand_agree(place: Path):
    with peers(peer(0), peer(1), cwd=place) as both:
        assert ends(both) == [(0, ""), (0, "")]
    simulated = package.run(place / "e.toml", on="simulate")
    for node in range(2):
        assert summary(place / f"out-{node}")["status"] == "finished"
        assert len(metrics(place / f"out-{node}")) == 3
        mine = package.load(place / f"out-{node}").parameters()
        for ours, theirs in zip(mine, simulated.model(node).parameters(), strict=True):
            torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=1e-14)


def test_peers_of_different_experiments_say_what_differs(place: Path):
    with peers(peer(0), peer(1, "--set", "optimiser.lr=0.2"), cwd=place) as both:
        (first, told), (second, told_too) = ends(both)
    assert first == second == 2
    assert "optimiser.lr: '0.2' here, '0.1' there" in told
    assert "optimiser.lr: '0.1' here, '0.2' there" in told_too
    for node in range(2):
        assert summary(place / f"out-{node}")["status"] == "failed"
        assert "optimiser.lr" in summary(place / f"out-{node}")["error"]


@pytest.mark.slow
def test_one_that_comes_late_is_told_the_difference_too(place: Path):
    with peers(peer(0), cwd=place) as (first,):
        events = place / "out-0" / "events.jsonl"
        wait_for(lambda: events.is_file() and "meeting" in events.read_text())
        with peers(peer(1, "--seed", 4), cwd=place) as (second,):
            (code, told), (code_too, told_too) = ends([first, second])
    assert code == code_too == 2
    assert "seed: '4' here, '3' there" in told
    assert "seed: '3' here, '4' there" in told_too


@pytest.mark.slow
def test_a_neighbour_that_does_not_come_is_named(place: Path):
    with peers(peer(0, "--join-timeout", 1), cwd=place) as alone:
        ((code, told),) = ends(alone)
    assert code == 1
    assert "nothing heard within 1 s of peer 1 at tcp://127.0.0.1:" in told
    assert "Traceback" not in told


STUCK = """
import signal, time
from pathlib import Path

def make(shape, outputs):
    Path("loading").touch()
    while signal.getsignal(signal.SIGINT) is not signal.SIG_DFL:
        time.sleep(0.01)
    Path("heard").touch()
    time.sleep(600)
"""


def test_another_ctrl_c_ends_a_peer_at_once(place: Path):
    (place / "stuck.py").write_text(STUCK)
    model = {"name": "custom", "factory": "stuck.py:make"}
    (place / "e.toml").write_text(tomli_w.dumps(small(nodes=2, model=model)))
    with peers(peer(0), cwd=place) as (process,):
        for file in ("loading", "heard"):
            wait_for((place / file).is_file)
            process.send_signal(signal.SIGINT)
        assert process.wait(30) == -signal.SIGINT


@pytest.mark.parametrize(
    "number",
    [signal.SIGTERM, signal.SIGHUP, pytest.param(signal.SIGINT, marks=pytest.mark.slow)],
)
def test_a_peer_that_is_asked_to_end_says_so(place: Path, number: signal.Signals):
    with peers(peer(0), cwd=place) as (process,):
        events = place / "out-0" / "events.jsonl"
        wait_for(lambda: events.is_file() and "meeting" in events.read_text())
        process.send_signal(number)
        assert ends([process]) == [(128 + number, "")]
    assert summary(place / "out-0")["status"] == "interrupted"


def slow(*more: str, told: str) -> Any:
    return pytest.param(more, told, marks=pytest.mark.slow)


@pytest.mark.parametrize(
    ("more", "told"),
    [
        (("--bind", "tcp://0.0.0.0:7"), "tcp://0.0.0.0:7 is beyond this machine"),
        (
            ("--bind", "tcp://127.0.0.1:70000"),
            "--bind tcp://127.0.0.1:70000: expected tcp://HOST:PORT",
        ),
        slow(
            "--bind", "udp://127.0.0.1:7000", told="udp://127.0.0.1:7000: expected tcp://HOST:PORT"
        ),
        slow("--bind", "tcp://256.1.1.1:7", "--insecure", told="cannot listen on tcp://256.1.1.1"),
        slow("--id", "2", told="where does peer 2 listen?"),
    ],
)
def test_what_cannot_work_is_said_in_one_line(place: Path, more: tuple[str, ...], told: str):
    with peers(peer(0, *more), cwd=place) as one:
        ((returned, err),) = ends(one)
    assert returned == 2
    assert told in err
    assert len([line for line in err.splitlines() if not line.startswith("WARNING")]) == 1


def test_a_taken_port_is_a_failure_and_no_mistake(place: Path):
    with socket.create_server(("127.0.0.1", 0)) as held:
        taken = f"tcp://127.0.0.1:{held.getsockname()[1]}"
        with peers(peer(0, "--bind", taken), cwd=place) as one:
            ((code, told),) = ends(one)
    assert code == 1
    assert told == f"p2pfl: {taken} is taken by another program\n"
