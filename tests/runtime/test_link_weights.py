"""Links with weights of their own are weighed alike by the simulator and by peers."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from runtime_cases import CASES, STEADY, Case, emulated, make, simulated, uneven, with_crashes

from p2pfl.algorithms import dpsgd
from p2pfl.learning import Quadratics
from p2pfl.learning.optim import sgd
from p2pfl.peer.plan import Pace
from p2pfl.topology import (
    base,
    equi_static,
    metropolis,
    od_equi_dyn,
    ou_equi_dyn,
    simple_base,
    u_equi_static,
    weights,
)
from p2pfl.topology.live import Overlay

N = 11
SCHEDULES = {
    "base": lambda n: base(n, 2),
    "simple_base": simple_base,
    "shuffled": lambda n: base(n, 1, shuffle=True, seed=3),
    "equi_static": lambda n: equi_static(n, 3, seed=1),
    "u_equi_static": lambda n: u_equi_static(n, 2, seed=1),
    "od_equi_dyn": lambda n: od_equi_dyn(n, 0.4, seed=1),
    "ou_equi_dyn": lambda n: ou_equi_dyn(n, 0.4, seed=1),
}
LAZY = Case(dpsgd, CASES["dpsgd directed"].graph, metropolis(lazy=True))


def run(name, pace, case):
    case = case._replace(opt=sgd(0.05))
    task, topology = Quadratics(N, 5, noise=0.1, seed=3), SCHEDULES[name](N)
    setup = make(case, pace, n=N, task=task, topology=topology)
    return dataclasses.replace(setup, weights=lambda k: weights(topology.links(k), case.rule))


@pytest.mark.parametrize("name", SCHEDULES)
@pytest.mark.parametrize(
    "case",
    [CASES["dpsgd directed"], CASES["push_sum directed"], LAZY],
    ids=["metropolis", "push", "lazy"],
)
def test_in_step_it_is_the_simulator(name, case):
    setup = run(name, Pace(12), case)
    (one, _), (two, _) = simulated(setup), emulated(setup, uneven())
    torch.testing.assert_close(one.params, two.ending.params, rtol=1e-10, atol=1e-12)


def test_they_are_not_what_degrees_would_say():
    """Else the test above would show nothing."""
    topology = simple_base(N)
    plain = [weights(topology.links(k)._replace(weights=None), metropolis()) for k in range(8)]
    own = [weights(topology.links(k), metropolis()) for k in range(8)]
    assert any(float((a - b).abs().max()) > 0.1 for a, b in zip(plain, own, strict=True))


@pytest.mark.parametrize("rule", ["dpsgd directed", "push_sum directed"])
def test_without_steps_an_exact_mean_after_a_period(rule):
    setup = run("base", Pace(SCHEDULES["base"](N).period, steps=0), CASES[rule])
    setup = dataclasses.replace(setup, task=Spread(), steps=torch.zeros_like)
    for ending in (simulated(setup)[0].params, emulated(setup)[0].ending.params):
        mean = setup.task.init(torch.arange(N)).mean(0).expand(N, -1)
        torch.testing.assert_close(ending, mean, rtol=1e-12, atol=1e-12)


class Spread(Quadratics):
    """Everybody begins elsewhere."""

    def __init__(self):
        super().__init__(N, 5, seed=3)

    def init(self, nodes):
        return nodes[:, None].double() ** 2 + torch.arange(5)


@pytest.mark.parametrize("name", ["base", "shuffled", "od_equi_dyn", "ou_equi_dyn"])
@pytest.mark.parametrize("case", ["dpsgd directed", "push_sum directed"])
@pytest.mark.parametrize("patience", [0.0, 2.0])
def test_out_of_step_everybody_still_takes_averages(name, case, patience, monkeypatch):
    from p2pfl.peer.mail import Mail

    lines = []
    inbox = Mail._inbox

    def watched(self, entries):
        made = inbox(self, entries)
        lines.append((self._me, made.weights[0].tolist()))
        return made

    monkeypatch.setattr(Mail, "_inbox", watched)
    emulated(run(name, Pace(40, patience=patience), CASES[case]), uneven())
    assert len(lines) == 40 * N
    for _, line in lines:
        assert min(line) > -1e-12
        assert case != "dpsgd directed" or sum(line) == pytest.approx(1)


def test_who_is_left_averages_exactly_with_the_weights_of_so_many():
    setup = run("base", Pace(60, steps=0), CASES["dpsgd directed"])
    rule = SCHEDULES["base"]
    setup = dataclasses.replace(
        with_crashes(setup, {4: 3.05}),
        task=Spread(),
        steps=torch.zeros_like,
        among=Overlay(setup.topology, rule).among,
    )
    emulator, _ = emulated(setup, STEADY)
    ending = emulator.ending
    left = ending.params[ending.nodes != 4]
    torch.testing.assert_close(left, left[:1].expand_as(left), rtol=1e-12, atol=1e-12)
