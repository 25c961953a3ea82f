"""Peers with keys: who is listed, with what command line, and what they say in the end."""

from __future__ import annotations

import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import pytest
import tomli_w
from launch_cases import command, free_address, p2pfl, small

from p2pfl.cli import main
from p2pfl.results.record import Recorder
from p2pfl.security.keys import KeyPair, new_keys
from p2pfl.security.roster import Member, allow

Ending = tuple[int, str]  # exit code, standard error


class Scene:
    """A folder with an experiment, everybody's keys, and a file that lists all peers.

    Args:
        folder: where; it is the working directory of the peers.
        nodes: how many.
        addressed: whether the file says where they listen.
        sections: of the experiment.
    """

    def __init__(
        self, folder: Path, nodes: int = 2, addressed: bool = True, **sections: Any
    ) -> None:
        self.folder = folder
        (folder / "e.toml").write_text(tomli_w.dumps(small(nodes=nodes, **sections)))
        self.keys = [new_keys(folder / f"{node}.key") for node in range(nodes)]
        self.addresses = [free_address() for _ in range(nodes)]
        for node, keys in enumerate(self.keys):
            where = self.addresses[node] if addressed else None
            allow(folder / "peers.toml", Member(node, address=where, key=keys.public))

    def list(self, *entries: tuple[int, KeyPair | None], file: str = "peers.toml") -> None:
        """Write a file of peers of our own: who is there, and with what key."""
        (self.folder / file).unlink(missing_ok=True)
        for node, keys in entries:
            public = keys.public if keys else None
            allow(self.folder / file, Member(node, address=self.addresses[node], key=public))

    def line(self, node: int, *more: object, peers: str = "peers.toml") -> tuple[object, ...]:
        """Return the command line of a peer."""
        words = ("peer", "e.toml", "--keys", f"{node}.key", "--out", f"out-{node}")
        return p2pfl(*words, "--peers", peers, "--join-timeout", 10, *more)

    @contextmanager
    def started(self, *lines: tuple[object, ...]) -> Iterator[list[subprocess.Popen[str]]]:
        with ExitStack() as stack:
            yield [stack.enter_context(command(*line, cwd=self.folder)) for line in lines]

    def leave(self, node: int) -> None:
        """Leave what a peer that has finished leaves, in the folder of peer 0."""
        text = (self.folder / "e.toml").read_text()
        about = {"on": "peer", "node": node, "base": str(self.folder)}
        Recorder(self.folder / "out-0", text, **about).finish("finished", {})

    def run(self, *lines: tuple[object, ...]) -> list[Ending]:
        """Let peers run to the end, each in a process of its own."""
        with self.started(*lines) as processes:
            return [ending(process) for process in processes]

    def here(self, monkeypatch: pytest.MonkeyPatch, capsys: Any, *words: object) -> Ending:
        """Do what a process with this command line would do, in ours, which is much faster."""
        monkeypatch.chdir(self.folder)
        monkeypatch.setattr(sys, "argv", ["p2pfl", *map(str, words[2:])])
        heard = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
        before = {number: signal.getsignal(number) for number in heard}
        capsys.readouterr()
        try:
            with pytest.raises(SystemExit) as exit_:
                main()
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)
        return int(exit_.value.code or 0), capsys.readouterr().err


def ending(process: subprocess.Popen[str]) -> Ending:
    """Wait for a process, and return how it ended."""
    told = process.communicate(timeout=60)[1]
    return process.returncode, told


def only_line(err: str) -> str:
    """Return the one line that was said on standard error."""
    (line,) = err.splitlines()
    assert line.startswith("p2pfl: ")
    return line.removeprefix("p2pfl: ")
