"""How much memory a training peer can be made to hold: measured on processes of their own."""

import json
import os
import socket
import struct
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import NamedTuple

import psutil
import pytest
from hostile_cases import MAD, SOON, VICTIM, Mad
from test_hostile import GREETING, heartbeats

from p2pfl.runtime import flows, sockets
from p2pfl.runtime.wire import Kind
from p2pfl.security.keys import KeyPair, make_keys

pytestmark = pytest.mark.processes
HERE = Path(__file__).parent
CLIENT = HERE.parent / "security" / "curve_client.py"
MIB = 1 << 20
ROUNDS = 200
READY = b"\x05READY\x0bSocket-Type" + struct.pack(">I", 6) + b"ROUTER"


class Besieged(NamedTuple):
    """A pair that trains in another process, and what it has come to in the end."""

    ports: list[int]
    keys: list[KeyPair]
    end: Callable[[], dict]
    most: Callable[[], int]  # bytes by which its memory has grown


@contextmanager
def program(*words: object) -> Iterator[subprocess.Popen[str]]:
    command = [sys.executable, *map(str, words)]
    pipe, env = subprocess.PIPE, {**os.environ, "OMP_NUM_THREADS": "1"}
    with subprocess.Popen(command, stdout=pipe, stderr=pipe, text=True, env=env) as process:
        try:
            yield process
        finally:
            process.kill()


@contextmanager
def besieged(
    attack: Callable[[Besieged, Mad], None], keyed: bool = True, kind: type[Mad] = Mad
) -> Iterator[Besieged]:
    """Let a pair meet a neighbour of ours, which does something, while its memory is watched."""
    with program(HERE / "victim.py", int(keyed), ROUNDS) as process, ExitStack() as stack:
        about = json.loads(process.stdout.readline())
        keys = [KeyPair(*pair) for pair in about["keys"]]
        sizes, over = [], threading.Event()

        def watch() -> None:
            looked = psutil.Process(process.pid)
            with suppress(psutil.Error):
                while not over.wait(0.005):
                    sizes.append(looked.memory_info().rss)

        def end() -> dict:
            told, said = process.communicate(timeout=60)
            assert said == ""
            return json.loads(told.splitlines()[-1])

        one = Besieged(about["ports"], keys, end, lambda: max(sizes) - sizes[0])
        mad = kind(one.ports[VICTIM], one.ports[MAD], keys)
        stack.callback(mad.close)
        mad.greet()
        assert process.stdout.readline() == "training\n"
        watcher = threading.Thread(target=watch)
        watcher.start()
        stack.callback(watcher.join)
        stack.callback(over.set)
        attack(one, mad)
        yield one


def stands(one: Besieged) -> dict[str, int]:
    """Check that the pair has trained to the end within its memory; return what was refused."""
    told = one.end()
    assert told["rounds"] == [ROUNDS, ROUNDS]
    assert one.most() < flows.BUDGET + sockets.UNDER_WAY + 64 * MIB
    refused: dict[str, int] = told["rejections"]
    return refused


def strangers(one: Besieged, mad: Mad) -> None:
    port, unknown = one.ports[VICTIM], make_keys()
    words = (unknown.public, unknown.secret, one.keys[VICTIM].public)
    with program(CLIENT, port, "endless", *words) as stranger:
        assert "ERROR" in stranger.communicate(timeout=20)[1]
    with program(CLIENT, port, "bomb") as bomb, program(CLIENT, port, "silent") as silent:
        assert bomb.stdout.readline() == silent.stdout.readline() == "connected\n"
        for _ in range(20):
            with socket.create_connection(("127.0.0.1", port)) as raw:
                raw.sendall(os.urandom(2000))


def endless(one: Besieged, mad: Mad) -> None:
    keys, port = one.keys, one.ports[VICTIM]
    words = (keys[MAD].public, keys[MAD].secret, keys[VICTIM].public)
    for mode in ("endless", "empty"):
        with program(CLIENT, port, mode, *words) as client:
            assert client.stdout.readline() == "cut\n"
    heartbeats(mad)


@pytest.mark.slow
def test_a_crowd_of_strangers():
    with besieged(strangers) as one:
        refused = stands(one)
    assert any("too many connections of strangers" in reason for reason in refused)
    assert any("a key that is not allowed" in reason for reason in refused)


def test_messages_without_end_from_a_neighbour_with_a_key():
    with besieged(endless) as one:
        refused = stands(one)
    name = f"127.0.0.1 ({one.keys[MAD].public[:8]}...): "
    assert refused[f"{name}{MIB} bytes without a whole message"] == 2
    assert refused[f"{name}too many messages"] > 0
    assert refused[f"peer {MAD}: too many messages"] > 0


class Raw(Mad):
    """Answers in the words of ZeroMQ's protocol, but not by ZeroMQ."""

    def listen(self, port: int, keys: list[KeyPair]) -> None:
        self.near = socket.create_server(("127.0.0.1", port))
        self.near.settimeout(SOON)

    def greet(self) -> None:
        self.say(*self.hello())
        self.connection, _ = self.near.accept()
        self.connection.sendall(GREETING + frame(4, READY))
        heard = b""
        while b"READY" not in heard:  # no message may come before
            heard += self.connection.recv(4096)
        self.connection.sendall(frame(0, self.small(Kind.WELCOME)))

    def close(self) -> None:
        self.near.close()
        self.connection.close()
        super().close()


def frame(flags: int, body: bytes) -> bytes:
    return struct.pack(">BQ", flags | 2, len(body)) + body


def endless_answers(one: Besieged, mad: Mad) -> None:
    assert isinstance(mad, Raw)
    with suppress(OSError):
        while True:
            mad.connection.sendall(frame(1, bytes(60_000)))


@pytest.mark.slow
def test_answers_without_end():
    """In clear, where whoever is dialled needs no key to speak."""
    with besieged(endless_answers, keyed=False, kind=Raw) as one:
        refused = stands(one)
    assert refused[f"127.0.0.1: {sockets.UNDER_WAY} bytes without a whole message"] == 1
