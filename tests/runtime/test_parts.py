"""Models that stay in the memory their chunks came in: the same as if they were put together."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import pytest
import torch
from links_cases import chunks_of
from runtime_cases import STEPS, Case, make, simulated
from test_serve import assert_as_simulated, everybody
from torch import Tensor

from p2pfl.aggregation import krum
from p2pfl.algorithms.averaging import dpsgd
from p2pfl.attacks import ATTACKS, hostile
from p2pfl.errors import RemoteProtocolError
from p2pfl.learning import Quadratics
from p2pfl.learning.pieces import Pieces
from p2pfl.peer.gossiper import Tempo
from p2pfl.peer.letters import WIDE
from p2pfl.peer.plan import Pace
from p2pfl.runtime import chunks, parts, wire
from p2pfl.runtime.chunks import Outgoing
from p2pfl.runtime.parts import Parted
from p2pfl.runtime.setup import Setup
from p2pfl.runtime.wire import Header, Kind
from p2pfl.topology import complete_graph, metropolis

D = WIDE + 52
HEADER = Header(Kind.CHUNK, b"12345678", 2, 3, 7, 2, 0.5)
# With one large field, with two, with small ones beside, and on a graph that is not complete.
STAYING = ["fedavg", "fedavg adam", "dpsgd directed", "combine first", "kgt", "diloco", "gossip"]
STAYING += ["relay"]  # which sends each neighbour something else, and lays side by side
# What looks into rows itself, or lays whole ones side by side.
LOOKING = {
    "krum": Case(lambda opt: dpsgd(opt, aggregate=krum(1)), complete_graph, metropolis()),
    **{
        attack: Case(
            lambda opt, attack=attack: hostile(dpsgd(opt), ATTACKS[attack](), {0}, seed=5),
            complete_graph,
            metropolis(),
        )
        for attack in ("sign_flip", "alie", "replay")
    },
}
# What is remembered or shared out is put together, and what is small.
JOINED = ["push_sum directed", "choco identity", "partial"]


class Message(NamedTuple):
    x: Tensor
    age: Tensor
    y: Tensor


@pytest.fixture(autouse=True)
def small_chunks() -> Iterator[None]:
    with chunks_of(4096):
        yield


def message(dtype: torch.dtype = torch.float32) -> Message:
    draw = torch.Generator().manual_seed(3)
    x, y = (torch.randn(1, D, generator=draw).to(dtype) for _ in range(2))
    return Message(x, torch.tensor([[4.0]], dtype=torch.float64), y)


def travel(sent: Message, spoiled: tuple[int, float] | None = None) -> Parted:
    """Let a message travel, in which a number of `y` may be replaced by another."""
    if spoiled:
        sent.y[0, spoiled[0]] = spoiled[1]
    outgoing, schema = Outgoing(HEADER, sent), chunks.schema(sent)
    parted = Parted(HEADER, schema)
    for index in range(len(outgoing)):
        header, *frames = (memoryview(bytearray(frame)) for frame in outgoing.chunk(index))
        parted.take(wire.unpack(header), frames)
    return parted


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_what_arrives_is_what_was_sent(dtype):
    sent = message(dtype)
    parted = travel(sent)
    assert not parted.left
    x, age, y = parted.received().message
    assert torch.equal(age, sent.age)
    for row, block in ((x, sent.x), (y, sent.y)):
        assert isinstance(row, Pieces)
        assert len(row.parts) > 1  # else nothing is tested
        assert row.numel() == D
        assert torch.equal(torch.cat([*row.parts], 1), block)
        cut = [block[:, start:stop] for start, stop in row.columns]
        assert all(torch.equal(a, b) for a, b in zip(row.parts, cut, strict=True))


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_values_that_are_not_finite_are_refused_as_they_come(value):
    with pytest.raises(RemoteProtocolError, match="y has values which are not finite"):
        travel(message(), spoiled=(D - 1, value))


def test_chunks_that_cut_numbers_in_two_are_put_together():
    schema = chunks.schema(message(torch.float64))
    assert parts.can_stay(schema, 3)
    with chunks_of(4100):
        assert not parts.can_stay(schema, 3)


def test_models_that_take_much_memory_are_put_together_where_it_is_used_again():
    schema = chunks.schema(message())
    most = parts.MOST // schema.nbytes
    assert parts.can_stay(schema, most)
    assert not parts.can_stay(schema, most + 1)


def test_where_all_is_small_there_is_nothing_to_gain():
    small = Message(torch.ones(1, WIDE), torch.ones(1, 1), torch.ones(1, 3))
    assert not parts.can_stay(chunks.schema(small), 1)


@pytest.fixture
def stayed(monkeypatch) -> list[int]:
    """One for every model that has stayed where it came."""
    found, received = [], Parted.received
    monkeypatch.setattr(Parted, "received", lambda self: found.append(1) or received(self))
    return found


def setup_of(case: Case | str, pace: Pace | Tempo) -> Setup:
    return make(case, pace, n=4, task=Quadratics(4, D, noise=0.1, seed=3), steps=STEPS["one"])


@pytest.mark.parametrize("name", [*STAYING, *JOINED, *LOOKING])
def test_peers_give_the_numbers_of_the_simulator(name: str, stayed: list[int]):
    setup = setup_of(LOOKING.get(name, name), Pace(3))
    simulator, rounds = simulated(setup)
    served = everybody(setup)
    assert bool(stayed) is (name not in JOINED)
    assert_as_simulated(served, simulator, rounds)


def test_local_steps_may_run_meanwhile(stayed: list[int]):
    setup = setup_of("dpsgd complete", Pace(3, overlap=True))
    assert_as_simulated(everybody(setup), *simulated(setup))
    assert stayed


def test_peers_on_a_timer_mix_them_too(stayed: list[int]):
    setup = setup_of("gossip", Tempo(0.02, 15))
    for ending, _ in everybody(setup).values():
        assert ending.reason == "all ticks done"
        assert ending.params.isfinite().all()
    assert stayed


def test_who_waits_for_nobody_mixes_them_too(stayed: list[int]):
    for ending, _ in everybody(setup_of("dpsgd ring", Pace(20, patience=0.0))).values():
        assert ending.reason == "all rounds done"
        assert ending.params.isfinite().all()
    assert stayed
