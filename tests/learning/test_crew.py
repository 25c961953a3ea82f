from __future__ import annotations

import threading
from unittest import mock

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from learning_cases import build, shards

from p2pfl.algorithm import Rows
from p2pfl.algorithms import dpsgd
from p2pfl.learning import ModelTask, losses, optim, train
from p2pfl.learning.crew import Crew, shares


@pytest.mark.parametrize("threads", [0, 1, 3])
def test_all_of_it_is_done(threads):
    done = []
    with Crew(threads) as crew:
        for i in range(50):
            crew.do(done.append, i)
    assert sorted(done) == list(range(50))


def test_each_thread_computes_alone():
    found, before = [], torch.get_num_threads()
    with Crew(2) as crew:
        for _ in range(8):
            crew.do(lambda: found.append((torch.get_num_threads(), threading.current_thread())))
    assert {threads for threads, _ in found} == {1}
    assert threading.current_thread() not in {thread for _, thread in found}
    assert torch.get_num_threads() == before


@pytest.mark.parametrize("threads", [1, 2])
def test_an_error_is_not_swallowed(threads):
    def fail():
        raise KeyError("lost")

    with pytest.raises(KeyError, match="lost"), Crew(threads) as crew:
        crew.do(fail)


@pytest.mark.parametrize("threads", [1, 2])
def test_an_error_of_the_caller_is_not_swallowed(threads):
    def give_up():
        raise OSError("ours")

    with pytest.raises(OSError, match="ours"), Crew(threads):
        give_up()


@pytest.mark.parametrize("momentum", [0.0, 0.9])
@pytest.mark.parametrize("name", ["mlp", "cnn", "odd"])
def test_threads_change_no_bit(name, momentum):
    shape, model = build(name)
    nodes, made = torch.arange(9), shards([12] * 9, shape)
    algorithm = dpsgd(optim.sgd(0.1, momentum=momentum))

    def trained(threads):
        task = ModelTask(model, losses.cross_entropy(), made, batch_size=5, block=2)
        state = algorithm.init(task.init(nodes), Rows(nodes, nodes))
        with mock.patch.object(torch, "get_num_threads", return_value=threads):
            return train(algorithm, task, state, nodes, nodes, torch.full_like(nodes, 4))

    (state, loss), (other, loss_) = trained(1), trained(3)
    assert torch.equal(state.x, other.x)
    assert torch.equal(loss, loss_)


@given(st.integers(0, 60), st.integers(1, 20), st.integers(1, 5))
def test_shares_end_together(rows, most, threads):
    blocks = shares(rows, most, threads)
    assert [i for block in blocks for i in range(rows)[block]] == list(range(rows))
    sizes = [block.stop - block.start for block in blocks]
    assert all(0 < size <= most for size in sizes)
    if rows > threads:  # each has as many blocks as any other, so far as they can be divided
        assert -(-len(sizes) // threads) == -(-rows // (threads * most))
        assert max(sizes) == min(sizes[:-1], default=sizes[-1])


def test_few_rows_are_left_together():
    assert shares(3, 8, 4) == [slice(0, 3)]
