"""Methods that send compressed models: their equations, what they keep, and what they reach."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from algorithm_cases import blocks, exchange, graphs, matrix, play
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from p2pfl import codec, rng
from p2pfl.algorithm import Algorithm, Inbox, Rows
from p2pfl.algorithms import beer, choco, deepsqueeze, dpsgd, jwins, moniqua, quantised
from p2pfl.algorithms.moniqua import Residues
from p2pfl.codec.wavelet import haar, inverse_haar
from p2pfl.learning.optim import Optimiser, sgd
from p2pfl.topology import complete_graph, ring_graph

LAWS = settings(max_examples=15, deadline=None)
ETA = 0.1
CODECS = {
    "identity": codec.identity(),
    "half": codec.half(),
    "bfloat16": codec.bfloat16(),
    "int8": codec.int8(),
    "qsgd": codec.qsgd(16),
    "sign": codec.sign(),
    "top_k": codec.top_k(2),
    "random_k": codec.random_k(2, indices="seed"),
    "wavelet": codec.wavelet(2, levels=1),
}


def close(actual: Tensor, expected: Tensor, rtol: float = 1e-10, atol: float = 1e-11) -> None:
    torch.testing.assert_close(actual, expected, rtol=rtol, atol=atol)


def everybody(n: int) -> Rows:
    return Rows(torch.arange(n), torch.ones(n, dtype=torch.int64))


def largest_two(x: Tensor) -> Tensor:
    return x * (x.abs() >= x.abs().sort(dim=1, descending=True).values[:, 1:2])


def test_quantised_equation():
    x, g = torch.randn(2, 6, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    w = matrix(ring_graph(6), lazy=False)
    state = play(quantised(sgd(ETA), codec.top_k(2)), x, everybody(6), g.unsqueeze(0), w)
    x = x - ETA * g
    expected = torch.empty_like(x)
    for i in range(6):
        moves = [w[i, j] * (largest_two(x)[j] - largest_two(x)[i]) for j in range(6)]
        expected[i] = x[i] + sum(moves)
    close(state.x, expected)


@LAWS
@given(data=st.data())
def test_deepsqueeze_equation(data):
    graph = data.draw(graphs(8))
    x, rows, grads = data.draw(blocks(len(graph)))
    w, gamma = matrix(graph, lazy=False), 0.3
    got = play(deepsqueeze(sgd(ETA), codec.top_k(2), gamma), x, rows, grads, w)
    error = torch.zeros_like(x)
    for g in grads:
        v = x - ETA * g + error
        said = largest_two(v)
        x, error = x - ETA * g + gamma * (w @ said - said), v - said
    close(got.x, x)
    close(got.error, error)


@LAWS
@given(data=st.data())
def test_beer_equation(data):
    graph = data.draw(graphs(8))
    start, rows, grads = data.draw(blocks(len(graph)))
    w, gamma = matrix(graph, lazy=False), 0.4
    got = play(beer(sgd(ETA), codec.top_k(2), gamma), start, rows, grads, w)
    # Algorithm 1 of the paper, with v^0 = g^0, h^0 = u^0 = 0, and all said once to begin with.
    x, v = start, grads[0]
    h, u = largest_two(x), largest_two(v)
    for t in range(len(grads)):
        x = x + gamma * (w @ h - h) - ETA * v
        if t + 1 < len(grads):
            h = h + largest_two(x - h)
            v = v + gamma * (w @ u - u) + grads[t + 1] - grads[t]
            u = u + largest_two(v - u)
    close(got.x, x)


@pytest.mark.parametrize("steps", [1, 3])
@pytest.mark.parametrize("name", CODECS)
@LAWS
@given(data=st.data())
def test_beer_keeps_the_sum_of_the_gradients(name, steps, data):
    a, graph = beer(sgd(ETA), CODECS[name], 0.2), data.draw(graphs(8))
    x, rows, grads = data.draw(blocks(len(graph)))
    for t in range(steps, len(grads) + 1, steps):
        state = play(a, x, rows, grads[:t], matrix(graph), steps)
        close(state.y.sum(0), grads[t - 1].sum(0))
    if len(graph) > 1:
        assert not torch.allclose(state.y, grads[-1])


@pytest.mark.parametrize("name", CODECS)
@pytest.mark.parametrize("method", [quantised, deepsqueeze, choco])
@LAWS
@given(data=st.data())
def test_the_mean_moves_by_the_mean_gradient(method, name, data):
    a, graph = method(sgd(ETA), CODECS[name]), data.draw(graphs(8))
    x, rows, grads = data.draw(blocks(len(graph)))
    state = play(a, x, rows, grads, matrix(graph, lazy=False))
    close(state.x.mean(0), x.mean(0) - ETA * grads.mean(1).sum(0))


def test_with_all_entries_they_are_dpsgd():
    made = torch.Generator().manual_seed(3)
    x, grads = (torch.randn(*s, 6, 8, dtype=torch.float64, generator=made) for s in ((), (9,)))
    rows, w = everybody(6), matrix(ring_graph(6), lazy=False)
    expected = play(dpsgd(sgd(ETA)), x, rows, grads, w).x
    for a in (
        quantised(sgd(ETA), codec.identity()),
        choco(sgd(ETA), codec.top_k(share=1.0), gamma=1.0),
        deepsqueeze(sgd(ETA), codec.wavelet(share=1.0, levels=2), gamma=1.0),
        jwins(sgd(ETA), share=1.0, levels=3),
    ):
        close(play(a, x, rows, grads, w).x, expected)


def test_beer_draws_other_lots_for_the_gradients():
    a = beer(sgd(ETA), codec.random_k(5))
    state = a.step(a.init(torch.ones(1, 400), everybody(1)), torch.ones(1, 400))
    (x, y), *_ = a.send(state).columns
    assert not torch.equal(x, y)


# Error feedback.


@pytest.mark.parametrize("name", CODECS)
def test_what_was_said_and_what_was_not_is_all_there_was(name):
    """The sum of what was sent and the last error is the sum of the models."""
    a, w = deepsqueeze(sgd(ETA), CODECS[name], 0.1), matrix(ring_graph(6), lazy=False)
    made = torch.Generator().manual_seed(5)
    x, grads = (torch.randn(*s, 6, 4, dtype=torch.float64, generator=made) for s in ((), (40,)))
    state, heard = a.init(x, everybody(6)), None
    said, models = torch.zeros_like(x), torch.zeros_like(x)
    for g in grads:
        state = a.step(state, g)
        models = models + state.x
        state, heard = exchange(a, state, heard, w, 4)
        said = said + heard.x
    close(said + state.error, models)
    assert name == "identity" or float(state.error.abs().max()) > 1e-6


# What they reach.


def gossiped(a: Algorithm[Any, Any, Any], rounds: int, d: int = 100) -> tuple[Tensor, float]:
    """The models of a ring of 16 after rounds without gradients, and how far the mean moved."""
    x = torch.randn(16, d, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    w, state, heard = matrix(ring_graph(16), lazy=False), a.init(x, everybody(16)), None
    for _ in range(rounds):
        state, heard = exchange(a, state, heard, w, d)
    return state.x, float((state.x.mean(0) - x.mean(0)).abs().max())


def spread(x: Tensor) -> float:
    return float((x - x.mean(0)).norm())


START = spread(
    torch.randn(16, 100, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
)


@pytest.mark.parametrize(
    ("gamma", "low", "high"),
    [(0.05, 1e-8, 1e-5), (0.1, 0, 1e-10), (0.2, 0, 1e-14), (0.3, 0, 1e-14)],
)
def test_choco_reaches_the_mean_as_fast_as_it_should(gamma, low, high):
    x, drift = gossiped(choco(sgd(0.0), codec.top_k(10), gamma), 5000)
    assert low <= spread(x) / START <= high
    assert drift < 1e-13


def test_choco_diverges_beyond():
    x, _ = gossiped(choco(sgd(0.0), codec.top_k(10), 0.5), 3000)
    assert not spread(x) < 10 * START


@pytest.mark.parametrize(
    ("name", "gamma"),
    [("half", 1.0), ("bfloat16", 1.0), ("int8", 1.0), ("qsgd", 0.5), ("sign", 0.3)],
)
def test_choco_makes_up_for_all_that_a_codec_loses(name, gamma):
    x, drift = gossiped(choco(sgd(0.0), CODECS[name], gamma), 1200)
    assert spread(x) < 1e-5 * START
    assert drift < 1e-13


def test_plain_exchange_agrees_up_to_what_the_codec_loses_of_a_model():
    for name, left in (("half", 2**-11), ("bfloat16", 2**-8), ("int8", 2 / 127)):
        x, drift = gossiped(quantised(sgd(0.0), CODECS[name]), 600)
        assert left / 100 < spread(x) / START < 4 * left
        assert drift < 1e-13
    x, _ = gossiped(quantised(sgd(0.0), codec.top_k(10)), 600)
    assert not spread(x) < START / 5  # and not at all where it loses most of it


def test_deepsqueeze_spreads_less_with_smaller_steps():
    left = [
        spread(gossiped(deepsqueeze(sgd(0.0), codec.top_k(30), gamma), 2500)[0]) / START
        for gamma in (0.2, 0.05)
    ]
    assert left[1] < left[0] / 2 < 0.2


def descended(a: Algorithm[Any, Any, Any], rounds: int) -> float:
    """How far the worst of eight is from the minimum of the mean of unlike quadratics."""
    made = torch.Generator().manual_seed(2)
    curve = 0.5 + 2 * torch.rand(8, 6, dtype=torch.float64, generator=made)
    centre = torch.randn(8, 6, dtype=torch.float64, generator=made)
    best = (curve * centre).sum(0) / curve.sum(0)
    w, heard = matrix(ring_graph(8), lazy=False), None
    state = a.init(torch.zeros_like(centre), everybody(8))
    for _ in range(rounds):
        state = a.step(state, curve * (a.model(state) - centre))
        state, heard = exchange(a, state, heard, w, 6)
    return float((state.x - best).abs().max())


@pytest.mark.parametrize(
    "one", [codec.top_k(2), codec.random_k(3), codec.sign(), codec.int8(), codec.half()]
)
def test_beer_is_exact_under_compression_and_choco_is_not(one):
    assert descended(beer(sgd(0.05), one, 0.2), 3000) < 1e-11
    assert descended(choco(sgd(0.05), one, 0.2), 500) > 1e-2


# Moniqua.


@pytest.mark.parametrize("bits", [2, 3, 8])
def test_moniqua_agrees_within_one_level(bits):
    x = torch.randn(16, 100, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    theta = 1.05 * float((x.amax(0) - x.amin(0)).max())
    level = 2 * theta / (1 - 2 / 2**bits) / 2**bits
    x, drift = gossiped(moniqua(sgd(0.0), theta, bits), 1000)
    assert float((x - x.mean(0)).square().mean().sqrt()) <= level / 2
    assert float((x.amax(0) - x.amin(0)).max()) <= 2 * level
    assert drift < 1e-12


def test_moniqua_takes_far_models_for_others():
    x = torch.randn(16, 100, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    theta = float((x.amax(0) - x.amin(0)).max()) / 12
    x, _ = gossiped(moniqua(sgd(0.0), theta), 1000)
    assert float((x.amax(0) - x.amin(0)).max()) > theta


@LAWS
@given(seed=st.integers(0, 999), bits=st.integers(2, 8), theta=st.floats(0.1, 10))
def test_moniqua_is_right_to_a_level_if_no_two_are_further_apart(seed, bits, theta):
    made = torch.Generator().manual_seed(seed)
    base = 1000 * torch.randn(1, 30, dtype=torch.float64, generator=made)
    x = base + (theta * 0.999) * torch.rand(5, 30, dtype=torch.float64, generator=made)
    a, w = moniqua(sgd(ETA), theta, bits, seed=seed), matrix(complete_graph(5))
    state = a.init(x, everybody(5))
    message = a.send(state)
    assert message.levels.nbytes == 5 * math.ceil(bits * 30 / 8)
    level = 2 * theta / (1 - 2 / 2**bits) / 2**bits
    u = rng.uniform(rng.keys(seed, torch.tensor([0])), 30)
    said = (x / level + u).floor() * level  # as if it had travelled in full
    state, _ = exchange(a, state, None, w, 30)
    close(state.x, x + w @ said - said, rtol=0, atol=1e-9 * 1000)


@pytest.mark.parametrize("sparse", [False, True])
@pytest.mark.filterwarnings("ignore:.*[Ss]parse CSR")
def test_moniqua_weighs_every_neighbour_by_its_own_weight(sparse):
    x = torch.tensor([[0.0], [0.25], [0.5]], dtype=torch.float64)
    a = moniqua(sgd(ETA), theta=1.5)  # levels are 3/254 apart
    w = torch.tensor([[0.5, 0.0, 0.5], [0.0, 0.75, 0.25], [0.5, 0.25, 0.25]]).double()
    state = a.init(x, everybody(3))
    heard = a.absorb(None, a.send(state), 1)
    inbox = Inbox(w.to_sparse_csr() if sparse else w, heard, torch.arange(3))
    close(a.receive(state, inbox).x, w @ x, atol=3 / 127)


def test_moniqua_refuses_what_nobody_sends():
    with pytest.raises(ValueError, match="bytes instead of"):
        moniqua(sgd(ETA), 1.0, bits=3).absorb(None, Residues(torch.zeros(1, 3).byte()), 9)


# JWINS.


def test_jwins_equation():
    n, d, k, levels = 5, 11, 4, 2
    made = torch.Generator().manual_seed(7)
    x, grads = (torch.randn(*s, n, d, dtype=torch.float64, generator=made) for s in ((), (6,)))
    w = matrix(ring_graph(n), lazy=False)
    got = play(jwins(sgd(ETA), k=k, levels=levels), x, everybody(n), grads, w)
    change = torch.zeros(n, 12, dtype=torch.float64)  # since last shared, of every coefficient
    for g in grads:
        trained = x - ETA * g
        change = change + haar(trained, levels) - haar(x, levels)
        now = haar(trained, levels)
        chosen = [set(row.abs().topk(k).indices.tolist()) for row in change]
        after = torch.zeros_like(now)
        for i in range(n):
            for c in range(12):
                theirs = (now[j, c] if c in chosen[j] else now[i, c] for j in range(n))
                after[i, c] = sum(w[i, j] * v for j, v in enumerate(theirs))
            change[i, list(chosen[i])] = 0
        x = inverse_haar(after, levels)[:, :d]
        change = change + haar(x, levels) - now
    close(got.x, x)


def test_jwins_shares_what_has_waited_longest():
    a, w = jwins(sgd(1.0), k=1, levels=1), matrix(complete_graph(2))
    state, heard, shared = a.init(torch.zeros(2, 4).double(), everybody(2)), None, []
    alike = inverse_haar(torch.tensor([[1.0, 1.01, 1.02, 1.03]]).double(), 1).repeat(2, 1)
    for _ in range(8):
        state = a.step(state, alike)
        state, heard = exchange(a, state, heard, w, 4)
        shared.append(int(heard.there[0].argmax()))
    assert set(shared[:4]) == set(shared[4:]) == {0, 1, 2, 3}


def test_jwins_does_not_share_what_has_not_changed():
    """And so does not agree on what nobody trains."""
    x, _ = gossiped(jwins(sgd(0.0), share=0.2), 200)
    assert 0.1 < spread(x) / START < 0.9


# In half precision.


@pytest.mark.parametrize(
    "build",
    [
        lambda opt: choco(opt, codec.top_k(2), 0.3),
        lambda opt: quantised(opt, codec.int8()),
        lambda opt: deepsqueeze(opt, codec.sign(), 0.1),
        lambda opt: beer(opt, codec.half(), 0.3),
        lambda opt: moniqua(opt, 9.0),
        lambda opt: jwins(opt, k=2),
    ],
)
def test_states_keep_their_types(build):
    a, w = build(sgd(ETA)), matrix(ring_graph(5))
    state = first = a.init(torch.randn(5, 8).bfloat16(), everybody(5))
    heard = None
    for _ in range(3):
        state = a.step(state, torch.randn(5, 8).bfloat16())
        message = a.send(state)
        again = a.send(first)
        assert [f.dtype for f in message] == [f.dtype for f in again]
        assert [f.shape for f in message] == [f.shape for f in again]
        state, heard = exchange(a, state, heard, w, 8)
        assert a.model(state).dtype == torch.bfloat16
        for old, new in zip(first, state, strict=True):
            if isinstance(old, Tensor):
                assert old.dtype == new.dtype


MISTAKES = [
    (lambda opt: choco(opt, codec.sign(), 0.0), "gamma = 0"),
    (lambda opt: beer(opt, codec.sign(), 1.5), "gamma = 1.5"),
    (lambda opt: deepsqueeze(opt, codec.sign(), -1.0), "gamma = -1"),
    (lambda opt: moniqua(opt, 0.0), "theta = 0"),
    (lambda opt: moniqua(opt, math.inf), "theta = inf"),
    (lambda opt: moniqua(opt, 1.0, bits=1), "bits = 1"),
    (lambda opt: moniqua(opt, 1.0, gamma=2.0), "gamma = 2"),
    (lambda opt: jwins(opt), "either k"),
    (lambda opt: jwins(opt, share=0.1, levels=0), "levels = 0"),
]


@pytest.mark.parametrize(("build", "words"), MISTAKES)
def test_mistakes_are_named(build: Any, words: str):
    opt: Optimiser = sgd(ETA)
    with pytest.raises(ValueError, match=words):
        build(opt)
