"""Each method against its equations, written out as in the papers."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from algorithm_cases import PLAIN, blocks, graphs, matrix, play
from hypothesis import given, settings
from hypothesis import strategies as st

from p2pfl.learning.optim import sgd

ETA = 0.1


def dpsgd(x, grads, w, rows):
    for g in grads:
        x = w @ (x - ETA * g)
    return x


def combine_first(x, grads, w, rows):
    for g in grads:
        x = w @ x - ETA * g
    return x


def push_sum(x, grads, w, rows):
    mass = torch.ones_like(x[:, :1])
    for g in grads:
        x, mass = w @ (x - ETA * g), w @ mass
    return x / mass


def gosgd(x, grads, w, rows):
    mass = torch.ones_like(x[:, :1])
    for g in grads:
        x = w @ (mass * (x - ETA * g)) / (w @ mass)  # x are the models, not numerators
        mass = w @ mass
    return x


def gradient_tracking(x, grads, w, rows):
    y = grads[0]
    for t in range(len(grads)):
        x = w @ (x - ETA * y)
        if t + 1 < len(grads):
            y = w @ y + grads[t + 1] - grads[t]
    return x


def d2(x, grads, w, rows):
    before, x = x, w @ (x - ETA * grads[0])
    for t in range(1, len(grads)):
        before, x = x, w @ (2 * x - before - ETA * grads[t] + ETA * grads[t - 1])
    return x


def exact_diffusion(x, grads, w, rows):
    psi, half = x, (w + torch.eye(len(w), dtype=w.dtype)) / 2
    for g in grads:
        before, psi = psi, x - ETA * g
        x = half @ (psi + x - before)
    return x


def extra(x, grads, w, rows):
    one = torch.eye(len(w), dtype=w.dtype)
    before, x = x, w @ x - ETA * grads[0]
    for t in range(1, len(grads)):
        change = -ETA * (grads[t] - grads[t - 1])
        before, x = x, (one + w) @ x - (one + w) / 2 @ before + change
    return x


def kgt(x, grads, w, rows, steps=1, outer_lr=1.0):
    c = torch.zeros_like(x)
    for batch in grads.split(steps):
        y = x
        for g in batch:
            y = y - ETA * (g + c)
        z = (x - y) / (steps * ETA)
        c = c - z + w @ z
        x = w @ (x - outer_lr * steps * ETA * z)
    return x


def push_diging(x, grads, w, rows):
    u, mass, y = x, torch.ones_like(x[:, :1]), grads[0]
    for t in range(len(grads)):
        u, mass = w @ (u - ETA * y), w @ mass
        if t + 1 < len(grads):
            y = w @ y + grads[t + 1] - grads[t]
    return u / mass


def push_pull(x, grads, w, rows):
    r, y = (w > 0).double(), grads[0]
    r = r / r.sum(1, keepdim=True)
    for t in range(len(grads)):
        x = r @ (x - ETA * y)
        if t + 1 < len(grads):
            y = w @ y + grads[t + 1] - grads[t]
    return x


def qg(x, grads, w, rows, steps=1, kind=(0.9, 0.9, False)):
    beta, mu, nesterov = kind
    m = torch.zeros_like(x)
    for batch in grads.split(steps):
        start, ahead = x, m
        for g in batch:
            ahead = beta * ahead + g
            x = x - ETA * (g + beta * ahead if nesterov else ahead)
        x = w @ x
        m = mu * m + (1 - mu) * (start - x) / (steps * ETA)
    return x


def outer(rule):
    """Return a method whose rule takes what was mixed of the changes, and what it remembers."""

    def method(x, grads, w, rows, steps=1):
        known = None
        for batch in grads.split(steps):
            change, known = rule(-(w @ (ETA * batch.sum(0))), known)
            x = w @ x + change
        return x

    return method


def momentum(lr, nesterov):
    def rule(delta, trace):
        trace = delta if trace is None else 0.9 * trace + delta
        return lr * (delta + 0.9 * trace if nesterov else trace), trace

    return outer(rule)


def adaptive(beta1, second):
    def rule(delta, known):
        m, v = known or (torch.zeros_like(delta), torch.full_like(delta, 1e-6))
        m, v = beta1 * m + (1 - beta1) * delta, second(v, delta**2)
        return 0.1 * m / (v**0.5 + 1e-3), (m, v)

    return outer(rule)


def choco(x, grads, w, rows):
    public = torch.zeros_like(x)
    for g in grads:
        x = x - ETA * g
        change = x - public
        kept = change.abs() >= change.abs().sort(dim=1, descending=True).values[:, 1:2]
        public = public + change * kept  # the two largest
        x = x + 0.4 * (w @ public - public)
    return x


def gossip(x, grads, w, rows):
    age = torch.zeros(len(x), dtype=torch.float64)
    for g in grads:
        x, age = x - ETA * g, age + 1
        shares = w * (age + 1)
        x = (shares / shares.sum(1, keepdim=True)) @ x
        age = torch.where(w > 0, age, -1.0).max(1).values
    return x


def fedavg(x, grads, w, rows):
    n = rows.examples.double()
    for g in grads:
        shares = (w > 0) * n
        x = (shares / shares.sum(1, keepdim=True)) @ (x - ETA * g)
    return x


def local(x, grads, w, rows):
    return x - ETA * grads.sum(0)


def noloco(x, grads, w, rows, steps=1, kind=(0.7, 0.5, 0.7)):
    """By the paper, which sends what the local steps have changed, and the slow models."""
    lr, momentum, gamma = kind
    slow, velocity = x, torch.zeros_like(x)
    for k in range(len(grads) // steps):
        change = -ETA * grads[k * steps : (k + 1) * steps].sum(0)
        velocity = momentum * velocity + lr * w @ change - gamma * (slow - w @ slow)
        slow = slow + velocity
    return slow


EQUATIONS = {
    "dpsgd": dpsgd,
    "dpsgd combine first": combine_first,
    "push_sum": push_sum,
    "gosgd": gosgd,
    "gradient_tracking": gradient_tracking,
    "d2": d2,
    "exact_diffusion": exact_diffusion,
    "extra": extra,
    "kgt": kgt,
    "push_diging": push_diging,
    "push_pull": push_pull,
    "qg": qg,
    "qg nesterov": partial(qg, kind=(0.8, 0.7, True)),
    "diloco": momentum(0.7, nesterov=True),
    "fedavgm": momentum(1.0, nesterov=False),
    "noloco": noloco,
    "noloco gamma": partial(noloco, kind=(0.6, 0.8, 0.9)),
    "fedadagrad": adaptive(0.0, lambda v, square: v + square),
    "fedadam": adaptive(0.9, lambda v, square: 0.99 * v + 0.01 * square),
    "fedyogi": adaptive(0.9, lambda v, square: v - 0.01 * square * torch.sign(v - square)),
    "choco top_k": choco,
    "gossip": gossip,
    "fedavg": fedavg,
    "local": local,
}


@pytest.mark.parametrize("name", EQUATIONS)
@settings(max_examples=20, deadline=None)
@given(data=st.data())
def test_equations(name, data):
    a, graph = PLAIN[name](sgd(ETA)), data.draw(graphs(8))
    x, rows, grads = data.draw(blocks(len(graph)))
    w = matrix(graph, a.needs.weights, lazy=False)
    got = a.model(play(a, x, rows, grads, w))
    torch.testing.assert_close(got, EQUATIONS[name](x, grads, w, rows), rtol=1e-10, atol=1e-12)


SEVERAL = ["kgt", "qg", "qg nesterov", "diloco", "fedavgm", "fedadagrad", "fedadam", "fedyogi"]
SEVERAL += ["noloco", "noloco gamma"]


@pytest.mark.parametrize("name", SEVERAL)
@settings(max_examples=10, deadline=None)
@given(data=st.data())
def test_equations_of_rounds_of_three_steps(name, data):
    a, graph = PLAIN[name](sgd(ETA)), data.draw(graphs(8))
    x, rows, grads = data.draw(blocks(len(graph)))
    w = matrix(graph, lazy=False)
    got = a.model(play(a, x, rows, grads, w, steps=3))
    expected = EQUATIONS[name](x, grads, w, rows, steps=3)
    torch.testing.assert_close(got, expected, rtol=1e-10, atol=1e-12)
