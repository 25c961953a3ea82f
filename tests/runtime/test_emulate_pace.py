"""The emulator does no more than it must, and what it puts off changes nothing."""

from __future__ import annotations

import dataclasses
import math

import pytest
import torch
from runtime_cases import CASES, STEADY, N, emulated, flat, make, simulated, uneven

from p2pfl.learning import Quadratics
from p2pfl.peer.gossiper import Tempo
from p2pfl.peer.plan import Pace
from p2pfl.peer.stopping import target
from p2pfl.runtime.emulate import Emulator
from p2pfl.runtime.later import Later, postponed
from p2pfl.runtime.measuring import STACKED, TOGETHER, Measuring


class Counting(Quadratics):
    """Counts how often it is asked."""

    calls = 0

    def evaluate(self, params, nodes):
        self.calls += 1
        return super().evaluate(params, nodes)


# What came of these runs is written down, so that a change of what happens is noticed.

IN_STEP = (1.6200902726146342, 2.843386554241621, 0.027656243356055557, 23.180358238854527)
IN_STEP_TIME = 83.54831977721008
WITHOUT_WAITING = (1.9966002463012296, 2.5903131328582805, 0.0682178809858156, 48.16814478060476)
WITHOUT_WAITING_TIME = 75.98119527121068
LIVING = [6, 6, 6, 5, 5, 5, 5, 5, 5]


def told(row) -> tuple[float, ...]:
    return (row.train_loss, row.eval_loss, row.consensus_distance, row.virtual_s)


def test_a_run_in_step_is_what_it_was():
    emulator, rounds = emulated(make("dpsgd ring", Pace(9, evaluate_every=3)), uneven(4))
    assert told(rounds[2][1]) == pytest.approx(IN_STEP, rel=1e-9)
    assert emulator.time == pytest.approx(IN_STEP_TIME, rel=1e-12)


def test_a_run_that_does_not_wait_is_what_it_was():
    setup = make("push_sum directed", Pace(9, patience=0.0, evaluate_every=3))
    emulator, rounds = emulated(setup, uneven(4, loss=0.1), {5: 9.0})
    assert told(rounds[5][3]) == pytest.approx(WITHOUT_WAITING, rel=1e-9)
    assert emulator.time == pytest.approx(WITHOUT_WAITING_TIME, rel=1e-12)
    assert [len(rows) for rows in rounds] == LIVING


# Wide models are mixed row by row.


@pytest.mark.parametrize("name", CASES)
def test_wide_models_are_mixed_as_in_the_simulator(name, monkeypatch):
    setup = make(name, Pace(4))
    expected = simulated(setup)[0].ending.params
    monkeypatch.setattr("p2pfl.peer.letters.WIDE", 4)
    torch.testing.assert_close(emulated(setup)[0].ending.params, expected, rtol=1e-10, atol=1e-12)


def test_who_hears_the_same_holds_the_same_to_the_bit(monkeypatch):
    monkeypatch.setattr("p2pfl.peer.letters.WIDE", 4)
    params = emulated(make("fedavg", Pace(3)))[0].ending.params
    assert all(torch.equal(row, params[0]) for row in params)


def test_a_model_does_not_keep_those_of_others_in_memory():
    setup = make("dpsgd ring", Pace(3, patience=1e6), task=Quadratics(N, 50))
    emulator = Emulator(setup, uneven())
    for _ in emulator.rounds():
        for peer in emulator.peers:
            x = emulator.state(peer).x
            assert x.untyped_storage().nbytes() == 50 * x.element_size()


# Only what is asked for is measured.


def test_distances_are_known_where_models_are_measured():
    _, rounds = emulated(make("dpsgd ring", Pace(8, evaluate_every=3)))
    known = [not math.isnan(row.consensus_distance) for row in flat(rounds)]
    assert known == [k in (2, 5, 7) for k in range(8) for _ in range(N)]
    _, rounds = emulated(make("gossip", Tempo(1.0, 8, 1, 3)))
    assert not any(math.isnan(row.consensus_distance) for row in rounds[7])
    assert all(math.isnan(row.consensus_distance) for row in rounds[6])


def test_a_round_that_some_ended_their_run_with_is_not_compared():
    setup = make("dpsgd ring", Pace(99, patience=0.0, evaluate_every=90, seconds=9.0))
    emulator, rounds = emulated(setup, uneven(1))
    ends = {emulator.peers[peer].round for peer in emulator.peers}
    assert len(ends) > 1  # else nothing is tested
    assert all(math.isnan(row.consensus_distance) for row in rounds[min(ends) - 1])
    assert not any(math.isnan(row.consensus_distance) for row in rounds[-1])


def test_never_is_never():
    setup = make("dpsgd ring", Pace(4, evaluate_every=0), task=Counting(N, 5))
    _, rounds = emulated(setup)
    assert setup.task.calls == 0
    assert all(math.isnan(row.eval_loss + row.consensus_distance) for row in flat(rounds))


def test_only_the_sample_is_evaluated_but_all_are_compared():
    setup = make("dpsgd ring", Pace(4, evaluate_every=2))
    setup = dataclasses.replace(setup, sample=torch.tensor([1, 4]))
    for rounds in (simulated(setup)[1], emulated(setup)[1]):
        found = [row.node for row in rounds[1] if not math.isnan(row.eval_loss)]
        assert found == [1, 4]
        assert not any(math.isnan(row.consensus_distance) for row in rounds[1])


@pytest.mark.parametrize("patience", [0.0, math.inf])
@pytest.mark.parametrize("every", [0, 1, 2])
def test_every_exchange_is_worked_out_once(every, patience):
    setup, done = make("dpsgd ring", Pace(6, patience=patience, evaluate_every=every)), []

    def receive(state, inbox):
        done.append(inbox)
        return before.receive(state, inbox)

    before = setup.algorithm
    setup = dataclasses.replace(setup, algorithm=before._replace(receive=receive))
    emulator, _ = emulated(setup, uneven(4))
    assert len(emulator.ending.params) == N
    assert len(done) == 6 * N


def test_no_more_models_wait_to_be_compared_than_are_measured_together(monkeypatch):
    most, before = [], Measuring.report

    def report(self, *given):
        most.append(len(self._reported))
        return before(self, *given)

    monkeypatch.setattr(Measuring, "report", report)
    n = 3 * TOGETHER
    setup = make("dpsgd ring", Pace(3, patience=0.0), n=n, task=Quadratics(n, 5))
    emulated(dataclasses.replace(setup, sample=torch.tensor([1])), uneven(2))
    assert max(most) == TOGETHER - 1


@pytest.mark.parametrize("network", [STEADY, uneven(2)])
def test_models_are_evaluated_together_where_nothing_waits_for_the_result(network):
    n = 2 * TOGETHER
    setup = make("dpsgd ring", Pace(6, evaluate_every=2), n=n, task=Counting(n, 5))
    _, rounds = emulated(setup, network)
    assert setup.task.calls <= 3 * (n // STACKED + 2)
    measured = [rows for rows in rounds if rows[0].round % 2]
    assert not any(math.isnan(row.eval_loss) for row in flat(measured))
    one_by_one = make("dpsgd ring", Pace(6, evaluate_every=2), n=n, task=Counting(n, 5))
    rule = target(-1.0, "eval_loss")  # never reached, but it might be
    one_by_one = dataclasses.replace(one_by_one, pace=one_by_one.pace._replace(stop=rule, width=n))
    _, again = emulated(one_by_one, network)
    assert one_by_one.task.calls == 3 * n
    for one, other in zip(flat(rounds), flat(again), strict=True):
        assert told(one) == pytest.approx(told(other), rel=1e-12, nan_ok=True)


def test_the_seconds_are_those_of_the_run_and_not_of_its_reader():
    emulator = Emulator(make("dpsgd ring", Pace(6)), uneven())
    spent = 0.0
    for rows in emulator.rounds():
        spent = max(row.wall_s for row in rows)
    seconds = emulator.seconds
    assert min(seconds.training, seconds.exchange, seconds.evaluation) > 0
    total = seconds.training + seconds.exchange + seconds.evaluation
    assert total == pytest.approx(spent, rel=0.2, abs=0.05)


# What is put off.


def test_a_state_is_worked_out_when_it_is_asked_for_and_once():
    calls = []
    case = CASES["dpsgd ring"]
    plain = case.build(case.opt)
    counted = plain._replace(receive=lambda s, inbox: calls.append(1) or plain.receive(s, inbox))
    emulator, _ = emulated(
        make(case._replace(build=lambda opt: counted), Pace(7, evaluate_every=0))
    )
    assert len(calls) == 6 * N  # nobody has asked for the last one
    assert emulator.ending.params.shape == (N, 5)
    assert len(calls) == 7 * N
    _ = emulator.ending
    assert len(calls) == 7 * N


def test_a_state_can_be_looked_at_without_being_kept():
    setup = make("dpsgd ring", Pace(1))
    algorithm = setup.algorithm
    lazy = postponed(algorithm)
    nodes = torch.tensor([2])
    state = lazy.init(setup.task.init(nodes), setup.rows(nodes))
    assert isinstance(state, Later)
    assert torch.equal(lazy.send(state).x, state.params)
    heavier = Later(
        algorithm._replace(receive=lambda s, by: s._replace(x=s.x * by)), state.now(), 2
    )
    assert torch.equal(heavier.worked_out().x, 2 * state.params)
    assert torch.equal(heavier.worked_out().x, 2 * state.params)
    assert heavier.now() is heavier.now() is heavier.worked_out()
