"""The emulator: the simulator's numbers when all goes well, and what happens when it does not."""

from __future__ import annotations

import math

import networkx as nx
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from runtime_cases import (
    CASES,
    LONELY,
    STEPS,
    Case,
    N,
    emulated,
    flat,
    make,
    one_peer_exponential,
    simulated,
    sparse_choco,
    uneven,
)

from p2pfl.algorithms import dpsgd, gossip, local, push_sum
from p2pfl.data.shards import Shards
from p2pfl.errors import RunError
from p2pfl.learning import ModelTask, Quadratics, local_steps, losses, models
from p2pfl.learning.optim import sgd
from p2pfl.peer.events import Received
from p2pfl.peer.gossiper import Tempo
from p2pfl.peer.rounds import Pace
from p2pfl.peer.stopping import plateau, target
from p2pfl.runtime.emulate import Emulator
from p2pfl.runtime.network import NetworkModel
from p2pfl.topology import exponential_graph, metropolis, push, ring_graph

STEADY = NetworkModel(latency=0.1, compute=1.0)


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
    if name == "d2" and steps != "one":
        return
    setup = make(name, Pace(9, evaluate_every=4), steps=STEPS[steps])
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


# Deadlines, losses, crashes.


def silent(node: int, graph, **more) -> NetworkModel:
    """Whatever the node sends is lost: to the others it is as if it were dead, or frozen."""
    links = {(node, other): {"loss": 1.0} for other in graph}
    return NetworkModel(latency=0.1, compute=1.0, links=links, **more)


@pytest.mark.parametrize("name", ["dpsgd ring", "fedavg", "dpsgd directed", "push_sum directed"])
def test_a_silent_peer_costs_one_deadline_in_all(name):
    setup = make(name, Pace(20, patience=5.0))
    emulator, rounds = emulated(setup, silent(2, range(N)))
    assert emulator.time <= 20 * 1.1 + 5.0 + 1e-9
    assert len(rounds) == 20
    assert emulator.ending.reason == "all rounds done"


@pytest.mark.parametrize("jitter", [0.0, 0.02, 0.2])
@given(seed=st.integers(0, 1000), n=st.integers(5, 9))
@settings(max_examples=6, deadline=None)
def test_whoever_waits_for_the_dead_does_not_pass_for_dead(jitter, seed, n):
    """The neighbours of a silent peer come late themselves, once, and are in step again."""
    setup = make("dpsgd ring", Pace(25, patience=5.0), n=n)
    network = silent(0, range(n), compute_jitter=jitter, jitter=0.5 if jitter else 0.0, seed=seed)
    emulator, rounds = emulated(setup, network)
    # Two wait in vain for the dead one in every round; the others for each other at most once.
    assert emulator.missed <= 2 * 25 + n
    assert max(row.virtual_s for row in flat(rounds)) <= 25 * (1.15 + jitter) + 5.0
    last = [row.virtual_s for row in rounds[-1]]
    assert max(last) - min(last) < 1.0  # nobody has been left behind by a round


def test_a_lost_message_costs_its_receiver_one_deadline():
    lossy = NetworkModel(latency=0.1, compute=1.0, loss=0.05, seed=1)
    emulator, rounds = emulated(make("dpsgd ring", Pace(20, patience=2.0)), lossy)
    assert 0 < emulator.missed < 40
    assert emulator.time <= 20 * 1.1 + 2.0 * emulator.missed + 1e-9
    assert len(rounds) == 20


def test_for_ever_is_an_error_and_not_an_ending():
    lossy = NetworkModel(loss=0.2, seed=1)
    with pytest.raises(RunError, match="nodes, 0 among them, wait for ever"):
        emulated(make("dpsgd ring", Pace(20)), lossy)


@pytest.mark.parametrize("patience", [math.inf, 50.0])
def test_a_crash_that_is_noticed_ends_the_wait(patience):
    setup = make("dpsgd ring", Pace(20, patience=patience))
    emulator, rounds = emulated(setup, STEADY, {4: 5.55})
    assert emulator.time == pytest.approx(20 * 1.1)
    assert [len(rows) for rows in rounds] == [6] * 5 + [5] * 15
    assert [rows[0].round for rows in rounds] == list(range(20))
    assert emulator.ending.nodes.tolist() == [0, 1, 2, 3, 5]
    assert emulator.ending.params.shape == (5, 5)
    assert emulator.missed == 0
    assert emulator.ending.updates == 5 * 6 + 15 * 5  # what the dead began does not count


def test_rounds_come_in_order_whoever_dies_when():
    for due in (0.0, 0.5, 1.0, 1.05, 3.3, 3.35, 8.75):
        setup = make("dpsgd ring", Pace(8))
        _, rounds = emulated(setup, STEADY, {4: due, 1: 4.4})
        assert [rows[0].round for rows in rounds] == list(range(8))
        assert all(len(rows) >= 4 for rows in rounds)


def test_a_round_is_told_as_soon_as_the_living_have_ended_it():
    """Node 4 dies while the others, never waiting, are many rounds ahead of it."""
    network = NetworkModel(latency=0.1, compute=1.0, speeds={4: 0.1})
    setup = make("dpsgd ring", Pace(40, patience=0.0))
    emulator, told = Emulator(setup, network, {4: 15.5}), []
    for rows in emulator.rounds():
        told.append((emulator.time, rows[0].round, len(rows)))
    assert [round for _, round, _ in told] == list(range(40))
    assert [time for time, _, _ in told][1:15] == [15.5] * 14
    assert [count for _, _, count in told] == [6] + [5] * 39


def test_who_ends_before_its_crash_has_not_crashed():
    emulator, _ = emulated(make("dpsgd ring", Pace(3)), STEADY, {4: 100.0})
    assert emulator.ending.nodes.tolist() == list(range(N))
    assert emulator.time == pytest.approx(3.3)


def test_everybody_may_crash():
    emulator, rounds = emulated(make("dpsgd ring", Pace(5)), STEADY, dict.fromkeys(range(N), 1.05))
    assert emulator.ending.params.shape == (0, 5)
    assert rounds == []


@given(st.data())
@settings(max_examples=25, deadline=None)
def test_whatever_happens_the_living_come_to_the_end(data):
    n, seed = data.draw(st.integers(1, 7)), data.draw(st.integers(0, 10**6))
    graph = nx.gnp_random_graph(n, 0.5, seed=seed, directed=data.draw(st.booleans()))
    build = data.draw(st.sampled_from([dpsgd, push_sum, sparse_choco]))
    stop = data.draw(st.none() | st.just(target(4.0, "train_loss")))
    pace = Pace(12, patience=data.draw(st.sampled_from([0.5, 3.0, 40.0])), stop=stop, width=2)
    crashes = data.draw(st.dictionaries(st.integers(0, n - 1), st.floats(0, 30), max_size=3))
    rule = push() if build is push_sum else metropolis()
    setup = make(Case(build, lambda _: graph, rule, sgd(0.05)), pace, n=n)
    emulator, rounds = emulated(setup, uneven(seed, loss=data.draw(st.floats(0, 0.5))), crashes)
    assert [rows[0].round for rows in rounds] == list(range(len(rounds)))
    assert all(len({row.node for row in rows}) == len(rows) for rows in rounds)
    living = emulator.ending.nodes.tolist()
    assert set(range(n)) - set(living) <= crashes.keys()
    for node in living:
        assert emulator.peers[node].round <= 12
    if living and not stop:
        assert {row.node for row in rounds[-1]} >= set(living)
        assert len(rounds) == 12
    assert bool(emulator.ending.params.isfinite().all())


def test_what_was_sent_before_a_crash_still_counts():
    """The dead one's last model is under way when it dies: it is waited for, and mixed."""
    setup = make("dpsgd ring", Pace(2))
    emulator, rounds = emulated(setup, STEADY, {4: 1.05})
    healthy, _ = simulated(make("dpsgd ring", Pace(1)))
    assert len(rounds[0]) == 5
    after_one = emulated(make("dpsgd ring", Pace(1)), STEADY, {4: 1.05})[0]
    keep = [0, 1, 2, 3, 5]
    torch.testing.assert_close(after_one.ending.params, healthy.params[keep])
    assert emulator.time == pytest.approx(2.2)


def test_a_straggler_neither_holds_the_others_nor_learns_alone():
    """It is twenty times slower; shortly before the others end, it is near them all the same."""
    case, task = Case(dpsgd, ring_graph, metropolis(), sgd(0.05)), Quadratics(N, 5, seed=3)
    network = NetworkModel(latency=0.1, compute=1.0, speeds={3: 0.05})
    setup = make(case, Pace(300, patience=2.0), task=task)
    emulator, rounds = emulated(setup, network, {3: 325.0})
    assert emulator.time < 300 * 1.1 + 3 * 2.0
    straggler, others = emulator.peers[3], emulator.ending.params.mean(0)
    assert straggler.round == 16 < len(rounds)
    alone = make(case._replace(build=local, graph=lambda n: LONELY), Pace(16), task=task)
    by_itself = simulated(alone)[0].params[3]
    assert (straggler.params[0] - others).norm() < 0.5 * (by_itself - others).norm()


# No waiting at all.


def held_and_mailed(emulator) -> float:
    """Add up the weight that peers hold, that lies in their mail and that is under way."""
    rule = emulator.setup.mixing
    letters = [m for p in emulator.peers.values() for mail in p._mail.values() for m in mail]
    letters += emulator.flying
    mailed = sum(m.message.w.item() * rule.weight(0, m.degree) for m in letters)
    return mailed + sum(p.state.w.item() for p in emulator.peers.values())


@pytest.mark.parametrize("patience", [0.0, 0.7])
@pytest.mark.parametrize("graph", [ring_graph, exponential_graph])
def test_push_sum_that_does_not_wait_for_all_keeps_all_mass(graph, patience):
    setup = make(Case(push_sum, graph, push(), sgd(0.0)), Pace(40, patience=patience), n=10)
    emulator = watched(setup, uneven(0))
    assert held_and_mailed(emulator) == pytest.approx(10, abs=1e-9)


def watched(setup, network):
    """Emulate; keep the messages that came after their receiver had stopped."""
    emulator = Emulator(setup, network)
    emulator.flying, at = [], emulator._at

    def note(due, peer, event):
        if isinstance(event, Received):
            emulator.flying.append(event)
        at(due, peer, event)

    def deliver(peer, event, handle=emulator._deliver):
        if isinstance(event, Received):
            emulator.flying.remove(event)
        handle(peer, event)

    emulator._at, emulator._deliver = note, deliver
    for _ in emulator.rounds():
        pass
    return emulator


def gap(params, task):
    return float((params.mean(0) - task.optimum()).norm())


@pytest.mark.parametrize("build", [dpsgd, sparse_choco, push_sum, gossip])
def test_learning_without_waiting(build):
    task = Quadratics(N, 5, noise=0.1, seed=3)
    rule = push() if build is push_sum else metropolis()
    setup = make(Case(build, ring_graph, rule, sgd(0.02)), Pace(300, patience=0.0), task=task)
    network = NetworkModel(latency=0.5, jitter=3.0, compute=1.0, compute_jitter=0.5, seed=1)
    emulator, _ = emulated(setup, network)
    assert gap(emulator.ending.params, task) < 0.2 * gap(task.init(torch.arange(N)), task)
    assert emulator.missed == emulator.rejected == 0


# Gossip by the clock.


def by_timer(build, graph, network=STEADY, ticks=300, rule=None, crashes=None, **tempo):
    task = Quadratics(N, 5, noise=0.1, seed=3)
    case = Case(build, graph, rule or metropolis(), sgd(0.02))
    setup = make(case, Tempo(1.0, ticks, **tempo), task=task)
    emulator, rounds = emulated(setup, network, crashes)
    start = gap(task.init(torch.arange(N)), task)
    return emulator, rounds, gap(emulator.ending.params, task) / start


@pytest.mark.parametrize("graph", [ring_graph, exponential_graph])
def test_gossip_by_the_clock_learns(graph):
    emulator, rounds, left = by_timer(
        gossip, graph, uneven(3, loss=0.1, compute=0.1), evaluate_every=7
    )
    assert left < 0.3
    assert [rows[0].round for rows in rounds] == list(range(300))
    assert all(len(rows) == N for rows in rounds)
    assert emulator.rejected == 0
    assert emulator.ending.reason == "all ticks done"
    received = sum(row.bytes_received for rows in rounds for row in rows)
    assert 0 < received <= sum(row.bytes_sent for rows in rounds for row in rows)


def test_who_hears_nothing_trains_once_a_period_all_the_same():
    network = NetworkModel(compute=0.3)
    emulator, _, _ = by_timer(local, lambda n: LONELY, network, ticks=50)
    assert emulator.updates == N * 49  # at the start, and at each push but the first and the last
    task, nodes = emulator.setup.task, torch.arange(N)
    x = task.init(nodes)
    for step in range(49):
        x = x - 0.02 * task.grad(x, nodes, nodes * 0 + step)[1]
    torch.testing.assert_close(emulator.ending.params, x)


def test_gossip_goes_on_without_the_dead():
    emulator, rounds, left = by_timer(gossip, ring_graph, crashes={2: 30.5})
    assert left < 0.5
    assert len(rounds) == 300
    assert [len(rows) for rows in rounds] == [6] * 30 + [5] * 270
    assert emulator.ending.nodes.tolist() == [0, 1, 3, 4, 5]
