"""Batches of several steps at once, and that no batch ever changes."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from p2pfl.data import EpochOrders, Shards, batch_indices


def shards(sizes, nodes=None):
    count = torch.tensor(sizes)
    total = int(count.sum())
    nodes = torch.arange(len(sizes)) if nodes is None else torch.tensor(nodes)
    return Shards(torch.zeros(total, 1), torch.zeros(total), nodes, count.cumsum(0) - count, count)


# Five steps of batches of 3 under seed 5, over one to four epochs: results are compared with
# those of earlier runs, so these numbers must stay.
KNOWN = {
    (7, 7, 7): [
        [5, 6, 1, 3, 2, 4, 0, 5, 4, 0, 2, 6, 1, 3, 2],
        [9, 12, 8, 11, 13, 7, 10, 12, 10, 11, 13, 8, 7, 9, 12],
        [14, 16, 18, 15, 20, 17, 19, 18, 19, 14, 20, 16, 15, 17, 14],
    ],
    (9, 5, 12, 4): [
        [5, 6, 1, 3, 2, 4, 8, 7, 0, 5, 4, 8, 7, 0, 2],
        [11, 10, 13, 9, 12, 12, 13, 10, 9, 11, 12, 11, 10, 9, 13],
        [14, 16, 25, 24, 21, 18, 15, 20, 17, 23, 19, 22, 18, 19, 14],
        [28, 27, 29, 26, 27, 26, 29, 28, 27, 26, 28, 29, 27, 26, 28],
    ],
    (3, 6, 4): [
        [0, 1, 2, 0, 1, 2, 0, 1, 2, 0, 1, 2, 0, 1, 2],
        [5, 8, 4, 7, 3, 6, 8, 6, 7, 4, 3, 5, 8, 6, 5],
        [9, 11, 10, 12, 9, 11, 10, 12, 9, 12, 10, 11, 12, 10, 11],
    ],
}


@pytest.mark.parametrize("count", [1, 2, 5])
@pytest.mark.parametrize("sizes", KNOWN)
def test_known_batches(sizes, count):
    held, seed = shards(list(sizes)), 5
    orders = EpochOrders(held, seed)
    for step in range(5 - count + 1):
        steps = torch.full_like(held.nodes, step)
        got = batch_indices(held, held.nodes, steps, 3, seed, orders, count)
        want = torch.tensor(KNOWN[sizes])[:, step * 3 : (step + count) * 3]
        assert got.equal(want)


def test_known_batches_of_many_unequal_nodes():
    sizes = [50 + (i * 13) % 31 for i in range(40)]
    held = shards(sizes, [3 * i + 1 for i in range(40)])
    start = torch.zeros(40, dtype=torch.int64)
    got = batch_indices(held, held.nodes, start, 16, -9, count=30)
    assert got.shape == (40, 480)
    assert got[0, :5].tolist() == [7, 3, 28, 16, 35]
    place = torch.arange(1, got.numel() + 1).view_as(got)  # any exchange of two changes the sum
    assert int((got * place % 1000003).sum()) == 9066910033


@given(
    sizes=st.lists(st.integers(1, 12), min_size=1, max_size=6),
    gap=st.integers(1, 3),
    size=st.sampled_from([1, 2, 4, "full"]),
    count=st.integers(1, 9),
    data=st.data(),
)
@settings(max_examples=80, deadline=None)
def test_several_steps_are_single_steps_one_after_the_other(sizes, gap, size, count, data):
    """Also for one node at several steps of one call, and with a memory full of others."""
    held = shards(sizes, [2 + gap * k for k in range(len(sizes))])
    width = min(size, max(sizes)) if size != "full" else sizes[0]
    alike = [k for k, n in enumerate(sizes) if (n if size == "full" else min(n, size)) == width]
    if not alike:
        return
    orders = EpochOrders(held, 1)
    for _ in range(3):
        rows = data.draw(st.lists(st.sampled_from(alike), min_size=1, max_size=6))
        nodes = held.nodes[torch.tensor(rows)]
        steps = torch.tensor(data.draw(st.lists(st.integers(0, 30), min_size=6, max_size=6)))
        steps = steps[: len(rows)]
        got = batch_indices(held, nodes, steps, size, 1, orders, count)
        each = [
            torch.cat([batch_indices(held, n, s + k, size, 1) for k in range(count)], 1)
            for n, s in zip(nodes.split(1), steps.split(1), strict=True)
        ]
        assert got.equal(torch.cat(each))


def test_thousands_of_nodes_at_once():
    held = shards([2 + k % 2 for k in range(3000)])
    steps = torch.arange(3000) % 7
    at_once = batch_indices(held, held.nodes, steps, 1, 8, count=3)
    pieces = zip(held.nodes.chunk(30), steps.chunk(30), strict=True)
    assert at_once.equal(torch.cat([batch_indices(held, n, s, 1, 8, count=3) for n, s in pieces]))


def test_nodes_may_share_examples():
    apart = shards([6, 6, 9])
    start, count = torch.tensor([0, 3, 1]), torch.tensor([6, 6, 9])
    shared = Shards(torch.zeros(10, 1), torch.zeros(10), torch.arange(3), start, count)
    steps = torch.tensor([0, 2, 5])
    got = [
        batch_indices(held, held.nodes, steps, 4, 0, EpochOrders(held, 0), 3)
        - held.start.unsqueeze(1)
        for held in (apart, shared)
    ]
    assert got[0].equal(got[1])


@pytest.mark.parametrize("first", [0, 4])
@pytest.mark.parametrize("gap", [1, 2])
def test_nodes_are_found_by_their_ids(first, gap):
    ids = [first, first + gap, first + 2 * gap]
    held = shards([2, 3, 4], ids)
    assert held.find(torch.tensor(ids[::-1])).tolist() == [2, 1, 0]
    assert held.find(torch.tensor([], dtype=torch.int64)).tolist() == []
    for absent in (first - 1, ids[-1] + 1, *range(first + 1, first + gap)):
        with pytest.raises(ValueError, match=f"node {absent} are not here; held are those of 3"):
            held.find(torch.tensor([ids[0], absent]))


def test_bad_sizes_are_refused():
    held = shards([3, 5, 2])
    with pytest.raises(ValueError, match="batch_size = 0 must be at least 1"):
        batch_indices(held, held.nodes, held.nodes, 0, 0)
    with pytest.raises(ValueError, match=r"batch_size = full gives .* 5 examples and others 2"):
        batch_indices(held, held.nodes, held.nodes, "full", 0)


def test_gather_is_indexing_for_any_shape():
    x, y = torch.randn(8, 2, 3), torch.arange(8)
    held = Shards(x, y, torch.tensor([0]), torch.tensor([0]), torch.tensor([8]))
    for index in (torch.tensor([[0, 5], [7, 5]]), torch.tensor([3]), torch.empty(0, 0).long()):
        assert held.gather(index).x.equal(x[index])
        assert held.gather(index).y.equal(y[index])


@pytest.mark.parametrize("some", [[7], [1, 7], [4, 7], [1, 4, 7], []])
def test_a_subset_holds_the_examples_of_some_nodes_and_draws_their_batches(some):
    x, y = torch.randn(10, 2), torch.arange(10)
    start, count = torch.tensor([6, 0, 3]), torch.tensor([4, 5, 4])  # shared, in no order
    held = Shards(x, y, torch.tensor([1, 4, 7]), start, count)
    nodes = torch.tensor(some, dtype=torch.int64)
    part = held.subset(nodes)
    assert part.nodes.equal(nodes)
    assert len(part.x) == len(part.y) == int(part.count.sum())
    assert part.start.tolist() == (part.count.cumsum(0) - part.count).tolist()
    for node in some:
        assert part.rows_of(node).x.equal(held.rows_of(node).x)
        assert part.rows_of(node).y.equal(held.rows_of(node).y)
    got = [s.gather(batch_indices(s, nodes, nodes, 3, 0, count=4)).y for s in (held, part)]
    assert got[0].equal(got[1])
    part.x.zero_()
    assert bool((held.x != 0).all())


def test_a_subset_must_ascend_and_be_here():
    held = shards([2, 3, 4])
    for nodes in ([1, 0], [1, 1]):
        with pytest.raises(ValueError, match="must ascend"):
            held.subset(torch.tensor(nodes))
    with pytest.raises(ValueError, match="node 3 are not here"):
        held.subset(torch.tensor([1, 3]))
