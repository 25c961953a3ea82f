"""Made-up data sets."""

from __future__ import annotations

import pytest
import torch

from p2pfl.data import DATASETS, HOLDOUTS, PARTITIONERS, federate
from p2pfl.data import synthetic as module
from p2pfl.errors import UserError


def load(*args, **keys):
    return DATASETS["synthetic"](*args, **keys).load(None, None)


def test_classes_are_balanced_clouds_of_the_given_width():
    data = load(4003, (2, 3), classes=4, noise=0.5)
    assert (data.shape, data.outputs, data.classes) == ((2, 3), 4, ("0", "1", "2", "3"))
    assert (data.x.dtype, data.y.dtype) == (torch.float32, torch.int64)
    assert sorted(data.y.bincount().tolist()) == [1000, 1001, 1001, 1001]
    assert data.y[:4].tolist() != [0, 1, 2, 3]  # not in the order of the file
    clouds = [data.x[data.y == k] for k in range(4)]
    for cloud in clouds:
        assert cloud.std(0).sub(0.5).abs().max() < 0.05
    centres = torch.stack([cloud.mean(0).flatten() for cloud in clouds])
    assert torch.pdist(centres).min() > 0.5
    assert load(50, noise=0.0).x.unique(dim=0).shape == (10, 20)


def test_a_regression_is_linear_up_to_the_noise():
    for noise in (0.0, 0.5):
        data = load(4000, (20,), classes=0, noise=noise)
        assert (data.outputs, data.classes, data.y.dtype) == (1, (), torch.float32)
        fit = torch.linalg.lstsq(data.x, data.y.unsqueeze(1)).solution
        left = (data.x @ fit).squeeze(1) - data.y
        assert float(left.std()) == pytest.approx(noise, abs=0.02)
        assert float(data.y.std()) > 0.5


@pytest.mark.parametrize("classes", [0, 3])
def test_the_seed_is_all_there_is(classes, monkeypatch):
    keys = {"examples": 60, "shape": (5,), "classes": classes}
    one = load(**keys, seed=-1)
    monkeypatch.setattr(module, "_CHUNK", 7)
    again, other = load(**keys, seed=-1), load(**keys, seed=1)
    assert one.x.equal(again.x)
    assert one.y.equal(again.y)
    assert not one.x.equal(other.x)
    assert not one.y.equal(other.y)


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"examples": 0}, "examples = 0 must be at least 1"),
        ({"shape": ()}, r"shape = \[\] must be one or more sizes"),
        ({"shape": (3, 0)}, r"shape = \[3, 0\] must be one or more sizes"),
        ({"classes": 1}, "classes = 1 must be at least 2, or 0"),
        ({"classes": -1}, "classes = -1 must be at least 2, or 0"),
        ({"noise": -0.1}, "noise = -0.1 must be a finite number, at least 0"),
        ({"noise": float("inf")}, "noise = inf must be"),
        ({"noise": float("nan")}, "noise = nan must be"),
        ({"examples": 10**15}, "take 7.45e.07 GiB, more memory than there is"),
        ({"examples": 2**62}, "more memory than there is"),
    ],
)
def test_bad_values_are_refused(keys, message):
    with pytest.raises(UserError, match=message):
        load(**keys)


def test_ten_thousand_nodes_share_it_out():
    data = load(40_000, (2,), seed=3)
    fed = federate(data, PARTITIONERS["iid"](), HOLDOUTS["random"](), 10_000, 0)
    assert fed.train.count.unique().tolist() == [3, 4]
    assert len(fed.train.nodes) == 10_000
    assert len(fed.test.x) == 8000
