"""Strangers and a mad neighbour do what they can to a peer, and honest models arrive."""

import math
import socket
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from random import Random

import hostile_cases
import pytest
import torch
import zmq
from hostile_cases import (
    HONEST,
    MAD,
    TERMS,
    VALUE,
    VICTIM,
    Mad,
    Peers,
    Told,
    attacked,
    constant,
)
from links_cases import (
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
from p2pfl.runtime import flows, wire
from p2pfl.runtime.links import Links
from p2pfl.runtime.wire import Header, Kind

sys.path.append(str(Path(__file__).parent / "fuzz"))
from fuzz_inputs import Do, Step, Story
from fuzz_mutations import mutated

# How a ZeroMQ connection begins: 64 bytes, of which 20 name the mechanism.
GREETING = bytes.fromhex("ff00000000000000017f0300") + b"NULL".ljust(20, b"\0") + bytes(32)
LEAVING = (Kind.BYE, Kind.ABORT)
ROUNDS = 60


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


# Between a pair that trains and a neighbour with a key


def chunks_in_vain(mad: Mad) -> None:
    for _ in range(200):
        mad.serve(mad.small(Kind.CHUNK, phase=1), b"more")


def credit_bombs(mad: Mad) -> None:
    for number in (wire.MOST_CREDIT + 1, 2**52):
        for _ in range(100):
            mad.say(mad.small(Kind.CREDIT, number=number))


def credit_for_any_phase(mad: Mad) -> None:
    for phase in range(200):
        mad.say(mad.small(Kind.CREDIT, number=1, phase=phase))


def heartbeats(mad: Mad) -> None:
    ping = mad.small(Kind.PING)
    with suppress(zmq.Again):  # once it is cut off, nobody takes them any more
        for _ in range(30_000):
            mad.say(ping)


def hellos(mad: Mad) -> None:
    with suppress(zmq.Again):
        for _ in range(30_000):
            mad.say(*mad.hello())


def lives(mad: Mad) -> None:
    for life in range(200):
        mad.say(*mad.hello(life=life))


def id_of_another(mad: Mad) -> None:
    for _ in range(60):
        mad.say(*mad.hello(sender=HONEST, life=9))
        mad.say(wire.pack(Header(Kind.BYE, TERMS.run, 2, HONEST)), b"so long")


def models_of_another(mad: Mad) -> None:
    mad.credit()
    for _ in range(200):
        mad.serve(*mad.chunks(0, sender=HONEST)[0])


def models_that_are_none(mad: Mad) -> None:
    mad.credit()
    mad.serve(*mad.chunks(0, value=math.nan)[0])


def models_of_another_size(mad: Mad) -> None:
    mad.credit()
    mad.serve(*mad.chunks(0, size=10)[0])


def rounds_again(mad: Mad) -> None:
    mad.credit(3)
    for chunk in (*mad.chunks(0), mad.chunks(0)[0]):
        mad.serve(*chunk)


def members_at_length(mad: Mad) -> None:
    for _ in range(60):
        mad.say(mad.small(Kind.MEMBERS), bytes(30_000))


GIVEN_UP = [
    (chunks_in_vain, "a chunk nobody has asked for"),
    (credit_bombs, "more credit than is given"),
    (credit_for_any_phase, "more credit than is given"),
    (lives, "hello refused"),
    (id_of_another, "the key of this connection is not the one that is listed for peer 1"),
    (models_of_another, "a chunk from somebody else"),
]
FLOODS = [heartbeats, hellos, members_at_length]
FORGIVEN = [
    (models_that_are_none, "values which are not finite"),
    (models_of_another_size, "bytes instead of"),
    (rounds_again, "round 0 again, or out of order"),
]


def all_is_well(ends: list[Told]) -> None:
    """Check that both have gone on to the end, and that nothing wrong was mixed."""
    for end in ends:
        assert (end.ending.reason, end.rounds) == ("all rounds done", hostile_cases.ROUNDS)
        params = end.ending.params
        torch.testing.assert_close(params, torch.full_like(params, VALUE), rtol=1e-12, atol=0.0)
    assert ends[1].rejections == {}


def name(value: object) -> str:
    return getattr(value, "__name__", "")


@pytest.mark.parametrize(("attack", "reason"), GIVEN_UP, ids=name)
def test_who_goes_on_with_nonsense_is_given_up_and_the_others_train_on(attack, reason: str):
    with attacked(Peers(constant()), attack) as ends:
        all_is_well(ends)
        found = [n for why, n in ends[0].rejections.items() if reason in why and "peer 2: " in why]
        assert sum(found) > 50
        assert MAD not in ends[0].neighbours


@pytest.mark.slow
@pytest.mark.parametrize("flood", FLOODS, ids=name)
def test_a_flood_is_cut_off(flood: Callable[[Mad], None]):
    peers = Peers(constant())
    with attacked(peers, flood) as ends:
        all_is_well(ends)
        key = peers.keys[MAD].public
        assert ends[0].rejections[f"127.0.0.1 ({key[:8]}...): too many messages"] > 0
        assert ends[0].rejections["peer 2: too many messages"] > 0


@pytest.mark.parametrize(("attack", "reason"), FORGIVEN, ids=name)
def test_a_model_that_is_none_is_counted_and_not_mixed(attack, reason: str):
    with attacked(Peers(constant()), attack) as ends:
        all_is_well(ends)
        ((why, count),) = ends[0].rejections.items()
        assert count == 1
        assert why.startswith("peer 2: ")
        assert reason in why


@pytest.mark.parametrize("large", [False, True], ids=["whole", "streams"])
def test_a_model_of_fewer_examples_than_none_is_counted_and_not_mixed(large: bool, monkeypatch):
    """As many as its neighbour has, and less than none: their sum would be 0, the mean NaN."""
    if large:
        monkeypatch.setattr(flows, "BUDGET", 1)

    def minus(mad: Mad) -> None:
        mad.credit()
        (own,) = setup.task.examples(torch.tensor([VICTIM])).tolist()
        for chunk in mad.chunks(0, examples=-float(own)):
            mad.serve(*chunk)

    setup = constant(case="fedavg")
    with attacked(Peers(setup), minus) as ends:
        all_is_well(ends)
        # Nobody has asked for what follows of a refused model: that may be counted, too.
        assert ends[0].rejections["peer 2: examples has values below 0, or above all counts"] == 1


def test_a_slow_drip_of_chunks_holds_nobody_up():
    def drip(mad: Mad) -> None:
        mad.credit()
        mad.serve(*mad.chunks(0, value=7.0)[0])  # and the other chunk never comes

    started = time.monotonic()
    with attacked(Peers(constant()), drip) as ends:
        all_is_well(ends)
    # A patience for each round would take longer.
    assert time.monotonic() - started < hostile_cases.ROUNDS * hostile_cases.PATIENCE / 2
