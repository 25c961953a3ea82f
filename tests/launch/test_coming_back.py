"""Peers by hand that are killed and started again, or come when the others train already."""

from __future__ import annotations

import json
import signal
import subprocess
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import pytest
import tomli_w
import torch
from launch_cases import command, free_address, metrics, p2pfl, small, summary, wait_for
from safetensors.torch import load_file
from secure_cases import Scene

pytestmark = pytest.mark.processes

NODES = 3
ENDLESS: dict[str, Any] = {
    "topology": {"name": "complete"},
    "pace": {"rounds": 1_000_000, "local_steps": 20},  # until they are asked to end
    "evaluation": {"every": 1_000_000},
}


class Company:
    """Peers by hand, which train until they are killed, or asked to end.

    Args:
        folder: their working directory.
        line: the words of the command line of each, after `p2pfl peer e.toml`.
    """

    def __init__(self, folder: Path, line: Callable[[int], tuple[object, ...]]) -> None:
        self.folder, self._line = folder, line
        self._stack = ExitStack()
        self.running: dict[int, subprocess.Popen[str]] = {}

    def start(self, node: int, *more: object) -> None:
        words = ("--out", f"out-{node}", "--join-timeout", 20, "--threads", 1, *more)
        line = p2pfl("peer", "e.toml", *self._line(node), *words)
        self.running[node] = self._stack.enter_context(command(*line, cwd=self.folder))

    def kill(self, node: int) -> None:
        self.running[node].kill()
        self.running.pop(node).wait()

    def end(self) -> None:
        """Ask all to end, and see that they do."""
        for process in self.running.values():
            process.send_signal(signal.SIGTERM)
        for process in self.running.values():
            _, err = process.communicate(timeout=60)
            assert (process.returncode, err) == (128 + signal.SIGTERM, "")

    def rounds(self, node: int) -> list[int]:
        return [int(row["round"]) for row in metrics(self.folder / f"out-{node}")]

    def is_training(self, node: int) -> bool:
        assert self.running[node].poll() is None
        return len(self.rounds(node)) > 10

    def hears_all(self, node: int, since: int) -> bool:
        """Say whether a peer has heard everybody in ten rounds running, all after one."""
        assert self.running[node].poll() is None
        rows = [row for row in metrics(self.folder / f"out-{node}") if int(row["round"]) > since]
        sizes = [(int(row["bytes_received"]), int(row["bytes_sent"])) for row in rows[-10:]]
        return len(sizes) == 10 and all(heard == sent > 0 for heard, sent in sizes)

    def events(self, node: int) -> list[str]:
        lines = (self.folder / f"out-{node}" / "events.jsonl").read_text().splitlines()
        return [json.loads(line)["event"] for line in lines]

    def close(self) -> None:
        self._stack.close()


@contextmanager
def company(folder: Path, line: Callable[[int], tuple[object, ...]]) -> Iterator[Company]:
    peers = Company(folder, line)
    try:
        yield peers
    finally:
        peers.close()


def listed(folder: Path, keys: bool, **sections: Any) -> Callable[[int], tuple[object, ...]]:
    """Write an experiment and a file of peers; return how each is told who it is."""
    scene = Scene(folder, NODES, **ENDLESS, **sections)
    if not keys:
        scene.list(*((node, None) for node in range(NODES)))
        return lambda node: ("--peers", "peers.toml", "--id", node)
    return lambda node: ("--peers", "peers.toml", "--keys", f"{node}.key")


@pytest.mark.parametrize("keys", [True, pytest.param(False, marks=pytest.mark.slow)])
def test_a_peer_that_was_killed_comes_back_and_hears_everybody(tmp_path: Path, keys: bool):
    with company(tmp_path, listed(tmp_path, keys)) as peers:
        for node in range(NODES):
            peers.start(node)
        wait_for(lambda: all(peers.is_training(node) for node in range(NODES)))
        peers.kill(2)
        away = peers.rounds(2)[-1]
        wait_for(lambda: peers.rounds(0)[-1] > away + 50)
        peers.start(2, "--resume")
        wait_for(lambda: peers.rounds(2)[-1] > away)
        back = peers.rounds(2)[-1]
        for node in range(NODES):
            wait_for(lambda node=node: peers.hears_all(node, back))
        peers.end()
        assert peers.rounds(2) == sorted({*peers.rounds(2)})
        assert peers.events(2).count("training") == 2
        assert peers.events(2).count("catching up") == 1


def test_who_comes_late_needs_one_contact_and_no_list(tmp_path: Path):
    (tmp_path / "late.toml").write_text('[[event]]\nat = "1h"\njoin = 2\n')
    churn = {"name": "script", "path": str(tmp_path / "late.toml")}
    sections = small(nodes=NODES, churn=churn, **ENDLESS)
    (tmp_path / "e.toml").write_text(tomli_w.dumps(sections))
    addresses = [free_address() for _ in range(NODES)]
    with company(tmp_path, lambda node: ("--id", node, "--bind", addresses[node])) as peers:
        for node in range(2):
            peers.start(node, "--contact", f"0@{addresses[0]}")
        wait_for(lambda: all(peers.is_training(node) for node in range(2)))
        peers.start(2, "--contact", f"1@{addresses[1]}")
        wait_for(lambda: peers.rounds(2))
        came = peers.rounds(2)[0]
        for node in range(NODES):
            wait_for(lambda node=node: peers.hears_all(node, came))
        peers.end()
        assert came > 0


@pytest.mark.slow
def test_who_comes_back_standardises_as_the_others_have_agreed(tmp_path: Path):
    pooled = {"preprocess": {"standardise": "pooled"}, "model": {"name": "logistic"}}
    line = listed(tmp_path, False, **pooled, data={"name": "breast_cancer"})
    with company(tmp_path, line) as peers:
        for node in range(NODES):
            peers.start(node)
        wait_for(lambda: all(peers.is_training(node) for node in range(NODES)))
        peers.kill(2)
        away = peers.rounds(2)[-1]
        peers.start(2, "--resume")
        wait_for(lambda: peers.rounds(2)[-1] > away)
        peers.end()
        assert "averaging statistics" in peers.events(0)
        assert peers.events(2).count("averaging statistics") == 1
    saved = [load_file(next((tmp_path / f"out-{n}").glob("models/*"))) for n in range(NODES)]
    constants = [name for name in saved[0] if "shift" in name or "scale" in name]
    assert constants
    for name in constants:
        torch.testing.assert_close(saved[2][name], saved[0][name])
    assert summary(tmp_path / "out-2")["status"] == "interrupted"
