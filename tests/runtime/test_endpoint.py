"""A peer's own end of its links: what cannot work is said, and nothing stays open after it."""

from __future__ import annotations

import gc
import socket
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from links_cases import ANYWHERE, PATIENCE

from p2pfl.errors import RunError, UserError
from p2pfl.runtime import endpoint as endpoint_module
from p2pfl.runtime.endpoint import Endpoint, Keyring
from p2pfl.runtime.sockets import Mail
from p2pfl.security.keys import make_keys

ALICE, BOB = make_keys(), make_keys()
KEYRING = Keyring(ALICE, {0: ALICE.public, 1: BOB.public})


def opened() -> tuple[int, int, int]:
    """Return how many files, threads of Python's and threads in all there are."""
    gc.collect()
    files, tasks = (len(list(Path(f"/proc/self/{kind}").iterdir())) for kind in ("fd", "task"))
    return files, threading.active_count(), tasks


@pytest.fixture
def nothing_left() -> Iterator[None]:
    """Compare what is open after a test with what was open before it."""
    for keyring in (None, KEYRING):  # what ZeroMQ and Python keep open for good is open then
        Endpoint(ANYWHERE, 1, keyring).close()
    before = opened()
    yield
    assert opened() == before


BAD = ["tcp://256.1.1.1:1", "tcp://127.0.0.1:70000", "udp://127.0.0.1:1", "nonsense"]


@pytest.mark.usefixtures("nothing_left")
@pytest.mark.parametrize("keyring", [None, KEYRING], ids=["in clear", "with keys"])
@pytest.mark.parametrize("address", BAD)
def test_an_address_to_listen_on_that_is_none(address: str, keyring: Keyring | None):
    with pytest.raises(UserError, match=f"cannot listen on {address}"):
        Endpoint(address, 1, keyring)


@pytest.mark.usefixtures("nothing_left")
@pytest.mark.parametrize("keyring", [None, KEYRING], ids=["in clear", "with keys"])
def test_an_address_that_is_taken(keyring: Keyring | None):
    with socket.create_server(("127.0.0.1", 0)) as held:
        address = f"tcp://127.0.0.1:{held.getsockname()[1]}"
        with pytest.raises(RunError, match=f"{address} is taken by another program"):
            Endpoint(address, 1, keyring)


@pytest.mark.usefixtures("nothing_left")
def test_a_listener_that_lets_strangers_in_is_closed(monkeypatch: pytest.MonkeyPatch):
    def refuse(address: str, key: str) -> None:
        raise RunError(f"{address} lets in a stranger")

    monkeypatch.setattr(endpoint_module, "check_listener", refuse)
    with pytest.raises(RunError, match="lets in a stranger"):
        Endpoint(ANYWHERE, 1, KEYRING)


@pytest.mark.usefixtures("nothing_left")
@pytest.mark.parametrize(
    ("dial", "why"),
    [
        (lambda one: one.dial(2, "tcp://127.0.0.1:7000", []), "no key is listed for peer 2"),
        (lambda one: one.dial(1, "tcp://127.0.0.1:70000", []), "70000, which is no address"),
        (lambda one: one.dial(1, f"ipc:///{'x' * 200}", []), "cannot dial ipc:///xxx"),
    ],
)
def test_what_cannot_be_dialled_leaves_the_endpoint_as_it_was(
    dial: Callable[[Endpoint], object], why: str
):
    one = Endpoint(ANYWHERE, 2, KEYRING)
    with pytest.raises(UserError, match=why):
        dial(one)
    one.tend()
    assert one.poller.poll(0) == []
    one.close()


@pytest.fixture
def pair(nothing_left: None) -> Iterator[tuple[Endpoint, Endpoint]]:
    """Two endpoints that know each other's keys."""
    both = Endpoint(ANYWHERE, 2, KEYRING), Endpoint(ANYWHERE, 2, KEYRING._replace(own=BOB))
    yield both
    for one in both:
        one.close()


def heard(one: Endpoint) -> Mail:
    assert one.listener.socket.poll(1000 * int(PATIENCE))
    (mail,) = one.listener.read()
    return mail


def test_a_link_brings_a_hello_with_the_key_and_is_closed_when_it_is_hung_up(pair):
    one, other = pair
    first, second = (one.dial(1, other.listener.address, [b"hello", text]) for text in (b"1", b"2"))
    one.hang_up(first)  # before it has said anything
    second.flush()
    mail = heard(other)
    assert (mail.key, [bytes(frame) for frame in mail.frames]) == (ALICE.public, [b"hello", b"2"])
    assert first.socket.closed
    assert not second.socket.closed


def test_a_key_that_is_taken_away_cannot_be_dialled_and_its_connections_are_cut(pair):
    one, other = pair
    link = one.dial(1, other.listener.address, [b"hello"])
    link.flush()
    heard(other)
    other.allow({1: BOB.public})
    with pytest.raises(UserError, match="no key is listed for peer 0"):
        other.dial(0, one.listener.address, [])
    deadline = time.monotonic() + PATIENCE
    while not (link.lost and link.trouble):
        assert time.monotonic() < deadline
        one.poller.poll(200)
        one.tend()
    assert link.trouble == "it does not admit our key"
    assert any("not allowed" in reason for reason in other.gate.refused())
