"""Links between peers of one process: they meet, refuse, lose each other and say goodbye."""

import math
import socket
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path

import msgpack
import pytest
import zmq
from links_cases import (
    ANYWHERE,
    MIB,
    PATIENCE,
    Stage,
    address_of,
    close_quietly,
    events_until,
    expect,
    frames,
    hello,
    make_links,
    meet,
    model,
    outcomes,
    port_of,
    rounds_of,
    send,
    small,
    stranger,
    together,
    turn,
    vanish,
)

from p2pfl.errors import RemoteProtocolError, RunError, UserError
from p2pfl.peer.events import PeerDown
from p2pfl.runtime import links as links_module
from p2pfl.runtime import sockets, wire
from p2pfl.runtime.handshake import NeighbourGone, Terms
from p2pfl.runtime.wire import Kind
from p2pfl.security import curve
from p2pfl.security.refusals import MOST_REASONS

# Meeting


def test_peers_meet_and_models_arrive_in_order(stage):
    a, b = stage(2).all_met(replaceable=False)
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
        b = make_links(1, scene.addresses[1], {0: scene.addresses[0]})
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


def test_who_refuses_and_leaves_at_once_is_heard(stage):
    scene = stage(2)
    b = scene.peer(1)
    with zmq.Context() as context, context.socket(zmq.ROUTER) as router:
        router.setsockopt(zmq.USE_FD, scene.sockets[0].detach())
        router.bind(scene.addresses[0])
        turn(lambda: bool(router.poll(0)), b)
        identity, *_ = router.recv_multipart()
        router.send_multipart([identity, small(Kind.REFUSE, 0), b"seed: '2' here, '1' there"])
        router.linger = 1000
    # That nobody is there is noticed before what was said is read.
    link, deadline = b._meeting.neighbours[0].link, time.monotonic() + PATIENCE
    while not link.lost and time.monotonic() < deadline:
        b._endpoint.tend()
    with pytest.raises(UserError, match="seed: '2' here"):
        b.meet(PATIENCE)


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
    lost = make_links(2, ANYWHERE, {0: scene.addresses[1]})
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
    assert a.rejected == {"a stranger: protocol version 9, ours is 1": 1}


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
        assert a.rejected[f"a stranger: hello refused: {reason.decode()}"] == 1
        sock.send_multipart(frames(1)[0])
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
        if a._meeting.absent() == [2]:
            met_half.set()
        return True

    with ThreadPoolExecutor(3) as pool:
        meeting = pool.submit(a.meet, PATIENCE, go_on)
        first_life = pool.submit(b.meet, PATIENCE, lambda: not met_half.is_set())
        first_life.result()
        vanish(b)
        b = make_links(1, scene.addresses[1], {p: scene.addresses[p] for p in (0, 2)})
        scene.stack.callback(close_quietly, b)
        c = scene.peer(2)
        for other in [pool.submit(links.meet, PATIENCE) for links in (b, c)]:
            other.result()
        meeting.result()
    expect(a, b, c)
    b.send(send(0))
    assert rounds_of(events_until(bool, a, b, c)) == [0]
    a.send(send(1))
    assert rounds_of(events_until(bool, b, a, c)) == [0]


def test_a_peer_started_again_after_the_beginning_is_refused(stage):
    scene = stage(2)
    a, b = scene.all_met()
    vanish(b)
    again = make_links(1, scene.addresses[1], {0: scene.addresses[0]})
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
            make_links(0, address, {})


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
        make_links(0, address, {})
    assert address in str(failure.value)
    assert open_files() == before


@pytest.mark.parametrize(
    "address", ["udp://x", "tcp://127.0.0.1:70000", "tcp://127.0.0.1:0", "nonsense", "tcp://"]
)
def test_an_address_that_cannot_be_dialled_is_named(address: str):
    before = open_files()
    with pytest.raises(UserError, match="cannot dial") as failure:
        make_links(0, ANYWHERE, {1: address})
    assert address in str(failure.value)
    assert open_files() == before


def test_too_few_files_are_a_readable_error():
    """In a process of its own: limits cannot be raised again."""
    program = (
        "import resource; resource.setrlimit(resource.RLIMIT_NOFILE, (60, 60))\n"
        "from p2pfl.runtime.endpoint import Endpoint\n"
        "from p2pfl.errors import RunError\n"
        "try:\n"
        "    endpoint = Endpoint('tcp://127.0.0.1:*', 80)\n"
        "    for k in range(1, 80): endpoint.dial(k, f'tcp://127.0.0.1:{9000 + k}', [])\n"
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
    "a model": frames(1)[0],
    "credit": [small(Kind.CREDIT, number=3)],
    "a heartbeat": [small(Kind.PING)],
    "a goodbye": [small(Kind.BYE), b"so long"],
    "an abortion": [small(Kind.ABORT), b"so long"],
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
        (frames(2)[0], "a chunk from somebody else"),
        (frames(run=b"another!")[0], "a chunk from somebody else"),
        (frames(phase=0)[0], "a chunk nobody has asked for"),
        (frames(checked=False)[0][:1], "0 buffers instead of 1"),
        ([*frames(checked=False)[0], b"more"], "2 buffers instead of 1"),
        ([frames(checked=False)[0][0], bytes(15)], "values has 15 bytes instead of 16"),
        (frames(message=model(math.nan))[0], "values has values which are not finite"),
        ([b""], "not a message of this protocol"),
    ],
)
def test_what_a_neighbour_may_not_serve_is_dropped_and_counted(stage, wrong, reason: str):
    with stage(2).scripted() as (a, other):
        other.serve(*wrong)
        other.serve(*frames(round=9)[0])
        assert rounds_of(events_until(bool, a)) == [9]
        assert a.rejected == {f"peer 1: {reason}": 1}


@pytest.mark.parametrize(
    ("wrong", "reason"),
    [
        ([small(Kind.PING, sender=2)], "a message from somebody who has not said hello"),
        (frames(run=b"another!")[0], "a message from somebody who has not said hello"),
        (frames()[0], "an unexpected CHUNK"),
        ([small(Kind.WELCOME)], "an unexpected WELCOME"),
        ([small(Kind.CREDIT, number=wire.MOST_CREDIT + 1)], "more credit than is given"),
        ([b"\xff" * 20], "not a message of this protocol"),
        ([bytes(129)], "a header of 129 bytes"),
    ],
)
def test_what_a_neighbour_may_not_say_is_dropped_and_counted(stage, wrong, reason: str):
    with stage(2).scripted() as (a, other):
        other.say(*wrong)
        other.say(small(Kind.PING))
        answers = []
        turn(lambda: answers.extend(other.heard()) or any(h.kind is Kind.PONG for h in answers), a)
        assert a.rejected == {f"peer 1: {reason}": 1}
        a.send(send(1))
        other.say(small(Kind.CREDIT, number=1))
        turn(lambda: any(h.kind is Kind.CHUNK for h in other.served()), a)


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
    a, b = stage(2).all_met()
    with stranger(address_of(a)) as sock:
        monitor = sock.get_monitor_socket(zmq.EVENT_DISCONNECTED)
        sock.send(bytes(curve.LARGEST + 1))
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
            welcome = small(Kind.WELCOME)
            router.send_multipart([identity, welcome, bytes(wire.CHUNK + sockets.SLACK + 1)])
            with pytest.raises(RunError, match=r"nothing heard within .* of peer 1"):
                meeting.result()


def test_who_makes_up_reasons_hides_only_its_own(stage):
    with stage(2).scripted() as (a, mad):
        for version in range(2, 60):
            mad.say(msgpack.packb((version,)))
        turn(lambda: a.rejected.total() == 58, a)
        assert a.rejected["peer 1: other reasons"] == 58 - MOST_REASONS
        a.reject(RemoteProtocolError("nonsense"))
        assert a.rejected["a stranger: nonsense"] == 1


def test_senders_that_strangers_make_up_are_not_kept(stage):
    a = stage(2).peer(0)
    with stranger(address_of(a)) as sock, ThreadPoolExecutor(1) as pool:
        meeting = pool.submit(a.meet, PATIENCE, lambda: a.rejected.total() < 100)
        for sender in range(5, 105):
            sock.send_multipart([small(Kind.PING, sender)])
        assert not meeting.result()
    assert not a._reader.heard


def test_a_hello_that_is_repeated_is_kept_once(stage):
    """Here nobody looks out for who is there, so nobody takes it out."""
    with stage(2).scripted() as (a, other):
        for _ in range(50):
            other.say(*hello(other.me))
        welcomes = []
        turn(lambda: welcomes.extend(other.served()) or len(welcomes) > 50, a)
        assert a._meeting.met == {1: 5}


# Goodbyes


def test_nobody_lingers_when_all_end_together(stage):
    peers = stage(5).all_met()
    for links in peers:
        links.send(send(*(p for p in range(5) if p != links.me)))
    took = together(*(lambda links=links: links.close("done", PATIENCE) for links in peers))
    assert max(took) < PATIENCE / 2


def test_the_last_model_arrives_before_the_goodbye(stage):
    a, b = stage(2).all_met(d=4 * MIB, replaceable=False)
    with ThreadPoolExecutor(1) as pool:
        for round in range(6):
            a.send(send(1, round=round, d=4 * MIB))
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
    assert took < PATIENCE / 2
    assert seen_b == [PeerDown(0)]
    b.send(send(0, 2))
    assert rounds_of(events_until(bool, c, b)) == [0]


def test_a_frozen_neighbour_costs_the_linger_and_a_dead_one_nothing(stage):
    a, _frozen = stage(2).all_met()
    (took,) = together(lambda: a.close("done", 0.5))
    assert 0.4 < took < PATIENCE / 2
    a, dead = stage(2).all_met()
    vanish(dead)
    (took,) = together(lambda: a.close("done", PATIENCE))
    assert took < PATIENCE / 2


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
    turn(lambda: a._neighbours[1].link.broken_since is not None, a)
    assert a.until_due(math.inf, 250) == links_module.POLL
    assert a.until_due(time.monotonic() - 1, 250) == 0
