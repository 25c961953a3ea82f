"""Who gets in and who does not, tried on real sockets: every way known to get it wrong."""

import gc
import time

import pytest
import zmq
from security_cases import PATIENCE, REFUSED, Door, event, is_refused, wait_for_news

from p2pfl.errors import RunError
from p2pfl.security.curve import DOMAIN, secure_dialler, secure_listener
from p2pfl.security.gate import Gate
from p2pfl.security.keys import make_keys
from p2pfl.security.refusals import MOST_REASONS
from p2pfl.security.selftest import check_listener

ALICE, BOB, MALLORY = make_keys(), make_keys(), make_keys()
IN, OUT = zmq.EVENT_HANDSHAKE_SUCCEEDED, zmq.EVENT_HANDSHAKE_FAILED_AUTH


def plain(door):
    return door.dial(plain_username=b"alice", plain_password=b"secret")


@pytest.mark.parametrize(
    "dial",
    [
        lambda door: door.dial(MALLORY, body=b"unknown key"),
        lambda door: door.dial(body=b"in clear"),
        plain,
        lambda door: door.dial(ALICE, MALLORY.public, body=b"wrong server key"),
        lambda door: door.dial(MALLORY, routing_id=b"alice", body=b"her name"),
    ],
    ids=["unknown key", "in clear", "password", "wrong server key", "a name without the key"],
)
def test_a_stranger_delivers_nothing(dial):
    with Door(ALICE) as door:
        assert is_refused(dial(door))
        door.dial(ALICE)
        assert door.read() == (ALICE.public, b"hello")
        assert door.read(timeout=50) is None


def test_refusals_are_counted_by_address_and_key():
    with Door(ALICE) as door:
        assert is_refused(door.dial(MALLORY))
        (reason,) = door.gate.refused()
        assert reason == f"127.0.0.1 ({MALLORY.public[:8]}...): a key that is not allowed"


def test_strangers_cannot_fill_the_list_of_refusals():
    with Door(ALICE) as door:
        for number in range(3 * MOST_REASONS):
            door.gate.callback(DOMAIN, f"{number:040}"[::-1].encode())
        assert len(door.gate.refused()) == MOST_REASONS + 1
        assert sum(door.gate.refused().values()) == 3 * MOST_REASONS
        assert is_refused(door.dial(MALLORY))
        assert f"127.0.0.1 ({MALLORY.public[:8]}...): a key that is not allowed" in (
            door.gate.refused()
        )


def test_nobody_gets_in_without_a_gate():
    with Door(gate=False) as door:
        assert is_refused(door.dial(ALICE))
        assert not door.listener.poll(50)


def test_a_gate_in_another_context_lets_nobody_in():
    with Door(gate=False) as door:
        gate = Gate(door.outside, [ALICE.public])
        assert is_refused(door.dial(ALICE))
        assert not door.listener.poll(50)
        gate.close()


def test_nobody_gets_in_once_the_gate_is_closed():
    with Door(ALICE) as door:
        door.gate.close()
        assert is_refused(door.dial(ALICE))
        assert not door.listener.poll(50)


def test_nobody_gets_in_once_the_gate_has_failed_and_its_owner_hears_of_it(monkeypatch):
    with Door(ALICE, BOB) as door:
        bob = door.dial(BOB)
        assert door.read()
        # Not the method that reads what is asked: the thread may just be in the middle of it.
        monkeypatch.setattr(door.gate._authenticator, "handle_zap_message", None)
        assert is_refused(door.dial(ALICE))
        assert not door.listener.poll(50)
        bob.send(b"who was here before")
        assert door.read() == (BOB.public, b"who was here before")
        poller = zmq.Poller()
        poller.register(door.gate.fileno(), zmq.POLLIN)
        assert poller.poll(PATIENCE)
        for _ in range(2):
            with pytest.raises(RunError, match="gate has failed"):
                door.gate.news()


def test_a_key_can_be_allowed_later_and_revoked_again():
    with Door() as door:
        assert event(door.dial(ALICE), {IN, OUT}) == OUT
        door.gate.allow([ALICE.public])
        assert event(door.dial(ALICE), {IN, OUT}) == IN
        door.gate.allow([BOB.public])
        assert event(door.dial(ALICE), {IN, OUT}) == OUT


def test_a_connection_of_a_revoked_key_is_cut_and_others_stay():
    with Door(ALICE, BOB) as door:
        alice, bob = door.dial(ALICE), door.dial(BOB)
        assert {door.read()[0], door.read()[0]} == {ALICE.public, BOB.public}
        door.gate.allow([BOB.public])
        assert event(alice, REFUSED)
        assert not door.gate.allows(ALICE.public)
        bob.send(b"still here")
        assert door.read() == (BOB.public, b"still here")
        assert not any("new list" in reason for reason in door.gate.refused())


def test_a_revoked_key_is_cut_even_if_it_has_never_said_anything():
    with Door(ALICE, BOB) as door:
        alice = door.dial(ALICE)
        assert event(alice, {IN})  # and its message is not read
        door.gate.allow([BOB.public])
        assert event(alice, REFUSED)


def test_who_claims_the_name_of_another_is_known_by_its_key():
    with Door(ALICE, BOB) as door:
        bob = door.dial(BOB, routing_id=b"alice")
        assert door.read() == (BOB.public, b"hello")
        alice = door.dial(ALICE, routing_id=b"alice")
        assert event(alice, {IN})
        door.listener.send_multipart([b"alice", b"for Bob"])
        assert bob.recv() == b"for Bob"  # the later one has not taken over
        assert not alice.poll(50)


def test_sockets_are_secured_before_they_are_used():
    context = zmq.Context()
    listener, dialler = context.socket(zmq.ROUTER), context.socket(zmq.DEALER)
    listener.bind("tcp://127.0.0.1:*")
    dialler.connect(listener.last_endpoint)
    with pytest.raises(RunError, match="before"):
        secure_listener(listener, ALICE)
    with pytest.raises(RunError, match="before"):
        secure_dialler(dialler, ALICE, BOB.public)
    context.destroy(0)


def test_a_library_that_is_too_old_is_refused(monkeypatch):
    monkeypatch.setattr(zmq, "zmq_version_info", lambda: (4, 3, 4))
    context = zmq.Context()
    with pytest.raises(RunError, match=r"4\.3\.5"):
        Gate(context, [])
    context.destroy(0)


def test_a_gate_may_be_closed_before_it_has_got_round_to_a_socket():
    for _ in range(20):
        context = zmq.Context()
        gate, socket = Gate(context, []), context.socket(zmq.ROUTER)
        gate.watch(socket)
        socket.close(0)
        gate.close()
        gate.close()
        context.term()


def test_a_context_has_one_gate():
    with Door() as door, pytest.raises(RunError, match="already"):
        Gate(door.context, [])


def test_news_of_a_link_that_is_refused_and_of_one_that_is_made_and_lost():
    with Door(ALICE) as door:
        gate = Gate(door.outside, [])
        sockets = []
        for link, keys in enumerate((ALICE, MALLORY)):
            socket = door.outside.socket(zmq.DEALER)
            secure_dialler(socket, keys, door.keys.public)
            gate.watch(socket, link)
            socket.connect(door.address)
            sockets.append(socket)
        heard = wait_for_news(gate, {(0, IN), (1, OUT)})
        assert (0, OUT) not in heard
        assert (1, IN) not in heard
        (descriptor,) = (n.value for n in heard.values() if n[:2] == (0, zmq.EVENT_CONNECTED))
        gate.cut(descriptor, "a test")
        wait_for_news(gate, {(0, zmq.EVENT_DISCONNECTED), (0, IN)})  # dialled again
        assert gate.refused() == {"127.0.0.1: a test": 1}
        for socket in sockets:
            socket.close(0)
        gate.close()


def test_closing_in_any_order_leaves_nothing_behind():
    import psutil

    def once():
        with Door(ALICE) as door:
            door.dial(ALICE)
            assert door.read()

    once()
    gc.collect()
    before = psutil.Process().num_fds()
    for _ in range(3):
        once()
    gc.collect()
    deadline = time.monotonic() + 10
    while psutil.Process().num_fds() > before and time.monotonic() < deadline:
        time.sleep(0.01)
    assert psutil.Process().num_fds() <= before


class TestSelfTest:
    def test_it_passes_while_nobody_reads_the_listener(self):
        with Door(ALICE) as door:
            check_listener(door.address, door.keys.public)
            assert not door.listener.poll(0)

    def test_it_finds_a_listener_that_is_bound_everywhere(self):
        with Door() as door:
            everywhere = door.context.socket(zmq.ROUTER)
            secure_listener(everywhere, door.keys)
            everywhere.bind("tcp://0.0.0.0:*")
            check_listener(everywhere.last_endpoint.decode(), door.keys.public)

    def test_it_refuses_a_listener_in_clear(self):
        self.refused("without encryption", lambda listener: None)

    def test_it_refuses_a_listener_whose_encryption_came_too_late(self):
        def late(listener):
            listener.bind("tcp://127.0.0.1:*")
            encrypt(listener)

        self.refused("without encryption", late)

    def test_it_refuses_a_listener_that_takes_any_key(self):
        self.refused("nobody knows", encrypt)

    def test_it_refuses_a_listener_whose_domain_is_empty(self):
        def undomained(listener):
            encrypt(listener)
            listener.setsockopt(zmq.ZAP_ENFORCE_DOMAIN, 1)

        self.refused("nobody knows", undomained, gate=True)

    def test_it_refuses_a_listener_that_does_not_answer(self):
        with pytest.raises(RunError, match="in time"):
            check_listener("tcp://127.0.0.1:9", ALICE.public, timeout=0.1)

    def refused(self, why, prepare, gate=False):
        context = zmq.Context()
        guard = Gate(context, []) if gate else None
        listener = context.socket(zmq.ROUTER)
        prepare(listener)
        if not listener.last_endpoint:
            listener.bind("tcp://127.0.0.1:*")
        with pytest.raises(RunError, match=why):
            check_listener(listener.last_endpoint.decode(), ALICE.public)
        listener.close(0)
        if guard:
            guard.close()
        context.destroy(0)


def encrypt(listener):
    listener.curve_server = True
    listener.curve_secretkey = ALICE.secret.encode()
    listener.curve_publickey = ALICE.public.encode()
