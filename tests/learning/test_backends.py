from __future__ import annotations

import copy
import subprocess
import sys

import pytest
import torch
from learning_cases import MODELS, Lstm, block, build
from torch import nn

from p2pfl.errors import RunError, UserError
from p2pfl.learning import backends, losses
from p2pfl.learning.modules import pure

LOSS = losses.cross_entropy()
NO_CHAINS = ("batchnorm", "odd", "shared")


def assert_same(one, two):
    for left, right in zip(one, two, strict=True):
        torch.testing.assert_close(left, right, rtol=1e-11, atol=1e-12)


@pytest.mark.parametrize("name", MODELS)
def test_backends_agree(name):
    made, *batch = block(*build(name))
    expected = backends.Looped(made, LOSS)(*batch)
    for other in (backends.Vmapped, backends.Debug, backends.Auto):
        assert_same(other(made, LOSS)(*batch), expected)
    if name not in NO_CHAINS:
        assert_same(backends.Stacked(made, LOSS)(*batch), expected)


@pytest.mark.parametrize(
    ("kind", "name"),
    [
        (kind, name)
        for kind in ("looped", "vmapped", "stacked", "auto")
        for name in MODELS
        if kind != "stacked" or name not in NO_CHAINS
    ],
)
def test_descending_adds_a_multiple_of_the_gradient(kind, name):
    made, params, *batch = block(*build(name))
    losses_, grads = backends.Looped(made, LOSS)(params, *batch)
    factor = -torch.linspace(0.1, 0.5, len(params), dtype=torch.float64).unsqueeze(1)
    moved = params.clone()
    backend = backends.BACKENDS[kind](made, LOSS, None)
    found = backend.descend(moved, [tuple(batch)], factor.unsqueeze(0))
    assert_same((found, moved), (losses_, params + factor * grads))


@pytest.mark.parametrize("name", ["binary", "squared"])
def test_other_losses_stacked(name):
    loss = losses.LOSSES[name]()
    made, params, x, y, keys = block((6,), nn.Sequential(nn.Linear(6, 1)).double())
    batch = (params, x, y.clamp(max=1), keys)
    assert_same(backends.Stacked(made, loss)(*batch), backends.Looped(made, loss)(*batch))


def test_layers_of_a_chain():
    model = nn.Sequential(
        nn.Conv1d(2, 3, 3, stride=2, padding=1, bias=False),
        nn.Sequential(nn.Tanh(), nn.Dropout1d(0.5)),
        nn.Sigmoid(),
        nn.Flatten(),
        nn.Identity(),
        nn.Linear(12, 4, bias=False),
        nn.GELU("tanh"),
        nn.Linear(4, 3),
    ).double()
    made, *batch = block((2, 8), model)
    assert_same(backends.Stacked(made, LOSS)(*batch), backends.Looped(made, LOSS)(*batch))


def test_examples_with_more_axes():
    model = nn.Sequential(nn.Linear(4, 5), nn.ReLU(), nn.Flatten(), nn.Linear(15, 3)).double()
    made, *batch = block((3, 4), model)
    assert_same(backends.Stacked(made, LOSS)(*batch), backends.Looped(made, LOSS)(*batch))


def _hooked():
    model = nn.Sequential(nn.Linear(6, 3))
    model[0].register_forward_hook(lambda *_: None)
    return model


def _hooked_root():
    model = nn.Sequential(nn.Linear(6, 3))
    model.register_forward_hook(lambda module, given, found: found * 2)
    return model


def _twice():
    drop = nn.Dropout(0.5)
    return nn.Sequential(drop, nn.Linear(6, 6), drop, nn.Linear(6, 3))


def _tied():
    layer = nn.Linear(6, 6)
    return nn.Sequential(layer, layer, nn.Linear(6, 3))


@pytest.mark.parametrize(
    ("model", "why"),
    [
        (nn.Sequential(nn.Linear(6, 3), nn.LayerNorm(3)), "1 is a LayerNorm"),
        (_hooked(), "0 has hooks"),
        (_hooked_root(), "the model has hooks"),
        (_twice(), "2 is used twice"),
        (_tied(), "some parameters are shared"),
        (nn.Sequential(nn.Linear(6, 6).requires_grad_(False), nn.Linear(6, 3)), "not trained"),
        (nn.Sequential(nn.Conv1d(1, 2, 3, padding="same"), nn.Linear(6, 3)), "0 pads 'same'"),
    ],
)
def test_what_is_no_chain(model, why):
    made = pure(model)
    with pytest.raises(UserError, match=why):
        backends.Stacked(made, LOSS)
    assert why in backends.Auto(made, LOSS)._refusal


@pytest.mark.parametrize("kind", ["stacked", "vmapped", "looped", "auto"])
def test_half_precision(kind):
    torch.manual_seed(0)
    model = MODELS["mlp"][1]((6,), 3)
    made, params, x, y, keys = block((6,), model)
    expected, grads = backends.Looped(made, LOSS)(params.float(), x.float(), y, keys)
    low = pure(copy.deepcopy(model).bfloat16())
    for stored in (torch.float32, torch.bfloat16):
        backend = backends.BACKENDS[kind](low, LOSS, torch.bfloat16)
        found, rough = backend(params.to(stored), x.bfloat16(), y, keys)
        assert (found.dtype, rough.dtype) == (torch.float32, stored)
        torch.testing.assert_close(found, expected, rtol=0.05, atol=0.05)
        assert (rough.float() - grads).norm() < 0.1 * grads.norm()
        moved = params.to(stored, copy=True)
        backend.descend(moved, [(x.bfloat16(), y, keys)], torch.full((1, 5, 1), -1.0))
        assert moved.dtype == stored
        assert (params.float() - moved.float() - grads).norm() < 0.15 * grads.norm()


@pytest.mark.parametrize("name", MODELS)
def test_a_row_alone_is_a_row_among_others(name):
    made, *batch = block(*build(name))
    losses_, grads = backends.Looped(made, LOSS)(*batch)
    for i in range(len(grads)):
        alone = backends.Looped(made, LOSS)(*(part[i : i + 1] for part in batch))
        assert torch.equal(alone[1][0], grads[i])
        assert torch.equal(alone[0][0], losses_[i])


def test_gradient_is_that_of_autograd():
    _, model = build("cnn")
    made, params, x, y, keys = block(MODELS["cnn"][0], model)
    found, grads = backends.Looped(made, LOSS)(params, x, y, keys)
    for i in range(len(params)):
        with torch.no_grad():
            for name, value in made.spec.unflatten(params[i]).items():
                model.get_parameter(name).copy_(value)
        model.zero_grad()
        loss = nn.functional.cross_entropy(model(x[i]), y[i])
        loss.backward()
        flat = torch.cat([p.grad.reshape(-1) for p in model.parameters()])
        torch.testing.assert_close(grads[i], flat, rtol=1e-12, atol=1e-14)
        assert found[i].item() == pytest.approx(loss.item(), rel=1e-13)


def test_inputs_are_left_alone():
    for name, factory in backends.BACKENDS.items():
        made, *batch = block(*build("mlp" if name == "stacked" else "odd"))
        kept = [part.clone() for part in batch]
        with torch.no_grad():
            _, grads = factory(made, LOSS, None)(*batch)
        assert not grads.requires_grad, name
        assert all(torch.equal(one, two) for one, two in zip(batch, kept, strict=True))
        assert not batch[0].requires_grad


def lstm_block():
    torch.manual_seed(0)
    return block((5, 3), Lstm().double())


def test_unknown_randomness_is_drawn_from_the_key():
    made, *batch = lstm_block()
    assert backends.draws_by_itself(made, batch[0][0], batch[1][0], batch[3][0])
    before = torch.get_rng_state()
    expected = backends.Looped(made, LOSS)(*batch)
    assert torch.equal(torch.get_rng_state(), before)
    torch.manual_seed(99)
    found = backends.Looped(made, LOSS)(*(part[2:3] for part in batch))
    assert torch.equal(found[1][0], expected[1][2])
    batch[3] = batch[3] + 1
    assert not torch.equal(backends.Looped(made, LOSS)(*batch)[1], expected[1])


@pytest.mark.parametrize("backend", [backends.Looped, backends.Vmapped, backends.Auto])
def test_what_a_model_raises_in_training_is_told_as_its_own(backend):
    model = nn.Sequential(nn.BatchNorm1d(6), nn.Linear(6, 3)).double()
    made, params, x, y, keys = block((6,), model, b=1)  # one example has no variance
    with pytest.raises(UserError, match="model: in training, ValueError: Expected more than 1"):
        backend(made, LOSS)(params, x, y, keys)


def test_auto_says_why():
    made, *batch = lstm_block()
    auto = backends.Auto(made, LOSS)
    auto(*(part[:1] for part in batch))
    assert "so far there was one at a time" in auto.reason
    found = auto(*batch)
    assert auto.reason.startswith("one row after the other: vmap refused the model")
    assert_same(found, backends.Looped(made, LOSS)(*batch))
    made, *batch = block(*build("mlp"))
    auto = backends.Auto(made, LOSS)
    auto(*batch)
    assert auto.reason == "8 layers stacked by hand"
    made, *batch = block(*build("odd"))
    auto = backends.Auto(made, LOSS)
    auto(*batch)
    assert auto.reason == "rows stacked by vmap: the model is a Odd"
    made, *batch = block(*build("batchnorm"))
    auto = backends.Auto(made, LOSS)
    auto(*batch)
    assert auto.reason.startswith("one row after the other: 1 is a BatchNorm2d")


def test_known_randomness_is_not_unknown():
    made, *batch = block(*build("mlp"))
    assert not backends.draws_by_itself(made, batch[0][0], batch[1][0], batch[3][0])


def test_no_rows():
    made, *batch = block(*build("linear"))
    for factory in backends.BACKENDS.values():
        found, grads = factory(made, LOSS, None)(*(part[:0] for part in batch))
        assert found.shape == (0,)
        assert grads.shape == (0, made.spec.size)


def _spoil_parameter(batch, made):
    made.spec.unflatten(batch[0])["1.bias"][3] = torch.nan


def _spoil_examples(batch, made):
    batch[1][2, 0] = torch.inf


def _spoil_targets(batch, made):
    batch[2] = batch[2][:, :-1]


def _spoil_size(batch, made):
    batch[0] = batch[0][:, 1:]


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (_spoil_parameter, "the parameter 1.bias of row 3 is not finite"),
        (_spoil_examples, "the examples of row 2 is not finite"),
        (_spoil_targets, "do not fit"),
        (_spoil_size, "rows of 20 parameters for a model of 21"),
    ],
)
def test_debug_names_what_is_wrong(spoil, message):
    made, *batch = block(*build("linear"))
    spoil(batch, made)
    with pytest.raises(RunError, match=message):
        backends.Debug(made, LOSS)(*batch)


def test_debug_names_the_gradient():
    class Root(nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = nn.Parameter(torch.zeros(3, dtype=torch.float64))

        def forward(self, x):
            return x + self.weight.abs().sqrt()

    made = pure(Root())
    params, x = torch.zeros(2, 3).double(), torch.zeros(2, 4, 3).double()
    y = torch.zeros(2, 4, dtype=torch.int64)
    with pytest.raises(RunError, match="the gradient of parameter weight of row 0"):
        backends.Debug(made, LOSS)(params, x, y, torch.arange(2))


def test_debug_checks_the_loss():
    wrong = LOSS._replace(each=lambda outputs, y: outputs)
    made, *batch = block(*build("linear"))
    with pytest.raises(RunError, match=r"the loss of 4 examples has shape \(4, 3\)"):
        backends.Debug(made, wrong)(*batch)


ALONE = """
import sys, torch
from p2pfl.data.shards import Examples, Shards
from p2pfl.learning import ModelTask, losses, models
at = torch.tensor([0])
train = Shards(torch.randn(9, 4), torch.arange(9) % 2, at, at, at + 9)
task = ModelTask(models.mlp([3], dropout=0.5)((4,), 2), losses.cross_entropy(), train,
                 Examples(train.x, train.y))
params = task.init(at)
task.grad(params, at, at)
task.evaluate(params, at)
print("torch._dynamo" in sys.modules)
"""


def test_a_single_row_never_loads_the_compiler():
    done = subprocess.run([sys.executable, "-c", ALONE], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"
