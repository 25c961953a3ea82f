"""Which methods are others in special cases, what they keep, and where they rest."""

from __future__ import annotations

import math

import networkx as nx
import pytest
import torch
from algorithm_cases import PLAIN, blocks, exchange, graphs, matrix, play
from hypothesis import given, settings
from hypothesis import strategies as st
from test_invariants import digraphs

from p2pfl.algorithm import Inbox, Rows
from p2pfl.algorithms import (
    d2,
    diloco,
    dpsgd,
    exact_diffusion,
    extra,
    fedadagrad,
    fedadam,
    fedavgm,
    fedyogi,
    gradient_tracking,
    kgt,
    noloco,
    push_diging,
    push_pull,
    qg,
)
from p2pfl.learning.optim import adam, sgd
from p2pfl.learning.schedules import exponential
from p2pfl.learning.tree import take
from p2pfl.topology import (
    complete_graph,
    exponential_graph,
    metropolis,
    push,
    random_matching,
    static,
    weights,
)

LAWS = settings(max_examples=15, deadline=None)
ETA = 0.07
MOMENTUM = sgd(ETA, momentum=0.8, nesterov=True, weight_decay=0.1)


def close(actual, expected, rtol=1e-10, atol=1e-12):
    torch.testing.assert_close(actual, expected, rtol=rtol, atol=atol)


SAME = {
    "exact diffusion is d2 with lazy weights": (exact_diffusion, d2, 1, MOMENTUM, True),
    "kgt with one step is gradient tracking": (kgt, gradient_tracking, 1, sgd(ETA), False),
    "fedavgm may do nothing": (lambda o: fedavgm(o, 1.0, 0.0), dpsgd, 3, adam(), False),
    "diloco may do nothing": (lambda o: diloco(o, 1.0, 0.0), dpsgd, 2, MOMENTUM, False),
    "noloco may do nothing": (lambda o: noloco(o, 1.0, 0.0, 1.0), dpsgd, 2, MOMENTUM, False),
    "noloco without a momentum is diloco without": (
        lambda o: noloco(o, 0.4, 0.0, 1.0),
        lambda o: diloco(o, 0.4, 0.0),
        3,
        MOMENTUM,
        False,
    ),
    "qg may do nothing": (lambda o: qg(o, beta=0.0), dpsgd, 3, MOMENTUM, False),
}


@pytest.mark.parametrize("case", SAME)
@LAWS
@given(data=st.data())
def test_special_cases(case, data):
    one, other, steps, opt, lazy = SAME[case]
    graph = data.draw(graphs(8))
    x, rows, grads = data.draw(blocks(len(graph)))
    a, b = one(opt), other(opt)
    mine = a.model(play(a, x, rows, grads, matrix(graph, lazy=False), steps))
    close(mine, b.model(play(b, x, rows, grads, matrix(graph, lazy=lazy), steps)))


@pytest.mark.parametrize("build", [push_diging, push_pull])
@LAWS
@given(data=st.data())
def test_directed_tracking_on_equal_degrees_is_gradient_tracking(build, data):
    graph = exponential_graph(data.draw(st.sampled_from([2, 4, 8])))
    x, rows, grads = data.draw(blocks(len(graph)))
    w = weights(static(graph).links(0), push())
    a, b = build(MOMENTUM), gradient_tracking(MOMENTUM)
    close(a.model(play(a, x, rows, grads, w)), b.model(play(b, x, rows, grads, w)))


@pytest.mark.parametrize("steps", [1, 2, 3])
@LAWS
@given(data=st.data())
def test_kgt_of_all_with_all_is_scaffold(steps, data):
    """With everybody taking part and control variates from the steps just taken (option II)."""
    n = data.draw(st.integers(1, 6))
    x, rows, grads = data.draw(blocks(n))
    x = x[:1].expand_as(x).contiguous()
    got = play(
        kgt(sgd(ETA), outer_lr=0.7), x, rows, grads, matrix(complete_graph(n), lazy=False), steps
    )
    mine, mean = torch.zeros_like(x), torch.zeros_like(x)
    for batch in grads.split(steps):
        y = x
        for g in batch:
            y = y - ETA * (g - mine + mean)
        mine = mine - mean + (x - y) / (steps * ETA)
        mean = mine.mean(0, keepdim=True)
        x = x + 0.7 * (y - x).mean(0, keepdim=True)
    close(got.x, x)


@given(data=st.data())
@LAWS
def test_outer_sgd_after_one_step_of_sgd_is_sgd_at_both_rates(data):
    n = data.draw(st.integers(1, 6))
    x, rows, grads = data.draw(blocks(n))
    x, w = x[:1].expand_as(x).contiguous(), matrix(complete_graph(n), lazy=False)
    outer = play(fedavgm(sgd(0.2), lr=0.3, momentum=0.0), x, rows, grads, w)
    close(outer.x, play(dpsgd(sgd(0.06)), x, rows, grads, w).x)


@pytest.mark.parametrize("gamma", [0.0, 0.7, 1.5])
@LAWS
@given(data=st.data())
def test_noloco_of_all_with_all_is_momentum_on_what_they_changed(gamma, data):
    """Then nobody is drawn anywhere; of diloco it differs by Nesterov's look ahead alone."""
    n = data.draw(st.integers(1, 6))
    x, rows, grads = data.draw(blocks(n))
    x, w = x[:1].expand_as(x).contiguous(), matrix(complete_graph(n), lazy=False)
    one = play(noloco(MOMENTUM, 0.7, 0.9, gamma), x, rows, grads, w, 2)
    close(one.x, play(fedavgm(MOMENTUM, 0.7, 0.9), x, rows, grads, w, 2).x)
    first = play(noloco(MOMENTUM, 0.7, 0.0, gamma), x, rows, grads, w, 2)
    close(first.x, play(diloco(MOMENTUM, 0.7, 0.0), x, rows, grads, w, 2).x)


@pytest.mark.parametrize("gamma", [0.0, 0.9])
@LAWS
@given(data=st.data())
def test_what_draws_models_together_does_not_move_their_mean(gamma, data):
    graph = data.draw(graphs(8))
    x, rows, grads = data.draw(blocks(len(graph)))
    a, w = noloco(sgd(ETA), 0.6, 0.5, gamma), matrix(graph, lazy=False)
    mean, velocity = x.mean(0), torch.zeros(x.shape[1], dtype=x.dtype)
    for g in grads:
        velocity = 0.5 * velocity - 0.6 * ETA * g.mean(0)
        mean = mean + velocity
    close(play(a, x, rows, grads, w).x.mean(0), mean)


def test_pairs_come_together_by_gamma_alone():
    x, rows = torch.randn(8, 3, dtype=torch.float64), Rows(torch.arange(8), torch.ones(8).long())
    for gamma, together in ((0.0, False), (0.7, True)):
        a, topology = noloco(sgd(ETA), 0.7, 0.5, gamma), random_matching(8, seed=2)
        state = a.init(x, rows)
        for k in range(200):
            w = weights(topology.links(k), metropolis()).double()
            state, _ = exchange(a, a.step(state, torch.zeros_like(x)), None, w, 3)
        close(state.x.mean(0), x.mean(0))
        assert (float((state.x - x.mean(0)).abs().max()) < 1e-6) is together


# What is kept.


@pytest.mark.parametrize("build", [push_diging, push_pull])
@pytest.mark.parametrize("steps", [1, 3])
@LAWS
@given(data=st.data())
def test_shares_keep_the_sum_of_the_gradients(build, steps, data):
    a, graph = build(MOMENTUM), data.draw(digraphs())
    x, rows, grads = data.draw(blocks(len(graph)))
    w = weights(static(graph).links(0), push())
    for t in range(steps, len(grads) + 1, steps):
        state = play(a, x, rows, grads[:t], w, steps)
        close(state.y.sum(0), grads[t - 1].sum(0))
    if build is push_diging:
        close(state.w.sum(), torch.tensor(len(x), dtype=torch.float64))


@pytest.mark.parametrize("steps", [1, 2, 3])
@LAWS
@given(data=st.data())
def test_corrections_sum_to_zero(steps, data):
    """Also where some take more steps than others, and with a momentum."""
    a, graph = kgt(MOMENTUM), data.draw(graphs(8))
    x, rows, grads = data.draw(blocks(len(graph)))
    w, state, heard = matrix(graph, lazy=False), a.init(x, rows), None
    lazy = torch.tensor(data.draw(st.lists(st.booleans(), min_size=len(x), max_size=len(x))))
    for i, g in enumerate(grads):
        stepped = a.step(state, g)
        if i % steps:  # some rest in all but the first step of a round
            some = lazy.unsqueeze(1)
            stepped = stepped._replace(
                x=torch.where(some, state.x, stepped.x),
                steps=torch.where(some, state.steps, stepped.steps),
            )
        state = stepped
        if (i + 1) % steps == 0:
            state, heard = exchange(a, state, heard, w, 4)
            close(state.correction.sum(0), torch.zeros(4, dtype=torch.float64), atol=1e-11)
    assert len(graph) == 1 or float(state.correction.abs().max()) > 1e-3


@given(data=st.data())
@LAWS
def test_push_pull_pulls_the_plain_mean_of_who_was_heard(data):
    graph = data.draw(digraphs())
    x, rows, _ = data.draw(blocks(len(graph)))
    a, w = push_pull(sgd(0.0)), weights(static(graph).links(0), push())
    state = a.step(a.init(x, rows), torch.zeros_like(x))
    after = exchange(a, state, None, w, 4)[0].x
    for i in range(len(x)):
        close(after[i], x[[i, *(j for j in graph.predecessors(i))]].mean(0))


@given(data=st.data())
@LAWS
def test_push_pull_sees_through_shares(data):
    """Peers hear shares, of which they make the models that were shared out."""
    graph = data.draw(digraphs())
    x, rows, grads = data.draw(blocks(len(graph)))
    a, w = push_pull(MOMENTUM), weights(static(graph).links(0), push())
    state = a.step(a.init(x, rows), grads[0])
    expected, said = exchange(a, state, None, w, 4)[0], a.send(state)
    for i in range(len(x)):
        senders = w[i].nonzero().flatten()
        own = (senders == i).nonzero().flatten()
        share = torch.where(senders == i, 1.0, w[i, senders]).unsqueeze(1)
        heard = type(said)(*(field[senders] * share for field in said))
        line = torch.where(senders == i, w[i, senders], 1.0).unsqueeze(0)
        one = a.receive(take(state, torch.tensor([i])), Inbox(line, heard, own))
        close(one.x[0], expected.x[i])
        close(one.y[0], expected.y[i])


# Quasi-global momentum.


def lone(a, grads):
    x = torch.zeros(1, grads.shape[-1], dtype=torch.float64)
    return play(a, x, Rows(torch.arange(1), torch.ones(1).long()), grads, matrix(nx.empty_graph(1)))


@pytest.mark.parametrize("share", [0.0, 1e-300])
def test_push_pull_takes_no_model_from_a_share_of_nothing(share: float):
    a = push_pull(sgd(ETA))
    state = a.init(torch.tensor([[3.0]]).double(), Rows(torch.arange(1), torch.ones(1)))
    mine = a.send(state)
    other = mine._replace(x=torch.tensor([[5.0]]).double(), w=torch.full_like(mine.w, share))
    heard = type(mine)(*map(torch.cat, zip(mine, other, strict=True)))
    after = a.receive(state, Inbox(torch.ones(1, 2).double(), heard, torch.tensor([0])))
    assert after.x.tolist() == [[3.0]]


@pytest.mark.parametrize("nesterov", [False, True])
def test_alone_the_velocity_follows_its_own_steps(nesterov):
    grads = torch.randn(9, 1, 3, dtype=torch.float64)
    beta, mu, m = 0.8, 0.6, torch.zeros(1, 3, dtype=torch.float64)
    state = lone(qg(sgd(ETA), beta, mu, nesterov), grads)
    for g in grads:
        ahead = beta * m + g
        m = mu * m + (1 - mu) * (beta * ahead + g if nesterov else ahead)
    close(state.velocity, -ETA * m)


def test_with_a_constant_gradient_the_momentum_is_that_over_one_minus_beta():
    g = torch.tensor([[1.0, -2.0, 0.5]], dtype=torch.float64)
    state = lone(qg(sgd(ETA), beta=0.9, mu=0.9), g.expand(4000, 1, 3))
    close(state.velocity, -ETA * g / (1 - 0.9), rtol=1e-9)


def test_where_all_hear_all_all_hold_one_velocity():
    x, grads = torch.ones(5, 3).double(), torch.randn(6, 5, 3, dtype=torch.float64)
    rows = Rows(torch.arange(5), torch.ones(5).long())
    v = play(qg(sgd(ETA)), x, rows, grads, matrix(complete_graph(5), lazy=False), 2).velocity
    close(v, v[:1].expand_as(v))
    assert float(v.abs().max()) > 1e-3


def test_a_velocity_goes_on_at_the_rates_of_the_past():
    grads = torch.randn(9, 1, 3, dtype=torch.float64)
    state = lone(qg(sgd(exponential(ETA, 0.7)), 0.9, 0.8), grads)
    x, v = torch.zeros(2, 1, 3, dtype=torch.float64)
    for k, g in enumerate(grads):
        step = 0.9 * v - ETA * 0.7**k * g
        x, v = x + step, 0.8 * v + 0.2 * step
    close(state.x, x)
    close(state.velocity, v)


def test_a_round_without_steps_divides_by_nothing():
    a, w = qg(sgd(ETA)), matrix(nx.path_graph(3), lazy=False)
    x = torch.randn(3, 4, dtype=torch.float64)
    state = a.init(x, Rows(torch.arange(3), torch.ones(3).long()))
    after = exchange(a, state, None, w, 4)[0]
    close(after.velocity, 0.1 * (w @ x - x))
    still = kgt(sgd(ETA))
    state = exchange(still, still.init(x, Rows(torch.arange(3), torch.ones(3))), None, w, 4)[0]
    close(state.correction, torch.zeros_like(x))


# Where they rest.


@pytest.mark.parametrize("name", ["extra", "exact_diffusion", "d2", "kgt", "gradient_tracking"])
def test_at_rest_unlike_gradients_that_sum_to_zero_move_nobody(name):
    """What they have learned of each other makes up for them, on any graph."""
    a, w = PLAIN[name](sgd(ETA)), matrix(nx.path_graph(5))
    x, rows = torch.zeros(5, 3, dtype=torch.float64), Rows(torch.arange(5), torch.ones(5).long())
    pull = torch.randn(5, 3, dtype=torch.float64)
    pull = pull - pull.mean(0)
    state, heard = a.init(x, rows), None
    for _ in range(900):  # the losses |x|^2 / 2 + pull x, whose mean is least at zero
        state, heard = exchange(a, a.step(state, a.model(state) + pull), heard, w, 3)
    close(a.model(state), x, atol=1e-9)


@pytest.mark.parametrize(
    ("build", "given", "words"),
    [
        (qg, {"beta": 1.0}, "beta must be"),
        (qg, {"mu": -0.1}, "mu must be"),
        (kgt, {"outer_lr": 0.0}, "outer_lr must be"),
        (kgt, {"outer_lr": 1.1}, "outer_lr must be"),
        (diloco, {"momentum": 1.0}, "momentum must be"),
        (fedavgm, {"lr": -1.0}, "lr must be"),
        (noloco, {"lr": -1.0}, "lr must be"),
        (noloco, {"momentum": 1.0}, "momentum must be"),
        (noloco, {"gamma": -0.5}, "gamma must be"),
        (noloco, {"gamma": math.inf}, "gamma must be"),
        (fedadagrad, {"tau": 0.0}, "tau must be"),
        (fedadam, {"beta2": 1.0}, "beta2 must be"),
        (fedyogi, {"beta1": -1.0}, "beta1 must be"),
        (fedyogi, {"lr": -1.0}, "lr must be"),
        (fedadam, {"lr": math.inf}, "lr must be a finite"),
        (fedadagrad, {"tau": math.inf}, "tau must be above 0 and at most"),
    ],
)
def test_what_cannot_be_is_refused(build, given, words):
    with pytest.raises(ValueError, match=words):
        build(sgd(0.1), **given)


@pytest.mark.parametrize("build", [extra, exact_diffusion, d2])
def test_what_builds_on_the_round_before_says_what_it_needs(build):
    needs = build(sgd(0.1)).needs
    assert needs.graph == "symmetric"
    assert needs.static
    assert needs.every_message
    assert needs.one_step
    assert needs.positive == (build is d2)
