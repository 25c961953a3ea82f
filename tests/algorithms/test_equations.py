"""Each method against its equations, written out as in the papers."""

from __future__ import annotations

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


EQUATIONS = {
    "dpsgd": dpsgd,
    "dpsgd combine first": combine_first,
    "push_sum": push_sum,
    "gradient_tracking": gradient_tracking,
    "d2": d2,
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
