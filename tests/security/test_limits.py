"""How much anybody can make a listener hold: measured on a process of its own."""

import json
import subprocess
import sys
import threading
import time
from contextlib import contextmanager, suppress
from pathlib import Path

import pytest
import zmq
from curve_client import LIBRARIES
from security_cases import PATIENCE, Door, event, wait_for_news

from p2pfl.security.curve import secure_dialler
from p2pfl.security.gate import Gate
from p2pfl.security.keys import make_keys

HERE = Path(__file__).parent
MIB = 1 << 20
ALICE, MALLORY = make_keys(), make_keys()


class Guarded:
    """A listener in another process."""

    def __init__(self, process):
        self.process = process
        about = json.loads(process.stdout.readline())
        self.address, self.key = about["address"], about["key"]
        self.port = self.address.rpartition(":")[2]

    def told(self):
        self.process.stdin.write("\n")
        self.process.stdin.flush()
        return json.loads(self.process.stdout.readline())

    def until(self, is_true, seconds=20.0):
        """Ask until something is true; return all answers."""
        answers, deadline = [], time.monotonic() + seconds
        while time.monotonic() < deadline:
            answers.append(self.told())
            if is_true(answers[-1]):
                return answers
            time.sleep(0.005)
        raise AssertionError(f"not after {seconds} s: {answers[-1]}")


@contextmanager
def program(name, *words):
    command = [sys.executable, str(HERE / name), *map(str, words)]
    pipe = subprocess.PIPE
    with subprocess.Popen(command, stdin=pipe, stdout=pipe, text=True) as process:
        try:
            yield process
        finally:
            process.kill()


@contextmanager
def guarded(strangers, *allowed):
    with program("guarded.py", strangers, *allowed) as process:
        yield Guarded(process)


@contextmanager
def client(guard, keys):
    context = zmq.Context()
    socket = context.socket(zmq.DEALER)
    socket.linger = 0
    secure_dialler(socket, keys, guard.key)
    socket.connect(guard.address)
    yield socket
    context.destroy(0)


def can_be_reached(guard, keys):
    before = guard.told()["delivered"].get(keys.public, 0)
    with client(guard, keys) as socket:
        socket.send(b"hello")
        guard.until(lambda told: told["delivered"].get(keys.public, 0) > before)


def test_a_hundred_strangers_cost_little_and_leave_nothing():
    with guarded(128, ALICE.public) as guard:
        can_be_reached(guard, ALICE)
        before = guard.told()
        with program("curve_client.py", guard.port, "bomb") as bomb:
            assert bomb.stdout.readline() == "connected\n"
            started = time.monotonic()
            answers = guard.until(lambda told: told["fds"] >= before["fds"] + 50)
            answers += guard.until(lambda told: told["fds"] <= before["fds"])
            assert time.monotonic() - started < 8
        worst = max(told["rss"] for told in answers) - before["rss"]
        assert worst < min(100 * 128 << 10, 16 * MIB)
        can_be_reached(guard, ALICE)


def test_more_strangers_than_are_let_in_are_cut_at_once():
    with guarded(10, ALICE.public) as guard:
        before = guard.told()["fds"]
        with program("curve_client.py", guard.port, "silent") as crowd:
            assert crowd.stdout.readline() == "connected\n"
            reason = "127.0.0.1: too many connections of strangers"
            guard.until(lambda told: told["refused"].get(reason, 0) == 90)
            guard.until(lambda told: told["fds"] <= before + 10)
            guard.until(lambda told: told["fds"] <= before)
        can_be_reached(guard, ALICE)


@pytest.mark.skipif(not LIBRARIES, reason="needs the libsodium of pyzmq's wheels")
@pytest.mark.parametrize("mode", ["endless", "empty"])
def test_a_message_without_end_is_cut_off_and_others_are_served(mode):
    with guarded(10, ALICE.public, MALLORY.public) as guard, client(guard, ALICE) as alice:
        can_be_reached(guard, ALICE)
        before = guard.told()["rss"]
        words = (guard.port, mode, MALLORY.public, MALLORY.secret, guard.key)
        with program("curve_client.py", *words) as flood:
            cut = "1048576 bytes without a whole message"
            answers = guard.until(lambda told: any(cut in reason for reason in told["refused"]))
            assert flood.stdout.readline() == "cut\n"
        assert answers[-1]["delivered"][MALLORY.public] == 1  # its hello, and no more
        alice.send(b"hello")
        answers += guard.until(lambda told: told["delivered"][ALICE.public] == 2)
        assert max(told["rss"] for told in answers) - before < 64 * MIB


def test_an_honest_peer_is_not_cut_however_much_it_sends():
    with Door(ALICE) as door:
        alice = door.dial(ALICE)
        assert door.read() == (ALICE.public, b"hello")
        for _ in range(100):  # 6 MB, of which the listener never leaves much unread
            alice.send(bytes(60_000))
            assert door.read()[1] == bytes(60_000)
        assert door.gate.refused() == {}


def fill(door):
    """Have a client send until all queues on the way are full; return how many messages."""
    alice, count = door.dial(ALICE), 1
    alice.sndtimeo = 300
    with suppress(zmq.Again):
        while True:
            alice.send(bytes(60_000))
            count += 1
    return count


def test_a_listener_that_is_not_read_cuts_nobody():
    with Door(ALICE) as door:
        count = fill(door)
        assert door.gate.refused() == {}
        assert count > 20  # more than lies in the listener
        for _ in range(count):
            assert door.read()
        assert door.gate.refused() == {}


def test_what_is_read_while_the_gate_thinks_counts_as_taken(monkeypatch):
    """However long the gate's thread waits for a core in the middle of its work."""
    with Door(ALICE) as door:
        count, connections = fill(door), door.gate._connections
        halted, go_on, looked = threading.Event(), threading.Event(), threading.Event()

        def look(untold):
            halted.set()
            assert go_on.wait(PATIENCE / 1000)
            real(untold)
            looked.set()

        real = connections.look
        monkeypatch.setattr(connections, "look", look)
        for number in range(count):
            if number == 50:  # so that there is something for it to look at
                assert halted.wait(PATIENCE / 1000)
            if number == 200:  # 9 MB later, of 1 that may pile up
                go_on.set()
                assert looked.wait(PATIENCE / 1000)
            assert door.read()
        assert door.gate.refused() == {}


def test_a_frame_that_is_too_large_is_refused_also_from_an_allowed_key():
    with Door(ALICE) as door:
        alice = door.dial(ALICE, body=bytes(70_000))
        assert event(alice, {zmq.EVENT_DISCONNECTED})
        assert not door.listener.poll(0)


def test_the_newest_of_too_many_connections_is_cut():
    with Door(ALICE, most=2) as door:
        sockets = []
        for _ in range(2):
            sockets.append(door.dial(ALICE))
            assert door.read()
        third = door.dial(ALICE, body=b"a word before it was cut, perhaps")
        assert event(third, {zmq.EVENT_DISCONNECTED})
        assert "127.0.0.1: too many connections" in door.gate.refused()
        sockets[0].send(b"still here")
        assert (ALICE.public, b"still here") in iter(door.read, None)


def test_what_is_dialled_has_an_allowance_of_its_own():
    with Door(ALICE) as door:
        gate = Gate(door.outside, [])
        socket = door.outside.socket(zmq.DEALER)
        secure_dialler(socket, ALICE, door.keys.public)
        gate.watch(socket, link=7, allowance=10 * MIB)
        socket.connect(door.address)
        socket.send(b"hello")
        assert door.listener.poll(PATIENCE)
        to, _ = door.listener.recv_multipart()
        for _ in range(30):  # 30 MB in all, and each is taken
            door.listener.send_multipart([to, bytes(MIB)])
            assert socket.poll(PATIENCE)
            frame = socket.recv(copy=False)
            gate.taken(frame.get(zmq.SRCFD), len(frame))
        assert gate.refused() == {}
        gate.news()
        poller, count = zmq.Poller(), 0
        poller.register(gate.fileno(), zmq.POLLIN)
        while not poller.poll(50) and count < 100:  # and none of these is
            door.listener.send_multipart([to, bytes(MIB)])
            count += 1
        wait_for_news(gate, {(7, zmq.EVENT_DISCONNECTED)})
        assert count >= 10
        assert gate.refused() == {"127.0.0.1: 10485760 bytes without a whole message": 1}
        socket.close(0)
        gate.close()
