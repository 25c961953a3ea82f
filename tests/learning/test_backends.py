from __future__ import annotations

import subprocess
import sys

import pytest
import torch
from learning_cases import MODELS, Lstm, block, build
from torch import nn

from p2pfl.errors import RunError
from p2pfl.learning import backends, losses
from p2pfl.learning.modules import pure

LOSS = losses.cross_entropy()


def assert_same(one, two):
    for left, right in zip(one, two, strict=True):
        torch.testing.assert_close(left, right, rtol=1e-11, atol=1e-12)


@pytest.mark.parametrize("name", MODELS)
def test_backends_agree(name):
    made, *batch = block(*build(name))
    expected = backends.looped(made, LOSS)(*batch)
    for other in (backends.vmapped, backends.debug, backends.auto):
        assert_same(other(made, LOSS)(*batch), expected)


@pytest.mark.parametrize("name", MODELS)
def test_a_row_alone_is_a_row_among_others(name):
    made, *batch = block(*build(name))
    losses_, grads = backends.looped(made, LOSS)(*batch)
    for i in range(len(grads)):
        alone = backends.looped(made, LOSS)(*(part[i : i + 1] for part in batch))
        assert torch.equal(alone[1][0], grads[i])
        assert torch.equal(alone[0][0], losses_[i])


def test_gradient_is_that_of_autograd():
    _, model = build("cnn")
    made, params, x, y, keys = block(MODELS["cnn"][0], model)
    found, grads = backends.looped(made, LOSS)(params, x, y, keys)
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


def test_blocks_of_rows_change_nothing():
    made, *batch = block(*build("mlp"), rows=21)
    assert_same(backends.vmapped(made, LOSS, 1)(*batch), backends.looped(made, LOSS)(*batch))


def test_inputs_are_left_alone():
    for name, factory in backends.BACKENDS.items():
        made, *batch = block(*build("odd"))
        kept = [part.clone() for part in batch]
        with torch.no_grad():
            _, grads = factory(made, LOSS)(*batch)
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
    expected = backends.looped(made, LOSS)(*batch)
    assert torch.equal(torch.get_rng_state(), before)
    torch.manual_seed(99)
    found = backends.looped(made, LOSS)(*(part[2:3] for part in batch))
    assert torch.equal(found[1][0], expected[1][2])
    batch[3] = batch[3] + 1
    assert not torch.equal(backends.looped(made, LOSS)(*batch)[1], expected[1])


def test_auto_says_why():
    made, *batch = lstm_block()
    auto = backends.auto(made, LOSS)
    auto(*(part[:1] for part in batch))
    assert "not tried yet" in auto.reason
    found = auto(*batch)
    assert auto.reason.startswith("looped: vmap refused the model")
    assert_same(found, backends.looped(made, LOSS)(*batch))
    made, *batch = block(*build("mlp"))
    auto = backends.auto(made, LOSS)
    auto(*batch)
    assert auto.reason.startswith("vmapped: it works")


def test_known_randomness_is_not_unknown():
    made, *batch = block(*build("mlp"))
    assert not backends.draws_by_itself(made, batch[0][0], batch[1][0], batch[3][0])


def test_no_rows():
    made, *batch = block(*build("linear"))
    for factory in backends.BACKENDS.values():
        found, grads = factory(made, LOSS)(*(part[:0] for part in batch))
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
        backends.debug(made, LOSS)(*batch)


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
        backends.debug(made, LOSS)(params, x, y, torch.arange(2))


def test_debug_checks_the_loss():
    wrong = LOSS._replace(each=lambda outputs, y: outputs)
    made, *batch = block(*build("linear"))
    with pytest.raises(RunError, match=r"the loss of 4 examples has shape \(4, 3\)"):
        backends.debug(made, wrong)(*batch)


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
