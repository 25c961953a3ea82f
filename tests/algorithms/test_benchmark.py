"""Sixteen nodes with unlike quadratic losses: who reaches the optimum, and how far off others stay.

Full gradients, a constant rate. What is exact must reach 1e-8; of what is not, the error is that
of a plain loop in numpy, written from the equations.
"""

from __future__ import annotations

from functools import cache

import networkx as nx
import numpy as np
import pytest
import torch
from algorithm_cases import exchange

from p2pfl.algorithm import Rows
from p2pfl.algorithms import (
    d2,
    diloco,
    dpsgd,
    exact_diffusion,
    extra,
    fedadagrad,
    fedadam,
    fedyogi,
    gradient_tracking,
    kgt,
    push_diging,
    push_pull,
    push_sum,
    qg,
)
from p2pfl.learning import Quadratics
from p2pfl.learning.optim import sgd
from p2pfl.learning.schedules import linear
from p2pfl.topology import Topology, metropolis, push, ring_graph, static, weights

torch.set_num_threads(1)

N, D, ETA, ROUNDS = 16, 10, 0.1, 1500
TASK = Quadratics(N, D, seed=4)
TASK.b *= 3  # unlike data
NODES = torch.arange(N)
BEST = TASK.optimum()
A, B, X = TASK.a.numpy(), TASK.b.numpy(), BEST.numpy()


def digraph() -> nx.DiGraph:
    """Return a ring one way, with a few links across: degrees differ, and in from out."""
    ring = nx.DiGraph((i, (i + 1) % N) for i in range(N))
    ring.add_edges_from([(0, 5), (0, 9), (3, 12), (7, 1), (7, 14), (11, 4)])
    return ring


def mixing(graph, rule):
    topology = graph if isinstance(graph, Topology) else static(graph)
    return [weights(topology.links(k), rule) for k in range(topology.period)]


RING = mixing(ring_graph(N), metropolis())
LAZY = mixing(ring_graph(N), metropolis(lazy=True))
SHARES = mixing(digraph(), push())


def alternating() -> list[torch.Tensor]:
    """Return two perfect matchings in turn, which join all nodes only together."""
    even = nx.Graph((i, i + 1) for i in range(0, N, 2))
    odd = nx.Graph((i, (i + 1) % N) for i in range(1, N, 2))
    return [mixing(graph, metropolis())[0] for graph in (even, odd)]


def one_way() -> list[torch.Tensor]:
    """Return the shares of graphs in which everybody sends to one other, 1, 2, 4 or 8 on."""
    graphs = [nx.DiGraph((i, (i + jump) % N) for i in range(N)) for jump in (1, 2, 4, 8)]
    return [mixing(graph, push())[0] for graph in graphs]


def end(a, each, rounds=ROUNDS, steps=1) -> torch.Tensor:
    state, heard = a.init(TASK.init(NODES), Rows(NODES, torch.ones(N).long())), None
    for k in range(rounds):
        for _ in range(steps):
            state = a.step(state, TASK.grad(a.model(state), NODES, NODES)[1])
        state, heard = exchange(a, state, heard, each[k % len(each)], D)
    return a.model(state)


def error(x) -> float:
    return float(np.linalg.norm(np.asarray(x) - X, axis=1).mean())


EXACT = {
    "gradient_tracking": (gradient_tracking, RING),
    "gradient_tracking changing": (gradient_tracking, alternating()),
    "d2 lazy": (d2, LAZY),
    "extra": (extra, RING),
    "exact_diffusion": (exact_diffusion, RING),
    "kgt": (kgt, RING),
    "kgt changing": (kgt, alternating()),
    "push_diging": (push_diging, SHARES),
    "push_pull": (push_pull, SHARES),
    "push_diging changing": (push_diging, one_way()),
    "push_pull changing": (push_pull, one_way()),
}


@pytest.mark.parametrize("name", EXACT)
def test_exact_methods_reach_the_optimum(name):
    build, each = EXACT[name]
    rate = ETA / 4 if len(each) > 1 else ETA / 2
    assert error(end(build(sgd(rate)), each, 2 * ROUNDS)) <= 1e-8


@pytest.mark.parametrize("name", ["extra", "exact_diffusion", "kgt", "push_diging", "push_pull"])
def test_they_do_so_with_momentum(name):
    build, each = EXACT[name]
    assert error(end(build(sgd(ETA / 8, momentum=0.6)), each, 2 * ROUNDS)) <= 1e-8


@pytest.mark.parametrize("name", ["d2 lazy", "extra", "exact_diffusion", "kgt", "push_diging"])
def test_they_do_so_while_the_rate_changes(name):
    build, each = EXACT[name]
    rate = linear(ETA / 2, steps=1000, final=ETA / 4)
    assert error(end(build(sgd(rate)), each, 2 * ROUNDS)) <= 1e-8


def test_kgt_takes_several_steps_a_round_and_dpsgd_must_not():
    for steps in (5, 10):
        rate = sgd(0.1 / steps)
        assert error(end(kgt(rate, outer_lr=0.8), RING, 2 * ROUNDS, steps)) <= 1e-8
        assert error(end(dpsgd(rate), RING, ROUNDS, steps)) > 0.1


# What is left of those that are not exact.


def gradients(x):
    return np.einsum("nji,nj->ni", A, np.einsum("nij,nj->ni", A, x) - B)


@cache
def dpsgd_by_hand():
    w, x = RING[0].numpy(), np.zeros((N, D))
    for _ in range(ROUNDS):
        x = w @ (x - ETA * gradients(x))
    return error(x)


def combine_first_by_hand():
    w, x = RING[0].numpy(), np.zeros((N, D))
    for _ in range(ROUNDS):
        x = w @ x - ETA * gradients(x)
    return error(x)


def momentum_by_hand():
    w, x, m = RING[0].numpy(), np.zeros((N, D)), np.zeros((N, D))
    for _ in range(ROUNDS):
        m = 0.9 * m + gradients(x)
        x = w @ (x - ETA / 10 * m)
    return error(x)


def qg_by_hand():
    w, x, m = RING[0].numpy(), np.zeros((N, D)), np.zeros((N, D))
    for _ in range(ROUNDS):
        after = w @ (x - ETA / 10 * (0.9 * m + gradients(x)))
        m, x = 0.9 * m + 0.1 * (x - after) / (ETA / 10), after
    return error(x)


def push_sum_by_hand():
    p, x, w = SHARES[0].numpy(), np.zeros((N, D)), np.ones((N, 1))
    for _ in range(ROUNDS):
        x, w = p @ (x - ETA * gradients(x / w)), p @ w
    return error(x / w)


def diloco_by_hand():
    w, slow, trace = RING[0].numpy(), np.zeros((N, D)), np.zeros((N, D))
    for _ in range(ROUNDS):
        x = slow
        for _ in range(4):
            x = x - ETA / 10 * gradients(x)
        change = w @ (x - slow)
        trace = 0.9 * trace + change
        slow = w @ slow + 0.7 * (change + 0.9 * trace)
    return error(slow)


BIASED = {
    "dpsgd": (dpsgd(sgd(ETA)), RING, 1, dpsgd_by_hand),
    "combine first": (dpsgd(sgd(ETA), "combine_then_adapt"), RING, 1, combine_first_by_hand),
    "dpsgd momentum": (dpsgd(sgd(ETA / 10, momentum=0.9)), RING, 1, momentum_by_hand),
    "qg": (qg(sgd(ETA / 10)), RING, 1, qg_by_hand),
    "push_sum": (push_sum(sgd(ETA)), SHARES, 1, push_sum_by_hand),
    "diloco": (diloco(sgd(ETA / 10)), RING, 4, diloco_by_hand),
}


@pytest.mark.parametrize("name", BIASED)
def test_biased_methods_stay_as_far_off_as_their_equations(name):
    a, each, steps, by_hand = BIASED[name]
    expected = by_hand()
    assert expected > 0.05
    assert error(end(a, each, ROUNDS, steps)) == pytest.approx(expected, rel=0.05)


def test_the_ranking():
    """Of equal effective rates, momentum along the network leaves less bias than one's own."""
    assert qg_by_hand() < 0.9 * momentum_by_hand()
    assert momentum_by_hand() == pytest.approx(dpsgd_by_hand(), rel=0.05)
    assert dpsgd_by_hand() < combine_first_by_hand()
    assert error(end(extra(sgd(ETA / 2)), RING)) < 1e-4 * qg_by_hand()


def test_exact_diffusion_takes_what_d2_cannot():
    torus = nx.convert_node_labels_to_integers(nx.grid_2d_graph(4, 4, periodic=True))
    each = mixing(torus, metropolis())  # whose smallest eigenvalue is -0.6
    assert error(end(exact_diffusion(sgd(ETA)), each)) <= 1e-8
    assert not error(end(d2(sgd(ETA)), each, 150)) < 1e3


@pytest.mark.parametrize("build", [fedadagrad, fedadam, fedyogi])
def test_adaptive_outer_steps_find_the_optimum_where_all_hear_all(build):
    x = end(build(sgd(0.02), lr=0.05), mixing(nx.complete_graph(N), metropolis()), 500, 2)
    assert error(x) < 0.02 * error(np.zeros((N, D)))
    assert bool((x == x[0]).all())
