"""Models mixed while they arrive: the same numbers, whoever is lost on the way."""

from __future__ import annotations

import dataclasses
import math
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from itertools import pairwise
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
from links_cases import Stage, chunks_of, meet
from runtime_cases import STEPS, make, simulated
from test_serve import SOON, assert_as_simulated, everybody
from torch import Tensor

from p2pfl.algorithms.averaging import Params, dpsgd
from p2pfl.errors import RemoteProtocolError
from p2pfl.learning import Quadratics
from p2pfl.learning.optim import sgd
from p2pfl.peer.events import Send
from p2pfl.peer.letters import Letters
from p2pfl.peer.plan import Pace
from p2pfl.runtime import chunks, flows, streams, wire
from p2pfl.runtime.chunks import Outgoing
from p2pfl.runtime.flows import Expected, Inflow, Outflow
from p2pfl.runtime.handshake import Terms
from p2pfl.runtime.links import Links
from p2pfl.runtime.serve import TRAINING, Server
from p2pfl.runtime.setup import Ending, Row, Setup
from p2pfl.runtime.wire import Header, Kind

CASES = ["fedavg", "fedavg adam", "dpsgd ring", "dpsgd complete", "dpsgd directed", "proximal"]
D = 2100  # above what an inbox lays side by side
RUN = b"12345678"
LINGER = 3.0  # seconds


@pytest.fixture
def small_chunks(monkeypatch) -> Iterator[None]:
    """Chunks of a few hundred numbers, and room for a few of them only."""
    monkeypatch.setattr(flows, "BUDGET", 3 * 4096)
    with chunks_of(4096):
        yield


@pytest.mark.usefixtures("small_chunks")
@pytest.mark.parametrize("name", CASES)
def test_streams_give_the_numbers_of_the_simulator(name: str, monkeypatch):
    streamed = []
    mix = streams._mix
    monkeypatch.setattr(streams, "_mix", lambda *args: streamed.append(1) or mix(*args))
    setup = make(name, Pace(3), n=4, task=Quadratics(4, D, noise=0.1, seed=3), steps=STEPS["one"])
    simulator, rounds = simulated(setup)
    served = everybody(setup)
    assert len(streamed) == 4 * 3
    assert_as_simulated(served, simulator, rounds)


# What is mixed, by hand

WEIGHTS = torch.tensor([[0.5, 0.2, 0.3]], dtype=torch.float64)


class Exchange:
    """A peer that mixes its own model with those of neighbours 1 and 2, as they come."""

    def __init__(self, window: int = 16) -> None:
        draw = torch.Generator().manual_seed(1)
        self.own, *self.sent = torch.randn(3, 1, D, dtype=torch.float64, generator=draw)
        schema = chunks.schema(Params(self.own))
        self.news, self.streams = threading.Condition(), []
        self.inflows = [Inflow(), Inflow()]
        for inflow in self.inflows:
            inflow.expect(TRAINING, Expected(schema, window, news=self.news))
            inflow.owed()
        self.columns = streams.wide_field(schema).columns
        self.mixed = 0

    def arrive(self, k: int, start: int = 0, stop: int | None = None) -> None:
        """Let some chunks of the model of neighbour 1 or 2 arrive."""
        header = Header(Kind.CHUNK, RUN, TRAINING, k, 0, 2, 0.0)
        outgoing = Outgoing(header, Params(self.sent[k - 1]))
        for index in range(len(outgoing))[start:stop]:
            first, *pieces = (memoryview(bytearray(frame)) for frame in outgoing.chunk(index))
            received = self.inflows[k - 1].take(wire.unpack(first), pieces)
            if received:
                self.streams.append(received.message.x)

    def mix(self, patience: float = 0.0) -> Tensor:
        algorithm = dpsgd(sgd(0.1))
        deadline = time.monotonic() + patience
        streaming = streams.streaming(algorithm, lambda: deadline, self._room)
        state = algorithm.init(self.own.clone(), None)
        letters = Letters(WEIGHTS.clone(), Params((self.own, *self.streams)), torch.tensor([0]))
        return streaming.receive(state, letters).x

    def _room(self) -> None:
        self.mixed += 1
        for inflow in self.inflows:
            inflow.owed()

    def expected(self, *present: int) -> Tensor:
        """Return the average with the neighbours that are present."""
        total = self.own * (1 - sum(WEIGHTS[0, k] for k in present))
        for k in present:
            total = total + WEIGHTS[0, k] * self.sent[k - 1]
        return total


@pytest.mark.usefixtures("small_chunks")
def test_columns_are_averages_of_whoever_has_sent_them():
    exchange = Exchange()
    exchange.arrive(1)
    exchange.arrive(2, stop=2)
    exchange.inflows[1].end()  # it died
    mixed = exchange.mix(patience=SOON)
    there = exchange.columns[1][1]
    torch.testing.assert_close(mixed[:, :there], exchange.expected(1, 2)[:, :there])
    torch.testing.assert_close(mixed[:, there:], exchange.expected(1)[:, there:])
    assert exchange.mixed == len(exchange.columns)


@pytest.mark.usefixtures("small_chunks")
def test_a_connection_that_breaks_ends_a_stream_and_its_rest_is_not_asked_for_again():
    exchange = Exchange()
    exchange.arrive(1, stop=3)
    exchange.arrive(2, stop=2)
    for inflow in exchange.inflows:
        inflow.broken()
    assert [inflow.next for inflow in exchange.inflows] == [1, 1]
    mixed = exchange.mix(patience=SOON)
    first, second = exchange.columns[1][1], exchange.columns[2][1]
    torch.testing.assert_close(mixed[:, :first], exchange.expected(1, 2)[:, :first])
    torch.testing.assert_close(mixed[:, first:second], exchange.expected(1)[:, first:second])
    assert torch.equal(mixed[:, second:], exchange.own[:, second:])


class Several(NamedTuple):
    """A state of fields of several types."""

    few: Tensor
    mask: Tensor
    x: Tensor
    master: Tensor
    kept: Tensor


def test_every_field_of_a_state_stays_of_its_type_and_in_its_own_memory():
    d, half = 6, torch.bfloat16
    x, wide = torch.arange(d).unsqueeze(0), torch.zeros(1, d)
    before = Several(torch.ones(1, 1), x > 2, x.to(half), wide, wide.clone())
    given: list[Tensor] = []

    def receive(s: Several, into: list[Tensor]) -> Several:
        given.extend(into)
        mixed = into[0] if into and into[0].dtype == torch.float32 else torch.empty_like(s.master)
        mixed.fill_(1 / 3)
        return Several(s.few + 1, s.mask, s.x, mixed * 2, mixed)  # one of them in another's place

    whole = streams._After(before, d, chunks.fresh)
    for start, stop in pairwise(range(0, d + 1, 2)):
        part = whole.cut(start, stop)
        whole.write(part, receive(part, whole.room(start, stop)), start, stop)
    after = whole.state()
    third = torch.full((1, d), 1 / 3)
    assert [field.data_ptr() for field in given] == [
        after.master[:, start:].data_ptr() for start in (2, 4)
    ]
    assert (after.mask is before.mask, after.x is before.x) == (True, True)
    assert after.few.item() == 2
    torch.testing.assert_close((after.master, after.kept), (third * 2, third))
    assert not before.master.any()


@pytest.mark.usefixtures("small_chunks")
def test_values_that_are_not_finite_leave_their_sender_out_from_there_on():
    exchange = Exchange()
    first, second = exchange.columns[1][1], exchange.columns[2][1]
    exchange.sent[1][0, second - 1] = math.nan
    exchange.arrive(1)
    exchange.arrive(2, stop=2)
    with pytest.raises(RemoteProtocolError) as caught:
        exchange.arrive(2, start=2, stop=3)
    assert str(caught.value) == "x has values which are not finite"
    exchange.arrive(2, start=3)  # is passed over
    mixed = exchange.mix()
    torch.testing.assert_close(mixed[:, :first], exchange.expected(1, 2)[:, :first])
    torch.testing.assert_close(mixed[:, first:], exchange.expected(1)[:, first:])
    assert exchange.inflows[1].next == 1
    exchange.inflows[1].owed()
    assert exchange.inflows[1]._streams == []  # nothing of it is kept


@pytest.mark.usefixtures("small_chunks")
def test_who_is_slower_than_the_patience_is_left_out_of_the_rest():
    exchange = Exchange()
    exchange.arrive(1)
    exchange.arrive(2, stop=1)
    mixed = exchange.mix(patience=0.2)
    there = exchange.columns[0][1]
    torch.testing.assert_close(mixed[:, :there], exchange.expected(1, 2)[:, :there])
    torch.testing.assert_close(mixed[:, there:], exchange.expected(1)[:, there:])
    exchange.arrive(2, start=1)  # what comes too late is not kept
    assert exchange.inflows[1].next == 1
    exchange.inflows[1].owed()
    assert exchange.inflows[1]._streams == []


@pytest.mark.usefixtures("small_chunks")
def test_a_stream_is_mixed_as_it_comes_through_a_window_of_one_chunk():
    exchange = Exchange(window=1)
    exchange.arrive(1, stop=1)
    exchange.arrive(2, stop=1)

    def feed() -> None:
        for index in range(1, len(exchange.columns)):
            with exchange.news:
                assert exchange.news.wait_for(lambda: exchange.mixed >= index, SOON)
            for k in (1, 2):
                exchange.arrive(k, index, index + 1)

    room = exchange._room

    def told() -> None:
        with exchange.news:
            room()
            exchange.news.notify_all()

    exchange._room = told
    with ThreadPoolExecutor(1) as pool:
        feeding = pool.submit(feed)
        mixed = exchange.mix(patience=SOON)
        feeding.result()
    torch.testing.assert_close(mixed, exchange.expected(1, 2))


@pytest.mark.usefixtures("small_chunks")
def test_models_that_nobody_will_mix_any_more_give_their_room_back():
    exchange = Exchange(window=3)
    inflow = exchange.inflows[0]
    exchange.arrive(1, stop=3)
    assert inflow.owed() == 0  # it holds all the room there is
    inflow.drop_before(1)
    assert inflow.owed() == 3
    exchange.arrive(1, start=3)
    assert inflow.next == 1


# Whole peers


def take_part(
    setup: Setup, node: int, links: Links, go_on: Callable[[Server], bool]
) -> tuple[Ending, list[Row], float]:
    """Serve as one node; return how it ended, its rows, and the seconds of its goodbye."""
    rows: list[Row] = []
    server = Server(setup, node, links)
    try:
        ending = server.run(lambda row, mark: rows.append(row), lambda: go_on(server))
    finally:
        started = time.monotonic()
        links.close("done", LINGER)
    return ending, rows, time.monotonic() - started


def all_take_part(
    setup: Setup, go_on: Callable[[Server], bool] = lambda server: True
) -> tuple[list[Links], list[tuple[Ending, list[Row], float]]]:
    with ExitStack() as stack:
        scene = Stage(stack, setup.topology.n)
        peers = [scene.peer(node) for node in range(scene.n)]
        meet(*peers)
        with ThreadPoolExecutor(scene.n) as pool:
            each = [pool.submit(take_part, setup, n, peers[n], go_on) for n in range(scene.n)]
            return peers, [one.result() for one in each]


def large(patience: float = math.inf, rounds: int = 6, n: int = 3) -> Setup:
    task = Quadratics(n, D, seed=3)
    return make("dpsgd complete", Pace(rounds, patience=patience), n=n, task=task)


@pytest.mark.usefixtures("small_chunks")
def test_a_chunk_with_values_that_are_not_finite_is_counted_and_training_goes_on(monkeypatch):
    chunk = Outgoing.chunk

    def poisoned(self: Outgoing, index: int, *checked: bool):
        header, *pieces = chunk(self, index, *checked)
        about = wire.unpack(header)
        if (about.sender, about.round, index) != (1, 2, 3):
            return [header, *pieces]
        pieces = [b"\xff" * len(piece) for piece in pieces]
        return [wire.pack(about._replace(check=chunks.checksum(about, pieces))), *pieces]

    monkeypatch.setattr(Outgoing, "chunk", poisoned)
    peers, ended = all_take_part(large())
    for node in (0, 2):
        assert peers[node].rejected == {"peer 1: x has values which are not finite": 1}
    for ending, rows, _ in ended:
        assert ending.reason == "all rounds done"
        assert ending.params.isfinite().all()
        assert [row.round for row in rows] == list(range(6))


def stuck(monkeypatch, node: int, round: int, free: threading.Event) -> threading.Event:
    """Let what a node sends stop in the middle of a model, until it is free to go on."""
    begun, flush = threading.Event(), Outflow.flush

    def slow(self: Outflow, hand_over) -> bool:
        now = self._queue[self._at] if self.waiting else None
        if now and now._header.sender == node and (now.round, self._chunk) >= (round, 2):
            begun.set()
            if not free.is_set():
                return False
        return flush(self, hand_over)

    monkeypatch.setattr(Outflow, "flush", slow)
    return begun


@pytest.mark.usefixtures("small_chunks")
def test_who_stops_in_the_middle_of_a_model_is_left_out_and_training_goes_on(monkeypatch):
    stuck(monkeypatch, 1, 2, threading.Event())
    peers, ended = all_take_part(large(patience=0.5))
    for ending, rows, _ in ended:
        assert ending.reason == "all rounds done"
        assert len(rows) == 6
    assert not any(links.rejected for links in peers)


@pytest.mark.usefixtures("small_chunks")
def test_who_was_late_once_is_in_step_again(monkeypatch):
    """What it sent while nobody waited for it must not stand in the way of what it sends then."""
    rounds, free = 30, threading.Event()
    begun = stuck(monkeypatch, 1, 2, free)

    def go_on(server: Server) -> bool:
        if server.node == 0 and begun.is_set() and server.machine.round >= 4:
            free.set()
        return True

    patience = 1.0
    _, ended = all_take_part(large(patience=patience, rounds=rounds), go_on)
    assert free.is_set()
    for ending, rows, _ in ended:
        assert ending.reason == "all rounds done"
        assert len(rows) == rounds
        took = [after.wall_s - before.wall_s for before, after in pairwise(rows)]
        assert sum(seconds > patience for seconds in took) < rounds / 3
    for node in (0, 2):
        assert ended[node][0].missed < rounds / 3


class Dawdling(Quadratics):
    """Node 0 takes one step only once something has happened."""

    def __init__(self, step: int, happened: threading.Event) -> None:
        super().__init__(3, D, seed=3)
        self._step, self._happened = step, happened

    def grad(self, params: Tensor, nodes: Tensor, steps: Tensor) -> tuple[Tensor, Tensor]:
        if (int(nodes[0]), int(steps[0])) == (0, self._step):
            self._happened.wait(SOON)
        return super().grad(params, nodes, steps)


@pytest.mark.usefixtures("small_chunks")
def test_a_late_model_does_not_hold_up_the_next_which_is_waited_for(monkeypatch):
    """A model that came while its receiver trained for the next round has all the room there is."""
    rounds, free, heard = 16, threading.Event(), threading.Event()
    stuck(monkeypatch, 1, 2, free)

    def go_on(server: Server) -> bool:
        if server.node == 0 and server.machine.round >= 5:  # it has done without the model of 4
            free.set()
            if server.machine.mail.newest(1) >= 4:
                heard.set()
        return True

    patience = 1.0
    setup = large(patience=patience, rounds=rounds)
    setup = dataclasses.replace(setup, task=Dawdling(5, heard))
    _, ended = all_take_part(setup, go_on)
    assert heard.is_set()
    waited = 0
    for _, rows, _ in ended:
        took = [after.wall_s - before.wall_s for before, after in pairwise(rows)]
        waited += sum(seconds > patience for seconds in took[4:])
    assert waited < 4  # all three would wait in vain two times or more


@pytest.mark.usefixtures("small_chunks")
def test_a_run_that_is_interrupted_in_the_middle_of_a_model_ends_at_once(monkeypatch):
    begun = stuck(monkeypatch, 1, 2, threading.Event())
    started = time.monotonic()
    _, ended = all_take_part(large(patience=math.inf), lambda server: not begun.is_set())
    assert time.monotonic() - started < SOON
    for ending, _, goodbye in ended:
        assert ending.reason == "interrupted"
        assert ending.params.isfinite().all()
        assert goodbye < LINGER


# Memory

HUB = """
import sys
from pathlib import Path
import torch
torch.set_num_threads(1)
from links_cases import chunks_of,  make_links
from p2pfl.algorithms import dpsgd
from p2pfl.learning.evaluation import Scores
from p2pfl.learning.optim import sgd
from p2pfl.peer.plan import Pace
from p2pfl.runtime.handshake import Terms
from p2pfl.runtime.serve import Server
from runtime_cases import Case, make
from p2pfl.topology import metropolis
import networkx as nx

d, rounds, bind, *leaves = sys.argv[1:]

class Still:
    d = int(sys.argv[1])
    def init(self, nodes): return torch.zeros(len(nodes), self.d)
    def examples(self, nodes): return torch.ones_like(nodes)
    def grad(self, params, nodes, steps): return torch.zeros(1), torch.zeros_like(params)
    def descend(self, params, nodes, first, factors): return torch.zeros(len(params))
    def evaluate(self, params, nodes): return Scores(torch.zeros(1), torch.zeros(1))

addresses = {1 + k: leaf for k, leaf in enumerate(leaves)}
links = make_links(0, bind, addresses, Terms({}))
setup = make(
    Case(dpsgd, nx.star_graph, metropolis()), Pace(int(rounds)), len(leaves), task=Still()
)
links.meet(60)
ending = Server(setup, 0, links).run(lambda row, mark: None)
links.close("done", 5)
status = Path("/proc/self/status").read_text()  # its own: ru_maxrss has that of the parent, too
peak = int(status.split("VmHWM:")[1].split()[0])
print(ending.reason, ending.params.mean().item(), dict(links.rejected), peak, sep=";")
"""


def peak_of_a_hub(k: int, d: int, rounds: int) -> float:
    """Return the MB a process needs at most that mixes the models of k others."""
    with ExitStack() as stack:
        scene = Stage(stack, k + 1)
        hub = scene.addresses[0]
        scene.sockets[0].close()
        leaves = [scene.peer(node, (0,), Terms({})) for node in range(1, k + 1)]
        here = Path(__file__).parent
        process = subprocess.Popen(
            [sys.executable, "-c", HUB, str(d), str(rounds), hub]
            + [scene.addresses[node] for node in range(1, k + 1)],
            cwd=here,
            stdout=subprocess.PIPE,
            text=True,
        )
        stack.callback(process.wait)
        stack.callback(process.kill)
        meet(*leaves, timeout=60)
        message = Params(torch.full((1, d), 1.0))
        for links in leaves:
            links.expect(TRAINING, chunks.schema(message))
            for round in range(rounds):
                links.send(Send((0,), round, 1, 0.0, message))
        while process.poll() is None:
            for links in leaves:
                links.events()
            leaves[0].poller.poll(5)
        reason, mean, rejected, peak = process.stdout.read().strip().split(";")
        assert (reason, rejected) == ("all rounds done", "{}")
        assert 0.5 < float(mean) < 1
        return int(peak) / 1000


@pytest.mark.processes
def test_the_memory_for_mixing_does_not_grow_with_the_number_of_neighbours():
    d, rounds = 5_000_000, 2  # 20 MB
    few, many = (peak_of_a_hub(k, d, rounds) for k in (2, 26))
    # All 24 models more would be 480 MB. One run and the next differ by up to six, as what is
    # trained, mixed and still on its way to somebody falls together or does not.
    assert many - few < 240
