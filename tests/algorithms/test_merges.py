"""What becomes of models of unlike age that meet."""

from __future__ import annotations

import math
from itertools import pairwise

import networkx as nx
import pytest
import torch
from algorithm_cases import matrix
from hypothesis import given, settings
from hypothesis import strategies as st

from p2pfl.algorithm import Inbox, Rows
from p2pfl.algorithms import fedasync, gossip
from p2pfl.algorithms.gossip import Aged, AgedState
from p2pfl.learning.optim import sgd

N, LIMIT = 7, 10


def met(a, x, age, w):
    state = AgedState(x, age, ())
    return a.receive(state, Inbox(w, a.send(state), torch.arange(len(x))))


def by_hand(x, age, w, share):
    """Let every row take the mean of those it hears, in proportion to `share(i, j)`."""
    rows = []
    for i in range(len(x)):
        around = [j for j in range(len(x)) if w[i, j]]
        shares = torch.tensor([share(i, j, around) for j in around], dtype=torch.float64)
        rows.append((shares.unsqueeze(1) * x[around]).sum(0) / shares.sum())
    return torch.stack(rows)


def asynchronous(alpha, fade, ages):
    """Return the share of a model in FedAsync: alpha among the others, the rest one's own."""

    def share(i, j, around):
        others = [alpha * fade(max(0.0, ages[i] - ages[k])) for k in around if k != i]
        each = [part / len(others) for part in others]
        if j == i:
            return 1 - sum(each)
        return each[[k for k in around if k != i].index(j)]

    return share


def polynomial(late):
    return (1 + late) ** -0.5


def hinge(late):
    return 1.0 if late <= 4 else 1 / (10 * (late - 4) + 1)


@pytest.mark.parametrize("kind", ["age", "mean", "limited", "polynomial", "hinge", "constant"])
@settings(max_examples=20, deadline=None)
@given(ages=st.lists(st.integers(0, 40), min_size=N, max_size=N), seed=st.integers(0, 99))
def test_models_are_merged_as_written(kind, ages, seed):
    graph = nx.gnp_random_graph(N, 0.4, seed=seed)
    w, x = matrix(graph, lazy=False), torch.randn(N, 3, dtype=torch.float64)
    shares = {
        "age": lambda i, j, around: w[i, j] * (ages[j] + 1),
        "mean": lambda i, j, around: w[i, j],
        "limited": lambda i, j, around: (
            (ages[j] + 1) * (ages[j] >= max(ages[k] for k in around) - LIMIT)
        ),
        "polynomial": asynchronous(0.6, polynomial, ages),
        "hinge": asynchronous(0.6, hinge, ages),
        "constant": asynchronous(0.6, lambda late: 1.0, ages),
    }
    if kind in ("age", "mean", "limited"):
        a = gossip(sgd(0.1), merge=kind, limit=LIMIT if kind == "limited" else None)
    else:
        a = fedasync(sgd(0.1), staleness=kind)
    after = met(a, x, torch.tensor(ages, dtype=torch.float64).unsqueeze(1), w)
    torch.testing.assert_close(after.x, by_hand(x, ages, w, shares[kind]), rtol=1e-12, atol=1e-12)
    oldest = [max(ages[j] for j in range(N) if w[i, j]) for i in range(N)]
    assert after.age.flatten().tolist() == oldest


PAIR = torch.full((2, 2), 0.5, dtype=torch.float64)  # as on a timer


def test_limited_keeps_the_older_of_two_that_are_far_apart():
    x, a = torch.tensor([[0.0], [6.0]]).double(), gossip(sgd(0.1), merge="limited", limit=10)
    apart = met(a, x, torch.tensor([[3.0], [14.0]]).double(), PAIR)
    assert apart.x.tolist() == [[6.0], [6.0]]
    near = met(a, x, torch.tensor([[4.0], [14.0]]).double(), PAIR)
    assert near.x.tolist() == [[4.5], [4.5]]  # as 5 to 15


@pytest.mark.parametrize("order", ["merge_then_update", "update_then_merge"])
def test_no_age_makes_a_model_infinite(order):
    a = gossip(sgd(0.1), merge="limited", limit=10, order=order)
    state = a.init(torch.full((2, 1), 1e30), Rows(torch.arange(2), torch.ones(2)))
    state = state._replace(age=torch.tensor([[0.0], [2.0**53]]))
    after = a.receive(state, Inbox(PAIR.float(), a.send(state), torch.arange(2)))
    after = a.settle(after) if a.settle else after
    assert after.x.tolist() == [[pytest.approx(1e30)], [pytest.approx(1e30)]]


def test_a_pair_on_a_timer_is_fedasync():
    x, age = torch.tensor([[0.0], [6.0]]).double(), torch.tensor([[8.0], [0.0]]).double()
    after = met(fedasync(sgd(0.1), alpha=0.6), x, age, PAIR)
    assert after.x[0].item() == pytest.approx(0.6 / 3 * 6)  # (1 + 8) ** -0.5
    assert after.x[1].item() == pytest.approx(6 - 0.6 * 6)  # what comes is not stale


def test_the_staler_the_less_and_who_is_slow_pulls_less_than_its_share():
    moved = []
    for late in range(0, 60, 3):
        x, age = torch.tensor([[0.0], [1.0]]).double(), torch.tensor([[60.0], [60.0 - late]])
        moved.append(float(met(fedasync(sgd(0.1)), x, age.double(), PAIR).x[0]))
    assert all(more > less for more, less in pairwise(moved))
    assert moved[0] == pytest.approx(0.6)


@pytest.mark.parametrize("build", [gossip, fedasync])
def test_age_never_falls_and_equal_models_stay(build):
    a, w = build(sgd(0.1)), matrix(nx.path_graph(4), lazy=False)
    x = torch.ones(4, 3, dtype=torch.float64)
    state = a.init(x, Rows(torch.arange(4), torch.ones(4).long()))
    for _ in range(5):
        before = state.age
        state = a.step(state, torch.zeros_like(x))
        state = a.receive(state, Inbox(w, Aged(state.x, state.age), torch.arange(4)))
        assert bool((state.age > before).all())
        torch.testing.assert_close(state.x, x, rtol=0, atol=1e-15)


@pytest.mark.parametrize(
    ("build", "given", "words"),
    [
        (gossip, {"limit": -1, "merge": "limited"}, "limit must be"),
        (gossip, {"limit": 3}, "limit = 3 is for merge = 'limited' alone"),
        (gossip, {"limit": 3, "merge": "age"}, "limit = 3 is for merge = 'limited' alone"),
        (gossip, {"merge": "age", "order": "random_walk"}, "merges nothing"),
        (fedasync, {"alpha": 0.0}, "alpha must be"),
        (fedasync, {"alpha": 1.5}, "alpha must be"),
        (fedasync, {"a": -1.0}, "a must be"),
        (fedasync, {"b": -1.0, "staleness": "hinge"}, "b must be"),
        (fedasync, {"b": 4.0}, "b = 4.0 is for staleness = 'hinge' alone"),
        (fedasync, {"a": 1.0, "staleness": "constant"}, "makes no use of it"),
        (fedasync, {"a": math.inf, "staleness": "hinge"}, "a must be a finite"),
        (fedasync, {"b": math.inf, "staleness": "hinge"}, "b must be a finite"),
    ],
)
def test_what_cannot_be_is_refused(build, given, words):
    with pytest.raises(ValueError, match=words):
        build(sgd(0.1), **given)


# The orders of the paper, where one model comes after the other.


def pegasos(x, y, w, age):
    """One step on a support vector machine; lambda = 0.1, from the age of the model."""
    rate = 1 / (0.1 * (age + 1))
    return (1 - rate * 0.1) * w + rate * y * x * (float(w @ x) * y < 1)


def as_written(order, own, x, y, came):
    """Play one node of the paper: what it holds after each model that comes, and its age."""
    last, held = (own, 0), []
    for received in came:
        (a, ta), (b, tb) = received, last
        if order == "update_then_merge":
            one, other = pegasos(x, y, a, ta), pegasos(x, y, b, tb)
            made = (one + other) / 2, max(ta, tb) + 1
        else:
            made = pegasos(x, y, a, ta), ta + 1
        last = received
        held.append(made)
    return held


@pytest.mark.parametrize("order", ["update_then_merge", "random_walk"])
def test_a_node_that_models_come_to_does_as_the_paper_says(order):
    """Of one example a node it is the same when the model before is trained."""
    draw = torch.Generator().manual_seed(3)
    x, own, *models = torch.randn(6, 1, 4, generator=draw, dtype=torch.float64)
    came = [(model[0], age) for model, age in zip(models, (3, 0, 9, 4), strict=True)]
    given = {"merge": "mean"} if order == "update_then_merge" else {}
    a = gossip(sgd(1.0), order=order, **given)

    def trained(state):
        moved = pegasos(x[0], 1.0, state.x[0], float(state.age))
        state = a.step(state, state.x - moved)
        return a.settle(state) if a.settle else state

    state, half = a.init(own, Rows(torch.tensor([1]), torch.tensor([1]))), []
    state = trained(state)  # its own, as if it had come
    for model, age in came:
        said = Aged(torch.cat([state.x, model[None]]), torch.tensor([[0.0], [age]]).double())
        state = trained(a.receive(state, Inbox(PAIR[:1], said, torch.tensor([0]))))
        half.append((state.x[0], float(state.age)))
    for (got, age), (expected, expected_age) in zip(
        half, as_written(order, own[0], x[0], 1.0, came), strict=True
    ):
        torch.testing.assert_close(got, expected, rtol=1e-12, atol=1e-12)
        assert age == expected_age


def test_a_walk_takes_what_comes_bit_by_bit_and_who_hears_nobody_stays():
    a, x = gossip(sgd(0.1), order="random_walk"), torch.randn(4, 3)
    state = a.init(x, Rows(torch.arange(4), torch.ones(4).long()))
    state = state._replace(age=torch.arange(4.0).unsqueeze(1))
    w = torch.tensor([[0.5, 0.5, 0, 0], [0.5, 0.5, 0, 0], [0, 0, 1, 0], [0, 0, 0.3, 0.7]])
    after = a.receive(state, Inbox(w, a.send(state), torch.arange(4)))
    assert torch.equal(after.x, x[[1, 0, 2, 2]])
    assert after.age.flatten().tolist() == [1, 0, 2, 2]
