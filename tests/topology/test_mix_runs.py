"""Rules that need the whole graph, and shares of them, in the runtimes."""

from __future__ import annotations

import dataclasses
import sys

import numpy as np
import pytest
import torch

import p2pfl
from p2pfl.algorithms import dpsgd, gradient_tracking, push_diging, push_pull, push_sum
from p2pfl.churn.script import Happening, Script
from p2pfl.errors import UserError
from p2pfl.experiment.experiment import Experiment
from p2pfl.experiment.pairing import suited
from p2pfl.learning import Quadratics
from p2pfl.learning.optim import sgd
from p2pfl.membership.timers import swim
from p2pfl.peer.plan import Pace
from p2pfl.runtime.conserved import mean_drift
from p2pfl.runtime.emulate import Emulator
from p2pfl.runtime.network import NetworkModel
from p2pfl.runtime.setup import Setup
from p2pfl.runtime.simulate import Simulator
from p2pfl.topology import (
    best_constant,
    fastest,
    grid_graph,
    max_degree,
    metropolis,
    one_peer_exponential,
    random_matching,
    ring_graph,
    star_graph,
    static,
    uniform,
    weights,
)
from p2pfl.topology.live import Overlay

torch.set_num_threads(1)
UNEVEN = NetworkModel(latency=0.1, jitter=3.0, compute=1.0, compute_jitter=2.0, seed=1)
NETS = {
    "grid": static(grid_graph(9)),
    "star": static(star_graph(7)),
    "one peer": one_peer_exponential(8),
    "matching": random_matching(7, seed=2),
}


def setup_of(algorithm, topology, rule, rounds=6):
    algorithm = algorithm(sgd(0.05))
    rule = suited(rule, algorithm.needs)
    return Setup(
        algorithm,
        Quadratics(topology.n, 5, noise=0.1, seed=3),
        topology,
        rule,
        Pace(rounds),
        torch.ones_like,
        lambda round: weights(topology.links(round), rule),
    )


def ends(driver):
    list(driver.rounds())
    return driver.ending.params


@pytest.mark.parametrize(
    ("algorithm", "net", "rule"),
    [
        (dpsgd, "star", best_constant()),
        (dpsgd, "grid", fastest()),
        (gradient_tracking, "star", fastest()),
        (dpsgd, "one peer", max_degree()),
        (dpsgd, "matching", best_constant()),
        (dpsgd, "grid", max_degree(lazy=True)),
        (push_sum, "grid", metropolis()),
        (lambda opt: push_sum(opt, weight="examples"), "star", metropolis(lazy=True)),
        (push_sum, "grid", max_degree()),
        (push_sum, "star", fastest(nonnegative=True)),
        (push_sum, "one peer", uniform()),
        (push_sum, "matching", metropolis()),
        (push_diging, "star", metropolis()),
        (push_pull, "grid", metropolis()),
    ],
)
def test_peers_work_out_the_line_that_the_simulator_has(algorithm, net, rule):
    setup = setup_of(algorithm, NETS[net], rule)
    torch.testing.assert_close(
        ends(Emulator(setup, UNEVEN)), ends(Simulator(setup)), rtol=1e-10, atol=1e-12
    )


def test_views_bear_the_weights_of_the_matrix():
    for rule in (fastest(), best_constant(), suited(metropolis(), push_sum(sgd(0.1)).needs)):
        setup = setup_of(dpsgd, NETS["star"], rule)
        matrix = weights(NETS["star"].links(0), rule)
        for node in range(7):
            view = setup.peer(node)._view_of(0, frozenset())
            assert view.taken == {j: float(matrix[node, j]) for j in view.hears_from}
            assert view.given == {j: float(matrix[j, node]) for j in view.sends_to}
    local = setup_of(dpsgd, NETS["star"], metropolis()).peer(0)._view_of(0, frozenset())
    assert local.given is None
    assert local.taken is None


def test_mixing_goes_on_when_peers_are_killed():
    """The others work out the weights of the graph that is left, and the mean is kept."""
    whole = static(ring_graph(8))
    setup = setup_of(dpsgd, whole, best_constant(), rounds=40)
    kills = (
        Happening("kill", seconds=8.5, nodes=(3,)),
        Happening("kill", seconds=14.0, nodes=(6,)),
    )
    setup = dataclasses.replace(
        setup,
        among=Overlay(whole, lambda k: static(ring_graph(k))).among,
        churn=Script("kills", 8, tuple(range(8)), kills),
        membership=swim(),
    )
    emulator = Emulator(setup, NetworkModel(latency=0.05, compute=1.0, seed=1))
    final = ends(emulator)
    small = weights(static(ring_graph(6)).links(0), best_constant())[0, 1]
    view = emulator.peers[0]._view_of(39, frozenset({3, 6}))
    assert view.taken == {1: float(small), 7: float(small)}
    assert len(final) == 6
    assert final.isfinite().all()
    assert mean_drift(emulator.drift.take(), final) * float(final.mean(0).norm()) < 0.05


@pytest.mark.parametrize("rule", [metropolis(), fastest(nonnegative=True)], ids=lambda r: r.name)
def test_no_share_is_lost_with_its_message(rule):
    """What peers hold, and what is on its way between them, is what they began with."""
    setup = setup_of(push_sum, NETS["star"], rule)
    setup = dataclasses.replace(setup, pace=Pace(60, patience=2.0))
    emulator = Emulator(setup, NetworkModel(latency=0.1, compute=1.0, loss=0.3, seed=4))
    ends(emulator)
    assert emulator.missed > 50
    ledgers = {peer: emulator.peers[peer].mail._ledger for peer in range(7)}
    held = sum(float(emulator.state(peer).w) for peer in range(7))
    given = {(i, j): float(sums.w) for i in range(7) for j, sums in ledgers[i].given.items()}
    taken = {(i, j): float(sums.w) for j in range(7) for i, sums in ledgers[j].taken.items()}
    under_way = sum(sums - taken.get(edge, 0.0) for edge, sums in given.items())
    assert under_way > 1e-3
    assert held + under_way == pytest.approx(7, abs=1e-9)


EXAMPLE = {
    "nodes": 8,
    "model": "linear",
    "training": {"dtype": "float64"},
    "algorithm": {"name": "push_sum", "weight": "examples"},
    "topology": "one_peer_exponential",
    "mixing": "metropolis",
    "partition": {"name": "dirichlet", "alpha": 0.5, "min_partition_size": 5},
}


def test_an_experiment_shares_by_any_rule_that_keeps_the_mean():
    experiment = Experiment.from_dict(EXAMPLE)
    task = experiment.task(experiment.federation(), None)
    setup = experiment.setup(task)
    assert setup.mixing.conserves == "mass"
    nodes = torch.arange(8)
    state = setup.fresh(nodes)
    x = torch.from_numpy(np.random.default_rng(0).normal(size=(8, 3)))
    counts = task.examples(nodes).double()
    mixed = torch.cat([counts[:, None] * x, counts[:, None]], 1)
    assert torch.equal(state.w[:, 0].double(), counts)
    for round in range(3):
        mixed = setup.weights(round) @ mixed
    right = (counts @ x / counts.sum()).expand(8, 3)
    torch.testing.assert_close(mixed[:, :3] / mixed[:, 3:], right, rtol=0, atol=1e-12)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"topology": "star", "mixing": "uniform"}, ["columns", "'uniform'", "'star'", "push"]),
        ({"topology": "star", "mixing": "best_constant"}, ["'push_sum'", "negative"]),
        (
            {"algorithm": "gossip", "topology": "star", "mixing": "fastest"},
            ["'gossip'", "negative"],
        ),
        ({"mixing": "best_constant"}, ["mixing.name = 'best_constant'", "both ways"]),
        ({"topology": "ring", "nodes": 65, "mixing": "fastest"}, ["fastest", "64 nodes, not 65"]),
        ({"topology": "base", "mixing": "max_degree"}, ["'base'", "weights of its own"]),
        (
            {"algorithm": "gossip", "topology": "ring", "pace": "timer", "mixing": "max_degree"},
            ["timer", "'max_degree'"],
        ),
        (
            {
                "algorithm": "d2",
                "nodes": 16,
                "topology": "torus",
                "mixing": "max_degree",
                "pace": {"local_steps": 1},
            },
            ["d2", "-0.600"],
        ),
    ],
)
def test_what_does_not_go_together_is_refused(changes, words):
    with pytest.raises(UserError) as caught:
        Experiment.from_dict({**EXAMPLE, **changes})
    for word in words:
        assert word in str(caught.value)


@pytest.mark.parametrize("n", [1, 2])
@pytest.mark.parametrize("rule", ["best_constant", "fastest", "max_degree", "metropolis"])
def test_the_smallest_networks_are_no_exception(n, rule):
    tables = {**EXAMPLE, "topology": "complete", "mixing": rule, "nodes": n}
    assert Experiment.from_dict(tables).nodes == n


def test_without_the_solver_one_line_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "cvxpy", None)
    with pytest.raises(UserError, match=r"^mixing: fastest needs cvxpy: pip install"):
        Experiment.from_dict(
            {**EXAMPLE, "algorithm": "dpsgd", "topology": "ring", "mixing": "fastest"}
        )


@pytest.mark.processes
def test_processes_reach_what_the_simulator_does(tmp_path):
    tables = {
        **EXAMPLE,
        "nodes": 4,
        "topology": "star",
        "pace": {"rounds": 3, "local_steps": 1},
        "evaluation": {"baselines": False},
    }
    for name, more in (("shares", {}), ("solved", {"algorithm": "dpsgd", "mixing": "fastest"})):
        one, other = (
            p2pfl.run({**tables, **more}, on, out=tmp_path / f"{name}-{on}").summary
            for on in ("simulate", "local")
        )
        for key in ("eval_loss_mean", "consensus_distance"):
            assert other[key] == pytest.approx(one[key], rel=1e-10)
