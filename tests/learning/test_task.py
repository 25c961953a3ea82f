from __future__ import annotations

import pytest
import torch
from learning_cases import MODELS, Lstm, build, examples, shards
from torch import nn

from p2pfl.data.batches import batch_indices
from p2pfl.data.shards import Shards
from p2pfl.data.statistics import Affine
from p2pfl.learning import (
    ModelTask,
    Quadratics,
    backends,
    evaluation,
    losses,
    models,
    per_node,
    task,
)

COUNTS = [9, 4, 7, 9, 2, 1]
NODES = torch.arange(len(COUNTS))
LOSS = losses.cross_entropy()


def make(name="mlp", counts=COUNTS, test=None, **options):
    shape, model = build(name)
    options = {"batch_size": 4, "seed": 3, "dtype": torch.float64} | options
    return ModelTask(model, LOSS, shards(counts, shape), test, **options)


def moved(made, nodes=NODES):
    noise = torch.randn(len(nodes), made.d, generator=torch.Generator().manual_seed(8)).double()
    return made.init(nodes) + 0.1 * noise


def test_everybody_starts_at_the_model():
    made = make()
    params = made.init(NODES)
    assert params.shape == (6, made.d)
    assert torch.equal(params, made.spec.flatten(build("mlp")[1]).expand(6, -1))
    params[0] = 0.0
    assert params[1].any()
    assert made.examples(NODES).tolist() == COUNTS


@pytest.mark.parametrize("batch_size", [1, 4, 100, "full"])
def test_gradient_by_hand_on_the_same_batch(batch_size):
    made = make("cnn", batch_size=batch_size)
    params, steps = moved(made), NODES * 2
    loss, grads = made.grad(params, NODES, steps)
    for i in range(len(NODES)):
        index = batch_indices(made.train, NODES[i : i + 1], steps[i : i + 1], batch_size, 3)
        model = made.predictor(params[i], i)
        value = nn.functional.cross_entropy(
            model(made.train.x[index[0]].double()), made.train.y[index[0]]
        )
        parts = torch.autograd.grad(value, [*model.parameters()])
        flat = torch.cat([part.reshape(-1) for part in parts])
        torch.testing.assert_close(grads[i], flat, rtol=1e-11, atol=1e-13)
        torch.testing.assert_close(loss[i], value.detach(), rtol=1e-12, atol=0)


@pytest.mark.parametrize("name", ["mlp", "odd"])
def test_a_row_alone_is_a_row_among_others(name):
    params = moved(make(name))
    loss, grads = make(name).grad(params, NODES, NODES + 5)
    for i in (0, 3, 5):
        alone = make(name).grad(params[i : i + 1], NODES[i : i + 1], NODES[i : i + 1] + 5)
        torch.testing.assert_close(alone[1][0], grads[i], rtol=1e-11, atol=1e-13)
        torch.testing.assert_close(alone[0][0], loss[i], rtol=1e-11, atol=0)


def test_the_block_follows_the_cache_or_the_user(monkeypatch):
    assert make(block=7).block == 7
    monkeypatch.setattr(task, "cache_bytes", lambda *how: 1)
    assert make().block == 1
    monkeypatch.setattr(task, "cache_bytes", lambda *how: 1 << 20)
    small, large = make(batch_size=1).block, make(batch_size=5).block
    assert small > large > 1


def test_threads_that_work_on_one_block_have_the_whole_cache(monkeypatch):
    monkeypatch.setattr(task, "cache_bytes", lambda device, threads: (1 << 20) // (threads or 4))
    each, together = (make(backend=b).block for b in (backends.Stacked, backends.Vmapped))
    assert 4 * each <= together < 4 * (each + 1)


def test_a_node_without_examples():
    made = make(counts=[5, 0, 5])
    nodes = torch.arange(3)
    loss, grads = made.grad(made.init(nodes), nodes, nodes)
    assert loss.isnan().tolist() == [False, True, False]
    assert grads.any(1).tolist() == [True, False, True]


@pytest.mark.parametrize("name", ["linear", "cnn", "odd", "batchnorm"])
@pytest.mark.parametrize("rows", [1, 4])
def test_scores_by_hand(name, rows):
    test = examples(50, MODELS[name][0])
    made = make(name, [9, 8, 7, 6], test)
    nodes = torch.arange(rows)
    params = moved(made, nodes)
    loss, acc = made.evaluate(params, nodes)
    for i in range(rows):
        outputs = made.predictor(params[i], i)(test.x.double())
        value = nn.functional.cross_entropy(outputs, test.y).item()
        assert loss[i].item() == pytest.approx(value, rel=1e-11)
        assert acc[i].item() == pytest.approx((outputs.argmax(1) == test.y).double().mean().item())


def test_scores_on_own_examples():
    made = make("linear", [3, 3], shards([4, 0], (6,), seed=5))
    nodes = torch.arange(2)
    params = moved(made, nodes)
    loss, acc = made.evaluate(params, nodes)
    x, y = made.test.rows_of(0)
    value = nn.functional.cross_entropy(made.predictor(params[0], 0)(x.double()), y)
    assert loss[0].item() == pytest.approx(value.item(), rel=1e-12)
    assert loss[1].isnan()
    assert acc[1].isnan()


def test_scores_of_what_cannot_be_stacked():
    torch.manual_seed(0)
    train, test = shards([3, 3, 3], (5, 3)), examples(20, (5, 3))
    made = ModelTask(Lstm(), LOSS, train, test, dtype=torch.float64)
    nodes = torch.arange(3)
    params = moved(made, nodes)
    loss, _ = made.evaluate(params, nodes)
    for i in range(3):
        value = nn.functional.cross_entropy(made.predictor(params[i], i)(test.x.double()), test.y)
        assert loss[i].item() == pytest.approx(value.item(), rel=1e-11)


class Noisy(nn.Module):
    """Draws whenever it is called, in evaluation too."""

    def __init__(self, norm: nn.Module) -> None:
        super().__init__()
        self.norm, self.head = norm, nn.Linear(6, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.norm(x + torch.randn_like(x)))


@pytest.mark.parametrize("norm", [nn.Identity, lambda: nn.BatchNorm1d(6)])
def test_who_draws_in_evaluation_has_the_same_scores_alone_as_among_others(norm, monkeypatch):
    monkeypatch.setattr(evaluation, "_BATCH_BYTES", 40 * 6 * 8)  # 40 examples of one row
    torch.manual_seed(0)
    made = ModelTask(Noisy(norm()), LOSS, shards([3, 3, 3], (6,)), examples(100, (6,)))
    nodes = torch.arange(3)
    params = moved(made, nodes).float()
    before = torch.get_rng_state()
    loss, _ = made.evaluate(params, nodes)
    assert torch.equal(torch.get_rng_state(), before)
    torch.manual_seed(99)
    alone = [made.evaluate(params[i : i + 1], nodes[i : i + 1]).loss for i in range(3)]
    assert torch.equal(loss, torch.cat(alone))
    assert len(set(loss.tolist())) == 3


def test_scores_without_test_examples_or_rows():
    made = make("linear")
    assert made.evaluate(made.init(NODES), NODES).loss.isnan().all()
    made = make("linear", test=examples(3, (6,)))
    assert made.evaluate(made.init(NODES[:0]), NODES[:0]).acc.shape == (0,)


def test_regression_has_no_accuracy():
    train = shards([5, 5], (6,))
    model = models.linear()((6,), 1)
    made = ModelTask(model, losses.squared(), train, train.rows_of(0), dtype=torch.float64)
    loss, acc = made.evaluate(made.init(NODES[:2]), NODES[:2])
    assert loss.isfinite().all()
    assert acc.isnan().all()


def affine(nodes=6, f=6):
    draw = torch.Generator().manual_seed(2)
    shift = torch.randn(nodes, f, generator=draw)
    return Affine(shift, 1 + torch.rand(nodes, f, generator=draw))


def test_standardised_by_constants_of_the_node():
    constants = affine()
    test = examples(30, (6,))
    test.x[3, 2] = torch.nan
    made = make("linear", test=test, affine=per_node(constants))
    made.train.x[0, 1] = torch.nan
    params = moved(made)
    raw = torch.tensor([[2.0, torch.nan, 1.0, 0.0, 5.0, 1.0]]).expand(6, 1, 6)
    found = made.standardised(raw, NODES)
    assert found[:, 0, 1].tolist() == [0.0] * 6
    expected = (raw[:, 0] - constants.shift) * constants.scale
    torch.testing.assert_close(found[:, 0, [0, 2]], expected[:, [0, 2]].double(), rtol=1e-6, atol=0)
    assert made.grad(params, NODES, NODES)[1].isfinite().all()
    loss, _ = made.evaluate(params, NODES)
    for i in (0, 5):
        x = made.standardised(test.x.unsqueeze(0), NODES[i : i + 1])[0]
        value = nn.functional.cross_entropy(made.predictor(params[i], i)(x), test.y)
        assert loss[i].item() == pytest.approx(value.item(), rel=1e-11)


def test_images_are_standardised_by_flat_constants():
    made = make("cnn", affine=per_node(affine(6, 64)))
    x, _ = made.batch(NODES[:1], NODES[:1])
    assert x.shape == (1, 4, 1, 8, 8)


def test_constants_of_the_nodes_held():
    constants, held = affine(3), torch.tensor([7, 2, 5])
    find = per_node(constants, held)
    assert torch.equal(find(torch.tensor([5, 7])).shift, constants.shift[[2, 0]])
    with pytest.raises(KeyError, match="6"):
        find(torch.tensor([6]))


def test_a_peer_with_its_own_shard_takes_the_same_step():
    constants = affine()
    everyone = make(affine=per_node(constants))
    params, node = moved(everyone), 2
    x, y = everyone.train.rows_of(node)
    at = torch.tensor([node])
    own = Shards(x, y, at, torch.tensor([0]), torch.tensor([len(y)]))
    one = Affine(constants.shift[at], constants.scale[at])
    peer = ModelTask(
        build("mlp")[1],
        LOSS,
        own,
        batch_size=4,
        seed=3,
        affine=per_node(one, at),
        dtype=torch.float64,
    )
    for step in range(6):
        expected = everyone.grad(params, NODES, torch.full_like(NODES, step))
        found = peer.grad(params[at], at, torch.tensor([step]))
        torch.testing.assert_close(found[1][0], expected[1][node], rtol=1e-11, atol=1e-13)


def test_statistics_come_from_an_even_sample(monkeypatch):
    monkeypatch.setattr(task, "_ENOUGH", 4)
    made = make("batchnorm", counts=[9])
    params = made.init(NODES[:1])
    model = made.predictor(params[0], 0)
    x = made.train.x[[0, 2, 4, 6]].double()
    inner = nn.functional.conv2d(x, model[0].weight, model[0].bias)
    torch.testing.assert_close(model[1].running_mean, inner.mean((0, 2, 3)), rtol=1e-11, atol=1e-12)


def test_the_backend_is_a_choice():
    made = make(backend=backends.Debug)
    other = make(backend=backends.Vmapped)
    params = moved(made)
    one, two = made.grad(params, NODES, NODES), other.grad(params, NODES, NODES)
    torch.testing.assert_close(one, two, rtol=1e-11, atol=1e-13)


def test_parameters_have_the_type_asked_for():
    made = make(dtype=torch.float32, test=examples(5, (6,)))
    params = made.init(NODES)
    assert params.dtype is torch.float32
    assert made.grad(params, NODES, NODES)[1].dtype is torch.float32
    assert made.evaluate(params, NODES).loss.dtype is torch.float32


def test_quadratics():
    quad = Quadratics(5, 3, seed=1)
    nodes = torch.arange(5)
    best = quad.optimum()
    loss, grads = quad.grad(best.expand(5, 3), nodes, nodes)
    assert grads.mean(0).abs().max() < 1e-14
    scores = quad.evaluate(torch.stack([best, best + 0.1]), nodes[:2])
    assert scores.loss[0].item() == pytest.approx(loss.mean().item(), rel=1e-13)
    assert scores.loss[1] > scores.loss[0]
    assert scores.acc.isnan().all()
    assert quad.examples(nodes).tolist() == [3] * 5
    params = torch.randn(5, 3, dtype=torch.float64, requires_grad=True)
    loss, grads = quad.grad(params, nodes, nodes)
    (expected,) = torch.autograd.grad(loss.sum(), params)
    torch.testing.assert_close(grads.detach(), expected, rtol=1e-13, atol=1e-13)


def test_noise_of_quadratics_belongs_to_node_and_step():
    quad = Quadratics(5, 3, noise=0.5)
    nodes, zero = torch.arange(5), torch.zeros(5, 3).double()
    _, grads = quad.grad(zero, nodes, nodes)
    _, alone = quad.grad(zero[:1], nodes[3:4], nodes[3:4])
    assert torch.equal(alone[0], grads[3])
    _, later = quad.grad(zero, nodes, nodes + 1)
    assert (later != grads).all()


@pytest.mark.parametrize("counts", [[9, 9, 8, 30], [9, 2, 8, 30]])
def test_what_is_drawn_ahead_is_what_would_be_drawn(counts):
    nodes, first = torch.arange(4), torch.tensor([3, 0, 7, 1])
    plain, ahead = make(counts=counts), make(counts=counts)
    ahead.prepare(nodes, first, 2)
    for who, begin, count in (
        (nodes, first, 2),
        (nodes[[2, 0]], first[[2, 0]], 2),
        (nodes[1:], first[1:] + 1, 2),  # other steps than were announced
        (nodes[1:], first[1:], 3),
    ):
        factors = torch.full((count, len(who), 1), -0.1, dtype=torch.float64)
        one, two = plain.init(who), ahead.init(who)
        loss = plain.descend(one, who, begin, factors)
        assert torch.equal(ahead.descend(two, who, begin, factors), loss)
        assert torch.equal(one, two)
