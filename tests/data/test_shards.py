"""Sharing out, holding out, batches and moments."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from p2pfl.data import (
    DATASETS,
    HOLDOUTS,
    PARTITIONERS,
    Dataset,
    EpochOrders,
    Shards,
    batch_indices,
    batch_sizes,
    counts_by_label,
    federate,
    in_two_passes,
    moments,
    moments_by_node,
    standardise,
)


def dataset(rows=100, classes=4, seed=0):
    gen = torch.Generator().manual_seed(seed)
    x = torch.randn(rows, 3, generator=gen)
    x[:, 0] = torch.arange(rows)  # the row's own name
    y = torch.randint(classes, (rows,), generator=gen)
    return Dataset(x, y, ("row", "b", "c"), tuple("abcdefgh"[:classes]), torch.ones(3).bool())


def shards(sizes, nodes=None):
    count = torch.tensor(sizes)
    total = int(count.sum())
    nodes = torch.arange(len(sizes)) if nodes is None else torch.tensor(nodes)
    y = torch.zeros(total, dtype=torch.int64)
    return Shards(torch.arange(total).unsqueeze(1), y, nodes, count.cumsum(0) - count, count)


def names(examples):
    return set(examples.x[:, 0].int().tolist())


@pytest.mark.parametrize("holdout", ["random", "last", "per_node", "none"])
@pytest.mark.parametrize("partition", ["iid", "linear"])
def test_every_row_is_somewhere_once(holdout, partition):
    keys = {"count": 20} if holdout == "last" else {}
    data = dataset()
    fed = federate(data, PARTITIONERS[partition](), HOLDOUTS[holdout](**keys), 5, 3)
    mine = [names(fed.train.rows_of(k)) for k in range(5)]
    test = names(fed.test) if fed.test is not None else set()
    assert set.union(*mine, test) == set(range(100))
    assert sum(map(len, mine)) + len(test) == 100
    assert len(test) == (0 if holdout == "none" else 20)
    assert (fed.test is None) == (holdout == "none")
    assert (fed.own_test is not None) == (holdout == "per_node")
    if holdout == "last":
        assert test == set(range(80, 100))
    for k in range(5):
        part = fed.train.rows_of(k)
        assert part.x.equal(data.x[part.x[:, 0].long()])
        assert part.y.equal(data.y[part.x[:, 0].long()])


@pytest.mark.parametrize("holdout", ["random", "per_node", "none"])
@pytest.mark.parametrize("peer", [0, 3])
def test_a_peer_holds_its_part_of_the_full_federation(holdout, peer):
    args = (dataset(), PARTITIONERS["dirichlet"](1.0, 2), HOLDOUTS[holdout](), 4, 11)
    whole, alone = federate(*args), federate(*args, only=peer)
    assert alone.train.nodes.tolist() == [peer]
    assert alone.train.rows_of(peer).x.equal(whole.train.rows_of(peer).x)
    assert len(alone.train.x) == len(alone.train.rows_of(peer).x)
    assert (whole.test is None) == (alone.test is None)
    if whole.test is not None:
        assert alone.test.x.equal(whole.test.x)
    if whole.own_test is not None:
        assert alone.own_test.rows_of(peer).x.equal(whole.own_test.rows_of(peer).x)
    with pytest.raises(ValueError, match=f"node {1} are not here; held are those of node {peer}"):
        alone.train.counts(torch.tensor([peer, 1]))


def test_a_seed_of_its_own_fixes_the_test_set():
    def test_rows(experiment, **keys):
        fed = federate(dataset(), PARTITIONERS["iid"](), HOLDOUTS["random"](**keys), 2, experiment)
        return names(fed.test)

    assert test_rows(1) != test_rows(2)
    assert test_rows(1, seed=5) == test_rows(2, seed=5)


@given(fraction=st.floats(0.05, 0.95), rows=st.integers(1, 200), seed=st.integers(0, 1000))
@settings(max_examples=50, deadline=None)
def test_a_stratified_sample_is_exact_in_total_and_within_one_by_class(fraction, rows, seed):
    y = dataset(rows, seed=seed).y
    taken = HOLDOUTS["random"](fraction).choose(y, seed)
    assert abs(int(taken.sum()) - fraction * rows) <= 0.5 + 1e-9
    for label in y.unique():
        of = y == label
        assert abs(int(taken[of].sum()) - fraction * int(of.sum())) <= 1 + 1e-9


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: HOLDOUTS["random"](1.0), "fraction = 1.0"),
        (lambda: HOLDOUTS["per_node"](0.0), "fraction = 0.0"),
        (lambda: HOLDOUTS["last"](0), "count = 0"),
        (lambda: federate(*parts("last", count=100), 2, 0), "leaves none"),
        (lambda: federate(*parts("per_node", fraction=0.9), 50, 0), "node 0 would have no"),
        (lambda: federate(*parts("none"), 3, 0, 3), "no node 3 among 3"),
    ],
)
def test_impossible_holdouts_are_refused(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def parts(holdout, **keys):
    return dataset(), PARTITIONERS["iid"](), HOLDOUTS[holdout](**keys)


def test_the_table_of_counts():
    fed = federate(dataset(), PARTITIONERS["iid"](), HOLDOUTS["none"](), 3, 0)
    table = counts_by_label(fed)
    assert table.header == ("node", "examples", "a", "b", "c", "d")
    for node, examples, *labels in table.rows:
        assert labels == fed.train.rows_of(node).y.bincount(minlength=4).tolist()
        assert sum(labels) == examples
    number = Dataset(torch.rand(4, 1), torch.tensor([1.0, 3.0, 5.0, 5.0]))
    table = counts_by_label(
        federate(number, PARTITIONERS["iid"](shuffle=False), HOLDOUTS["none"](), 2, 0)
    )
    assert table.header[2:] == ("target mean", "target std")
    assert table.rows == [(0, 2, 2.0, 1.0), (1, 2, 5.0, 0.0)]


@given(sizes=st.lists(st.integers(1, 9), min_size=1, max_size=6), data=st.data())
@settings(max_examples=60, deadline=None)
def test_each_example_once_an_epoch(sizes, data):
    held = shards(sizes)
    node = data.draw(st.integers(0, len(sizes) - 1))
    size = data.draw(st.integers(1, 5))
    width = int(batch_sizes(held, torch.tensor([node]), size))
    orders = EpochOrders(held, 3) if data.draw(st.booleans()) else None
    start = int(held.start[node])
    # as many steps as epochs have examples: a whole number of epochs, straddled on the way
    seen = [
        batch_indices(held, torch.tensor([node]), torch.tensor([step]), size, 3, orders)
        for step in range(sizes[node])
    ]
    flat = torch.cat(seen, 1).flatten() - start
    for epoch in flat.view(width, sizes[node]):
        assert sorted(epoch.tolist()) == list(range(sizes[node]))


@given(
    sizes=st.lists(st.integers(4, 12), min_size=1, max_size=8),
    steps=st.lists(st.integers(0, 40), min_size=1, max_size=12),
    seed=st.integers(-(2**40), 2**40),
    data=st.data(),
)
@settings(max_examples=60, deadline=None)
def test_a_row_alone_is_the_row_among_many(sizes, steps, seed, data):
    held = shards(sizes, nodes=[3 * k + 1 for k in range(len(sizes))])
    pick = st.sampled_from(held.nodes.tolist())
    nodes = torch.tensor(data.draw(st.lists(pick, min_size=len(steps), max_size=len(steps))))
    orders = EpochOrders(held, seed)
    together = batch_indices(held, nodes, torch.tensor(steps), 4, seed, orders)
    for i in reversed(range(len(steps))):
        node, step = nodes[i : i + 1], torch.tensor(steps[i : i + 1])
        assert batch_indices(held, node, step, 4, seed, orders).equal(together[i : i + 1])
        at = int(held.find(node))
        only = shards([sizes[at]], nodes=node.tolist())
        alone = batch_indices(only, node, step, 4, seed)
        assert alone.equal(together[i : i + 1] - held.start[at])


def test_orders_differ_between_epochs_nodes_and_seeds():
    held = shards([50, 50])
    zero, one = torch.tensor([0]), torch.tensor([1])

    def epoch(node, number, seed):
        steps = range(number * 2, number * 2 + 2)
        got = [batch_indices(held, node, torch.tensor([s]), 25, seed) for s in steps]
        return (torch.cat(got, 1) - held.start[node]).tolist()

    assert epoch(zero, 0, 0) == epoch(zero, 0, 0)
    assert epoch(zero, 0, 0) != epoch(zero, 1, 0)
    assert epoch(zero, 0, 0) != epoch(one, 0, 0)
    assert epoch(zero, 0, 0) != epoch(zero, 0, 1)


def test_full_batches_and_mixed_sizes():
    held = shards([3, 5, 2])
    nodes = torch.tensor([0, 1, 2])
    assert batch_sizes(held, nodes, "full").tolist() == [3, 5, 2]
    assert batch_sizes(held, nodes, 3).tolist() == [3, 3, 2]
    one = torch.tensor([1])
    assert batch_indices(held, one, torch.tensor([7]), "full", 0).tolist() == [[3, 4, 5, 6, 7]]
    assert batch_indices(held, nodes[:0], nodes[:0], 3, 0).shape == (0, 0)
    with pytest.raises(ValueError, match="3 examples and others 2"):
        batch_indices(held, nodes, nodes, 3, 0)
    with pytest.raises(ValueError, match="batch_size = 0"):
        batch_sizes(held, nodes, 0)
    with pytest.raises(ValueError, match="other shards or another seed"):
        batch_indices(held, one, one, 2, 0, EpochOrders(held, 1))


def test_gather_follows_the_index():
    held = shards([3, 5])
    index = torch.tensor([[0, 2], [4, 3]])
    assert held.gather(index).x.squeeze(-1).equal(index)
    assert held.to("cpu").rows_of(1).x.flatten().tolist() == [3, 4, 5, 6, 7]


def test_moments_of_parts_are_moments_of_all():
    data = dataset()
    data.x[::7, 1] = torch.nan
    numeric = torch.tensor([True, True, False])
    fed = federate(data, PARTITIONERS["linear"](), HOLDOUTS["none"](), 4, 0)
    each = moments_by_node(fed.train, numeric)
    whole = moments(data.x, numeric)
    torch.testing.assert_close(each.sum(0), whole, rtol=1e-12, atol=1e-9)
    pooled = standardise(whole, numeric, torch.float64)
    gossiped = standardise(each.mean(0), numeric, torch.float64)
    torch.testing.assert_close(gossiped, pooled, rtol=1e-10, atol=1e-12)
    known = data.x[~data.x[:, 1].isnan(), 1].double()
    assert float(pooled.shift[1]) == pytest.approx(float(known.mean()), rel=1e-12)
    assert float(1 / pooled.scale[1]) == pytest.approx(float(known.std(correction=0)), rel=1e-10)
    assert (pooled.shift[2], pooled.scale[2]) == (0, 1)
    assert standardise(each, numeric).shift.shape == (4, 3)


def test_standardised_data_have_mean_zero_and_variance_one():
    data = DATASETS["breast_cancer"]().load(None, None)
    x = standardise(moments(data.x, data.numeric), data.numeric).apply(data.x).double()
    torch.testing.assert_close(x.mean(0), torch.zeros(30).double(), rtol=0, atol=1e-5)
    torch.testing.assert_close(x.var(0, correction=0), torch.ones(30).double(), rtol=1e-5, atol=0)


def test_two_passes_keep_a_spread_far_below_the_mean():
    """However the sums are averaged: up to a factor, and up to the rounding of a network."""
    gen = torch.Generator().manual_seed(0)
    x = 1e6 + 6 * torch.randn(999, 2, generator=gen).double()
    starts, counts = torch.tensor([0, 10]), torch.tensor([10, 989])
    held = Shards(x, torch.zeros(999), torch.arange(2), starts, counts)

    def exact(each):
        return each.mean(0, keepdim=True).expand_as(each)

    def gossip(each):
        noise = 1 + 1e-15 * torch.randn(each.shape, generator=gen).double()
        return exact(each) * torch.tensor([[[0.3]], [[1.7]]]) * noise

    numeric = torch.tensor([True, True])
    std = x.std(0, correction=0).expand(2, 2)
    for average in (exact, gossip):
        found = in_two_passes(held, numeric, average, torch.float64)
        torch.testing.assert_close(found.shift, x.mean(0).expand(2, 2), rtol=1e-14, atol=0)
        torch.testing.assert_close(1 / found.scale, std, rtol=1e-10, atol=0)


def test_hard_features():
    gen = torch.Generator().manual_seed(0)
    far = 1e6 + 100 * torch.randn(1000, generator=gen)  # mean much larger than spread
    constant = torch.full((1000,), 0.1)
    never = torch.full((1000,), torch.nan)
    x = torch.stack([far, constant, never], 1)
    numeric = torch.ones(3).bool()
    affine = standardise(moments(x, numeric), numeric, torch.float64)
    assert float(1 / affine.scale[0]) == pytest.approx(float(far.double().std(correction=0)), 1e-6)
    assert affine.scale[1:].tolist() == [1, 1]
    assert affine.apply(x)[:, 1:].abs().max() < 1e-8


@pytest.mark.parametrize(
    ("name", "rows", "shape", "outputs"),
    [
        ("digits", 1797, (1, 8, 8), 10),
        ("breast_cancer", 569, (30,), 2),
        ("wine", 178, (13,), 3),
        ("diabetes", 442, (10,), 1),
    ],
)
def test_the_data_sets_of_scikit_learn(name, rows, shape, outputs):
    data = DATASETS[name]().load(None, None)
    assert (len(data.x), data.shape, data.outputs) == (rows, shape, outputs)
    assert data.x.dtype == torch.float32
    assert data.y.dtype == (torch.int64 if outputs > 1 else torch.float32)
    assert (data.numeric is None) == (name == "digits")
    if name == "digits":
        assert (data.x.min(), data.x.max()) == (0, 1)
