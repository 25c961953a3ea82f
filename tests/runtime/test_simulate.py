from __future__ import annotations

import math

import pytest
import torch
from runtime_cases import CASES, STEPS, N, make, simulated

from p2pfl.errors import RunError, UserError
from p2pfl.learning import Quadratics
from p2pfl.learning.optim import sgd
from p2pfl.peer.gossiper import Tempo
from p2pfl.peer.plan import Pace
from p2pfl.peer.stopping import plateau, target
from p2pfl.runtime import wire


def test_dpsgd_by_hand():
    setup = make(CASES["dpsgd ring"]._replace(opt=sgd(0.05)), Pace(5), steps=STEPS["unequal"])
    task, nodes = setup.task, torch.arange(N)
    x, w, count = task.init(nodes), setup.weights(0).to_dense(), 1 + nodes % 3
    simulator, rounds = simulated(setup)
    for k, rows in enumerate(rounds):
        total = torch.zeros(N).double()
        for i in nodes.tolist():
            for step in range(k * int(count[i]), (k + 1) * int(count[i])):
                one = torch.tensor([i])
                loss, grads = task.grad(x[one], one, torch.tensor([step]))
                x[i] -= 0.05 * grads[0]
                total[i] += loss[0] / count[i]
        x = w @ x
        torch.testing.assert_close(torch.tensor([r.train_loss for r in rows]).double(), total)
        far = (x - x.mean(0)).square().sum(1)
        torch.testing.assert_close(torch.tensor([r.consensus_distance for r in rows]).double(), far)
    torch.testing.assert_close(simulator.params, x, rtol=1e-12, atol=1e-13)
    assert simulator.ending.updates == 5 * int(count.sum())
    assert simulator.ending.reason == "all rounds done"


def test_rows_say_what_was_measured_and_when():
    _, rounds = simulated(make("dpsgd ring", Pace(5, evaluate_every=2)))
    assert [[row.round for row in rows] for rows in rounds] == [[k] * N for k in range(5)]
    assert [[row.node for row in rows] for rows in rounds] == [list(range(N))] * 5
    measured = [not math.isnan(rows[0].eval_loss) for rows in rounds]
    assert measured == [False, True, False, True, True]  # and after the last
    assert all(math.isnan(row.virtual_s) for rows in rounds for row in rows)


@pytest.mark.parametrize(
    ("name", "payload"),
    [
        ("dpsgd ring", 5 * 8),
        ("dpsgd directed", 5 * 8),
        ("fedavg", 5 * 8 + 8),
        ("gradient_tracking", 2 * 5 * 8),
        ("choco top_k", 2 * (8 + 4)),
        ("push_sum directed", 5 * 8 + 8),
        ("local", 5 * 8),
    ],
)
def test_bytes_are_degree_times_payload_and_header(name, payload):
    setup = make(name, Pace(3))
    _, rounds = simulated(setup)
    for k, rows in enumerate(rounds):
        for row in rows:
            sends_to, hears_from = setup.topology.view(row.node, k)
            size = wire.model_size(row.node, k, len(sends_to), payload)
            assert row.bytes_sent == len(sends_to) * size
            assert row.bytes_received == sum(
                wire.model_size(j, k, len(setup.topology.view(j, k)[0]), payload)
                for j in hears_from
            )


def test_the_same_seed_gives_the_same_bits():
    def history():
        simulator, rounds = simulated(make("choco random_k", Pace(6), steps=STEPS["unequal"]))
        return simulator.params, [[row._replace(wall_s=0) for row in rows] for rows in rounds]

    (params, rows), (again, rows_again) = history(), history()
    assert torch.equal(params, again)
    assert repr(rows) == repr(rows_again)


def test_divergence_names_the_node_and_the_round():
    with pytest.raises(RunError, match=r"node \d diverged in round \d+: its training loss"):
        simulated(make(CASES["dpsgd ring"]._replace(opt=sgd(50.0)), Pace(2000)))


def test_a_timer_needs_a_clock():
    with pytest.raises(UserError, match="timer"):
        simulated(make("gossip", Tempo(1.0, 3)))


def test_one_node_alone():
    simulator, rounds = simulated(make("dpsgd complete", Pace(4), n=1))
    assert [len(rows) for rows in rounds] == [1] * 4
    assert rounds[-1][0].bytes_sent == rounds[-1][0].consensus_distance == 0
    task, x = Quadratics(1, 5, noise=0.1, seed=3), torch.zeros(1, 5).double()
    opt, one = CASES["dpsgd complete"].opt, torch.tensor([0])
    state = opt.init(x)
    for step in range(4):
        update, state = opt.update(task.grad(x, one, one + step)[1], state, x)
        x = x + update
    torch.testing.assert_close(simulator.params, x)


def test_a_target_ends_the_run_where_every_node_has_reached_it():
    rule = target(4.5, "train_loss")
    full = simulated(make("dpsgd ring", Pace(200)))[1]
    first = next(k for k, rows in enumerate(full) if max(r.train_loss for r in rows) <= 4.5)
    width = 3
    expected = (
        math.ceil(first / width) * width + width
    )  # said at a window's start, known at its end
    simulator, rounds = simulated(make("dpsgd ring", Pace(200, stop=rule, width=width)))
    assert len(rounds) == expected < 200
    assert simulator.ending.reason == "converged"
    assert not math.isnan(rounds[-1][0].eval_loss)


def test_a_plateau_counts_measurements_without_progress():
    rule = plateau("eval_loss", patience=4, min_delta=1e-3, smoothing=0.0)
    task = Quadratics(N, 5, seed=3)
    full = simulated(make("fedavg", Pace(300, evaluate_every=2), task=task))[1]
    best, since, last = math.inf, 0, 0
    while since < 4:
        last += 2  # the round in which the measurement of the round before is said
        loss = full[last - 1][0].eval_loss
        best, since = (loss, 0) if best - loss > 1e-3 else (best, since + 1)
    simulator, rounds = simulated(make("fedavg", Pace(300, evaluate_every=2, stop=rule), task=task))
    assert simulator.ending.reason == "converged"
    assert rounds[-1][0].round == last > 20
