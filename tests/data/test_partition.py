"""The laws of a partition, for every partitioner."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from p2pfl.data import PARTITIONERS, Labels

KEYS = {
    "dirichlet": {"alpha": 1.0, "min_partition_size": 1},
    "balanced_dirichlet": {"alpha": 1.0},
    "shard": {"num_shards_per_partition": 2},
    "pathological": {"num_classes_per_partition": 2},
    "size": {"partition_sizes": (40, 50, 60)},
}
DROPS = {"shard", "pathological"}  # by definition, the rows nobody is dealt


def labels(rows=150, classes=5, owners=3, seed=0):
    gen = torch.Generator().manual_seed(seed)
    y = torch.randint(classes, (rows,), generator=gen)
    return Labels(y, torch.arange(rows) % owners, owners)


def make(name, **keys):
    return PARTITIONERS[name](**{**KEYS.get(name, {}), **keys})


@pytest.mark.parametrize("name", sorted(PARTITIONERS))
def test_parts_are_sorted_disjoint_and_cover(name):
    parts = make(name)(labels(), 3, 7)
    joined = torch.cat(parts)
    assert len(parts) == 3
    assert all(part.dtype == torch.int64 and len(part) > 0 for part in parts)
    assert all(bool((part.diff() > 0).all()) for part in parts)
    assert len(joined.unique()) == len(joined)
    if name not in DROPS:
        assert joined.sort().values.tolist() == list(range(150))


@pytest.mark.parametrize("name", sorted(set(PARTITIONERS) - {"natural_id"}))
def test_the_seed_decides_and_an_own_seed_wins(name):
    def parts(experiment, **keys):
        return [part.tolist() for part in make(name, **keys)(labels(), 3, experiment)]

    assert parts(1) == parts(1)
    assert parts(1) != parts(2)
    assert parts(1, seed=9) == parts(2, seed=9) == parts(9)


@given(rows=st.integers(1, 60), n=st.integers(1, 12), seed=st.integers(-(2**63), 2**63 - 1))
@settings(max_examples=40, deadline=None)
def test_iid_sizes_differ_by_one(rows, n, seed):
    given_ = labels(rows)
    if n > rows:
        with pytest.raises(ValueError, match=f"{n} nodes cannot share {rows}"):
            make("iid")(given_, n, seed)
        return
    sizes = [len(part) for part in make("iid")(given_, n, seed)]
    assert sum(sizes) == rows
    assert max(sizes) - min(sizes) <= 1


def test_without_shuffle_iid_cuts_the_file():
    assert [p.tolist() for p in make("iid", shuffle=False)(labels(5), 2, 0)] == [[0, 1, 2], [3, 4]]


@pytest.mark.parametrize(
    ("name", "sizes"),
    [("linear", [16, 33, 51]), ("square", [7, 28, 65]), ("exponential", [9, 24, 67])],
)
def test_sizes_by_node(name, sizes):
    assert [len(part) for part in make(name)(labels(100), 3, 0)] == sizes


def test_size_gives_what_is_asked():
    assert [len(part) for part in make("size")(labels(), 3, 0)] == [40, 50, 60]


def test_natural_id_follows_the_groups():
    parts = make("natural_id")(labels(9), 3, 0)
    assert [part.tolist() for part in parts] == [[0, 3, 6], [1, 4, 7], [2, 5, 8]]


@given(n=st.integers(1, 12), alpha=st.floats(0.05, 10), seed=st.integers(0, 99))
@settings(max_examples=40, deadline=None)
def test_dirichlet_keeps_its_minimum(n, alpha, seed):
    try:
        parts = make("dirichlet", alpha=alpha, min_partition_size=4)(labels(400), n, seed)
    except ValueError as error:
        assert "min_partition_size = 4" in str(error)  # noqa: PT017  (unlucky is allowed)
        return
    assert min(len(part) for part in parts) >= 4
    assert sum(len(part) for part in parts) == 400


@given(n=st.integers(1, 23), seed=st.integers(0, 99))
@settings(max_examples=30, deadline=None)
def test_balanced_dirichlet_is_balanced_and_skewed(n, seed):
    given_ = labels(2000, classes=10)
    parts = make("balanced_dirichlet", alpha=0.2)(given_, n, seed)
    assert min(len(part) for part in parts) >= 0.45 * 2000 / n  # 0.5 of the group's own mean
    assert sum(len(part) for part in parts) == 2000


def test_a_large_alpha_is_nearly_iid_and_a_small_one_is_not():
    given_ = labels(5000)

    def largest_share(alpha):
        parts = make("dirichlet", alpha=alpha, min_partition_size=1)(given_, 5, 0)
        tops = [given_.y[part].bincount(minlength=5).max() / len(part) for part in parts]
        return sum(tops) / 5

    assert largest_share(1000.0) < 0.25
    assert largest_share(0.05) > 0.6


def test_dirichlet_takes_one_alpha_per_node():
    alpha = (100.0, 1.0, 1.0)
    sizes = [len(part) for part in make("dirichlet", alpha=alpha)(labels(), 3, 0)]
    assert sizes[0] > 130


@pytest.mark.parametrize("mode", ["random", "deterministic", "first-deterministic"])
def test_pathological_nodes_have_their_number_of_classes(mode):
    given_ = labels()
    parts = make("pathological", class_assignment_mode=mode)(given_, 7, 0)
    seen = [given_.y[part].unique().tolist() for part in parts]
    assert [len(classes) for classes in seen] == [2] * 7
    if mode == "deterministic":
        assert seen == [sorted([k % 5, (k + 1) % 5]) for k in range(7)]
    if mode == "first-deterministic":
        assert all(k % 5 in classes for k, classes in enumerate(seen))


@pytest.mark.parametrize(
    ("keys", "sizes"),
    [
        ({"num_shards_per_partition": 2}, [34, 34, 34]),  # 103 // 6 = 17 a shard
        ({"num_shards_per_partition": 2, "shard_size": 10}, [20, 20, 20]),
        ({"num_shards_per_partition": None, "shard_size": 10}, [40, 30, 30]),
        ({"num_shards_per_partition": None, "shard_size": 50, "keep_incomplete_shard": True}, None),
    ],
)
def test_shard_sizes(keys, sizes):
    parts = make("shard", **keys)(labels(103), 3, 0)
    if sizes is None:
        assert sorted(len(part) for part in parts) == [3, 50, 50]
    else:
        assert [len(part) for part in parts] == sizes


def test_two_shards_hold_few_classes():
    given_ = Labels(torch.arange(100) % 10)
    for part in make("shard")(given_, 5, 0):
        assert len(given_.y[part].unique()) <= 2


@pytest.mark.parametrize(
    ("name", "keys", "n", "message"),
    [
        ("iid", {}, 0, "nodes = 0"),
        ("size", {}, 2, "lists 3 sizes for 2 nodes"),
        ("size", {"partition_sizes": (1, 2, 3)}, 3, "add up to 6, but there are 150"),
        ("size", {"partition_sizes": (1, 0)}, 2, "must all be positive"),
        ("exponential", {}, 40, "node 0 of 40 would get none"),
        ("natural_id", {}, 4, "3 owners, but nodes = 4; set nodes = 3"),
        ("dirichlet", {"alpha": 0.0}, 3, "alpha = 0.0 must be greater than 0"),
        ("dirichlet", {"alpha": (1.0, 2.0)}, 3, "lists 2 numbers for 3 nodes"),
        ("dirichlet", {"min_partition_size": 0}, 3, "min_partition_size = 0 must be at least 1"),
        ("dirichlet", {"min_partition_size": 51}, 3, "min_partition_size = 51"),
        ("dirichlet", {"alpha": 1e-4, "min_partition_size": 45}, 3, "balanced_dirichlet"),
        ("balanced_dirichlet", {"alpha": -1}, 3, "greater than 0"),
        ("balanced_dirichlet", {"alpha": 1, "group_size": 0}, 3, "group_size = 0"),
        ("balanced_dirichlet", {"alpha": 1e-3}, 150, "less than half"),
        ("shard", {"num_shards_per_partition": None}, 3, "give num_shards_per_partition"),
        ("shard", {"num_shards_per_partition": 0}, 3, "must be at least 1"),
        ("shard", {"shard_size": 26}, 3, "5 shards of 26"),
        ("shard", {"num_shards_per_partition": 60}, 3, "too few"),
        ("pathological", {"num_classes_per_partition": 6}, 3, "the 5 classes"),
        ("pathological", {"class_assignment_mode": "odd"}, 3, "'first-deterministic'"),
        ("pathological", {"num_classes_per_partition": 5}, 60, "lower num_classes_per_partition"),
    ],
)
def test_the_impossible_is_refused(name, keys, n, message):
    with pytest.raises(ValueError, match=name) as caught:
        make(name, **keys)(labels(), n, 0)
    assert message in str(caught.value)


@pytest.mark.parametrize("name", ["dirichlet", "balanced_dirichlet", "shard", "pathological"])
def test_a_regression_has_no_classes(name):
    with pytest.raises(ValueError, match="regression"):
        make(name)(Labels(torch.rand(50)), 3, 0)


def test_natural_id_needs_owners():
    with pytest.raises(ValueError, match="does not say who owns"):
        make("natural_id")(Labels(torch.zeros(5, dtype=torch.int64)), 3, 0)
