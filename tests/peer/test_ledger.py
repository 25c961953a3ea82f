"""Running sums: nothing is lost for good, and nothing comes twice."""

from __future__ import annotations

import math
import random
from typing import NamedTuple

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from p2pfl.algorithms import push_sum as sgp
from p2pfl.learning.optim import sgd
from p2pfl.peer.events import Received
from p2pfl.peer.ledger import Ledger
from p2pfl.peer.mail import Mail
from p2pfl.peer.plan import Pace, View
from p2pfl.topology import one_peer_exponential, push

N, LOST, TWICE = 16, 0.3, 0.3


class Mass(NamedTuple):
    x: Tensor
    w: Tensor


def mass(x, w=1.0, dtype=torch.float64):
    return Mass(torch.tensor([[x, -x]], dtype=dtype), torch.tensor([[w]], dtype=dtype))


def plus(one, other):
    return Mass(one.x + other.x, one.w + other.w)


def half(whole):
    return Mass(whole.x / 2, whole.w / 2)


class Faulty:
    """A network that loses messages, repeats some later on, and delays some."""

    def __init__(self, late, seed):
        self.lots, self.late = random.Random(seed), late
        self.under_way = []

    def send(self, now, *letter):
        if self.lots.random() < LOST:
            return
        delay = self.lots.randint(1, 8) if self.lots.random() < self.late else 0
        self.under_way.append((now + delay, *letter))
        if self.lots.random() < TWICE:
            self.under_way.append((now + self.lots.randint(1, 8), *letter))

    def due(self, now):
        letters = [rest for at, *rest in self.under_way if at <= now]
        self.under_way = [letter for letter in self.under_way if letter[0] > now]
        return letters


def push_sum(rounds, network, sums):
    """Push-sum over a faulty network; return states, ledgers, and how much mail was old."""
    topology = one_peer_exponential(N)
    states = [mass(float(node)) for node in range(N)]
    ledgers, newest, overtaken = [Ledger() for _ in range(N)], {}, 0
    for round in range(rounds):
        for node in range(N):
            (to,), _ = topology.view(node, round)
            states[node] = half(states[node])
            share = states[node]
            network.send(round, to, node, round, ledgers[node].give(to, share) if sums else share)
        for to, sender, said_in, said in network.due(round):
            if sums and said_in < newest.get((sender, to), 0):
                overtaken += 1
                continue  # as a mailbox does
            newest[sender, to] = said_in
            news = ledgers[to].take(sender, said) if sums else said
            states[to] = plus(states[to], news)
    return states, ledgers, overtaken


def error(states):
    return max(float((s.x / s.w - torch.tensor([[7.5, -7.5]])).abs().max()) for s in states)


# A delay slows agreement down: what comes late has been mixed with less in the meantime.
@pytest.mark.parametrize(("late", "rounds"), [(0.0, 200), (0.3, 300)])
@pytest.mark.parametrize("seed", range(3))
def test_push_sum_is_exact_over_a_faulty_network(late, rounds, seed):
    states, ledgers, overtaken = push_sum(rounds, Faulty(late, seed), sums=True)
    assert overtaken > 100  # else nothing was tested
    assert error(states) <= 1e-9
    on_the_way = sum(
        float(said.w) - float(ledgers[to].taken[sender].w if sender in ledgers[to].taken else 0)
        for sender in range(N)
        for to, said in ledgers[sender].given.items()
    )
    assert on_the_way > 0.01
    assert sum(float(s.w) for s in states) + on_the_way == pytest.approx(N, abs=1e-12)


@pytest.mark.parametrize("late", [0.0, 0.3])
@pytest.mark.parametrize("seed", range(3))
def test_without_sums_it_ends_far_off(late, seed):
    states, _, _ = push_sum(200, Faulty(late, seed), sums=False)
    assert error(states) > 0.01
    assert abs(sum(float(s.w) for s in states) - N) > 1


@given(st.lists(st.tuples(st.integers(-1000, 1000), st.booleans()), min_size=1))
def test_whatever_was_lost_comes_with_what_arrives(shares):
    sender, receiver, got = Ledger(), Ledger(), mass(0.0, 0.0)
    meant = mass(0.0, 0.0)
    for x, arrives in shares:
        meant = plus(meant, mass(float(x)))
        said = sender.give(1, mass(float(x)))
        if arrives:
            for copy in (said, said):
                got = plus(got, receiver.take(0, copy))
            assert torch.equal(got.x, meant.x)
            assert torch.equal(got.w, meant.w)


def test_neighbours_have_sums_of_their_own():
    ledger = Ledger()
    ledger.give(1, mass(1.0))
    assert float(ledger.give(2, mass(5.0)).w) == 1
    assert float(ledger.give(1, mass(1.0)).w) == 2
    ledger.take(1, mass(3.0))
    assert float(ledger.take(2, mass(3.0)).x[0, 0]) == 3


def test_messages_keep_their_form_and_nobody_writes_into_them():
    ledger, share = Ledger(), mass(2.0)
    first = ledger.give(1, share)
    copies = [part.clone() for part in (*share, *first)]
    second = ledger.give(1, share)
    assert isinstance(second, Mass)
    assert [part.shape for part in second] == [part.shape for part in share]
    ledger.take(1, first)
    taken = ledger.take(1, second)
    assert isinstance(taken, Mass)
    assert all(map(torch.equal, (*share, *first), copies))
    assert torch.equal(taken.x, share.x)


def test_who_has_started_again_begins_from_nothing():
    one, other = Ledger(), Ledger()
    for _ in range(3):
        other.take(0, one.give(1, mass(1.0)))
    other = Ledger()  # it has lost its memory: what was said to it would be taken once more
    assert float(other.take(0, one.give(1, mass(1.0))).w) == 4
    other = Ledger()
    one.forget(1)
    assert float(other.take(0, one.give(1, mass(1.0))).w) == 1
    one.take(1, mass(9.0, 9.0))
    one.forget(1)
    assert float(one.take(1, other.give(0, mass(1.0))).w) == 1
    one.forget(7)  # nobody it knows


def test_half_precision_is_summed_in_single():
    sender, receiver = Ledger(), Ledger()
    total = 0.0
    for _ in range(1000):
        said = sender.give(1, mass(1.0, dtype=torch.bfloat16))
        assert said.x.dtype == torch.float32
        total += float(receiver.take(0, said).w)
    assert total == 1000


@pytest.mark.parametrize(("dtype", "most"), [(torch.float32, 1e-4), (torch.float64, 2e-13)])
def test_a_thousand_rounds_hardly_move_the_mean(dtype, most):
    topology, draw = one_peer_exponential(N), torch.Generator().manual_seed(1)
    x = torch.randn(N, 1, 200, generator=draw, dtype=torch.float64).to(dtype) + 1
    mean, ledgers = x.mean(0, dtype=torch.float64), [Ledger() for _ in range(N)]
    for round in range(1000):
        halves, said = x / 2, {}
        for node in range(N):
            (to,), _ = topology.view(node, round)
            half = Mass(halves[node], torch.ones(1, 1, dtype=dtype))
            said[to] = node, ledgers[node].give(to, half)
        x = torch.stack([halves[k] + ledgers[k].take(*said[k]).x for k in range(N)])
    assert 0 < float((x - mean).abs().max()) < most


def test_what_is_never_answered_is_taken_back():
    ours, theirs = Ledger(), Ledger()
    theirs.take(0, ours.lend(1, mass(1.0, 0.5)))
    ours.heard(1)
    assert not ours.owes(1)
    late = [ours.lend(1, mass(2.0, 0.25)), ours.lend(1, mass(4.0, 0.125))]
    assert ours.owes(1)
    back = ours.take_back(1)
    assert (back.x.tolist(), back.w.tolist()) == ([[6.0, -6.0]], [[0.375]])
    assert ours.take_back(1) is None
    # It had only been silent, and reads it after all. It owes that then, and takes no more before.
    assert [float(theirs.take(0, said).w) for said in late] == [0.25, 0.125]
    assert theirs.take(0, ours.give(1, mass(0.0, 0.125))) is None
    assert theirs.take(0, ours.give(1, mass(0.0, 0.125))) is None
    new = theirs.take(0, ours.give(1, mass(0.0, 0.25)))
    assert (new.x.tolist(), new.w.tolist()) == ([[-6.0, 6.0]], [[0.125]])


def test_who_had_answered_already_owes_nothing():
    ledger = Ledger()
    ledger.lend(1, mass(1.0), answered=True)
    assert ledger.take_back(1) is None
    assert float(ledger.give(1, mass(0.0, 1.0)).w) == 2.0


def test_a_sum_that_was_not_opened_is_not_taken_from_nothing():
    mail = Mail(1, sgp(sgd(0.1)), push(), 2, Pace(1))
    mail.put(Received(0, 5, 1, -math.inf, mass(1.0, 2.0), 0), 5)
    mail.forget(0)  # the epoch of this edge has changed, and sums begin anew
    mail.remember(1, 1, mass(0.0))
    assert float(mail.open(View((0,), (0,)), 5, True).inbox.heard.w.sum()) == 1
    mail.put(Received(0, 6, 1, -math.inf, mass(1.0, 0.25), 0), 6)
    mail.remember(1, 1, mass(0.0))
    assert float(mail.open(View((0,), (0,)), 6, True).inbox.heard.w.sum()) == 1.25
