"""Exchanges between local steps that agree as fast as polynomials allow."""

from __future__ import annotations

import dataclasses

import networkx as nx
import pytest
import torch
from algorithm_cases import blocks, exchange, graphs, matrix, setup
from hypothesis import given, settings
from hypothesis import strategies as st

from p2pfl.algorithm import Rows
from p2pfl.algorithms import chebyshev, dpsgd
from p2pfl.errors import UserError
from p2pfl.experiment.experiment import Experiment
from p2pfl.learning import Quadratics
from p2pfl.learning.optim import sgd
from p2pfl.runtime.emulate import Emulator
from p2pfl.runtime.network import NetworkModel
from p2pfl.runtime.simulate import Simulator
from p2pfl.topology import metropolis, ring_graph
from p2pfl.topology.chebyshev import accelerated, bound

RHO = 0.949253  # of sixteen nodes in a ring


@settings(max_examples=25, deadline=None)
@given(data=st.data(), rho=st.floats(0.3, 0.99))
def test_after_every_step_the_polynomials_begin_anew(data, rho):
    graph = data.draw(graphs(8))
    x, rows, grads = data.draw(blocks(len(graph)))
    a, w = chebyshev(sgd(0.1), rho), matrix(graph, lazy=False)
    state, heard = a.init(x, rows), None
    for g, count in zip(grads, (1, 4, 2, 7, 1, 3), strict=True):
        state = a.step(state, g)
        begun, mean = state.x, state.x.mean(0)
        for expected in accelerated(w, begun, rho, count):
            state, heard = exchange(a, state, heard, w, 4)
            torch.testing.assert_close(state.x, expected, rtol=1e-9, atol=1e-9)
        torch.testing.assert_close(state.x.mean(0), mean, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("count", [5, 20, 60])
def test_a_ring_agrees_as_fast_as_is_promised(count):
    x, w = torch.arange(16.0, dtype=torch.float64).unsqueeze(1), matrix(ring_graph(16), lazy=False)
    left = {}
    for name, a in (("plain", dpsgd(sgd(0.1))), ("fast", chebyshev(sgd(0.1), RHO))):
        state, heard = a.init(x, Rows(torch.arange(16), torch.ones(16).long())), None
        for _ in range(count):
            state, heard = exchange(a, state, heard, w, 1)
        left[name] = float((a.model(state) - 7.5).norm() / (x - 7.5).norm())
    assert left["fast"] <= bound(RHO, count) * (1 + 1e-6)
    if count > 5:
        assert left["fast"] < 0.02 * left["plain"]


def test_runtimes_agree_where_some_rounds_have_no_steps():
    a, n = chebyshev(sgd(0.05, momentum=0.5), RHO), 16
    run = setup(a, Quadratics(n, 5, noise=0.1, seed=1), ring_graph(n), metropolis(), 20, 2)
    run = dataclasses.replace(run, pace=run.pace._replace(train_every=5))
    simulator = Simulator(run)
    for _ in simulator.rounds():
        pass
    emulator = Emulator(run, NetworkModel(latency=0.1, compute=1.0))
    for _ in emulator.rounds():
        pass
    torch.testing.assert_close(emulator.ending.params, simulator.params, rtol=1e-10, atol=1e-11)


def test_with_closer_agreement_it_rests_nearer_to_the_optimum():
    task, off = Quadratics(16, 5, seed=2), {}
    for name, a in (("plain", dpsgd(sgd(0.1))), ("fast", chebyshev(sgd(0.1), RHO))):
        run = setup(a, task, ring_graph(16), metropolis(), 1600, 1)
        run = dataclasses.replace(run, pace=run.pace._replace(train_every=8))
        simulator = Simulator(run)
        for _ in simulator.rounds():
            pass
        off[name] = float((simulator.params - task.optimum()).norm(dim=1).mean())
    assert off["fast"] < 0.3 * off["plain"]


BASE = {"nodes": 8, "topology": "ring", "pace": {"train_every": 4, "local_steps": 1}}


@pytest.mark.parametrize(
    ("tables", "words"),
    [
        ({"algorithm": "chebyshev"}, "algorithm.rho is missing"),
        ({"algorithm": "chebyshev:rho=1.0"}, "rho must be above 0 and below 1"),
        ({"algorithm": "chebyshev:rho=0.5"}, "is below that of these weights, 0.804738"),
        ({"algorithm": "chebyshev:rho=0.9", "pace": {}}, "pace.train_every = 1"),
        ({"algorithm": "chebyshev:rho=0.9", "pace": "timer"}, "works in rounds"),
        ({"algorithm": "chebyshev:rho=0.9", "topology": "random_matching"}, "neighbours that stay"),
        (
            {"algorithm": "chebyshev:rho=0.99", "topology": "star", "mixing": "uniform"},
            "needs symmetric weights",
        ),
        ({"algorithm": "chebyshev:rho=0.9", "topology": "exponential"}, "both ways"),
    ],
)
def test_what_may_drive_models_apart_is_refused(tables, words):
    with pytest.raises(UserError, match=words):
        Experiment.from_dict(BASE | tables)


def test_what_the_command_line_tells_of_a_ring_will_do():
    assert Experiment.from_dict(BASE | {"algorithm": "chebyshev:rho=0.804738"}).nodes == 8
    assert nx.is_connected(ring_graph(8))
