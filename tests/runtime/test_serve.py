"""Peers with real sockets and clocks, as threads of one process."""

from __future__ import annotations

import math
import socket
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from runtime_cases import CASES, STEPS, make, simulated
from torch import Tensor

from p2pfl.errors import RunError
from p2pfl.learning import Quadratics
from p2pfl.learning.evaluation import Scores
from p2pfl.peer.gossiper import Tempo
from p2pfl.peer.plan import Pace
from p2pfl.runtime.endpoint import Endpoint
from p2pfl.runtime.finding import Book
from p2pfl.runtime.handshake import Terms
from p2pfl.runtime.links import Links
from p2pfl.runtime.serve import Server
from p2pfl.runtime.setup import Ending, Row, Setup
from p2pfl.runtime.simulate import Simulator

Go = Callable[[], bool]
SOON = 15.0  # seconds for what should take well under one


def everybody(setup: Setup, go_on: dict[int, Go] | None = None) -> dict[int, tuple[Ending, Any]]:
    """Let all peers of a setup take part; return how each ended, and its rows."""
    with listening(setup.topology.n) as addresses, ThreadPoolExecutor(setup.topology.n) as pool:
        peers = {
            node: pool.submit(take_part, setup, node, addresses, (go_on or {}).get(node))
            for node in range(setup.topology.n)
        }
        return {node: peer.result() for node, peer in peers.items()}


def assert_as_simulated(
    served: dict[int, tuple[Ending, Any]], simulator: Simulator, rounds: list[list[Row]]
) -> None:
    """Assert that peers have come to the models of the simulator, by the same messages."""
    for node, (ending, rows) in served.items():
        torch.testing.assert_close(
            ending.params[0], simulator.ending.params[node], rtol=1e-10, atol=1e-13
        )
        for mine, all_rows in zip(rows, rounds, strict=True):
            assert mine.bytes_sent == all_rows[node].bytes_sent
            assert mine.bytes_received == all_rows[node].bytes_received
            assert mine.eval_loss == pytest.approx(all_rows[node].eval_loss, rel=1e-10)


@contextmanager
def listening(n: int) -> Iterator[dict[int, tuple[str, int]]]:
    held = [socket.create_server(("127.0.0.1", 0)) for _ in range(n)]
    yield {
        node: (f"tcp://127.0.0.1:{sock.getsockname()[1]}", sock.detach())
        for node, sock in enumerate(held)
    }


def take_part(
    setup: Setup, node: int, addresses: dict[int, tuple[str, int]], go_on: Go | None
) -> tuple[Ending, list[Row]]:
    ids = {
        p
        for k in range(setup.topology.period or 1)
        for s in setup.topology.view(node, k)
        for p in s
    }
    book = Book(setup.topology.n, {p: addresses[p][0] for p in ids})
    endpoint = Endpoint(addresses[node][0], len(ids), descriptor=addresses[node][1])
    links = Links(node, endpoint, ids, Terms({}), book)
    rows: list[Row] = []
    try:
        links.meet(SOON)
        server = Server(setup, node, links)
        ending = server.run(lambda row, mark: rows.append(row), go_on or (lambda: True))
        assert not links.rejected
    finally:
        links.close("done", SOON)
    return ending, rows


ONE_STEP = {name for name, case in CASES.items() if case.build(case.opt).needs.one_step}
PAIRS = [(a, many) for a in CASES for many in STEPS if a not in ONE_STEP or many == "one"]


@pytest.mark.parametrize(("name", "many"), PAIRS)
def test_peers_give_the_numbers_of_the_simulator(name: str, many: str):
    setup = make(name, Pace(5), steps=STEPS[many])
    simulator, rounds = simulated(setup)
    served = everybody(setup)
    assert_as_simulated(served, simulator, rounds)
    for node, (ending, rows) in served.items():
        assert ending.reason == "all rounds done"
        assert len(rows) == 5
        for mine, all_rows in zip(rows, rounds, strict=True):
            theirs = all_rows[node].train_loss
            assert mine.train_loss == pytest.approx(theirs, rel=1e-10, nan_ok=True)
    assert sum(ending.updates for ending, _ in served.values()) == simulator.ending.updates


def test_a_result_wakes_the_loop_at_once():
    """150 rounds of nothing would take 40 s if each were noticed at the next nap."""
    started = time.monotonic()
    everybody(make("dpsgd ring", Pace(150, evaluate_every=150), n=3))
    assert time.monotonic() - started < SOON


def test_peers_on_a_timer_push_and_stop():
    setup = make("gossip", Tempo(0.02, 15), n=4)
    for ending, rows in everybody(setup).values():
        assert ending.reason == "all ticks done"
        assert [row.round for row in rows] == list(range(15))
        assert sum(row.bytes_sent for row in rows) > 0


class Failing(Quadratics):
    """Its gradients cannot be had after some steps."""

    def grad(self, params: Tensor, nodes: Tensor, steps: Tensor) -> tuple[Tensor, Tensor]:
        if int(nodes[0]) == 1 and int(steps[0]) == 3:
            raise ZeroDivisionError("of this task")
        return super().grad(params, nodes, steps)


def test_an_error_in_the_worker_comes_out_and_the_others_go_on():
    setup = make("dpsgd complete", Pace(6), n=3, task=Failing(3, 5))
    with listening(3) as addresses, ThreadPoolExecutor(3) as pool:
        peers = [pool.submit(take_part, setup, node, addresses, None) for node in range(3)]
        with pytest.raises(ZeroDivisionError, match="of this task"):
            peers[1].result()
        for node in (0, 2):
            ending, rows = peers[node].result()
            assert ending.reason == "all rounds done"
            assert len(rows) == 6


class Diverging(Quadratics):
    def grad(self, params: Tensor, nodes: Tensor, steps: Tensor) -> tuple[Tensor, Tensor]:
        loss, grads = super().grad(params, nodes, steps)
        return loss * math.inf, grads


def test_divergence_is_an_error_that_names_the_node():
    with pytest.raises(RunError, match="node 0 diverged in round 0"):
        everybody(make("local", Pace(3), n=1, task=Diverging(1, 5)))


class Slow(Quadratics):
    """Tells when training has begun, and takes for ever over it."""

    def __init__(self, n: int) -> None:
        super().__init__(n, 5)
        self.begun, self.steps = threading.Event(), 0

    def grad(self, params: Tensor, nodes: Tensor, steps: Tensor) -> tuple[Tensor, Tensor]:
        self.begun.set()
        self.steps += 1
        return super().grad(params, nodes, steps)


def test_local_steps_are_broken_off_when_a_peer_is_to_end():
    task = Slow(1)
    setup = make(
        "local", Pace(3), n=1, task=task, steps=lambda nodes: torch.full_like(nodes, 10**9)
    )
    started = time.monotonic()
    ending, rows = everybody(setup, {0: lambda: not task.begun.is_set()})[0]
    assert time.monotonic() - started < SOON
    assert ending.reason == "interrupted"
    assert rows == []
    assert 0 < task.steps < 10**6


class SlowToMeasure(Quadratics):
    """Its evaluations take a second."""

    def __init__(self, n: int) -> None:
        super().__init__(n, 5)
        self.asked = threading.Event()

    def evaluate(self, params: Tensor, nodes: Tensor) -> Scores:
        self.asked.set()
        time.sleep(1)
        return super().evaluate(params, nodes)


def test_rounds_whose_evaluation_is_cut_off_are_still_reported():
    task = SlowToMeasure(1)

    setup = make("local", Pace(3), n=1, task=task)
    ending, rows = everybody(setup, {0: lambda: not task.asked.is_set()})[0]
    assert ending.reason == "interrupted"
    assert [row.round for row in rows] == [0]
    assert math.isnan(rows[0].eval_loss)
    assert math.isfinite(rows[0].train_loss)


def test_one_that_ends_early_costs_the_others_nothing():
    count = iter(range(10**9))
    setup = make("dpsgd complete", Pace(30), n=4)
    started = time.monotonic()
    served = everybody(setup, {2: lambda: next(count) < 8})
    assert time.monotonic() - started < SOON
    assert served[2][0].reason == "interrupted"
    for node in (0, 1, 3):
        assert len(served[node][1]) == 30
        assert served[node][0].reason == "all rounds done"


def test_nothing_stays_open():
    everybody(make("dpsgd ring", Pace(2)))
    before = len(list(Path("/proc/self/fd").iterdir()))
    threads = threading.active_count()
    for _ in range(2):
        everybody(make("dpsgd ring", Pace(2)))
    assert len(list(Path("/proc/self/fd").iterdir())) == before
    assert threading.active_count() == threads
