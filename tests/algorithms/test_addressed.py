"""Messages that differ from neighbour to neighbour: who is given what, and what comes of it."""

from __future__ import annotations

import networkx as nx
import pytest
import torch
from algorithm_cases import blocks, exchange, graphs, inbox, matrix, play, simulate, told
from hypothesis import given, settings
from hypothesis import strategies as st

from p2pfl.algorithm import Rows
from p2pfl.algorithms import divshare, dpsgd, powergossip, relay
from p2pfl.algorithms.lowrank import orthonormal
from p2pfl.learning import Quadratics
from p2pfl.learning.optim import sgd
from p2pfl.learning.spec import Spec
from p2pfl.peer.addressed import spread, variant
from p2pfl.topology import (
    binary_tree_graph,
    chain_graph,
    el_local,
    metropolis,
    ring_graph,
    star_graph,
    static,
    uniform,
    weights,
)

LAWS = settings(max_examples=25, deadline=None)
N, D = 16, 10


def close(actual, expected):
    torch.testing.assert_close(actual, expected, rtol=1e-11, atol=1e-12)


def among(n: int, w: torch.Tensor) -> Rows:
    return told(Rows(torch.arange(n), torch.ones(n).long()), w)


# Who is given what.


@pytest.mark.parametrize("n", [5, 80])  # dense weights, and sparse ones
@pytest.mark.parametrize("variants", [1, 2, 3, 7])
def test_the_neighbours_of_a_node_are_given_its_variants_in_turn(n, variants):
    topology = el_local(n, s=3, seed=1)
    links = topology.links(4)
    w = weights(links, uniform())
    wide = spread(w, links, variants).to_dense().view(n, n, variants)
    assert torch.equal(wide.sum(2), w.to_dense())
    for sender in range(n):
        to, _ = topology.view(sender, 4)
        for place, receiver in enumerate(to):
            assert wide[receiver, sender].nonzero().tolist() == [[place % variants]]
        assert wide[sender, sender].nonzero().tolist() == [[0]]


# RelaySGD.

TREES = {"chain": (chain_graph(16), 15), "star": (star_graph(16), 2)}
TREES["binary tree"] = (binary_tree_graph(15), 6)


@pytest.mark.parametrize("name", TREES)
def test_every_model_counts_once_as_old_as_it_is_far_away(name):
    graph, diameter = TREES[name]
    n, w = len(graph), matrix(graph)
    a = relay(sgd(0.1), n)
    x = torch.randn(n, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    state, said = a.init(x, among(n, w)), []
    away = torch.tensor(nx.floyd_warshall_numpy(graph)).long()
    for k in range(diameter + 3):
        state = a.step(state, torch.randn(n, 3, dtype=torch.float64))
        said.append(a.model(state))
        state, _ = exchange(a, state, None, w, 3)
        total = 1 + state.counts.sum((1, 2))
        assert bool((total == n).all()) == (k + 1 >= diameter)
    for i in range(n):
        close(a.model(state)[i], sum(said[-max(1, int(away[i, j]))][j] for j in range(n)) / n)


def quadratics():
    task = Quadratics(N, D, seed=4)
    task.b *= 3  # unlike data
    return task


def error(task, x) -> float:
    return float((x - task.optimum()).norm(dim=1).mean())


@pytest.mark.parametrize("graph", [chain_graph(N), binary_tree_graph(N), star_graph(N)])
def test_relay_reaches_the_optimum_and_dpsgd_does_not(graph):
    task = quadratics()
    ours = simulate(relay(sgd(0.1), N), task, graph, metropolis(), 1500)
    assert error(task, ours.params) <= 1e-9
    plain = simulate(dpsgd(sgd(0.1)), task, graph, metropolis(), 1500)
    assert error(task, plain.params) > 1


def test_what_is_lost_makes_a_smaller_count_and_no_wrong_mean():
    """Models that agree stay as they are, whatever is lost, and counts tell what is."""
    n, graph = 8, chain_graph(8)
    w, x = matrix(graph), torch.full((8, 2), 3.0, dtype=torch.float64)
    a, draw = relay(sgd(0.0), n), torch.Generator().manual_seed(2)
    state, least = a.init(x, among(n, w)), []
    for _ in range(60):
        lost = (torch.rand(n, n, generator=draw) < 0.2) & ~torch.eye(n, dtype=torch.bool)
        known = inbox(a, state, None, w, 2)
        left = known.weights.view(n, n, -1).masked_fill(lost.unsqueeze(2), 0).flatten(1)
        state = a.receive(state, type(known)(left, known.heard, known.own))
        least.append(float(1 + state.counts.sum((1, 2)).min()))
        assert bool((1 + state.counts.sum((1, 2)) <= n).all())
        close(a.model(state), x)
    assert min(least[20:]) < n


def test_relay_must_be_told_who_the_neighbours_are():
    with pytest.raises(ValueError, match="neighbours"):
        relay(sgd(0.1), 4).init(torch.zeros(1, 3), Rows(torch.arange(1), torch.ones(1).long()))


# Fragments.


@given(data=st.data())
@LAWS
def test_the_fragments_of_a_model_are_all_of_it_once(data):
    d, parts = data.draw(st.integers(1, 40)), data.draw(st.integers(1, 9))
    seed, ids = data.draw(st.integers(0, 2**40)), torch.tensor([3, 8])
    a = divshare(sgd(0.1), parts, seed)
    model = torch.arange(1.0, 2 * d + 1, dtype=torch.float64).view(2, d)
    message = a.send(a.init(model, Rows(ids, ids)))
    assert message.values.shape == (2, parts, -(-d // parts))
    for row in range(2):
        told_of = message.values[row].flatten()
        assert told_of[told_of > 0].sort().values.tolist() == model[row].tolist()


@given(data=st.data())
@LAWS
def test_a_parameter_is_averaged_over_those_who_said_something_of_it(data):
    graph = data.draw(graphs(8))
    x, rows, _ = data.draw(blocks(len(graph), 11))
    a, w = divshare(sgd(0.1), 3), matrix(graph)
    state = a.init(x, rows)
    after = a.model(exchange(a, state, None, w, 11)[0])
    total, count = x.clone(), torch.ones_like(x)
    for sender in graph:
        for place, receiver in enumerate(sorted(graph[sender])):
            values = variant(a.send(state), place).values[sender]
            told_of = torch.isin(x[sender], values)
            total[receiver] += torch.where(told_of, x[sender], 0.0)
            count[receiver] += told_of
    close(after, total / count)


@given(data=st.data())
@LAWS
def test_one_fragment_is_dpsgd_with_uniform_weights(data):
    graph = data.draw(graphs(8))
    x, rows, grads = data.draw(blocks(len(graph)))
    w = weights(static(graph).links(0), uniform())
    opt = sgd(0.1, momentum=0.9)
    close(
        play(divshare(opt, fragments=1), x, rows, grads, w, 2).x,
        play(dpsgd(opt), x, rows, grads, w, 2).x,
    )


def test_a_neighbour_is_told_other_parameters_in_every_round():
    a, one = divshare(sgd(0.0), 4), Rows(torch.arange(2), torch.arange(2))
    x = torch.arange(1.0, 81.0).view(2, 40)
    state, seen = a.init(x, one), set()
    for _ in range(12):
        told_of = variant(a.send(state), 0).values[0].tolist()
        assert len(told_of) == 10
        seen.update(told_of)
        state = a.receive(state, inbox(a, state, None, torch.eye(2), 40))
    assert len(seen) > 30


# PowerGossip.


def spec_of(*shapes: tuple[int, ...]) -> Spec:
    return Spec(tuple(f"w{i}" for i in range(len(shapes))), shapes, ("float64",) * len(shapes))


def gossiped(spec: Spec, rank: int, rounds: int) -> tuple[float, float]:
    """Return the relative consensus error on a ring of 16, and how far the mean has moved."""
    draw = torch.Generator().manual_seed(0)
    x = torch.randn(16, spec.size, dtype=torch.float64, generator=draw)
    a, w = powergossip(sgd(0.0), spec, rank), matrix(ring_graph(16), lazy=False)
    state, mean = a.init(x, among(16, w)), x.mean(0)
    for _ in range(rounds):
        state, _ = exchange(a, state, None, w, spec.size)
    drift = float((state.x.mean(0) - mean).abs().max())
    return float((state.x - mean).norm() / (x - mean).norm()), drift


@pytest.mark.parametrize(
    ("rounds", "expected"),
    [
        (100, 0.243),
        (500, 0.0387),
        pytest.param(1000, 5.0e-3, marks=pytest.mark.slow),
        pytest.param(2000, 9.1e-5, marks=pytest.mark.slow),
        pytest.param(4000, 3.0e-8, marks=pytest.mark.slow),
    ],
)
def test_powergossip_agrees_as_fast_as_was_worked_out_by_hand(rounds, expected):
    error, drift = gossiped(spec_of((20, 12)), 1, rounds)
    assert expected / 2 < error < 2 * expected
    assert drift <= 1e-13


def test_more_directions_agree_faster():
    by_rank = [gossiped(spec_of((20, 12), (7,)), rank, 60)[0] for rank in (1, 4, 12)]
    assert by_rank == sorted(by_rank, reverse=True)
    assert by_rank[2] < 0.1 < by_rank[0]


def test_vectors_and_small_matrices_are_mixed_as_by_dpsgd():
    spec, n = spec_of((2, 9), (5,), (6, 1)), 6
    draw = torch.Generator().manual_seed(5)
    x = torch.randn(n, spec.size, dtype=torch.float64, generator=draw)
    grads = torch.randn(6, n, spec.size, dtype=torch.float64, generator=draw)
    rows, w = Rows(torch.arange(n), torch.ones(n).long()), matrix(binary_tree_graph(n))
    ours = play(powergossip(sgd(0.1), spec, rank=2), x, rows, grads, w)
    close(ours.x, play(dpsgd(sgd(0.1)), x, rows, grads, w).x)


def test_one_gap_of_one_direction_is_closed_in_two_rounds():
    """The first basis is drawn; the second is where the two differ."""
    draw = torch.Generator().manual_seed(3)
    left, right = torch.randn(2, 7, 1, dtype=torch.float64, generator=draw)
    x = torch.stack([(left @ right[:5].T).flatten(), torch.zeros(35)])
    a, w = powergossip(sgd(0.0), spec_of((7, 5))), torch.full((2, 2), 0.5, dtype=torch.float64)
    state = a.init(x, among(2, w))
    for _ in range(2):
        assert not torch.allclose(state.x[0], state.x[1])
        state, _ = exchange(a, state, None, w, 35)
    close(state.x, x.mean(0).expand(2, -1))


@pytest.mark.parametrize("rank", [1, 2, 3])
def test_messages_are_as_long_as_the_longer_turn(rank):
    spec = spec_of((32, 64), (32,), (10, 32), (10,), (8, 3, 3, 3), (1, 9))
    a = powergossip(sgd(0.1), spec, rank)
    x, w = torch.zeros(3, spec.size, dtype=torch.float64), torch.ones(3, 3)
    state = a.init(x, among(3, w))
    turns = (64 + 10 + 8, 32 + 32 + 27)  # which side begins makes them near each other
    for _ in range(3):
        message = a.send(state)
        assert message.values.shape == (3, 2, rank * max(turns) + 32 + 10 + 9)
        state, _ = exchange(a, state, None, w / 3, spec.size)


def test_powergossip_takes_no_model_of_another_size():
    with pytest.raises(ValueError, match="6 parameters"):
        powergossip(sgd(0.1), spec_of((2, 2))).init(torch.zeros(1, 6), among(1, torch.ones(1, 1)))


@given(data=st.data())
@LAWS
def test_bases_are_orthonormal_whatever_is_left(data):
    a, r = data.draw(st.sampled_from([(3, 1), (3, 2), (6, 4)]))
    draw = torch.Generator().manual_seed(data.draw(st.integers(0, 999)))
    block, drawn = torch.randn(2, 2, a, r, dtype=torch.float64, generator=draw)
    if data.draw(st.booleans()):
        block[..., -1] = block[..., 0] * data.draw(st.sampled_from([0.0, 1.0, -3.0]))
    scale = data.draw(st.sampled_from([0.0, 1e-200, 1.0, 1e100]))
    made = orthonormal(block * scale, drawn)
    close(made.mT @ made, torch.eye(r, dtype=torch.float64).expand(2, r, r))
