"""Strangers and a mad neighbour throw mutated bytes at a peer, and honest models arrive."""

import socket
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from random import Random

import pytest
from links_cases import (
    Stage,
    address_of,
    events_until,
    frames,
    hello,
    port_of,
    send,
    small,
    stranger,
)

from p2pfl.errors import RemoteProtocolError
from p2pfl.peer.events import Received
from p2pfl.runtime import wire
from p2pfl.runtime.links import Links
from p2pfl.runtime.wire import Kind

sys.path.append(str(Path(__file__).parent / "fuzz"))
from fuzz_inputs import Do, Step, Story
from fuzz_mutations import mutated

# How a ZeroMQ connection begins: 64 bytes, of which 20 name the mechanism.
GREETING = bytes.fromhex("ff00000000000000017f0300") + b"NULL".ljust(20, b"\0") + bytes(32)
LEAVING = (Kind.BYE, Kind.ABORT)
ROUNDS = 60


@pytest.fixture
def stage() -> Iterator[Callable[[int], Stage]]:
    with ExitStack() as stack:
        yield lambda n: Stage(stack, n)


def stories(sender: int) -> list[Story]:
    """Return messages to be mutated, as from a neighbour."""
    kinds = [small(kind, sender, number=3) for kind in Kind]
    return [
        [Step(Do.HEADER, (header,)) for header in kinds],
        [Step(Do.HEADER, (header, b"so long")) for header in kinds],
        [Step(Do.CHUNK, tuple(frames(sender, round)[0])) for round in range(4)],
        [Step(Do.TERMS, tuple(hello(sender)))],
    ]


def mad_messages(draw: Random, sender: int) -> Iterator[tuple[bytes, ...]]:
    """Yield messages that are nearly right, but no goodbyes: those would be believed."""
    seeds = stories(sender)
    for _, message in mutated(draw.choice(seeds), draw, seeds):
        try:
            leaves = bool(message) and wire.unpack(message[0]).kind in LEAVING
        except RemoteProtocolError:
            leaves = False
        if message and not leaves:
            yield message


def exchange(a: Links, b: Links, round: int) -> None:
    """Let two honest peers exchange their models of a round."""
    a.send(send(b.me, round=round, value=round))
    b.send(send(a.me, round=round, value=-round))
    arrived = []

    def both(seen: list) -> bool:
        arrived.extend(b.events())
        return all(
            any(isinstance(e, Received) and (e.sender, e.round) == (s, round) for e in events)
            for s, events in ((b.me, seen), (a.me, arrived))
        )

    for event in (*events_until(both, a), *arrived):
        if isinstance(event, Received) and event.sender in (a.me, b.me):
            assert event.message.values[0, 0] == (round if event.sender == a.me else -round)


def test_mutated_bytes_of_strangers_do_no_harm(stage):
    a, b = stage(2).all_met(replaceable=False)
    draw = Random(1)
    for round in range(ROUNDS):
        with (
            socket.create_connection(("127.0.0.1", port_of(a))) as raw,
            stranger(address_of(a)) as sock,
        ):
            noise = draw.randbytes(draw.randrange(1, 2000))
            raw.sendall(noise if draw.random() < 0.5 else GREETING + noise)
            for message in mad_messages(draw, sender=1):
                sock.send_multipart(message)
            exchange(a, b, round)
    assert a.rejected.total() > ROUNDS
    assert all(reason.startswith("a stranger") for reason in a.rejected)
    assert not b.rejected


def test_mutated_messages_of_a_neighbour_do_no_harm_to_the_others(stage):
    draw = Random(2)
    with stage(3).scripted() as (a, mad, b):
        for round in range(ROUNDS):
            for message in mad_messages(draw, mad.me):
                mad.say(*message)
            for message in mad_messages(draw, mad.me):
                mad.serve(*message)
            if 2 in a._neighbours:
                a.send(send(2, round=round))
            exchange(a, b, round)
        assert a.rejected.total() > ROUNDS
        assert any(reason.startswith("peer 2") for reason in a.rejected)
        assert not any(reason.startswith("peer 1") for reason in a.rejected)
        assert not b.rejected
