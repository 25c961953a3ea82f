"""Models of which only a part is shared: the rest is trained as by a node that hears nobody."""

from __future__ import annotations

import pytest
import torch
from algorithm_cases import PLAIN, blocks, exchange, graphs, local_train, matrix, play, simulate
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from p2pfl.algorithm import Rows, newest
from p2pfl.algorithms import dpsgd, gossip, local, partial, proximal, push_sum, shared_columns
from p2pfl.learning import Quadratics
from p2pfl.learning.optim import sgd
from p2pfl.learning.spec import Spec
from p2pfl.topology import metropolis, ring_graph

LAWS = settings(max_examples=8, deadline=None)
OPT = sgd(0.1, momentum=0.9, weight_decay=0.05)
SHARED, KEPT = torch.tensor([0, 2, 3]), torch.tensor([1, 4])
ABLE = {name: build for name, build in PLAIN.items() if build(OPT).columnwise}
MEANS = [name for name, build in ABLE.items() if build(OPT).needs.weights == "mean"]
TAKES = [name for name in MEANS if PLAIN[name](OPT).settle is None]


def close(actual, expected):
    torch.testing.assert_close(actual, expected, rtol=1e-10, atol=1e-11)


@pytest.mark.parametrize("name", TAKES)
@pytest.mark.parametrize("steps", [1, 2])
@LAWS
@given(data=st.data())
def test_each_part_is_the_method_on_its_own(name, steps, data):
    whole, graph = PLAIN[name](OPT), data.draw(graphs(6))
    if whole.needs.one_step and steps > 1:
        return
    x, rows, grads = data.draw(blocks(len(graph), d=5))
    w, alone = matrix(graph), torch.eye(len(x), dtype=torch.float64)
    a = partial(whole, SHARED)
    model = a.model(play(a, x, rows, grads, w, steps))
    shared = play(whole, x[:, SHARED], rows, grads[..., SHARED], w, steps)
    close(model[:, SHARED], whole.model(shared))
    kept = play(whole, x[:, KEPT], rows, grads[..., KEPT], alone, steps)
    close(model[:, KEPT], whole.model(kept))


@pytest.mark.parametrize("name", TAKES)
def test_all_may_be_shared(name):
    whole = PLAIN[name](OPT)
    x, grads = torch.randn(4, 5, dtype=torch.float64), torch.randn(3, 4, 5, dtype=torch.float64)
    rows, w = Rows(torch.arange(4), torch.arange(1, 5)), matrix(ring_graph(4))
    after = play(partial(whole, torch.arange(5)), x, rows, grads, w)
    close(whole.model(after), whole.model(play(whole, x, rows, grads, w)))


@pytest.mark.parametrize("name", ["dpsgd", "fedavg", "gradient_tracking", "kgt", "choco top_k"])
def test_messages_and_memory_are_as_large_as_what_is_shared(name):
    whole, a = PLAIN[name](OPT), partial(PLAIN[name](OPT), SHARED)
    x, rows = torch.randn(4, 5, dtype=torch.float64), Rows(torch.arange(4), torch.ones(4).long())
    part = whole.init(x[:, SHARED], rows)
    sizes = [f.shape for f in whole.send(part)]
    assert [f.shape for f in a.send(a.init(x, rows))] == sizes
    heard = a.absorb(None, a.send(a.init(x, rows)), 5)
    assert all(field.shape[1] in (1, 3) for field in heard)


def test_who_remembers_only_the_newest_message_still_does():
    assert partial(dpsgd(OPT), SHARED).absorb is newest
    assert partial(PLAIN["choco top_k"](OPT), SHARED).absorb is not newest


def test_heads_differ_and_bodies_agree():
    task = Quadratics(6, 5, seed=1)
    done = simulate(partial(dpsgd(sgd(0.05)), SHARED), task, ring_graph(6), metropolis(), 300, 1)
    spread = done.params.std(0)
    alone = local_train(local(sgd(0.05)), task, task.init(torch.arange(6)), torch.arange(6), 300)
    assert float(spread[SHARED].max()) < 0.3 * float(alone.x.std(0)[SHARED].min())
    assert float(spread[KEPT].min()) > 0.2


def test_without_gradients_bodies_contract_and_heads_stay():
    a, w = partial(dpsgd(sgd(0.1)), SHARED), matrix(ring_graph(6), lazy=False)
    x = torch.randn(6, 5, dtype=torch.float64)
    state = a.init(x, Rows(torch.arange(6), torch.ones(6).long()))
    for _ in range(200):
        state, _ = exchange(a, state, None, w, 5)
    close(state.x[:, KEPT], x[:, KEPT])
    close(state.x[:, SHARED], x[:, SHARED].mean(0).expand(6, 3))


def test_what_local_steps_change_beside_an_exchange_is_carried_over():
    a, w = partial(dpsgd(sgd(0.1)), SHARED), matrix(ring_graph(4), lazy=False)
    x, g = torch.randn(2, 4, 5, dtype=torch.float64)
    sent = a.init(x, Rows(torch.arange(4), torch.ones(4).long()))
    trained, (mixed, _) = a.step(sent, g), exchange(a, sent, None, w, 5)
    carried = a.carry(sent, trained, mixed).x
    close(carried[:, KEPT], (x - 0.1 * g)[:, KEPT])
    close(carried[:, SHARED], (w @ x - 0.1 * g)[:, SHARED])


SPEC = Spec.of(nn.Sequential(nn.Linear(3, 2), nn.ReLU(), nn.Linear(2, 4, bias=False)))


@pytest.mark.parametrize(
    ("patterns", "columns"),
    [
        (["0.*"], range(8)),
        (["*.bias"], range(6, 8)),
        (["2.weight", "0.bias"], range(6, 16)),
        (["*"], range(16)),
        (["?.weight"], [*range(6), *range(8, 16)]),
    ],
)
def test_patterns(patterns, columns):
    assert shared_columns(SPEC, patterns).tolist() == list(columns)


def test_a_pattern_without_a_parameter_names_those_there_are():
    with pytest.raises(ValueError, match=r"'body\.\*'; there are 0\.weight, 0\.bias, 2\.weight"):
        shared_columns(SPEC, ["0.*", "body.*"])


@pytest.mark.parametrize(
    ("algorithm", "words"),
    [
        (push_sum(OPT), "a mass is shared out in whole"),
        (local(OPT), "hears nobody"),
        (dpsgd(OPT)._replace(columnwise=False), "needs whole models"),
        (gossip(OPT, order="update_then_merge"), "merged after their local steps"),
        (partial(dpsgd(OPT), SHARED), "needs whole models"),
    ],
)
def test_what_cannot_share_a_part_is_refused(algorithm, words):
    with pytest.raises(ValueError, match=words):
        partial(algorithm, SHARED)


def test_nothing_is_not_shared():
    with pytest.raises(ValueError, match="no parameters are shared"):
        partial(dpsgd(OPT), SHARED[:0])


def test_the_pull_of_proximal_is_on_all_of_the_model():
    a, w = proximal(partial(dpsgd(sgd(0.1)), SHARED), 0.5), matrix(ring_graph(3), lazy=False)
    x = torch.randn(3, 5, dtype=torch.float64)
    grads = torch.randn(2, 3, 5, dtype=torch.float64)
    state = play(a, x, Rows(torch.arange(3), torch.ones(3).long()), grads, w, steps=2)
    y = x - 0.1 * grads[0]
    y = y - 0.1 * (grads[1] + 0.5 * (y - x))
    close(a.model(state)[:, KEPT], y[:, KEPT])
    close(a.model(state)[:, SHARED], (w @ y)[:, SHARED])
