"""Local steps while the messages travel: the same numbers in all runtimes, in less time."""

from __future__ import annotations

import math

import pytest
import torch
from runtime_cases import (
    CASES,
    STEPS,
    N,
    emulated,
    flat,
    make,
    one_peer_exponential,
    simulated,
    uneven,
)
from test_emulate import same

from p2pfl.errors import RunError
from p2pfl.learning import Quadratics
from p2pfl.learning.optim import sgd
from p2pfl.peer.plan import Pace
from p2pfl.peer.stopping import plateau, target
from p2pfl.runtime.network import NetworkModel

CARRYING = [name for name, case in CASES.items() if case.build(case.opt).carry]


def test_dpsgd_by_hand():
    setup = make(
        CASES["dpsgd ring"]._replace(opt=sgd(0.05)), Pace(5, overlap=True), steps=STEPS["three"]
    )
    task, nodes, w = setup.task, torch.arange(N), setup.weights(0).to_dense()

    def trained(x, round):
        total = torch.zeros(N).double()
        for step in range(3 * round, 3 * round + 3):
            loss, grads = task.grad(x, nodes, nodes * 0 + step)
            x, total = x - 0.05 * grads, total + loss / 3
        return x, total

    sent, loss = trained(task.init(nodes), 0)
    mixed = sent
    simulator, rounds = simulated(setup)
    for k, rows in enumerate(rounds):
        mixed = w @ sent
        torch.testing.assert_close(torch.tensor([r.train_loss for r in rows]).double(), loss)
        scores = task.evaluate(mixed, nodes).loss
        torch.testing.assert_close(torch.tensor([r.eval_loss for r in rows]).double(), scores)
        ahead, loss = trained(sent, k + 1)
        sent = mixed + (ahead - sent)
    torch.testing.assert_close(simulator.params, mixed, rtol=1e-12, atol=1e-13)
    assert simulator.ending.updates == 5 * 3 * N


@pytest.mark.parametrize("steps", STEPS)
@pytest.mark.parametrize("name", CARRYING)
def test_emulator_agrees_with_simulator(name, steps):
    setup = make(name, Pace(9, evaluate_every=4, overlap=True), steps=STEPS[steps])
    same(simulated(setup), emulated(setup), 9)


@pytest.mark.parametrize("name", CARRYING)
def test_wide_models_and_small_blocks_change_nothing(name, monkeypatch):
    setup = make(name, Pace(4, patience=1e6, overlap=True))
    expected = simulated(setup)[0].ending.params
    monkeypatch.setattr("p2pfl.peer.letters.WIDE", 4)
    monkeypatch.setattr(type(setup.task), "block", 2)
    for runtime in (simulated, emulated):
        params = runtime(setup)[0].ending.params
        torch.testing.assert_close(params, expected, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("name", ["dpsgd directed", "push_sum directed"])
def test_emulator_agrees_on_links_that_change(name):
    setup = make(name, Pace(11, overlap=True), n=8, topology=one_peer_exponential(8))
    same(simulated(setup), emulated(setup), 11)


@pytest.mark.parametrize("patience", [math.inf, 1e6])
@pytest.mark.parametrize(
    "rule",
    [
        target(4.5, "train_loss"),
        target(4.5, "eval_loss"),
        plateau("train_loss", patience=3, min_delta=1e-2),
        plateau("eval_loss", patience=2, min_delta=1e-2, smoothing=0.0),
    ],
    ids=["target train", "target eval", "plateau train", "plateau eval"],
)
@pytest.mark.parametrize("latency", [0.1, 5.0])
def test_all_stop_in_the_same_round_as_in_the_simulator(rule, patience, latency):
    pace = Pace(300, patience=patience, evaluate_every=2, stop=rule, width=3, overlap=True)
    setup = make("dpsgd ring", pace, n=7, steps=STEPS["unequal"])
    one, other = simulated(setup), emulated(setup, uneven(latency=latency))
    assert one[0].ending.reason == "converged"
    assert 3 < len(one[1]) < 300
    same(one, other)


def test_hearing_nobody_is_training_alone():
    setup = make("local", Pace(6, overlap=True))
    expected = simulated(make("local", Pace(6)))[0].params
    assert torch.equal(simulated(setup)[0].params, expected)


@pytest.mark.parametrize(
    ("latency", "overlap", "ends"),
    [
        (0.5, False, [1.5, 3.0, 4.5, 6.0]),
        (0.5, True, [1.5, 2.5, 3.5, 4.5]),  # steps take longer than messages
        (3.0, False, [4.0, 8.0, 12.0, 16.0]),
        (3.0, True, [4.0, 7.0, 10.0, 13.0]),  # and the other way round
    ],
)
def test_a_round_takes_as_long_as_the_slower_of_the_two(latency, overlap, ends):
    network = NetworkModel(latency=latency, compute=1.0)
    _, rounds = emulated(make("dpsgd ring", Pace(4, overlap=overlap)), network)
    assert [{row.virtual_s for row in rows} for rows in rounds] == [{end} for end in ends]


def test_narrow_links_are_hidden_behind_the_steps():
    def duration(overlap):
        setup = make("dpsgd ring", Pace(50, overlap=overlap), steps=STEPS["three"])
        size = simulated(setup)[1][0][0].bytes_sent / 2
        network = NetworkModel(latency=0.0, compute=1.0, bandwidth=size / 2.5)
        return emulated(setup, network)[0].time

    assert duration(False) == pytest.approx(50 * (3.0 + 2.5), rel=0.02)
    assert duration(True) == pytest.approx(50 * 3.0 + 2.5, rel=0.02)


@pytest.mark.parametrize("patience", [math.inf, 50.0])
def test_a_crash_that_is_noticed_ends_the_wait(patience):
    setup = make("dpsgd ring", Pace(20, patience=patience, overlap=True))
    emulator, rounds = emulated(setup, NetworkModel(latency=0.1, compute=1.0), {4: 5.55})
    assert emulator.time == pytest.approx(20 + 0.1)
    assert [len(rows) for rows in rounds] == [6] * 5 + [5] * 15
    assert emulator.missed == 0


def test_a_straggler_costs_one_deadline():
    network = NetworkModel(latency=0.1, compute=1.0, speeds={3: 0.05})
    setup = make("dpsgd ring", Pace(100, patience=2.0, overlap=True))
    emulator, rounds = emulated(setup, network, {3: 125.0})
    assert max(row.virtual_s for row in rounds[-1]) < 100 + 3 * 2.0 + 1.0
    assert emulator.gone[3].round == 6  # its steps take 20 seconds


def test_lost_messages_are_errors_or_missed():
    lossy = NetworkModel(latency=0.1, compute=1.0, loss=0.05, seed=1)
    emulator, rounds = emulated(make("dpsgd ring", Pace(20, patience=2.0, overlap=True)), lossy)
    assert 0 < emulator.missed < 40
    assert len(rounds) == 20
    with pytest.raises(RunError, match="wait for ever"):
        emulated(make("dpsgd ring", Pace(20, overlap=True)), lossy)


def test_out_of_time_ends_with_the_round_that_was_begun():
    network = NetworkModel(compute=1.0, latency=0.1)
    setup = make("dpsgd ring", Pace(100, seconds=5.5, overlap=True))
    emulator, rounds = emulated(setup, network)
    assert emulator.ending.reason == "out of time"
    assert emulator.time == pytest.approx(6.1)
    assert len(rounds) == 6
    assert emulator.updates == 6 * N


def test_steps_ahead_of_a_round_that_is_not_do_not_count():
    rule = target(4.5, "train_loss")
    setup = make("dpsgd ring", Pace(300, stop=rule, width=3, overlap=True))
    slow = NetworkModel(latency=9.0, compute=1.0)  # so that they are done before the end
    emulator, rounds = emulated(setup, slow)
    assert emulator.updates == N * len(rounds)


def test_a_smooth_problem_is_learned_as_well():
    """The mean model is that of D-PSGD whose gradients are taken a mixing earlier."""
    task = Quadratics(N, 5, seed=3)
    case = CASES["dpsgd ring"]._replace(opt=sgd(0.02))
    left = [
        (simulated(make(case, Pace(400, overlap=overlap), task=task))[0].params - task.optimum())
        .mean(0)
        .norm()
        for overlap in (False, True)
    ]
    start = (task.init(torch.arange(N)) - task.optimum()).mean(0).norm()
    assert max(left) < 0.05 * start


def test_the_same_seed_gives_the_same_history_to_the_bit():
    def history():
        setup = make("push_sum directed", Pace(15, patience=3.0, overlap=True))
        emulator, rounds = emulated(setup, uneven(4, loss=0.1))
        rows = [row._replace(wall_s=0.0) for row in flat(rounds)]
        return emulator.ending.params, repr(rows), emulator.time, emulator.missed

    (params, *rest), (again, *rest_again) = history(), history()
    assert torch.equal(params, again)
    assert rest == rest_again
