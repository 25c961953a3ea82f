"""What theory promises of each method, on random graphs and problems."""

from __future__ import annotations

import networkx as nx
import numpy as np
import pytest
import torch
from algorithm_cases import (
    ALL,
    blocks,
    exchange,
    graphs,
    local_train,
    matrix,
    play,
    simulate,
)
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torch import nn

from p2pfl import codec
from p2pfl.algorithm import Rows
from p2pfl.algorithms import (
    average,
    choco,
    d2,
    dpsgd,
    fedavg,
    gradient_tracking,
    proximal,
    push_sum,
)
from p2pfl.data.shards import Shards
from p2pfl.learning import ModelTask, Quadratics, losses
from p2pfl.learning.optim import sgd
from p2pfl.topology import complete_graph, metropolis, push, ring_graph, static, weights

LAWS = settings(max_examples=25, deadline=None)
ETA = 0.07
SYMMETRIC = ["dpsgd", "dpsgd combine first", "d2", "choco top_k", "choco random_k"]
SYMMETRIC += ["exact_diffusion", "extra", "kgt", "gossip mean"]


def close(actual, expected, rtol=1e-11, atol=1e-12):
    torch.testing.assert_close(actual, expected, rtol=rtol, atol=atol)


@st.composite
def digraphs(draw, largest=8):
    """Draw a directed ring and some links on top of it."""
    n = draw(st.integers(2, largest))
    graph = nx.DiGraph((node, (node + 1) % n) for node in range(n))
    ends = st.integers(0, n - 1)
    more = draw(st.lists(st.tuples(ends, ends), max_size=2 * n))
    graph.add_edges_from((a, b) for a, b in more if a != b)
    return graph


@pytest.mark.parametrize("name", SYMMETRIC)
@LAWS
@given(data=st.data())
def test_the_mean_moves_by_the_mean_gradient(name, data):
    """For d2 this telescopes, from whatever gradients."""
    a, graph = ALL[name](sgd(ETA)), data.draw(graphs(16))
    x, rows, grads = data.draw(blocks(len(graph)))
    for t in range(1, len(grads) + 1):
        state = play(a, x, rows, grads[:t], matrix(graph, lazy=False))
        close(a.model(state).mean(0), x.mean(0) - ETA * grads[:t].mean(1).sum(0))


@given(data=st.data())
@LAWS
def test_mixing_keeps_the_sum_and_never_spreads(data):
    graph = data.draw(graphs(24))
    x, rows, _ = data.draw(blocks(len(graph)))
    a, w = average(), matrix(graph, lazy=data.draw(st.booleans()))
    after = exchange(a, a.init(x, rows), None, w, 4)[0].x
    close(after.sum(0), x.sum(0))
    spread, before = (after - after.mean(0)).square().sum(), (x - x.mean(0)).square().sum()
    n = len(x)
    slem = torch.linalg.matrix_norm(w - torch.full((n, n), 1 / n, dtype=w.dtype), 2)
    assert spread <= slem**2 * before + 1e-12
    assert slem <= 1 + 1e-12


@pytest.mark.parametrize("steps", [1, 3])
@LAWS
@given(data=st.data())
def test_tracking_keeps_the_sum_of_the_gradients(steps, data):
    a, graph = gradient_tracking(sgd(ETA, momentum=0.5)), data.draw(graphs(12))
    x, rows, grads = data.draw(blocks(len(graph)))
    for t in range(steps, len(grads) + 1, steps):
        state = play(a, x, rows, grads[:t], matrix(graph), steps)
        close(state.y.sum(0), grads[t - 1].sum(0))
        assert t == steps or len(graph) == 1 or not torch.allclose(state.y, grads[t - 1])


@pytest.mark.parametrize("graph", [complete_graph(4), ring_graph(4)])
def test_push_sum_by_examples_seeks_the_optimum_over_all_examples(graph):
    best = torch.tensor([[0.0], [1.0], [2.0], [10.0]], dtype=torch.float64)
    count = torch.tensor([1, 1, 1, 97])
    a, w = push_sum(sgd(2e-3), weight="examples"), matrix(graph, "mass")
    state, heard = a.init(torch.zeros_like(best), Rows(torch.arange(4), count)), None
    for _ in range(4000):
        state = a.step(state, a.model(state) - best)  # of (x - best)^2 / 2
        state, heard = exchange(a, state, heard, w, 1)
    optimum = (count.double() @ best[:, 0] / count.sum()).item()
    assert optimum == pytest.approx(9.73)
    assert a.model(state).mean().item() == pytest.approx(optimum, abs=0.05)


@pytest.mark.parametrize("weight", ["uniform", "examples"])
@LAWS
@given(data=st.data())
def test_push_sum_keeps_its_mass_and_finds_the_mean(weight, data):
    a, graph = push_sum(sgd(0.0), weight=weight), data.draw(digraphs())
    x, rows, _ = data.draw(blocks(len(graph)))
    w = weights(static(graph).links(0), push())
    counts = rows.examples.double() if weight == "examples" else torch.ones(len(x)).double()
    state = a.init(x, rows)
    for _ in range(400):
        state, _ = exchange(a, state, None, w, 4)
        close(state.w.sum(), counts.sum(), rtol=1e-12)
        close(state.x.sum(0), (counts[:, None] * x).sum(0))
        assert bool((state.w > 0).all())
    mean = torch.from_numpy(np.average(x, axis=0, weights=counts))
    close(a.model(state), mean.expand_as(x), rtol=1e-9, atol=1e-9)


@given(data=st.data())
@LAWS
def test_push_sum_on_a_doubly_stochastic_matrix_is_dpsgd(data):
    n, degree = data.draw(st.sampled_from([(3, 2), (6, 3), (8, 4)]))
    graph = nx.random_regular_graph(degree, n, seed=data.draw(st.integers(0, 99)))
    assume(nx.is_connected(graph))
    x, rows, grads = data.draw(blocks(n))
    one = play(push_sum(sgd(ETA)), x, rows, grads, matrix(graph, "mass"))
    other = play(dpsgd(sgd(ETA)), x, rows, grads, matrix(graph, lazy=False))
    close(one.x, other.x)
    close(one.w, torch.ones_like(one.w))


@given(data=st.data())
@LAWS
def test_fedavg_is_the_mean_by_counts(data):
    n = data.draw(st.integers(1, 9))
    x, rows, grads = data.draw(blocks(n))
    a, w = fedavg(sgd(ETA)), matrix(nx.complete_graph(n))
    ours = a.model(play(a, x, rows, grads[:2], w, steps=2))
    trained = x - ETA * grads[:2].sum(0)
    mean = torch.from_numpy(np.average(trained, axis=0, weights=rows.examples))
    close(ours, mean.expand_as(x), rtol=1e-12)
    assert bool((ours == ours[0]).all())  # the same to the bit, as all add up in one order
    plain = fedavg(sgd(ETA), weight="uniform")
    close(plain.model(play(plain, x, rows, grads[:2], w, steps=2)), trained.mean(0).expand_as(x))


# All-to-all with equal batches and one step is centralised SGD: data, batches, gradients,
# the order of everything and the average are right, or this fails.


def digits(n: int, each: int) -> tuple[Shards, torch.Tensor, torch.Tensor]:
    from sklearn.datasets import load_digits

    x, y = load_digits(return_X_y=True)
    x, y = torch.from_numpy(x[: n * each]) / 16, torch.from_numpy(y[: n * each]).long()
    count = torch.full((n,), each)
    return Shards(x, y, torch.arange(n), count.cumsum(0) - count, count), x, y


@pytest.mark.parametrize("batch", [8, "full"])
@pytest.mark.parametrize("name", ["fedavg", "fedavg uniform", "dpsgd", "push_sum examples"])
def test_all_to_all_is_centralised_sgd(name, batch):
    n, rounds = 5, 7
    shards, _, _ = digits(n, 24)
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 12), nn.Tanh(), nn.Linear(12, 10)).double()
    task = ModelTask(
        model, losses.cross_entropy(), shards, batch_size=batch, seed=5, dtype=torch.float64
    )
    rule = push() if "push" in name else metropolis()
    done = simulate(ALL[name](sgd(0.5)), task, complete_graph(n), rule, rounds)
    nodes = torch.arange(n)
    torch_sgd = torch.optim.SGD(model.parameters(), lr=0.5)
    for step in range(rounds):
        x, y = task.batch(nodes, nodes * 0 + step)
        torch_sgd.zero_grad()
        nn.functional.cross_entropy(model(x.flatten(0, 1)), y.flatten()).backward()
        torch_sgd.step()
    central = task.spec.flatten(model).detach()
    close(done.params, central.expand_as(done.params), rtol=1e-9, atol=1e-12)


def test_fedavg_of_unequal_nodes_with_full_batches_is_centralised_sgd():
    _, x, y = digits(1, 60)
    count = torch.tensor([5, 40, 15])
    shards = Shards(x, y, torch.arange(3), count.cumsum(0) - count, count)
    torch.manual_seed(1)
    model = nn.Linear(64, 10).double()
    task = ModelTask(model, losses.cross_entropy(), shards, batch_size="full", dtype=torch.float64)
    done = simulate(fedavg(sgd(0.3)), task, complete_graph(3), metropolis(), 6)
    optimiser = torch.optim.SGD(model.parameters(), lr=0.3)
    for _ in range(6):
        optimiser.zero_grad()
        nn.functional.cross_entropy(model(x), y).backward()
        optimiser.step()
    central = task.spec.flatten(model).detach()
    close(done.params, central.expand_as(done.params), rtol=1e-9, atol=1e-12)


# Compression.


def gossiped(gamma: float, rounds: int, kept) -> tuple[float, float]:
    """CHOCO without gradients on a ring of 16: the error left, and how far the mean moved."""
    x = torch.randn(16, 100, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    a, w = choco(sgd(0.0), kept, gamma), matrix(ring_graph(16), lazy=False)
    state, heard = a.init(x, Rows(torch.arange(16), torch.ones(16).long())), None
    for _ in range(rounds):
        state, heard = exchange(a, state, heard, w, 100)
    drift = (state.x.mean(0) - x.mean(0)).abs().max()
    return float((state.x - x.mean(0)).norm() / (x - x.mean(0)).norm()), float(drift)


@pytest.mark.parametrize(
    ("kept", "gamma"),
    [(codec.top_k(share=0.1), 0.2), (codec.random_k(share=0.4), 0.3), (codec.identity(), 1.0)],
)
def test_choco_reaches_the_mean(kept, gamma):
    error, drift = gossiped(gamma, 3000, kept)
    assert error <= 1e-9
    assert drift <= 1e-12


def test_choco_diverges_when_gamma_is_too_large():
    error, _ = gossiped(1.0, 600, codec.top_k(share=0.1))
    assert not error < 1e3


# Bias.

TASK = Quadratics(8, 6, seed=2)


def far(algorithm, graph, rule, rounds: int, steps: int = 1) -> float:
    done = simulate(algorithm, TASK, graph, rule, rounds, steps)
    return float((done.params - TASK.optimum()).abs().max())


def test_corrected_methods_reach_the_optimum_and_dpsgd_does_not():
    ring = ring_graph(8)
    assert far(gradient_tracking(sgd(0.1)), ring, metropolis(), 2500) < 1e-10
    assert far(d2(sgd(0.1)), ring, metropolis(lazy=True), 2500) < 1e-10
    assert far(dpsgd(sgd(0.1)), ring, metropolis(), 2500) > 1e-2
    assert far(choco(sgd(0.1), codec.top_k(2), 0.2), ring, metropolis(), 2500) > 1e-2


def test_mixing_first_has_the_larger_bias():
    full = complete_graph(8)
    assert far(dpsgd(sgd(0.1)), full, metropolis(), 800) < 1e-10
    assert far(dpsgd(sgd(0.1), order="combine_then_adapt"), full, metropolis(), 800) > 1e-2


def test_d2_needs_eigenvalues_above_minus_a_third():
    torus = nx.convert_node_labels_to_integers(nx.grid_2d_graph(4, 4, periodic=True))
    task = Quadratics(16, 3, seed=1)
    lazy = simulate(d2(sgd(0.1)), task, torus, metropolis(lazy=True), 400)
    assert float(lazy.params.abs().max()) < 10
    bare = simulate(d2(sgd(0.1)), task, torus, metropolis(), 120)
    assert not float(bare.params.abs().max()) < 1e3


# FedProx.


def test_proximal_changes_nothing_in_one_step_and_pulls_in_several():
    graph, rule = ring_graph(8), metropolis()
    plain = simulate(dpsgd(sgd(0.05)), TASK, graph, rule, 20)
    pulled = simulate(proximal(dpsgd(sgd(0.05)), 0.7), TASK, graph, rule, 20)
    assert torch.equal(plain.params, pulled.params)
    nodes, mu, eta = torch.arange(8), 0.7, 0.05
    x = anchor = TASK.init(nodes) + 1
    for step in range(4):
        x = x - eta * (TASK.grad(x, nodes, nodes * 0 + step)[1] + mu * (x - anchor))
    a = proximal(dpsgd(sgd(eta)), mu)
    close(a.model(local_train(a, TASK, anchor, nodes, 4)), x)


def test_the_anchor_of_proximal_is_the_model_after_mixing():
    a = proximal(dpsgd(sgd(ETA)), mu=0.9)
    draw = torch.Generator().manual_seed(2)
    x = torch.randn(4, 3, dtype=torch.float64, generator=draw)
    grads = torch.randn(6, 4, 3, dtype=torch.float64, generator=draw)
    w = matrix(ring_graph(4), lazy=False)
    state = play(a, x, Rows(torch.arange(4), torch.ones(4).long()), grads, w, steps=3)
    for g in grads.split(3):
        anchor = x
        for step in g:
            x = x - ETA * (step + 0.9 * (x - anchor))
        x = w @ x
    close(a.model(state), x)
    close(state.anchor, x)
