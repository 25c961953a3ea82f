from __future__ import annotations

import copy

import pytest
import torch
from learning_cases import MODELS, Odd, block, build
from torch import nn

from p2pfl import rng
from p2pfl.errors import UserError
from p2pfl.learning.evaluation import Evaluator
from p2pfl.learning.losses import cross_entropy
from p2pfl.learning.modules import (
    KeyedDropout,
    assemble,
    estimate_buffers,
    forward,
    predict,
    pure,
)
from p2pfl.learning.spec import Spec


def key(number: int):
    return rng.keys(1, torch.tensor(number))


@pytest.mark.parametrize("name", MODELS)
def test_flat_vector_and_back(name):
    _, model = build(name)
    spec = Spec.of(model)
    vector = spec.flatten(model)
    assert vector.shape == (spec.size,)
    own = dict(model.named_parameters())
    for parameter, view in spec.unflatten(vector).items():
        assert torch.equal(view, own[parameter])
        assert view.untyped_storage().data_ptr() == vector.untyped_storage().data_ptr()
    rows = torch.stack([vector, 2 * vector, 3 * vector])
    for parameter, view in spec.unflatten(rows).items():
        assert torch.equal(view[2], 3 * own[parameter])
        assert view.untyped_storage().data_ptr() == rows.untyped_storage().data_ptr()


def test_what_a_forward_pass_leaves_behind_is_in_no_model_made_of_it():
    made, params, x, y, _ = block(*build("shared"))
    Evaluator(made, cross_entropy())(params, {}, x, y[0])  # stacks the rows
    values = made.spec.unflatten(params[2])
    module = assemble(made, values, {})
    assert module.hidden is None
    torch.testing.assert_close(module(x[2]), predict(made, values, {}, x[2]))


def test_tied_once_and_frozen_never():
    spec = Spec.of(Odd(4, 2))
    assert "one.weight" in spec.names
    assert "two.weight" not in spec.names
    assert not [name for name in spec.names if "frozen" in name]


def test_digest():
    one, two = Spec.of(nn.Linear(2, 3)), Spec.of(nn.Linear(2, 3))
    assert one.digest == two.digest
    others = [nn.Linear(3, 2), nn.Linear(2, 3).double(), nn.Sequential(nn.Linear(2, 3))]
    assert len({Spec.of(other).digest for other in others} | {one.digest}) == 4


@pytest.mark.filterwarnings("ignore:Complex modules")
@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: nn.ReLU(), "not none"),
        (lambda: nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2).double()), "float32, float64"),
        (lambda: nn.Linear(2, 2).to(torch.complex64), "complex64"),
        (lambda: nn.LazyLinear(3), "parameter weight is lazy"),
        (lambda: nn.Sequential(nn.Linear(2, 2), nn.AlphaDropout(0.1)), r"AlphaDropout \(1\)"),
    ],
)
def test_what_cannot_be_trained_is_refused(make, message):
    with pytest.raises(UserError, match=message):
        pure(make())


def test_copies_hold_no_memory_for_what_is_trained():
    model = nn.Sequential(nn.Linear(300, 200), nn.BatchNorm1d(200), nn.Linear(200, 100))
    model[2].requires_grad_(requires_grad=False)
    made = pure(model)
    for part in (made.training, made.evaluating, made.pattern, made.estimating):
        held = sum(p.untyped_storage().nbytes() for p in part.parameters() if p.requires_grad)
        assert held < 100
        assert part.get_parameter("2.weight") is model[2].weight  # frozen, and nobody writes it


def test_what_a_module_keeps_outside_its_registry_is_not_taken_for_trained():
    class Aside(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(2, 1)
            self.aside = [self.linear.weight]

        def forward(self, x):
            return x @ self.aside[0].T

    model = Aside()
    params = Spec.of(model).unflatten(Spec.of(model).flatten(model))
    assert forward(pure(model), params, key(0), torch.ones(3, 2)).isnan().all()


def test_the_model_is_left_alone():
    _, model = build("batchnorm")
    before = copy.deepcopy(model.state_dict())
    made, params, x, _, keys = block(MODELS["batchnorm"][0], model)
    views = made.spec.unflatten(params[0])
    forward(made, views, keys[0], x[0])
    estimate_buffers(made, views, x[0])
    after = model.state_dict()
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert any(isinstance(module, nn.Dropout2d) for module in model.modules())
    assert model.training


def test_rate_of_dropout():
    drop = KeyedDropout(0.3, layer=0)
    drop.key = key(0)
    y = drop(torch.ones(100, 1000))
    kept = (y != 0).double().mean()
    # 10^5 draws of a Bernoulli: five standard errors.
    assert abs(kept - 0.7) < 5 * (0.21 / 1e5) ** 0.5
    torch.testing.assert_close(y[y != 0], torch.full_like(y[y != 0], 1 / 0.7))


def test_dropout_of_none_and_all():
    x = torch.randn(4, 5)
    assert torch.equal(KeyedDropout(0.0, 0)(x), x)
    assert not KeyedDropout(1.0, 0)(x).any()
    assert torch.equal(KeyedDropout(0.5, 0).eval()(x), x)


def test_whole_channels_are_dropped():
    made = pure(nn.Sequential(nn.Conv2d(1, 1, 1), nn.Dropout2d(0.5)))
    params = {"0.weight": torch.zeros(1, 1, 1, 1), "0.bias": torch.ones(1)}
    y = forward(made, params, key(3), torch.zeros(64, 1, 3, 3))
    share = (y != 0).float().mean((1, 2, 3))
    assert set(share.tolist()) == {0.0, 1.0}


def test_masks_are_of_key_layer_and_call():
    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = nn.Parameter(torch.ones(1))
            self.one, self.two = nn.Dropout(0.5), nn.Dropout(0.5)

        def forward(self, x):
            return torch.stack([self.one(x), self.one(x), self.two(x)]) * self.weight

    made = pure(Twice())
    params, x = {"weight": torch.ones(1)}, torch.ones(2, 40)
    y = forward(made, params, key(0), x)
    assert len({tuple(mask.flatten().tolist()) for mask in y}) == 3
    assert torch.equal(forward(made, params, key(0), x), y)
    assert not torch.equal(forward(made, params, key(1), x), y)


def test_a_module_used_twice_is_replaced_everywhere():
    drop = nn.Dropout(0.5)
    made = pure(nn.Sequential(nn.Linear(3, 3), drop, nn.Sequential(nn.Linear(3, 3), drop)))
    assert not any(isinstance(module, nn.Dropout) for module in made.training.modules())
    assert made.training[1] is made.training[2][1]
    assert len(made.dropouts) == 1


def test_masks_are_unlike_in_torch_and_leave_its_generator_alone():
    _, model = build("mlp")
    made, params, x, _, keys = block((6,), model)
    before = torch.get_rng_state()
    forward(made, made.spec.unflatten(params[0]), keys[0], x[0])
    assert torch.equal(torch.get_rng_state(), before)


def test_statistics_are_those_of_the_data():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Dropout(0.5)).double()
    made = pure(model)
    x = torch.randn(50, 3, dtype=torch.float64)
    vector = made.spec.flatten(model) * 1.5
    views = made.spec.unflatten(vector)
    inner = x @ views["0.weight"].T + views["0.bias"]
    found = estimate_buffers(made, views, x)
    torch.testing.assert_close(found["1.running_mean"], inner.mean(0), rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(found["1.running_var"], inner.var(0), rtol=1e-12, atol=1e-12)
    by_hand = (inner - inner.mean(0)) / (inner.var(0) + 1e-5).sqrt()
    by_hand = by_hand * views["1.weight"] + views["1.bias"]
    torch.testing.assert_close(predict(made, views, found, x), by_hand, rtol=1e-12, atol=1e-12)
    plain = assemble(made, views, found)
    torch.testing.assert_close(plain(x), by_hand, rtol=1e-12, atol=1e-12)
    assert not plain.training
    assert torch.equal(model[1].running_mean, torch.zeros(4).double())


def test_without_normalisation_there_is_nothing_to_estimate():
    _, model = build("mlp")
    made = pure(model)
    views = made.spec.unflatten(made.spec.flatten(model))
    assert estimate_buffers(made, views, torch.zeros(2, 6).double()) == {}


def test_what_a_forward_pass_writes_is_forgotten():
    class Counting(nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = nn.Parameter(torch.ones(1))
            self.register_buffer("mean", torch.zeros(1))

        def forward(self, x):
            self.mean.add_(1.0)
            return x * self.weight + self.mean

    made = pure(Counting())
    params, x = {"weight": torch.ones(1)}, torch.zeros(2, 1)
    for _ in range(3):
        assert forward(made, params, key(0), x).tolist() == [[1.0], [1.0]]
