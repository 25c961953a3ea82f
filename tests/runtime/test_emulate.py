"""The emulator gives the simulator's numbers when all goes well, and says how long it took."""

from __future__ import annotations

import math

import networkx as nx
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from runtime_cases import (
    CASES,
    STEADY,
    STEPS,
    Case,
    N,
    emulated,
    flat,
    make,
    one_peer_exponential,
    simulated,
    uneven,
)

import p2pfl
from p2pfl.algorithms import dpsgd, push_sum
from p2pfl.data.shards import Shards
from p2pfl.learning import ModelTask, Quadratics, local_steps, losses, models
from p2pfl.peer.plan import Pace
from p2pfl.peer.stopping import plateau, target
from p2pfl.runtime.emulate import Emulator
from p2pfl.runtime.network import NetworkModel
from p2pfl.topology import exponential_graph, metropolis, push


def same(one, other, rounds: int | None = None):
    """Compare what two runs came to, and their rows but for the times."""
    (a, rows), (b, rows_b) = one, other
    torch.testing.assert_close(a.ending.params, b.ending.params, rtol=1e-10, atol=1e-12)
    assert a.ending.reason == b.ending.reason
    assert a.ending.updates == b.ending.updates
    assert len(rows) == len(rows_b) == (rounds or len(rows))
    for left, right in zip(flat(rows), flat(rows_b), strict=True):
        timeless = [row._replace(wall_s=0.0, virtual_s=0.0) for row in (left, right)]
        assert timeless[0] == pytest.approx(timeless[1], rel=1e-10, abs=1e-11, nan_ok=True)


@pytest.mark.parametrize("steps", STEPS)
@pytest.mark.parametrize("name", CASES)
def test_emulator_agrees_with_simulator(name, steps):
    setup = make(name, Pace(9, evaluate_every=4), steps=STEPS[steps])
    if setup.algorithm.needs.one_step and steps != "one":
        return
    same(simulated(setup), emulated(setup), 9)


@pytest.mark.parametrize("name", ["dpsgd ring", "push_sum directed"])
def test_deadlines_that_nobody_misses_change_nothing(name):
    setup = make(name, Pace(9, patience=1e6))
    same(simulated(setup), emulated(setup), 9)


@pytest.mark.parametrize("name", ["dpsgd directed", "push_sum directed"])
def test_emulator_agrees_on_links_that_change(name):
    setup = make(name, Pace(11), n=8, topology=one_peer_exponential(8))
    same(simulated(setup), emulated(setup), 11)


@pytest.mark.parametrize("patience", [math.inf, 1e6])
@pytest.mark.parametrize("build", [dpsgd, push_sum])
def test_a_sender_far_ahead_in_step_loses_no_message(build, patience):
    """On a directed ring a fast node gets n - 1 rounds ahead of the slow one it sends to."""
    ring = nx.cycle_graph(14, create_using=nx.DiGraph)
    case = Case(build, lambda n: ring, push() if build is push_sum else metropolis())
    setup = make(case, Pace(30, patience=patience), n=14)
    network = NetworkModel(latency=0.01, compute=0.1, speeds={5: 0.01})
    same(simulated(setup), emulated(setup, network), 30)


def test_nothing_is_dropped_where_nothing_holds_the_sender_back():
    line = nx.path_graph(4, create_using=nx.DiGraph)
    setup = make(Case(dpsgd, lambda n: line, metropolis()), Pace(30), n=4)
    same(simulated(setup), emulated(setup, NetworkModel(speeds={2: 0.02})), 30)


def test_emulator_agrees_on_a_real_model_with_unequal_nodes():
    draw = torch.Generator().manual_seed(0)
    count = torch.tensor([9, 33, 16, 40, 8, 21])
    x, y = torch.randn(127, 6, generator=draw), torch.randint(3, (127,), generator=draw)
    shards = Shards(x, y, torch.arange(6), count.cumsum(0) - count, count)
    torch.manual_seed(0)
    model = models.mlp([5], dropout=0.2)((6,), 3)
    task = ModelTask(model, losses.cross_entropy(), shards, batch_size=8, dtype=torch.float64)
    for name in ("fedavg", "push_sum examples", "dpsgd ring"):
        setup = make(name, Pace(4), task=task, steps=lambda n: local_steps(task.examples(n), 8, 1))
        same(simulated(setup), emulated(setup), 4)


@pytest.mark.parametrize("name", ["push_sum", "gosgd", "push_diging", "push_pull", "dpsgd"])
def test_emulator_and_simulator_count_the_same_bytes_of_half_precision(name):
    tables = {"nodes": 4, "topology": "ring", "algorithm": name, "model": "logistic"}
    tables |= {"pace": {"rounds": 2, "local_steps": 1}, "training": {"dtype": "bfloat16"}}
    one, other = (p2pfl.run(tables, on=on).metrics for on in ("simulate", "emulate"))
    assert one["bytes_sent"].tolist() == other["bytes_sent"].tolist()
    assert one["bytes_received"].tolist() == other["bytes_received"].tolist()


@pytest.mark.parametrize("n", [1, 2])
def test_the_smallest_networks(n):
    for name in ("dpsgd complete", "fedavg", "push_sum directed", "local"):
        if n == 1 and CASES[name].graph is exponential_graph:
            continue
        setup = make(name, Pace(3, stop=target(-1.0, "train_loss")), n=n)
        same(simulated(setup), emulated(setup), 3)


def test_nodes_without_neighbours_among_others():
    graph = nx.Graph([(0, 1), (1, 2)])
    graph.add_nodes_from([3, 4])
    setup = make(Case(dpsgd, lambda n: graph, metropolis()), Pace(5), n=5)
    same(simulated(setup), emulated(setup), 5)


# Stopping together.


@pytest.mark.parametrize("patience", [math.inf, 1e6])
@pytest.mark.parametrize(
    "rule",
    [
        target(4.77, "train_loss"),
        target(2.9, "eval_loss"),
        plateau("train_loss", patience=3, min_delta=0.5, smoothing=0.5),
        plateau("eval_loss", patience=2, min_delta=1e-2, smoothing=0.0),
    ],
    ids=["target train", "target eval", "plateau train", "plateau eval"],
)
def test_all_stop_in_the_same_round_as_in_the_simulator(rule, patience):
    n, width = 7, 3  # the diameter of the ring
    pace = Pace(300, patience=patience, evaluate_every=2, stop=rule, width=width)
    setup = make("dpsgd ring", pace, n=n, steps=STEPS["unequal"])
    one, other = simulated(setup), emulated(setup)
    assert one[0].ending.reason == "converged"
    assert width < len(one[1]) < 300
    assert len(one[1]) % width == 0
    same(one, other)
    assert [len(rows) for rows in other[1]] == [n] * len(one[1])


@given(st.integers(0, 10**6), st.integers(2, 9), st.sampled_from([3.0, 3.5, 4.0, 4.5, 5.0]))
@settings(max_examples=12, deadline=None)
def test_all_stop_in_the_same_round_on_random_graphs(seed, n, goal):
    graph = nx.gnp_random_graph(n, 0.4, seed=seed)
    graph.add_edges_from((i, i + 1) for i in range(n - 1))
    pace = Pace(40, stop=target(goal, "train_loss"), width=nx.diameter(graph))
    setup = make(Case(dpsgd, lambda _: graph, metropolis()), pace, n=n, task=Quadratics(n, 5))
    same(simulated(setup), emulated(setup, uneven(seed)))


# The same history, and few calls.


@pytest.mark.parametrize("patience", [math.inf, 3.0, 0.0])
def test_the_same_seed_gives_the_same_history_to_the_bit(patience):
    def history():
        setup = make("dpsgd ring", Pace(15, patience=patience))
        emulator, rounds = emulated(setup, uneven(4, loss=0.1 if patience < math.inf else 0.0))
        rows = [row._replace(wall_s=0.0) for row in flat(rounds)]
        return emulator.ending.params, repr(rows), emulator.time, emulator.missed

    (params, *rest), (again, *rest_again) = history(), history()
    assert torch.equal(params, again)
    assert rest == rest_again


def test_training_is_batched():
    emulator, _ = emulated(make("dpsgd ring", Pace(20)), STEADY)
    assert emulator.batches == 20  # not 20 * N
    assert emulator.updates == 20 * N


def test_virtual_time_is_compute_and_way():
    emulator, rounds = emulated(make("dpsgd ring", Pace(10), steps=STEPS["three"]), STEADY)
    assert [rows[0].virtual_s for rows in rounds] == pytest.approx(
        [3.1 * (k + 1) for k in range(10)]
    )
    assert emulator.time == pytest.approx(31.0)
    slow = NetworkModel(latency=0.1, compute=1.0, speeds={2: 0.25})
    assert emulated(make("dpsgd ring", Pace(10)), slow)[0].time == pytest.approx(10 * 4 + 0.1)


def test_a_narrow_uplink_sends_one_after_the_other():
    setup = make("dpsgd complete", Pace(1), steps=torch.zeros_like)
    size = emulated(setup)[1][0][0].bytes_sent / (N - 1)
    network = NetworkModel(latency=0.5, compute=1.0, uplink=size)
    assert emulated(setup, network)[0].time == pytest.approx(N - 1 + 0.5)


def test_messages_queue_on_a_narrow_link():
    """A peer that never waits sends more than a link can carry: what comes, comes late."""
    setup = make("dpsgd ring", Pace(10, patience=0.0), n=2)
    size = emulated(make("dpsgd ring", Pace(1), n=2))[1][0][0].bytes_sent
    network = NetworkModel(latency=0.0, compute=1.0, bandwidth=size / 4.0, speeds={1: 0.1})
    _, rounds = emulated(setup, network)
    slow = {rows[i].round: rows[i] for rows in rounds for i in range(len(rows)) if rows[i].node}
    # One message takes 4 s to pass: node 0 sends one a second, and node 1 takes 10 s a round.
    assert [slow[k].bytes_received for k in range(3)] == [2 * size, 2 * size, 3 * size]


@pytest.mark.parametrize("patience", [math.inf, 0.0])
def test_a_peer_out_of_time_ends_the_round_it_is_in(patience):
    network = NetworkModel(compute=1.0, latency=0.1)
    emulator = Emulator(make("dpsgd ring", Pace(100, patience=patience, seconds=5.5)), network)
    rounds = list(emulator.rounds())
    assert emulator.ending.reason == "out of time"
    assert 5.5 <= emulator.ending.virtual_s < 5.5 + 1.0 + 0.1 + 1e-9
    assert len(rounds) in (5, 6)
