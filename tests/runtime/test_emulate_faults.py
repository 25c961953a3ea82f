"""The emulator when not all goes well: deadlines, losses, crashes, and peers that never wait."""

from __future__ import annotations

import dataclasses
import math

import networkx as nx
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from runtime_cases import (
    LONELY,
    STEADY,
    Case,
    N,
    emulated,
    flat,
    make,
    simulated,
    sparse_choco,
    uneven,
    with_crashes,
)

from p2pfl.algorithms import dpsgd, gossip, local, push_sum
from p2pfl.churn.script import Happening, Script
from p2pfl.errors import RunError
from p2pfl.learning import Quadratics
from p2pfl.learning.optim import sgd
from p2pfl.peer.gossiper import Tempo
from p2pfl.peer.plan import Pace
from p2pfl.peer.stopping import target
from p2pfl.runtime.emulate import Emulator
from p2pfl.runtime.network import NetworkModel
from p2pfl.topology import exponential_graph, metropolis, push, ring_graph


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


def test_a_script_that_stops_all_for_good_is_named():
    stop = Happening("stop", 5.0, nodes=tuple(range(N)))
    churn = Script("test", N, tuple(range(N)), (stop,))
    setup = dataclasses.replace(make("dpsgd ring", Pace(20, patience=5.0)), churn=churn)
    with pytest.raises(RunError, match=f"^{N} nodes, 0 among them, were stopped by the churn"):
        emulated(setup, STEADY)


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
    emulator, told = Emulator(with_crashes(setup, {4: 15.5}), network), []
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
    straggler, others = emulator.gone[3], emulator.ending.params.mean(0)
    assert straggler.round == 16 < len(rounds)
    alone = make(case._replace(build=local, graph=lambda n: LONELY), Pace(16), task=task)
    by_itself = simulated(alone)[0].params[3]
    assert (emulator.state(3).x[0] - others).norm() < 0.5 * (by_itself - others).norm()


# No waiting at all.


def held_and_under_way(emulator) -> float:
    """Add up the weight that peers hold, and that they have given and nobody has taken yet."""
    books = {peer: machine.mail._ledger for peer, machine in emulator.peers.items()}
    total = sum(emulator.state(peer).w.item() for peer in books)
    for giver, book in books.items():
        for taker, share in book.given.items():
            taken = books[taker].taken.get(giver)
            total += share.w.item() - (taken.w.item() if taken else 0.0)
    return total


@pytest.mark.parametrize("patience", [0.0, 0.7])
@pytest.mark.parametrize("graph", [ring_graph, exponential_graph])
def test_push_sum_that_does_not_wait_for_all_keeps_all_mass(graph, patience):
    setup = make(Case(push_sum, graph, push(), sgd(0.0)), Pace(40, patience=patience), n=10)
    emulator, _ = emulated(setup, uneven(0))
    assert held_and_under_way(emulator) == pytest.approx(10, abs=1e-9)


def test_push_sum_over_a_network_that_loses_messages_finds_the_mean():
    """Of every ten messages three are lost; without sums of shares the mass would be, too."""
    setup = make(Case(push_sum, exponential_graph, push(), sgd(0.0)), Pace(200, patience=0.0), n=16)
    alike, begin = setup.task.init(torch.tensor([0])), setup.algorithm.init
    # All start alike, which is the mean already: node k starts k further on.
    apart = setup.algorithm._replace(init=lambda x, rows: begin(x + rows.nodes[:, None], rows))
    setup = dataclasses.replace(setup, algorithm=apart)
    emulator, _ = emulated(setup, NetworkModel(latency=0.01, compute=0.1, loss=0.3, seed=2))
    assert (emulator.ending.params - (alike + 7.5)).abs().max() < 1e-9
    assert held_and_under_way(emulator) == pytest.approx(16, abs=1e-9)


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
