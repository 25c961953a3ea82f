"""Hosts to launch peers on: users of an SSH server inside the test, each with a home of its own."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import Any

import asyncssh
import tomli_w

from p2pfl.experiment.experiment import Experiment
from p2pfl.fleet.hosts import Fleet, read_hosts
from p2pfl.fleet.remote import pid

NAMES = ("ward-a", "ward-b", "ward-c")


class Sshd:
    """An SSH server in a thread: logs in any of `NAMES` with its key, and runs a local shell."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.connections: list[asyncssh.SSHServerConnection] = []
        self._running: set[asyncio.Task[Any]] = set()
        host_key = asyncssh.generate_private_key("ssh-ed25519")
        user_key = asyncssh.generate_private_key("ssh-ed25519")
        user_key.write_private_key(folder / "id")
        user_key.write_public_key(folder / "id.pub")
        for name in NAMES:
            (folder / name / "bin").mkdir(parents=True)
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, daemon=True)
        self._thread.start()
        self._server = self._call(self._listen(host_key))
        self.port = self._server.get_port()
        public = host_key.export_public_key().decode()
        (folder / "known_hosts").write_text(f"[127.0.0.1]:{self.port} {public}")

    def home(self, name: str) -> Path:
        return self.folder / name

    def fake(self, name: str, command: str, script: str) -> Path:
        """Put a program where a user's shell finds it first."""
        path = self.home(name) / "bin" / command
        path.write_text(f"#!/bin/sh\n{script}\n")
        path.chmod(0o755)
        return path

    def drop_all(self) -> None:
        """Break all connections."""

        async def drop() -> None:
            for connection in self.connections:
                connection.abort()
            self.connections.clear()

        self._call(drop())

    def places(self) -> list[Path]:
        """Return where the files of each peer on the hosts start, as ``.../003``."""
        found = self.folder.glob("*/.local/state/p2pfl/*/*.pid")
        return sorted((path.with_suffix("") for path in found), key=lambda path: path.name)

    def close(self) -> None:
        for place in self.places():
            if (process := pid(place)) is not None:
                os.kill(process, signal.SIGKILL)

        async def close() -> None:
            self._server.close()
            await self._server.wait_closed()
            await asyncio.gather(*self._running)

        self.drop_all()
        self._call(close())
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()

    def _call(self, work: Any) -> Any:
        return asyncio.run_coroutine_threadsafe(work, self._loop).result(30)

    async def _listen(self, host_key: asyncssh.SSHKey) -> asyncssh.SSHAcceptor:
        return await asyncssh.listen(
            "127.0.0.1",
            0,
            server_host_keys=[host_key],
            authorized_client_keys=str(self.folder / "id.pub"),
            process_factory=self._run,
            acceptor=self.connections.append,
            sftp_factory=True,
            encoding=None,
        )

    async def _run(self, process: asyncssh.SSHServerProcess[bytes]) -> None:
        self._running.add(this := asyncio.current_task())
        this.add_done_callback(self._running.discard)
        home = self.home(process.get_extra_info("username"))
        env = os.environ | {"HOME": str(home), "PATH": f"{home}/bin:{os.environ['PATH']}"}
        child = await asyncio.create_subprocess_shell(
            process.command or "false",
            stdin=asyncio.subprocess.PIPE,
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.PIPE,
            env=env | {"OMP_NUM_THREADS": "1"},
            cwd=home,
            start_new_session=True,
        )
        pairs = ((child.stdout, process.stdout), (child.stderr, process.stderr))
        pumps = [asyncio.create_task(_pump(source, sink)) for source, sink in pairs]
        feed = asyncio.create_task(_feed(process.stdin, child.stdin))
        gone = asyncio.create_task(process.wait_closed())
        said = asyncio.gather(*pumps, return_exceptions=True)
        await asyncio.wait({said, gone}, return_when=asyncio.FIRST_COMPLETED)
        if said.done() and not any(said.result()):
            process.exit(await child.wait())
        else:  # nobody listens any more
            with suppress(ProcessLookupError):
                os.killpg(child.pid, signal.SIGKILL)
        for task in (feed, gone, *pumps):
            task.cancel()
        await asyncio.gather(feed, gone, *pumps, child.wait(), return_exceptions=True)


async def _pump(source: Any, sink: Any) -> None:
    while data := await source.read(1 << 16):
        sink.write(data)
        await sink.drain()


async def _feed(source: Any, sink: Any) -> None:
    with suppress(OSError):  # the child may end before it has read all
        await _pump(source, sink)
        sink.write_eof()


def hosts_file(sshd: Sshd, **changes: dict[str, Any]) -> Path:
    """Write a hosts file with one peer on each host; `changes` are keys of hosts, by letter."""
    defaults = {
        "ssh_port": sshd.port,
        "ssh_key": str(sshd.folder / "id"),
        "known_hosts": str(sshd.folder / "known_hosts"),
        "python": sys.executable,
        "threads": 1,
    }
    hosts = [
        {"name": name, "user": name, "address": "127.0.0.1", "ports": [port]}
        | changes.get(name[-1], {})
        for name, port in zip(NAMES, free_ports(len(NAMES)), strict=True)
    ]
    path = sshd.folder / "hosts.toml"
    path.write_text(tomli_w.dumps({"defaults": defaults, "hosts": hosts}))
    return path


def fleet(sshd: Sshd, **changes: dict[str, Any]) -> Fleet:
    return read_hosts(hosts_file(sshd, **changes))


def free_ports(count: int) -> list[int]:
    """Return ports that are free, no two of them the same: all are held until the last is found."""
    with ExitStack() as held:
        servers = [held.enter_context(socket.create_server(("127.0.0.1", 0))) for _ in range(count)]
        return [server.getsockname()[1] for server in servers]


def free_port() -> int:
    return free_ports(1)[0]


def small(**sections: Any) -> dict[str, Any]:
    """A small experiment on three peers."""
    return {
        "name": "small",
        "nodes": 3,
        "data": {"name": "synthetic", "examples": 60, "shape": [4], "classes": 2},
        "model": {"name": "mlp", "hidden": [4]},
        "algorithm": {"name": "dpsgd"},
        "topology": {"name": "complete"},
        "pace": {"rounds": 3, "patience": 2.0},
        **sections,
    }


def experiment(**sections: Any) -> Experiment:
    return Experiment.from_dict(small(**sections))


def summary(folder: Path) -> dict[str, Any]:
    loaded: dict[str, Any] = json.loads((folder / "summary.json").read_text())
    return loaded


def rounds(place: Path) -> int:
    """Return how many rounds a peer has behind it, of which ``.../003`` is the folder."""
    path = place / "metrics.csv"
    return path.read_text().count("\n") - 1 if path.is_file() else 0


def wait_for(what: Callable[[], Any], timeout: float = 60.0) -> Any:
    """Ask until the answer is true, and return it."""
    deadline = time.monotonic() + timeout
    while not (answer := what()):
        assert time.monotonic() < deadline, "waited in vain"
        time.sleep(0.02)
    return answer
