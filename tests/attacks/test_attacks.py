"""Attacks: what is sent, what is known, and that nobody else is changed."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from p2pfl import aggregation as rules
from p2pfl.algorithm import Inbox, Rows
from p2pfl.algorithms import choco, dpsgd, fedavg, gossip, gradient_tracking, local, push_sum
from p2pfl.algorithms.averaging import Params
from p2pfl.attacks import ATTACKS, Known, alie_z, hostile
from p2pfl.attacks.lies import alie, dissensus, gaussian, ipm, mimic, replay, sign_flip
from p2pfl.attacks.refusal import without_non_finite
from p2pfl.codec import top_k
from p2pfl.learning.optim import sgd
from p2pfl.learning.pieces import Pieces
from p2pfl.learning.tree import leaves, take
from p2pfl.peer.letters import Letters
from p2pfl.topology import complete_graph, metropolis, push, ring_graph, static, weights

torch.set_num_threads(1)


def matrix(graph, needs: str = "mean") -> Tensor:
    return weights(static(graph).links(0), push() if needs == "mass" else metropolis())


OPT = sgd(0.1, momentum=0.9)
N, D = 6, 5
ROWS = Rows(torch.arange(N), torch.tensor([3, 1, 4, 1, 5, 9]))
W = matrix(complete_graph(N))
SENDING = [name for name in ATTACKS if name != "label_flip"]


def normal(seed: int, *shape: int) -> Tensor:
    draw = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, dtype=torch.float64, generator=draw)


def close(actual: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(actual, expected, rtol=1e-11, atol=1e-12)


def rounds(a, x: Tensor, count: int, w: Tensor = W):
    """Yield (state, message) after the local step of each round."""
    state = a.init(x, ROWS)
    for k in range(count):
        state = a.step(state, normal(100 + k, N, D))
        message = a.send(state)
        yield state, message
        state = a.receive(state, Inbox(w, message, torch.arange(N)))


@pytest.mark.parametrize("build", [dpsgd, fedavg, gossip, gradient_tracking, push_sum])
@pytest.mark.parametrize("name", ["sign_flip", "gaussian", "replay"])
def test_the_honest_are_not_changed_in_one_bit(build, name):
    """Given the same messages, an honest row does what it does without the wrapper."""
    plain, a = build(OPT), hostile(build(OPT), ATTACKS[name](), {1, 4}, seed=2)
    w = matrix(complete_graph(N), plain.needs.weights)
    honest = torch.tensor([0, 2, 3, 5])
    state, x = a.init(normal(1, N, D), ROWS), normal(1, N, D)
    inner = plain.init(x, ROWS)
    for k in range(4):
        grads = normal(100 + k, N, D)
        state, inner = a.step(state, grads), plain.step(inner, grads)
        message, truth = a.send(state), plain.send(inner)
        for said, meant in zip(take(message, honest), take(truth, honest), strict=True):
            assert torch.equal(said, meant)
        inbox = Inbox(w, message, torch.arange(N))
        state, inner = a.receive(state, inbox), plain.receive(inner, inbox)
        for one, other in zip(leaves(state.inner), leaves(inner), strict=True):
            assert torch.equal(one[honest], other[honest])
        assert torch.equal(a.model(state)[honest], plain.model(inner)[honest])
        inner = state.inner  # attackers know the truth of themselves


def test_without_attackers_among_the_rows_nothing_is_changed():
    plain, a = dpsgd(OPT), hostile(dpsgd(OPT), sign_flip(), {17})
    for (one, said), (other, meant) in zip(
        rounds(a, normal(1, N, D), 3), rounds(plain, normal(1, N, D), 3), strict=True
    ):
        assert torch.equal(one.inner.x, other.x)
        assert torch.equal(said.x, meant.x)


def test_attackers_mix_their_own_true_model():
    a, w = hostile(dpsgd(sgd(0.1)), sign_flip(4.0), {1}), matrix(ring_graph(N))
    x = normal(1, N, D)
    state = a.init(x, ROWS)
    message = a.send(state)
    close(message.x[1], -4 * x[1])
    after = a.model(a.receive(state, Inbox(w, message, torch.arange(N))))
    close(after[1], (w @ x)[1])
    close(after[2], (w @ message.x)[2])


@pytest.mark.parametrize("name", SENDING)
def test_an_attacker_is_the_same_alone_as_among_all(name):
    """What a peer does, which holds one row, is what its row does in the simulator."""
    a, w = hostile(dpsgd(OPT), ATTACKS[name](), {1, 4}, seed=2), matrix(ring_graph(N))
    x = normal(1, N, D)
    state, alone = a.init(x, ROWS), a.init(x[[1]], Rows(ROWS.nodes[[1]], ROWS.examples[[1]]))
    senders = w[1].nonzero()[:, 0]
    for k in range(4):
        grads = normal(100 + k, N, D)
        state, alone = a.step(state, grads), a.step(alone, grads[[1]])
        message = a.send(state)
        torch.testing.assert_close(a.send(alone).x, message.x[[1]], equal_nan=True)
        line = Inbox(w[[1]][:, senders], Params(message.x[senders]), torch.tensor([1]))
        alone = a.receive(alone, line)
        state = a.receive(state, Inbox(w, message, torch.arange(N)))
        close(a.model(alone)[0], a.model(state)[1])


@pytest.mark.parametrize("name", SENDING)
def test_what_is_said_is_a_lie(name):
    a = hostile(dpsgd(OPT), ATTACKS[name](), {1})
    *_, (state, message) = rounds(a, normal(1, N, D), 3)
    assert not torch.equal(message.x[1], state.inner.x[1])
    assert torch.equal(message.x[0], state.inner.x[0])


def test_every_model_in_a_message_is_replaced():
    a = hostile(gradient_tracking(OPT), sign_flip(), {1})
    *_, (state, message) = rounds(a, normal(1, N, D), 2)
    close(message.x[1], -state.inner.x[1])
    close(message.y[1], -state.inner.y[1])
    counts = hostile(fedavg(OPT), sign_flip(), {1})
    *_, (_, counted) = rounds(counts, normal(1, N, D), 1)
    assert counted.examples[:, 0].tolist() == [3, 1, 4, 1, 5, 9]


# Each attack by hand.


def known(seed: int, k: int = 7) -> Known:
    weights = torch.full((k,), 1 / (k + 1), dtype=torch.float64)
    return Known(normal(seed, 1, D), normal(seed + 1, k, D), weights, weights[:1])


def test_alie_and_ipm_are_made_of_the_last_exchange():
    about = known(3)
    mean, std = about.others.mean(0), about.others.std(0, correction=0)
    close(alie(z=0.7).hear(None, about).lie[0], mean - 0.7 * std)
    close(alie().hear(None, about).lie[0], mean - 1.5 * std)
    close(
        alie(b=2).hear(None, known(3, 24)).lie[0],
        alie(z=alie_z(25, 2)).hear(None, known(3, 24)).lie[0],
    )
    close(ipm(0.1).hear(None, about).lie[0], -0.1 * mean)
    a = hostile(dpsgd(OPT), ipm(0.5), {1})
    messages = [message.x for _, message in rounds(a, normal(1, N, D), 3)]
    others = torch.tensor([0, 2, 3, 4, 5])
    for before, after in itertools.pairwise(messages):
        close(after[1], -0.5 * before[others].mean(0))


@pytest.mark.parametrize(
    ("n", "b", "z"),
    [(50, 12, 0.3360), (50, 24, 1.4261), (25, 5, 0.2533), (20, 4, 0.1573), (16, 3, 0.0966)],
)
def test_how_far_alie_may_go(n, b, z):
    assert alie_z(n, b) == pytest.approx(z, abs=5e-5)


def test_alie_stays_with_the_mean_where_nothing_hides():
    assert alie_z(10, 2) == pytest.approx(0, abs=1e-12)
    assert alie_z(2, 1) == alie_z(3, 3) == 0


@given(seed=st.integers(0, 2**32), k=st.integers(1, 9), epsilon=st.sampled_from([1.0, 1.5]))
@settings(max_examples=30, deadline=None)
def test_dissensus_undoes_the_mixing_of_its_victim(seed, k, epsilon):
    """With 1 exactly: the victim stays; with more it goes away from the others."""
    about = known(seed, k)
    lie = dissensus(epsilon).hear(None, about).lie
    models = torch.cat([about.others, lie])
    w = torch.full((k + 1,), 1 / (k + 1), dtype=torch.float64)
    moved = w[:k] @ (about.others - about.others[0])
    close(w @ models - models[0], (1 - epsilon) * moved)


def test_mimic_copies_whoever_stands_out():
    others = 0.01 * normal(1, 7, D)
    others[4, 2] = 5.0
    weights = torch.ones(7, dtype=torch.float64) / 8
    about = Known(normal(2, 1, D), others, weights, weights[:1])
    memory = mimic().init(torch.zeros(1, D, dtype=torch.float64))
    for _ in range(5):
        memory = mimic().hear(memory, about)
    assert torch.equal(memory.lie[0], others[4])
    assert abs(float(memory.axis[0, 2])) > 0.99


def test_replay_is_so_many_rounds_late():
    a = hostile(dpsgd(OPT), replay(rounds=2), {1})
    played = list(rounds(a, normal(1, N, D), 6))
    for (before, _), (_, message) in zip(played, played[2:], strict=False):
        close(message.x[1], before.inner.x[1])


def test_noise_is_drawn_by_seed_node_and_round():
    a = hostile(dpsgd(OPT), gaussian(2.0), {1, 4}, seed=3)
    played = list(rounds(a, torch.zeros(N, D, dtype=torch.float64), 3))
    noise = [message.x - state.inner.x for state, message in played]
    drawn = torch.stack([part[row] for part in noise for row in (1, 4)])
    assert len({tuple(row) for row in drawn.tolist()}) == 6
    again = list(rounds(a, torch.zeros(N, D, dtype=torch.float64), 3))
    assert all(torch.equal(m.x, n.x) for (_, m), (_, n) in zip(played, again, strict=True))
    key, wide = torch.arange(1, dtype=torch.int64), torch.zeros(1, 20_000, dtype=torch.float64)
    assert gaussian(2.0).lie((), wide, key).std() == pytest.approx(2, rel=0.03)


# What is not finite.


@pytest.mark.parametrize("sparse", [False, True])
@pytest.mark.filterwarnings("ignore:.*[Ss]parse CSR")
def test_who_sends_what_is_not_finite_is_not_heard(sparse):
    w = matrix(ring_graph(N))
    x = normal(1, N, D)
    x[2, 3], x[5, 0] = math.nan, math.inf
    inbox = Inbox(w.to_sparse_csr() if sparse else w, Params(x), torch.arange(N))
    kept = without_non_finite(inbox, back=True)
    expected = w.clone()
    for row in range(N):
        for bad in {2, 5} - {row}:
            expected[row, row] += expected[row, bad]
            expected[row, bad] = 0
    close(kept.weights.to_dense(), expected)
    assert kept.heard.x.isfinite().all()
    assert torch.equal(kept.heard.x[[0, 1, 3, 4]], x[[0, 1, 3, 4]])
    lost = without_non_finite(inbox, back=False).weights.to_dense()
    gone = torch.tensor([1, 1, 0, 1, 1, 0], dtype=torch.float64) / 3
    close(lost.sum(1), 1 - gone)
    whole = Inbox(w, Params(normal(1, N, D)), torch.arange(N))
    assert without_non_finite(whole, back=True) is whole


def test_nor_are_rows_in_pieces_whose_numbers_are_not_finite():
    x, columns = normal(1, 3, D), [(0, 2), (2, D)]
    x[1, D - 1] = math.nan
    pieces = [Pieces([row[None, a:b] for a, b in columns], columns) for row in x[:2]]
    thirds = torch.full((1, 3), 1 / 3, dtype=torch.float64)
    inbox = Letters(thirds, Params((*pieces, x[2:])), torch.tensor([2]))
    kept = without_non_finite(inbox, back=True)
    close(kept.weights, torch.tensor([[1 / 3, 0, 2 / 3]], dtype=torch.float64))
    close(kept.mix(kept.heard.x), x[:1] / 3 + 2 * x[2:] / 3)


@pytest.mark.parametrize("aggregate", [None, rules.median(), rules.krum(1)])
def test_honest_models_stay_finite(aggregate):
    a = hostile(dpsgd(OPT, aggregate=aggregate), ATTACKS["non_finite"](), {1})
    for state, message in rounds(a, normal(1, N, D), 4):
        assert a.model(state).isfinite().all()
        assert message.x[1].isnan().all()


# What makes no sense.


@pytest.mark.parametrize(
    ("build", "attack", "told"),
    [
        (local, "sign_flip", "nobody hears"),
        (lambda opt: choco(opt, top_k(3)), "sign_flip", "changes"),
        (push_sum, "alie", "shares"),
        (gradient_tracking, "non_finite", "every message"),
    ],
)
def test_what_makes_no_sense_is_refused(build, attack, told):
    with pytest.raises(ValueError, match=told):
        hostile(build(OPT), ATTACKS[attack](), {1})


@pytest.mark.parametrize(
    ("make", "told"),
    [
        (lambda: sign_flip(0.0), "scale = 0.0"),
        (lambda: gaussian(math.inf), "sigma = inf"),
        (lambda: replay(0), "rounds = 0"),
        (lambda: alie(1.0, 2), "either z"),
        (lambda: alie(b=0), "b = 0"),
        (lambda: ipm(-1.0), "epsilon = -1"),
    ],
)
def test_wrong_settings_are_named(make, told):
    with pytest.raises(ValueError, match=told):
        make()
