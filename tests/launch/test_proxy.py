"""Faults between processes: what plain sockets, and ZeroMQ, see of them."""

from __future__ import annotations

import math
import random
import resource
import socket
import threading
import time
from urllib.parse import urlsplit

import pytest
import zmq
from launch_cases import wait_for
from proxy_cases import LONG, dial, ends, fill, is_silent, listen, push, read, took

from p2pfl.errors import RunError, UserError
from p2pfl.launch import proxy as module
from p2pfl.launch.faults import Way
from p2pfl.launch.proxy import Proxy

MIB = 1 << 20


def test_every_pair_has_an_address_and_bytes_pass_both_ways():
    data = random.Random(1).randbytes(3 * MIB)
    with ends(3) as e:
        assert {a: e.proxy.addresses(a).keys() for a in range(3)} == {
            0: {1, 2},
            1: {0, 2},
            2: {0, 1},
        }
        for a, b in ((0, 1), (1, 0), (2, 1)):
            near, far = e.connect(a, b)
            for source, sink in ((near, far), (far, near)):
                sending = push(source, data)
                assert read(sink, len(data)) == data
                sending.join()
        assert e.proxy.counts().passed == 6 * (len(data) + 5)


def test_the_first_and_the_last_id_have_addresses():
    with listen() as held:
        address = held.getsockname()
        with Proxy({0: address, 255: address}) as proxy:
            for a, b in ((0, 255), (255, 0)):
                with dial(proxy, a, b) as near, held.accept()[0] as far:
                    took(near, far)


@pytest.mark.parametrize("host", ["127.0.0.1", "127.1.0.0", "127.1.0.9"])
def test_an_address_of_no_pair_leads_nowhere(host: str):
    with ends() as e:
        port = urlsplit(e.proxy.addresses(0)[1]).port
        with socket.create_connection((host, port), LONG) as stray:
            assert stray.recv(1) == b""
        e.connect(0, 1)


def test_an_end_is_passed_on_and_the_other_direction_goes_on():
    with ends() as e:
        near, far = e.connect(0, 1)
        near.sendall(b"last words")
        near.shutdown(socket.SHUT_WR)
        assert read(far, 100) == b"last words"
        far.sendall(b"noted")
        far.close()
        assert read(near, 100) == b"noted"
        assert e.proxy.counts().reset == 0


def test_who_dies_is_seen_to_be_dead():
    with ends() as e:
        near, far = e.connect(0, 1)
        near.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, module.RST)
        near.close()
        with pytest.raises(ConnectionResetError):
            far.recv(1)


def test_nobody_there_breaks_the_connection_and_retarget_finds_who_was_started_again():
    with ends() as e, listen() as again:
        e.listeners[1].close()
        with pytest.raises(ConnectionResetError):
            e.dial(0, 1).recv(1)
        e.proxy.retarget(1, *again.getsockname())
        e.listeners[1] = again
        e.connect(0, 1)


def test_a_partition_is_silent_and_healing_delivers_what_was_under_way():
    with ends(4) as e:
        across, within = e.connect(0, 2), e.connect(0, 1)
        rest = e.connect(2, 3)
        e.proxy.partition([[0, 1]])
        for source, sink in (across, across[::-1]):
            source.sendall(b"held")
            assert is_silent(sink)
        for source, sink in (within, rest):
            took(source, sink)
        wait_for(lambda: e.proxy.counts().held == 8)
        e.proxy.heal()
        for end in across:
            assert read(end, 4) == b"held"
        took(*across)


def test_a_partition_holds_ends_and_new_connections_back_as_well():
    with ends() as e:
        near, far = e.connect(0, 1)
        e.proxy.partition([[0], [1]])
        near.close()
        assert is_silent(far)
        another = e.dial(0, 1)
        another.sendall(b"anybody?")
        assert is_silent(another)
        e.listeners[1].settimeout(0.3)
        with pytest.raises(TimeoutError):
            e.listeners[1].accept()
        e.listeners[1].settimeout(LONG)
        e.proxy.heal()
        assert read(far, 1) == b""
        assert read(e.accept(1), 8) == b"anybody?"


def test_another_partition_ends_the_one_before():
    with ends(3) as e:
        (a, b), (c, d) = e.connect(0, 1), e.connect(1, 2)
        e.proxy.partition([[0]])
        e.proxy.partition([[2]])
        took(a, b)
        c.sendall(b"?")
        assert is_silent(d)


def test_what_is_held_up_for_too_long_breaks_the_connection():
    with ends(patience=0.5) as e:
        used, quiet = e.connect(0, 1), e.connect(0, 1)
        e.proxy.partition([[0]])
        used[0].sendall(b"?")
        for end in used:
            with pytest.raises(ConnectionResetError):
                end.recv(1)
        assert is_silent(quiet[1])  # nothing was said on it, so nothing is missed
        e.proxy.heal()
        took(*quiet)


def test_a_delay_is_of_one_direction_whoever_has_dialled():
    with ends() as e:
        one, other = e.connect(0, 1), e.connect(1, 0)[::-1]
        e.proxy.delay([(0, 1)], 2 * LONG)
        for near, far in (one, other):
            near.sendall(b"?")
            took(far, near)
            assert is_silent(far)


def test_a_delay_is_kept_and_undone():
    with ends() as e:
        near, far = e.connect(0, 1)
        e.proxy.delay(None, 0.5)
        assert took(near, far) >= 0.5
        e.proxy.delay(None, 2 * LONG)
        e.proxy.delay(None, 0)
        took(near, far)


def test_what_is_delayed_overlaps():
    with ends() as e:
        near, far = e.connect(0, 1)
        e.proxy.delay([(0, 1)], 0.5)
        begun = time.monotonic()
        for _ in range(20):
            near.sendall(b"?")
            time.sleep(0.01)  # for each to be a chunk of its own
        assert len(read(far, 20)) == 20
        assert 0.5 <= time.monotonic() - begun < 6  # and not 20 times half a second


def test_a_rate_is_kept_and_undone():
    with ends() as e:
        near, far = e.connect(0, 1)
        e.proxy.limit([(0, 1)], MIB)
        begun = time.monotonic()
        push(near, bytes(MIB))
        read(far, MIB)
        assert time.monotonic() - begun >= 0.9
        e.proxy.limit(None, math.inf)
        push(near, bytes(64 * MIB))
        assert len(read(far, 64 * MIB)) == 64 * MIB
        assert time.monotonic() - begun < 30


def test_what_is_lost_comes_late_and_whole():
    data = random.Random(2).randbytes(64)
    with ends(seed=3) as e:
        near, far = e.connect(0, 1)
        e.proxy.drop([(0, 1)], 0.5)
        assert max(took(near, far) for _ in range(8)) >= 0.2
        push(near, data)
        assert read(far, 64) == data
        assert e.proxy.counts().lost > 0


def fates(way: Way, number: int = 200) -> list[tuple[float, bytes]]:
    return [way.enter(bytes(8)) for _ in range(number)]


def test_losses_and_damage_are_drawn_by_seed_and_link():
    ways = [Way(1, 2, 3), Way(1, 2, 3), Way(1, 3, 2), Way(2, 2, 3)]
    for way in ways:
        way.loss, way.damage = 0.3, 0.5
    same, again, *others = [fates(way) for way in ways]
    assert same == again
    assert all(same != other for other in others)
    assert ways[0].counts == ways[1].counts
    assert 35 < sum(late > 0 for late, _ in same) < 90  # of 200, at 0.3
    assert 70 < sum(chunk != bytes(8) for _, chunk in same) < 130  # of 200, at 0.5
    assert {round(late, 6) for late, _ in same} >= {0.0, 0.2, 0.6}


def test_damage_is_one_bit():
    data = random.Random(4).randbytes(MIB)
    with ends() as e:
        near, far = e.connect(0, 1)
        e.proxy.corrupt([(0, 1)], 1.0)
        push(near, data)
        got = read(far, MIB)
        changed = (int.from_bytes(got) ^ int.from_bytes(data)).bit_count()
        assert 0 < changed == e.proxy.counts().corrupted
        push(far, data)
        assert read(near, MIB) == data
        e.proxy.corrupt(None, 0)
        push(near, data)
        assert read(far, MIB) == data


def test_a_reset_breaks_the_connections_of_one_pair():
    with ends(3) as e:
        ours, theirs, other = e.connect(0, 1), e.connect(1, 0), e.connect(0, 2)
        e.proxy.reset(0, 1)
        for end in (*ours, *theirs):
            with pytest.raises(ConnectionResetError):
                end.recv(1)
        took(*other)
        assert e.proxy.counts().reset == 2


def test_a_reader_that_has_stopped_stops_the_writer():
    with ends() as e:
        near, far = e.connect(0, 1)
        sent = fill(near, 400 * MIB)
        assert sent < 64 * MIB  # what kernels hold, and 4 MiB
        assert read(far, sent) == bytes(sent)


def test_leaving_ends_all_connections_and_the_thread():
    with listen() as held:
        with Proxy({0: ("127.0.0.1", 1), 1: held.getsockname()}) as proxy:
            near, (far, _) = dial(proxy, 0, 1), held.accept()
            proxy.partition([[0]])
            waiting = dial(proxy, 0, 1)
        with near, far, waiting:
            for end in (near, far, waiting):
                with pytest.raises(ConnectionResetError):
                    end.recv(1)
    assert not any(thread.name == "proxy" for thread in threading.enumerate())


def test_what_is_asked_for_is_checked():
    with pytest.raises(UserError, match="no proxy for peer 256: ids go from 0 to 255"):
        Proxy({256: ("127.0.0.1", 1)})
    with ends(3) as e:
        for wrong, message in (
            (lambda p: p.partition([[0], [0, 1]]), "peer 0 is in two groups"),
            (lambda p: p.partition([[7]]), "there is no peer 7"),
            (lambda p: p.reset(0, 3), "there is no peer 3"),
            (lambda p: p.retarget(4, "127.0.0.1", 1), "there is no peer 4"),
            (lambda p: p.delay([(0, 0)], 1), "there is no link from peer 0 to peer 0"),
            (lambda p: p.delay(None, -1), "a delay of -1"),
            (lambda p: p.delay(None, math.nan), "a delay of nan"),
            (lambda p: p.limit(None, 0), "a rate of 0"),
            (lambda p: p.drop(None, 1), "a loss of 1"),
            (lambda p: p.corrupt(None, 1.1), "a probability of 1.1"),
        ):
            with pytest.raises(UserError, match=message):
                wrong(e.proxy)
        e.connect(0, 1)


def test_where_loopback_cannot_be_had_alone_it_says_so(monkeypatch):
    monkeypatch.setattr(module, "DEVICE", b"nonesuch0")
    with pytest.raises(RunError, match="cannot listen on all of loopback: No such device"):
        Proxy({}).__enter__()


def test_room_for_files_is_made():
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (300, hard))
    try:
        with Proxy(dict.fromkeys(range(32), ("127.0.0.1", 1))):
            assert resource.getrlimit(resource.RLIMIT_NOFILE)[0] == min(hard, 256 + 4 * 32 * 31)
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


def test_zeromq_goes_on_after_a_partition_and_after_a_reset():
    """The one notices nothing, the other dials again."""
    context = zmq.Context()
    with ends() as e:
        e.listeners[1].close()
        router, dealer = context.socket(zmq.ROUTER), context.socket(zmq.DEALER)
        try:
            for one in (router, dealer):
                one.linger, one.rcvtimeo = 0, int(1000 * LONG)
            e.proxy.retarget(1, "127.0.0.1", router.bind_to_random_port("tcp://127.0.0.1"))
            dealer.connect(e.proxy.addresses(0)[1])
            dealer.send(b"one")
            identity, body = router.recv_multipart()
            assert body == b"one"

            e.proxy.partition([[0], [1]])
            dealer.send(b"two")
            router.send_multipart([identity, b"three"])
            assert not router.poll(1000)
            assert not dealer.poll(0)
            e.proxy.heal()
            assert router.recv_multipart() == [identity, b"two"]
            assert dealer.recv() == b"three"

            e.proxy.reset(0, 1)

            def is_there_again() -> bool:
                dealer.send(b"four")  # some are lost with the connection
                return bool(router.poll(100))

            wait_for(is_there_again)
            again, body = router.recv_multipart()
            assert body == b"four"
            assert again != identity  # it is another connection
        finally:
            context.destroy()
