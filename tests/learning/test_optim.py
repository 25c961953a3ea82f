from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from p2pfl.learning import optim, schedules
from p2pfl.learning.tree import leaves, take, tree_map

ROWS, D, STEPS = 3, 5, 20

CASES = {
    "sgd": (optim.sgd(0.1), torch.optim.SGD, {"lr": 0.1}),
    "sgd decay": (
        optim.sgd(0.1, weight_decay=0.2),
        torch.optim.SGD,
        {"lr": 0.1, "weight_decay": 0.2},
    ),
    "momentum": (
        optim.sgd(0.1, momentum=0.9, weight_decay=0.2),
        torch.optim.SGD,
        {"lr": 0.1, "momentum": 0.9, "weight_decay": 0.2},
    ),
    "nesterov": (
        optim.sgd(0.1, momentum=0.7, nesterov=True),
        torch.optim.SGD,
        {"lr": 0.1, "momentum": 0.7, "nesterov": True},
    ),
    "adam": (optim.adam(0.1), torch.optim.Adam, {"lr": 0.1}),
    "adam all": (
        optim.adam(0.1, 0.8, 0.95, 1e-3, 0.3),
        torch.optim.Adam,
        {"lr": 0.1, "betas": (0.8, 0.95), "eps": 1e-3, "weight_decay": 0.3},
    ),
    "adam beta 0": (optim.adam(0.1, 0.0), torch.optim.Adam, {"lr": 0.1, "betas": (0.0, 0.999)}),
    "adamw": (optim.adamw(0.1), torch.optim.AdamW, {"lr": 0.1}),
    "adamw all": (
        optim.adamw(0.1, 0.8, 0.95, 1e-3, 0.3),
        torch.optim.AdamW,
        {"lr": 0.1, "betas": (0.8, 0.95), "eps": 1e-3, "weight_decay": 0.3},
    ),
}

RATES = {
    "step_decay": (
        schedules.step_decay(0.1, 4, 0.5),
        lambda o: torch.optim.lr_scheduler.StepLR(o, 4, 0.5),
    ),
    "exponential": (
        schedules.exponential(0.1, 0.9),
        lambda o: torch.optim.lr_scheduler.ExponentialLR(o, 0.9),
    ),
    "linear": (
        schedules.linear(0.1, 15, 0.02),
        lambda o: torch.optim.lr_scheduler.LinearLR(o, 1.0, 0.2, 15),
    ),
    "cosine": (
        schedules.cosine(0.1, STEPS, 0.01),
        lambda o: torch.optim.lr_scheduler.CosineAnnealingLR(o, STEPS, 0.01),
    ),
    "constant": (
        schedules.constant(0.1),
        lambda o: torch.optim.lr_scheduler.ConstantLR(o, 1.0),
    ),
}

ALL = {
    **{name: case[0] for name, case in CASES.items()},
    **{f"adam {name}": optim.adam(rate) for name, (rate, _) in RATES.items()},
    "chain": optim.chain(
        [optim.clip_norm(1.0), optim.clip_value(0.5), optim.weight_decay(0.1), optim.sgd(0.1, 0.9)]
    ),
}


def gradients(step, rows=ROWS):
    draw = torch.Generator().manual_seed(step)
    return 2 * torch.randn(rows, D, generator=draw, dtype=torch.float64)


def ours(opt, params, steps=range(STEPS)):
    state = opt.init(params)
    for step in steps:
        update, state = opt.update(gradients(step, len(params)), state, params)
        params = params + update
    return params, state


def theirs(kind, options, params, scheduler=None):
    leaf = params.clone().requires_grad_()
    opt = kind([leaf], **options)
    rate = scheduler(opt) if scheduler else None
    for step in range(STEPS):
        leaf.grad = gradients(step)
        opt.step()
        if rate:
            rate.step()
    return leaf.detach()


def start(rows=ROWS):
    return torch.linspace(-1, 1, rows * D, dtype=torch.float64).reshape(rows, D)


@pytest.mark.parametrize("name", CASES)
def test_is_torch_optim(name):
    opt, kind, options = CASES[name]
    found, _ = ours(opt, start())
    torch.testing.assert_close(found, theirs(kind, options, start()), rtol=1e-12, atol=1e-12)


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize("name", RATES)
@pytest.mark.parametrize("factory", ["sgd", "adamw"])
def test_schedules_are_those_of_torch(factory, name):
    rate, scheduler = RATES[name]
    opt = optim.OPTIMISERS[factory](rate)
    kind = {"sgd": torch.optim.SGD, "adamw": torch.optim.AdamW}[factory]
    found, _ = ours(opt, start())
    expected = theirs(kind, {"lr": 0.1}, start(), scheduler)
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("name", ALL)
def test_rows_are_independent_and_state_has_rows_first(name):
    opt = ALL[name]
    block, state = ours(opt, start())
    assert all(len(leaf) == ROWS for leaf in leaves(state))
    for i in range(ROWS):
        params = start()[i : i + 1]
        alone = opt.init(params)
        for step in range(STEPS):
            update, alone = opt.update(gradients(step)[i : i + 1], alone, params)
            params = params + update
        torch.testing.assert_close(params, block[i : i + 1], rtol=1e-14, atol=1e-14)


@pytest.mark.parametrize("name", ALL)
def test_rows_may_stand_at_different_counts(name):
    opt = ALL[name]
    _, early = ours(opt, start(1), range(3))
    _, late = ours(opt, start(1), range(11))
    both = tree_map(lambda *rows: torch.cat(rows), early, late)
    grads, params = gradients(50, 2), start(2)
    expected = [
        opt.update(grads[i : i + 1], take(both, torch.tensor([i])), params[i : i + 1])[0]
        for i in range(2)
    ]
    found, _ = opt.update(grads, both, params)
    torch.testing.assert_close(found, torch.cat(expected), rtol=1e-14, atol=1e-14)


@pytest.mark.parametrize("name", ALL)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_type_is_kept_and_inputs_are_only_read(name, dtype):
    opt = ALL[name]
    params, grads = start().to(dtype), gradients(0).to(dtype)
    _, state = opt.update(grads, opt.init(params), params)
    given = (params, grads, state)
    kept = tree_map(torch.clone, given)
    update, _ = opt.update(grads, state, params)
    assert update.dtype is dtype
    assert all(map(torch.equal, leaves(given), leaves(kept)))


def test_plain_sgd_has_no_state():
    assert optim.sgd(0.1).init(start()) == ()


def test_bias_correction_in_single_precision():
    params = torch.zeros(1, 1)
    update, _ = optim.adam(1.0, eps=0.0).update(torch.ones(1, 1), optim.adam().init(params), params)
    assert update.item() == pytest.approx(-1.0, abs=3e-7)


@given(st.floats(0.1, 10), st.integers(0, 1000))
@settings(max_examples=25, deadline=None)
def test_clip_norm_is_per_row(norm, seed):
    grads = gradients(seed)
    clipped, state = optim.clip_norm(norm).update(grads, (), start())
    for row, new in zip(grads, clipped, strict=True):
        expected = row * min(1.0, norm / row.norm())
        torch.testing.assert_close(new, expected, rtol=1e-14, atol=0)
    assert state == ()


def test_clip_norm_leaves_zero_alone():
    zero = torch.zeros(2, 3)
    assert torch.equal(optim.clip_norm(1.0).update(zero, (), zero)[0], zero)


def test_clip_value_and_scale():
    grads = torch.tensor([[-3.0, 0.5, 2.0]])
    assert optim.clip_value(1.0).update(grads, (), grads)[0].tolist() == [[-1.0, 0.5, 1.0]]
    assert optim.scale(-2.0).update(grads, (), grads)[0].tolist() == [[6.0, -1.0, -4.0]]


def test_chain_composes_in_order():
    grads, params = torch.full((1, 4), 3.0), torch.ones(1, 4)
    opt = optim.chain([optim.clip_norm(2.0), optim.weight_decay(0.5), optim.sgd(0.1)])
    update, _ = opt.update(grads, opt.init(params), params)
    torch.testing.assert_close(update, torch.full((1, 4), -0.1 * (1 + 0.5)))


def test_cosine_with_warmup():
    rate = schedules.cosine(1.0, 14, final=0.2, warmup=4)
    count = torch.arange(20, dtype=torch.float64).unsqueeze(1)
    found = rate(count).squeeze(1)
    assert found[:4].tolist() == [0.25, 0.5, 0.75, 1.0]
    assert found[4].item() == 1.0
    assert found[9].item() == pytest.approx(0.6, abs=1e-12)
    assert (found[14:] - 0.2).abs().max() < 1e-12
    assert (found[4:].diff() <= 1e-15).all()


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: optim.sgd(-1.0), "lr must be a finite number >= 0, not -1.0"),
        (lambda: optim.sgd(float("nan")), "lr must be"),
        (lambda: optim.sgd(0.1, momentum=1.0), r"momentum must be in \[0, 1\), not 1.0"),
        (lambda: optim.sgd(0.1, nesterov=True), "nesterov must be false when momentum is 0"),
        (lambda: optim.sgd(0.1, weight_decay=-1), "weight_decay must be"),
        (lambda: optim.adam(beta1=1.0), "beta1"),
        (lambda: optim.adam(beta2=-0.1), "beta2"),
        (lambda: optim.adam(eps=-1.0), "eps"),
        (lambda: optim.adam(-1.0), "lr"),
        (lambda: optim.adam(weight_decay=-1.0), "weight_decay"),
        (lambda: optim.adamw(weight_decay=-1.0), "weight_decay"),
        (lambda: optim.weight_decay(-1.0), "rate"),
        (lambda: optim.clip_norm(0.0), "norm"),
        (lambda: optim.clip_value(-1.0), "value"),
        (lambda: optim.scale(float("inf")), "factor"),
        (lambda: optim.chain([]), "parts"),
        (lambda: schedules.constant(-1), "value"),
        (lambda: schedules.step_decay(1, 0, 0.5), "every"),
        (lambda: schedules.step_decay(1, 1, 2), "factor"),
        (lambda: schedules.exponential(1, 0), "rate"),
        (lambda: schedules.linear(1, 0), "steps"),
        (lambda: schedules.cosine(1, 5, warmup=5), "warmup"),
        (lambda: schedules.cosine(1, 5, final=-1), "final"),
    ],
)
def test_bad_values_are_named(make, message):
    with pytest.raises(ValueError, match=message):
        make()
