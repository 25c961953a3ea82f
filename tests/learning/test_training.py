from __future__ import annotations

from typing import NamedTuple

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from learning_cases import build, local, shards
from torch import Tensor

from p2pfl.algorithm import Rows
from p2pfl.algorithms import dpsgd, gossip
from p2pfl.learning import ModelTask, Quadratics, local_steps, losses, optim, schedules, train
from p2pfl.learning.tree import (
    assign,
    leaves,
    put_,
    split,
    take,
    tree_map,
    unshared,
    views,
)

OPT = optim.chain([optim.clip_norm(1.0), optim.adam(schedules.exponential(0.1, 0.9))])


def run(task, nodes, first, count, opt=OPT):
    algorithm = local(opt)
    state = algorithm.init(task.init(nodes), Rows(nodes, task.examples(nodes)))
    return train(algorithm, task, state, nodes, first, count)


@given(st.lists(st.integers(0, 4), min_size=1, max_size=6), st.integers(0, 50))
@settings(max_examples=25, deadline=None)
def test_unequal_counts_are_each_row_alone(counts, first):
    task = Quadratics(6, 3, noise=0.1)
    nodes = torch.arange(len(counts)).flip(0)
    begin, count = nodes + first, torch.tensor(counts)
    state, loss = run(task, nodes, begin, count)
    for i in range(len(counts)):
        one = slice(i, i + 1)
        alone, own = run(task, nodes[one], begin[one], count[one])
        for leaf, expected in zip(leaves(state), leaves(alone), strict=True):
            torch.testing.assert_close(leaf[one], expected, rtol=1e-12, atol=1e-13)
        torch.testing.assert_close(loss[one], own, rtol=1e-12, atol=0, equal_nan=True)
        assert loss[i].isnan() == (counts[i] == 0)


def test_steps_by_hand():
    task, nodes = Quadratics(2, 3), torch.arange(2)
    state, loss = run(task, nodes, nodes * 0, torch.tensor([3, 3]), optim.sgd(0.1))
    x, total = torch.zeros(2, 3, dtype=torch.float64), 0.0
    for step in range(3):
        value, grads = task.grad(x, nodes, nodes * 0 + step)
        x, total = x - 0.1 * grads, total + value
    torch.testing.assert_close(state.x, x, rtol=1e-14, atol=0)
    torch.testing.assert_close(loss, total / 3, rtol=1e-14, atol=0)


def test_no_steps_and_no_rows():
    task, nodes = Quadratics(2, 3), torch.arange(2)
    state, loss = run(task, nodes, nodes, nodes * 0)
    assert loss.isnan().all()
    assert not state.x.any()
    state, loss = run(task, nodes[:0], nodes[:0], nodes[:0])
    assert state.x.shape == (0, 3)
    assert loss.shape == (0,)


@pytest.mark.parametrize("count", [[2, 2, 2], [0, 1, 3]])
def test_the_state_given_is_left_alone(count):
    task, nodes = Quadratics(3, 2), torch.arange(3)
    algorithm = local(OPT)
    state = algorithm.init(task.init(nodes), Rows(nodes, nodes))
    state, _ = train(algorithm, task, state, nodes, nodes, nodes * 0 + 2)
    kept = tree_map(torch.clone, state)
    train(algorithm, task, state, nodes, nodes, torch.tensor(count))
    same(state, kept)


def test_local_epochs_of_a_model_learn():
    _, model = build("mlp")
    made = shards([40, 17, 5], (6,))
    made.x[:, 0] = made.y * 2.0
    task = ModelTask(model, losses.cross_entropy(), made, made.rows_of(0), batch_size=8)
    nodes = torch.arange(3)
    count = local_steps(task.examples(nodes), 8, 20)
    assert count.tolist() == [100, 60, 20]
    before = task.evaluate(task.init(nodes), nodes)
    state, loss = run(task, nodes, nodes * 0, count, optim.sgd(0.3))
    after = task.evaluate(state.x, nodes)
    assert (after.loss < before.loss)[:2].all()
    assert loss.isfinite().all()


@given(st.lists(st.integers(0, 200), min_size=1), st.integers(1, 50), st.integers(0, 4))
def test_local_steps(counts, batch_size, epochs):
    found = local_steps(torch.tensor(counts), batch_size, epochs).tolist()
    assert found == [epochs * -(-count // batch_size) for count in counts]
    full = local_steps(torch.tensor(counts), "full", epochs).tolist()
    assert full == [epochs * bool(count) for count in counts]


@pytest.mark.parametrize(("batch_size", "epochs"), [(0, 1), (3, -1)])
def test_local_steps_checks(batch_size, epochs):
    with pytest.raises(ValueError, match="must be a whole number"):
        local_steps(torch.tensor([3]), batch_size, epochs)


class State(NamedTuple):
    x: Tensor
    more: tuple


def tree():
    x = torch.arange(8.0).reshape(4, 2)
    return State(x, (torch.arange(4).unsqueeze(1), (), (x + 1,)))


def same(one, two):
    assert type(one) is type(two)
    for left, right in zip(leaves(one), leaves(two), strict=True):
        assert torch.equal(left, right)


def test_take_and_put():
    rows = torch.tensor([2, 0])
    part = take(tree(), rows)
    assert isinstance(part, State)
    assert part.more[0].tolist() == [[2], [0]]
    assert part.more[1] == ()
    changed = tree()
    put_(changed, rows, tree_map(lambda leaf: leaf * 10, part))
    same(take(changed, rows), tree_map(lambda leaf: leaf * 10, part))
    rest = torch.tensor([1, 3])
    same(take(changed, rest), take(tree(), rest))


def test_views_write_through_and_assign_hands_old_values_on():
    made = (torch.zeros(4, 2), torch.ones(4, 2), torch.full((4, 2), 2.0))
    part = views(made, slice(1, 3))
    assign(part, (part[0] + 5, part[0], part[2]))  # the second becomes what the first was
    assert [leaf[:, 0].tolist() for leaf in made] == [[0, 5, 5, 0], [1, 0, 0, 1], [2, 2, 2, 2]]


def test_unshared_copies_only_what_is_shared():
    x, y = torch.zeros(3, 2), torch.zeros(3, 2)
    found = unshared((x, (y, x)))
    assert found[0] is x
    assert found[1][0] is y
    found[1][1].add_(1)
    assert not x.any()


def test_split():
    parts = split(tree(), 4)
    assert len(parts) == 4
    same(tree_map(lambda *rows: torch.cat(rows), *parts), tree())


def test_a_tree_has_only_tensors_and_tuples():
    with pytest.raises(TypeError, match="tuples of tensors, not list"):
        take([torch.zeros(2)], torch.tensor([0]))


@pytest.mark.parametrize("rate", [0.1, schedules.exponential(0.1, 0.9)])
@pytest.mark.parametrize("counts", [[3, 3, 3, 3], [2, 0, 3, 1]])
@pytest.mark.parametrize("name", ["mlp", "cnn", "batchnorm"])
@pytest.mark.parametrize("kind", [dpsgd, gossip])
def test_steps_straight_into_the_parameters_are_the_same_steps(kind, name, counts, rate):
    shape, model = build(name)
    made = shards([9, 12, 8, 3], shape)
    algorithm = kind(optim.sgd(rate))
    assert algorithm.factor is not None
    nodes, count = torch.arange(4), torch.tensor(counts)
    for block in (1, 3, 100):
        task = ModelTask(
            model, losses.cross_entropy(), made, batch_size=8, dtype=torch.float64, block=block
        )
        start = algorithm.init(task.init(nodes), Rows(nodes, nodes))
        found = train(algorithm, task, start, nodes, nodes, count)
        slow = algorithm._replace(factor=None)
        expected = train(slow, task, start, nodes, nodes, count)
        for one, two in zip(leaves(found), leaves(expected), strict=True):
            torch.testing.assert_close(one, two, rtol=1e-10, atol=1e-12, equal_nan=True)


def test_a_momentum_is_not_a_factor():
    for opt in (optim.sgd(0.1, momentum=0.9), optim.sgd(0.1, weight_decay=0.1), optim.adam()):
        assert not opt.linear
        assert dpsgd(opt).factor is None
    assert optim.chain([optim.scale(0.5), optim.sgd(0.1)]).linear
    assert not optim.chain([optim.clip_norm(0.5), optim.sgd(0.1)]).linear
