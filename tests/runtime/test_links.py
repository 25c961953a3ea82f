"""Links between peers of one process: they meet, refuse, lose each other and say goodbye."""

import math
import select
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import NamedTuple

import msgpack
import pytest
import torch
import zmq

from p2pfl.errors import RemoteProtocolError, RunError, UserError
from p2pfl.peer.events import Event, PeerDown, Received, Send
from p2pfl.runtime import links as links_module
from p2pfl.runtime import wire
from p2pfl.runtime.handshake import NeighbourGone, Terms
from p2pfl.runtime.links import MANY, MOST_REASONS, Links
from p2pfl.runtime.wire import Header, Kind

TERMS = Terms({"seed": "1", "algorithm.name": "dpsgd"})
PATIENCE = 10.0  # seconds a test waits for what should take milliseconds


class Message(NamedTuple):
    values: torch.Tensor


def model(value: float = 1.0, d: int = 4) -> Message:
    return Message(torch.full((1, d), float(value)))


def send(*to: int, round: int = 0, value: float = 1.0, d: int = 4) -> Send:
    return Send(to, round, len(to), 0.0, model(value, d))


class Stage:
    """Some peers, all neighbours of one another unless a test says otherwise."""

    def __init__(self, stack: ExitStack, n: int) -> None:
        self.stack, self.n = stack, n
        self.sockets = [socket.create_server(("127.0.0.1", 0)) for _ in range(n)]
        ports = [held.getsockname()[1] for held in self.sockets]
        self.addresses = {node: f"tcp://127.0.0.1:{port}" for node, port in enumerate(ports)}
        for held in self.sockets:
            stack.callback(held.close)

    def peer(
        self,
        node: int,
        neighbours: tuple[int, ...] | None = None,
        terms: Terms = TERMS,
        again: bool = False,
        largest: int = 1 << 20,
    ) -> Links:
        """Start a peer; `again`: another process of the same id, listening elsewhere."""
        others = [p for p in self.addresses if p != node] if neighbours is None else neighbours
        addresses = {p: self.addresses[p] for p in others}
        if again:
            links = Links(node, "tcp://127.0.0.1:*", addresses, terms, largest)
        else:
            held = self.sockets[node].detach()
            links = Links(node, self.addresses[node], addresses, terms, largest, held)
        self.stack.callback(close_quietly, links)
        return links

    def all_met(self, **more: object) -> list[Links]:
        peers = [self.peer(node, **more) for node in range(self.n)]
        meet(*peers)
        for links in peers:
            links.expect(1, wire.schema(model()), True)
        return peers


@pytest.fixture
def stage() -> Iterator[Callable[[int], Stage]]:
    with ExitStack() as stack:
        yield lambda n: Stage(stack, n)


def close_quietly(links: Links) -> None:
    if not links._context.closed:
        links.close("the test is over", 0)


def meet(*peers: Links, timeout: float = PATIENCE) -> None:
    for error in outcomes(*peers, timeout=timeout):
        if error:
            raise error


def outcomes(*peers: Links, timeout: float = PATIENCE) -> list[BaseException | None]:
    """Let peers meet, each in a thread and closing when it fails; return what they raised."""

    def one(links: Links) -> BaseException | None:
        try:
            links.meet(timeout)
        except (UserError, RunError) as error:
            links.close(str(error), 1.0)
            return error
        return None

    with ThreadPoolExecutor(len(peers)) as pool:
        return list(pool.map(one, peers))


def events_until(done: Callable[[list[Event]], bool], *peers: Links) -> list[Event]:
    """Turn the peers' loops until the first of them has seen enough; return what it saw."""
    seen: list[Event] = []
    deadline = time.monotonic() + PATIENCE
    while not done(seen):
        assert time.monotonic() < deadline, f"only {seen} happened"
        for links in peers:
            happened = links.events()
            seen += happened if links is peers[0] else []
        peers[0].poller.poll(10)
    return seen


def rounds_of(events: list[Event]) -> list[int]:
    return [event.round for event in events if isinstance(event, Received)]


def turn(until: Callable[[], bool], *peers: Links) -> list[Event]:
    return events_until(lambda seen: until(), *peers)


@contextmanager
def stranger(address: str, kind: int = zmq.DEALER) -> Iterator[zmq.Socket[bytes]]:
    with zmq.Context() as context, context.socket(kind) as sock:
        sock.linger = 0
        sock.rcvtimeo = 1000 * int(PATIENCE)
        sock.connect(address)
        yield sock


def hello(sender: int, terms: Terms = TERMS, life: int = 5) -> list[bytes]:
    return [
        wire.pack(Header(Kind.HELLO, terms.run, 0, sender, life)),
        wire.pack_terms(terms.items),
    ]


def frames(sender: int, round: int = 0, run: bytes | None = None, phase: int = 1) -> list[bytes]:
    header = Header(Kind.MODEL, run or TERMS.run, phase, sender, round, 1, 0.0)
    return [bytes(frame) for frame in wire.dump(header, model())]


# Meeting


def test_peers_meet_and_models_arrive_in_order(stage):
    a, b = stage(2).all_met()
    a.expect(1, wire.schema(model()), False)
    for round in range(5):
        a.send(send(1, round=round, value=round))
    seen = events_until(lambda seen: len(seen) == 5, b, a)
    assert rounds_of(seen) == [0, 1, 2, 3, 4]
    assert [event.message.values[0, 0].item() for event in seen] == [0, 1, 2, 3, 4]
    assert all(event.sender == 0 and event.degree == 1 for event in seen)
    assert not a.rejected
    assert not b.rejected


def test_a_neighbour_may_start_later(stage):
    scene = stage(2)
    scene.sockets[1].close()  # for now nobody listens there
    a, calls = scene.peer(0), iter(range(10**6))
    asked_often = threading.Event()

    def go_on() -> bool:
        if next(calls) == 3:
            asked_often.set()
        return True

    with ThreadPoolExecutor(1) as pool:
        meeting = pool.submit(a.meet, PATIENCE, go_on)
        assert asked_often.wait(PATIENCE)
        b = Links(1, scene.addresses[1], {0: scene.addresses[0]}, TERMS, 1000)
        scene.stack.callback(close_quietly, b)
        b.meet(PATIENCE)
        meeting.result()


def test_a_neighbour_that_never_starts_is_named(stage):
    scene = stage(3)
    a, b = scene.peer(0), scene.peer(1)
    first, second = outcomes(a, b, timeout=0.5)
    told = f"nothing heard within 0.5 s of peer 2 at {scene.addresses[2]}"
    assert told in str(first) or told in str(second)
    assert all(isinstance(error, RunError) for error in (first, second))


def test_one_that_is_not_wanted_any_more_stops_meeting(stage):
    a = stage(2).peer(0)
    a.meet(PATIENCE, go_on=lambda: False)


def test_peers_of_different_experiments_both_name_the_difference(stage):
    scene = stage(2)
    other = Terms({"seed": "2", "algorithm.name": "choco"})
    a, b = scene.peer(0), scene.peer(1, terms=other)
    first, second = outcomes(a, b)
    assert isinstance(first, UserError)
    assert isinstance(second, UserError)
    assert f"peer 1 at {scene.addresses[1]} refused peer 0 ('here' is peer 1)" in str(first)
    assert "algorithm.name: 'choco' here, 'dpsgd' there; seed: '2' here, '1' there" in str(first)
    assert "algorithm.name: 'dpsgd' here, 'choco' there; seed: '1' here, '2' there" in str(second)


def test_a_third_peer_hears_why_the_others_do_not_begin(stage):
    scene = stage(3)
    a = scene.peer(0, (1, 2))
    b = scene.peer(1, (0,), terms=Terms({"seed": "2"}))
    c = scene.peer(2, (0, 1))  # it waits for peer 1, which does not know of it
    started = time.monotonic()
    first, second, third = outcomes(a, b, c)
    assert time.monotonic() - started < PATIENCE / 2
    assert isinstance(first, UserError)
    assert isinstance(second, UserError)
    assert isinstance(third, UserError | NeighbourGone)


def test_a_neighbour_that_gives_up_tells_why(stage):
    scene = stage(3)
    a, b = scene.peer(0, (1, 2)), scene.peer(1, (0,))
    # Peer 2 never comes; peer 0 runs out of time, and peer 1 is in training already.
    with ThreadPoolExecutor(2) as pool:
        failing = pool.submit(a.meet, 1.0)
        b.meet(PATIENCE)
        with pytest.raises(RunError, match="peer 2") as failure:
            failing.result()
        closing = pool.submit(a.close, str(failure.value), 1.0)
        with pytest.raises(NeighbourGone, match=r"peer 0 gave up .*nothing heard within 1 s"):
            turn(lambda: False, b)
        closing.result()


def test_an_address_that_is_somebody_elses_is_found_out(stage):
    scene = stage(3)
    a, b = scene.peer(0, (1,)), scene.peer(1, (0,))
    lost = Links(2, "tcp://127.0.0.1:*", {0: scene.addresses[1]}, TERMS, 1000)
    scene.stack.callback(close_quietly, lost)
    meet(a, b)
    with ThreadPoolExecutor(1) as pool:
        meeting = pool.submit(outcomes, lost)
        turn(meeting.done, a, b)
        (error,) = meeting.result()
    assert isinstance(error, UserError)
    assert f"peer 0 at {scene.addresses[1]} says that it is peer 1" in str(error)


def test_a_neighbour_of_another_version_is_named(stage):
    scene = stage(2)
    a = scene.peer(0)
    with zmq.Context() as context, context.socket(zmq.ROUTER) as router:
        router.linger = 0
        router.setsockopt(zmq.USE_FD, scene.sockets[1].detach())
        router.bind(scene.addresses[1])
        with ThreadPoolExecutor(1) as pool:
            meeting = pool.submit(a.meet, PATIENCE)
            identity, *_ = router.recv_multipart()
            router.send_multipart([identity, msgpack.packb([9, "a new", "layout"])])
            with pytest.raises(UserError, match=r"peer 1 at .* speaks protocol version 9"):
                meeting.result()


def test_a_hello_of_another_version_is_answered(stage):
    a, b = stage(2).all_met()
    with stranger(address_of(a)) as sock:
        sock.send_multipart([msgpack.packb([9, "a new", "layout"])])
        turn(lambda: bool(sock.poll(0)), a, b)
        assert wire.unpack(sock.recv_multipart()[0]).kind is Kind.REFUSE
    assert a.rejected == {"protocol version 9, ours is 1": 1}


def port_of(links: Links) -> int:
    return int(
        links._listener.socket.getsockopt(zmq.LAST_ENDPOINT).rsplit(b":", 1)[1].rstrip(b"\0")
    )


def address_of(links: Links) -> str:
    return f"tcp://127.0.0.1:{port_of(links)}"


@pytest.mark.parametrize(
    ("message", "told"),
    [
        (hello(7), "peer 7 is no neighbour of peer 0"),
        (hello(0), "peer 0 is no neighbour of peer 0"),
        (hello(1), "there is a peer 1 already"),
        (hello(1, Terms({"seed": "1"})), "algorithm.name: 'dpsgd' here, absent there"),
    ],
)
def test_a_hello_that_is_not_acceptable_is_refused(stage, message: list[bytes], told: str):
    a, b = stage(2).all_met()
    with stranger(address_of(a)) as sock:
        sock.send_multipart(message)
        turn(lambda: bool(sock.poll(0)), a, b)
        header, reason = sock.recv_multipart()
        assert wire.unpack(header).kind is Kind.REFUSE
        assert told in reason.decode()
        assert a.rejected[f"hello refused: {reason.decode()}"] == 1
        sock.send_multipart(frames(1))
        turn(lambda: a.rejected.total() == 2, a, b)
    b.send(send(0))
    assert rounds_of(events_until(bool, a, b)) == [0]  # the real peer 1 is heard as before


def test_a_second_process_of_one_id_is_refused(stage):
    scene = stage(2)
    a, b = scene.all_met()
    double = scene.peer(1, (0,), again=True)
    with ThreadPoolExecutor(1) as pool:
        meeting = pool.submit(outcomes, double, timeout=PATIENCE)
        turn(meeting.done, a, b)
        (error,) = meeting.result()
    assert isinstance(error, UserError)
    assert "there is a peer 1 already" in str(error)


def test_a_peer_started_again_while_others_meet_is_let_in(stage):
    scene = stage(3)
    a, b = scene.peer(0), scene.peer(1)
    met_half = threading.Event()

    def go_on() -> bool:
        if a._absent() == [2]:
            met_half.set()
        return True

    with ThreadPoolExecutor(3) as pool:
        meeting = pool.submit(a.meet, PATIENCE, go_on)
        first_life = pool.submit(b.meet, PATIENCE, lambda: not met_half.is_set())
        first_life.result()
        vanish(b)
        b = Links(1, scene.addresses[1], {p: scene.addresses[p] for p in (0, 2)}, TERMS, 1000)
        scene.stack.callback(close_quietly, b)
        c = scene.peer(2)
        for other in [pool.submit(links.meet, PATIENCE) for links in (b, c)]:
            other.result()
        meeting.result()
    for links in (a, b, c):
        links.expect(1, wire.schema(model()), True)
    b.send(send(0))
    assert rounds_of(events_until(bool, a, b, c)) == [0]
    a.send(send(1))
    assert rounds_of(events_until(bool, b, a, c)) == [0]


def vanish(links: Links) -> None:
    """End a peer's links without a goodbye, as SIGKILL does."""
    links._context.destroy(0)


def test_a_peer_started_again_after_the_beginning_is_refused(stage):
    scene = stage(2)
    a, b = scene.all_met()
    vanish(b)
    again = Links(1, scene.addresses[1], {0: scene.addresses[0]}, TERMS, 1000)
    scene.stack.callback(close_quietly, again)
    with ThreadPoolExecutor(1) as pool:
        meeting = pool.submit(outcomes, again, timeout=PATIENCE)
        turn(meeting.done, a)
        (error,) = meeting.result()
    assert isinstance(error, UserError)
    assert "peer 1" in str(error)  # started again, or given up already
    assert "started again after the run" in str(error) or "goes on without" in str(error)


# Addresses


def test_an_occupied_address_is_named():
    with socket.create_server(("127.0.0.1", 0)) as held:
        address = f"tcp://127.0.0.1:{held.getsockname()[1]}"
        with pytest.raises(RunError, match=f"{address} is taken by another program"):
            Links(0, address, {}, TERMS, 1000)


@pytest.mark.parametrize(
    "address",
    [
        "tcp://256.1.1.1:1",
        "udp://x",
        "tcp://127.0.0.1:70000",
        "tcp://127.0.0.1",
        "nonsense",
        "tcp://",
    ],
)
def test_an_address_that_cannot_be_used_is_named(address: str):
    before = open_files()
    with pytest.raises(UserError, match="cannot listen on") as failure:
        Links(0, address, {}, TERMS, 1000)
    assert address in str(failure.value)
    assert open_files() == before


@pytest.mark.parametrize(
    "address", ["udp://x", "tcp://127.0.0.1:70000", "tcp://127.0.0.1:0", "nonsense", "tcp://"]
)
def test_an_address_that_cannot_be_dialled_is_named(address: str):
    before = open_files()
    with pytest.raises(UserError, match="cannot dial") as failure:
        Links(0, "tcp://127.0.0.1:*", {1: address}, TERMS, 1000)
    assert address in str(failure.value)
    assert open_files() == before


def test_too_few_files_are_a_readable_error():
    """In a process of its own: limits cannot be raised again."""
    program = (
        "import resource; resource.setrlimit(resource.RLIMIT_NOFILE, (60, 60))\n"
        "from p2pfl.runtime.links import Links, Terms\n"
        "from p2pfl.errors import RunError\n"
        "others = {k: f'tcp://127.0.0.1:{9000 + k}' for k in range(1, 80)}\n"
        "try: Links(0, 'tcp://127.0.0.1:*', others, Terms({}), 1000)\n"
        "except RunError as error: print(error)"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.stdout == "too many links: Too many open files (see `ulimit -n`)\n"


# Strangers

JUNK = {
    "nothing": [b""],
    "noise": [b"\xff" * 20],
    "many empty frames": [b""] * 5000,
    "a long header": [b"\x90" * 1000],
    "a model": frames(1),
    "a goodbye": [wire.pack(Header(Kind.BYE, TERMS.run, 1, 1)), b"so long"],
    "an abortion": [wire.pack(Header(Kind.ABORT, TERMS.run, 1, 1)), b"so long"],
    "a hello without terms": hello(1)[:1],
    "a hello with a bomb": [hello(1)[0], b"\xdc\xff\xff" * 20_000],
    "a hello with too much": [*hello(1), b"more"],
}


@pytest.mark.parametrize("junk", JUNK.values(), ids=JUNK.keys())
def test_junk_is_dropped_and_counted(stage, junk: list[bytes]):
    a, b = stage(2).all_met()
    with stranger(address_of(a)) as sock:
        for _ in range(3):
            sock.send_multipart(junk)
        turn(lambda: a.rejected.total() == 3, a, b)
    b.send(send(0))
    assert rounds_of(events_until(bool, a, b)) == [0]
    a.send(send(1))
    assert rounds_of(events_until(bool, b, a)) == [0]


@pytest.mark.parametrize(
    ("wrong", "reason"),
    [
        (frames(2), "a message from somebody who has not said hello"),
        (frames(1, run=b"another!"), "a message from somebody who has not said hello"),
        (frames(1, phase=0), "a message of another phase"),
        (frames(1)[:1], "0 buffers instead of 1"),
        ([*frames(1), b"more"], "2 buffers instead of 1"),
        ([frames(1)[0], bytes(15)], "values has 15 bytes instead of 16"),
        ([frames(1)[0], b"\xff" * 16], "values has values which are not finite"),
        ([wire.pack(Header(Kind.WELCOME, TERMS.run, 1, 1))], "an unexpected WELCOME"),
    ],
)
def test_what_a_neighbour_may_not_send_is_dropped_and_counted(stage, wrong, reason: str):
    scene = stage(2)
    a = scene.peer(0)
    with zmq.Context() as context, context.socket(zmq.ROUTER) as router:
        router.linger = 0
        router.setsockopt(zmq.USE_FD, scene.sockets[1].detach())
        router.bind(scene.addresses[1])
        with stranger(scene.addresses[0]) as sock, ThreadPoolExecutor(1) as pool:
            meeting = pool.submit(a.meet, PATIENCE)
            sock.send_multipart(hello(1))
            identity, *_ = router.recv_multipart()
            router.send_multipart([identity, wire.pack(Header(Kind.WELCOME, TERMS.run, 0, 1))])
            meeting.result()
            a.expect(1, wire.schema(model()), True)
            sock.send_multipart(wrong)
            sock.send_multipart(frames(1, round=9))
            assert rounds_of(events_until(bool, a)) == [9]
            assert a.rejected == {reason: 1}


def test_raw_bytes_do_no_harm(stage):
    a, b = stage(2).all_met()
    for data in (
        b"GET / HTTP/1.1\r\n\r\n",
        bytes(1000),
        b"\xff" * 1000,
        b"\xff\0\0\0\0\0\0\0\1\x7f",
    ):
        with socket.create_connection(("127.0.0.1", port_of(a))) as raw:
            raw.sendall(data)
            turn(lambda: True, a, b)
    b.send(send(0))
    assert rounds_of(events_until(bool, a, b)) == [0]


def test_a_frame_that_is_too_large_cuts_the_connection(stage):
    a, b = stage(2).all_met(largest=100_000)
    with stranger(address_of(a)) as sock:
        monitor = sock.get_monitor_socket(zmq.EVENT_DISCONNECTED)
        sock.send(bytes(100_001))
        turn(lambda: bool(monitor.poll(0)), a, b)
        sock.disable_monitor()
        monitor.close(0)
    assert not a.rejected  # nothing of it was ever handed to us
    b.send(send(0))
    assert rounds_of(events_until(bool, a, b)) == [0]


def test_an_oversized_answer_cuts_the_connection(stage):
    scene = stage(2)
    a = scene.peer(0)
    with zmq.Context() as context, context.socket(zmq.ROUTER) as router:
        router.linger = 0
        router.setsockopt(zmq.USE_FD, scene.sockets[1].detach())
        router.bind(scene.addresses[1])
        with ThreadPoolExecutor(1) as pool:
            meeting = pool.submit(a.meet, 0.5)
            identity, *_ = router.recv_multipart()
            welcome = wire.pack(Header(Kind.WELCOME, TERMS.run, 0, 1))
            router.send_multipart([identity, welcome, bytes(5000)])
            with pytest.raises(RunError, match=r"nothing heard within .* of peer 1"):
                meeting.result()


def test_reasons_of_refusal_are_bounded(stage):
    a = stage(1).peer(0)
    for number in range(3 * MOST_REASONS):
        a.reject(RemoteProtocolError(f"nonsense {number}"))
    assert len(a.rejected) == MOST_REASONS + 1
    assert a.rejected.total() == 3 * MOST_REASONS


def test_messages_of_a_later_phase_are_kept_but_not_any_number(stage):
    a, b = stage(2).all_met(largest=1 << 23)  # room for 8 of them
    a.expect(0, wire.schema(model()), True)
    b.expect(1, wire.schema(model()), False)
    for round in range(2 * MANY):
        b.send(send(0, round=round))
        turn(lambda: not b._links[0].unsent, a, b)
    turn(lambda: a.rejected.total() == MANY, a, b)
    a.expect(1, wire.schema(model()), True)
    assert rounds_of(a.events()) == list(range(MANY))


# Losses


def test_a_neighbour_that_does_not_read_gets_the_newest_later(stage):
    a, b = stage(2).all_met(largest=1 << 22)
    big = 1 << 20  # 4 MiB of float32: the kernel holds one or two
    b.expect(1, wire.schema(model(d=big)), True)
    for round in range(40):
        a.send(send(1, round=round, d=big))
        assert not a.events()
    assert len(a._links[1].unsent) == 1
    seen = events_until(lambda seen: 39 in rounds_of(seen), b, a)
    assert len(seen) < 25  # most were left out
    assert rounds_of(seen) == sorted(rounds_of(seen))


def test_a_neighbour_that_leaves_too_much_unread_is_given_up_once(stage):
    a, _b = stage(2).all_met(largest=1 << 23)
    a.expect(1, wire.schema(model(d=1 << 20)), False)
    events: list[Event] = []
    for round in range(40):
        a.send(send(1, round=round, d=1 << 20))
        events += a.events()
        assert 1 not in a._links or len(a._links[1].unsent) <= MANY + 1
    assert events == [PeerDown(1)]
    started = time.monotonic()
    a.close("done", PATIENCE)  # and is not waited for
    assert time.monotonic() - started < 2


def test_a_neighbour_that_died_is_noticed_after_the_grace(stage, monkeypatch):
    monkeypatch.setattr(links_module, "GRACE", 0.3)
    a, b, c = stage(3).all_met()
    vanish(b)
    started = time.monotonic()
    seen = events_until(bool, a, c)
    assert seen == [PeerDown(1)]
    assert 0.25 < time.monotonic() - started < 2
    c.send(send(0))
    assert rounds_of(events_until(bool, a, c)) == [0]


class Relay:
    """Stands between two peers, and can cut the connections it carries."""

    def __init__(self, target: int) -> None:
        self.listener = socket.create_server(("127.0.0.1", 0))
        self.address = f"tcp://127.0.0.1:{self.listener.getsockname()[1]}"
        self.target, self.made = target, 0
        self.pairs: dict[socket.socket, socket.socket] = {}
        self.commands = socket.socketpair()
        self.thread = threading.Thread(target=self._run)
        self.thread.start()

    def cut(self) -> None:
        self.commands[0].send(b"c")

    def close(self) -> None:
        self.commands[0].send(b"q")
        self.thread.join()

    def _run(self) -> None:
        while True:
            ready, _, _ = select.select([self.listener, self.commands[1], *self.pairs], [], [])
            if self.commands[1] in ready:
                for end in self.pairs:
                    end.close()
                self.pairs.clear()
                if self.commands[1].recv(1) == b"q":
                    break
                continue
            for sock in ready:
                self._accept() if sock is self.listener else self._pass_on(sock)
        for end in (self.listener, *self.commands):
            end.close()

    def _accept(self) -> None:
        near, _ = self.listener.accept()
        far = socket.create_connection(("127.0.0.1", self.target))
        self.pairs |= {near: far, far: near}
        self.made += 1

    def _pass_on(self, sock: socket.socket) -> None:
        if sock not in self.pairs:
            return
        data = sock.recv(65536)
        self.pairs[sock].sendall(data)
        if not data:
            self.pairs.pop(self.pairs.pop(sock)).close()
            sock.close()


def test_a_connection_that_broke_is_made_again(stage):
    scene = stage(2)
    relay = Relay(int(scene.addresses[1].rsplit(":", 1)[1]))
    scene.stack.callback(relay.close)
    scene.addresses[1] = relay.address
    held = scene.sockets[1]
    a = scene.peer(0)
    near = f"tcp://127.0.0.1:{held.getsockname()[1]}"
    b = Links(1, near, {0: scene.addresses[0]}, TERMS, 1000, held.detach())
    scene.stack.callback(close_quietly, b)
    meet(a, b)
    for links in (a, b):
        links.expect(1, wire.schema(model()), False)
    for round in range(3):
        a.send(send(1, round=round))
        assert rounds_of(events_until(bool, b, a)) == [round]
        relay.cut()
        broken = events_until(lambda seen: a._links[1].broken_since is not None, a, b)
        assert broken == []
    assert relay.made == 3 or turn(lambda: relay.made >= 3, a, b) == []
    a.send(send(1, round=3))
    a.send(send(1, round=4))
    assert rounds_of(events_until(lambda seen: len(seen) == 2, b, a)) == [3, 4]
    assert not b.rejected


# Goodbyes


def together(*calls: Callable[[], None]) -> list[float]:
    """Make calls at the same time; return how long each took."""

    def timed(call: Callable[[], None]) -> float:
        started = time.monotonic()
        call()
        return time.monotonic() - started

    with ThreadPoolExecutor(len(calls)) as pool:
        return list(pool.map(timed, calls))


def test_nobody_lingers_when_all_end_together(stage):
    peers = stage(5).all_met()
    for links in peers:
        links.send(send(*(p for p in range(5) if p != links.me)))
    took = together(*(lambda links=links: links.close("done", PATIENCE) for links in peers))
    assert max(took) < 2


def test_the_last_model_arrives_before_the_goodbye(stage):
    a, b = stage(2).all_met(largest=1 << 22)
    for links in (a, b):
        links.expect(1, wire.schema(model(d=1 << 20)), False)
    with ThreadPoolExecutor(1) as pool:
        for round in range(6):
            a.send(send(1, round=round, d=1 << 20))
        closing = pool.submit(a.close, "done", PATIENCE)
        seen = events_until(lambda seen: PeerDown(0) in seen, b)
        closing.result()
    assert rounds_of(seen) == [0, 1, 2, 3, 4, 5]
    assert seen[-1] == PeerDown(0)
    assert b.events() == []


def test_those_who_go_on_lose_only_who_has_left(stage):
    a, b, c = stage(3).all_met()
    with ThreadPoolExecutor(1) as pool:
        closing = pool.submit(together, lambda: a.close("done", PATIENCE))
        seen_b = events_until(lambda seen: closing.done(), b, c)
        (took,) = closing.result()
    assert took < 2
    assert seen_b == [PeerDown(0)]
    b.send(send(0, 2))
    assert rounds_of(events_until(bool, c, b)) == [0]


def test_a_frozen_neighbour_costs_the_linger_and_a_dead_one_nothing(stage):
    a, _frozen = stage(2).all_met()
    (took,) = together(lambda: a.close("done", 0.5))
    assert 0.4 < took < 2
    a, dead = stage(2).all_met()
    vanish(dead)
    (took,) = together(lambda: a.close("done", PATIENCE))
    assert took < 2


def open_files() -> int:
    return len(list(Path("/proc/self/fd").iterdir()))


def test_everything_is_closed_at_the_end(stage):
    with ExitStack() as stack:
        for links in Stage(stack, 2).all_met():
            vanish(links)  # what zmq and pytest keep open for good is open now
    before = open_files()
    for _ in range(3):
        with ExitStack() as stack:
            peers = Stage(stack, 4).all_met()
            wake = peers[0].inproc("worker")
            peers[0].waker("worker").close(0)
            peers[0].poller.unregister(wake)
            wake.close(0)
            together(*(lambda links=links: links.close("done", PATIENCE) for links in peers))
    assert open_files() == before


# Waiting


def test_the_loop_sleeps_until_there_is_something_to_do(stage):
    a, b = stage(2).all_met()
    a.events()
    now = time.monotonic()
    assert a.until_due(math.inf, 250) == 250
    assert a.until_due(now + 3600, 250) == 250
    assert 50 < a.until_due(now + 0.1, 250) <= 100
    assert a.until_due(now - 1, 250) == 0
    assert a.until_due(time.monotonic() + 0.0009, 250) == 1  # not 0, or it would spin
    vanish(b)
    turn(lambda: a._links[1].broken_since is not None, a)
    assert a.until_due(math.inf, 250) == links_module.POLL
    assert a.until_due(time.monotonic() - 1, 250) == 0
