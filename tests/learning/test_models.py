from __future__ import annotations

import pytest
import torch
from torch import nn

from p2pfl.errors import UserError
from p2pfl.learning import losses, models


@pytest.mark.parametrize(
    ("name", "options", "shape"),
    [
        ("linear", {}, (5,)),
        ("logistic", {}, (1, 8, 8)),
        ("mlp", {"hidden": [], "dropout": 0.5}, (5,)),
        ("mlp", {"hidden": [4], "activation": "tanh", "dropout": 0.5}, (1, 8, 8)),
        ("cnn", {}, (3, 32, 32)),
        ("cnn", {}, (1, 16, 16)),
        ("cnn", {"channels": [20]}, (1, 8, 8)),
        ("cnn", {"channels": [8, 8], "kernel": 3}, (1, 10, 13)),
        ("lenet", {}, (1, 12, 12)),
        ("lenet", {}, (3, 32, 20)),
    ],
)
def test_models_give_outputs(name, options, shape):
    model = models.MODELS[name](**options)(shape, 7)
    assert model(torch.randn(2, *shape)).shape == (2, 7)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: models.cnn()((1, 8, 8), 10), "cnn needs images of at least 16 x 16, not 8 x 8"),
        (lambda: models.cnn()((1, 15, 28), 10), "not 15 x 28: the input is too small"),
        (lambda: models.lenet()((1, 11, 28), 10), "lenet needs images of at least 12 x 12"),
        (lambda: models.cnn()((64,), 10), r"shape must be \[channels, height, width\]"),
        (lambda: models.mlp(dropout=1.0), r"dropout must be in \[0, 1\), not 1.0"),
        (lambda: models.mlp([0]), "hidden"),
        (lambda: models.mlp(activation="selu"), "activation must be one of"),
        (lambda: models.cnn([]), "channels"),
        (lambda: models.cnn(kernel=0), "kernel"),
        (lambda: models.cnn(hidden=0), "hidden"),
    ],
)
def test_bad_values_are_named(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_least_sizes_are_least():
    for factory, side in ((models.cnn(), 16), (models.lenet(), 12), (models.cnn([5], 3), 4)):
        factory((1, side, side), 2)(torch.zeros(1, 1, side, side))
        with pytest.raises(ValueError, match="too small"):
            factory((1, side - 1, side), 2)


OWN = """
from __future__ import annotations
import dataclasses
from torch import nn

@dataclasses.dataclass
class Widths:
    width: int

def net(shape, outputs, width=3):
    return nn.Sequential(nn.Flatten(), nn.Linear(shape[0], Widths(width).width),
                         nn.Linear(width, outputs))

def wrong(shape, outputs):
    return 7

number = 5
"""


def test_a_model_from_a_file(tmp_path):
    path = tmp_path / "own_net.py"
    path.write_text(OWN)
    model = models.load_factory(f"{path}:net", {"width": 9})((4,), 2)
    assert model(torch.zeros(3, 4)).shape == (3, 2)
    assert model[1].out_features == 9


def test_a_model_from_a_module(tmp_path, monkeypatch):
    (tmp_path / "own_module_of_test.py").write_text(OWN)
    monkeypatch.syspath_prepend(tmp_path)
    factory = models.MODELS["custom"]("own_module_of_test:net")
    assert isinstance(factory((4,), 2), nn.Module)


@pytest.mark.parametrize(
    ("factory", "message"),
    [
        ("net", "must be 'module:function'"),
        (":net", "must be 'module:function'"),
        ("nowhere.py:net", "there is no file nowhere.py"),
        ("no_such_module_at_all:net", "cannot load no_such_module_at_all"),
        ("{path}:nte", "has no function 'nte'; it has Widths, net, wrong"),
        ("{path}:number", "has no function 'number'"),
        ("{broken}:net", "cannot load .*broken.py"),
        ("{missing}:net", "no_such_dependency"),
    ],
)
def test_what_is_missing_is_named(tmp_path, factory, message):
    files = {"path": OWN, "broken": "def (", "missing": "import no_such_dependency"}
    for name, text in files.items():
        (tmp_path / f"{name}.py").write_text(text)
    places = {name: tmp_path / f"{name}.py" for name in files}
    with pytest.raises(UserError, match=message):
        models.load_factory(factory.format(**places))


def test_what_is_no_module_is_refused(tmp_path):
    path = tmp_path / "own.py"
    path.write_text(OWN)
    with pytest.raises(UserError, match=r"returned int, not an nn\.Module"):
        models.load_factory(f"{path}:wrong")((4,), 2)


def test_cross_entropy():
    outputs = torch.tensor([[2.0, 0.0, 0.0], [0.0, 0.0, 5.0]], dtype=torch.float64)
    y = torch.tensor([0, 1])
    loss = losses.cross_entropy()
    expected = -outputs.log_softmax(1)[torch.arange(2), y]
    torch.testing.assert_close(loss.each(outputs, y), expected, rtol=1e-14, atol=0)
    assert loss.correct(outputs, y).tolist() == [1.0, 0.0]
    assert loss.outputs(3) == 3


def test_binary_is_cross_entropy_of_two_outputs():
    logit = torch.tensor([[3.0], [-1.0], [0.5]], dtype=torch.float64)
    two = torch.cat([torch.zeros_like(logit), logit], 1)
    y = torch.tensor([1, 1, 0])
    one, many = losses.binary(), losses.cross_entropy()
    torch.testing.assert_close(one.each(logit, y), many.each(two, y), rtol=1e-14, atol=0)
    assert one.correct(logit, y).tolist() == many.correct(two, y).tolist() == [1, 0, 0]
    assert one.outputs(2) == 1


def test_squared():
    loss = losses.squared()
    outputs = torch.tensor([[1.0], [3.0]])
    assert loss.each(outputs, torch.tensor([0.0, 1.0])).tolist() == [1.0, 4.0]
    wide = torch.tensor([[1.0, 3.0]])
    assert loss.each(wide, torch.tensor([[0.0, 1.0]])).tolist() == [2.5]
    assert loss.correct is None
    assert loss.outputs(0) == 1


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: losses.cross_entropy().outputs(0), "classes must be at least 2"),
        (lambda: losses.binary().outputs(3), "classes must be 2 for binary, not 3"),
        (lambda: losses.default_loss(1), "classes"),
    ],
)
def test_losses_know_their_classes(call, message):
    with pytest.raises(ValueError, match=message):
        call()


def test_tables_hold_factories_under_their_names():
    for name, factory in losses.LOSSES.items():
        assert factory().name == name
