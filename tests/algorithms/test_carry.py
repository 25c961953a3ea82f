"""Local steps beside an exchange: what is carried over is both, and nothing is lost."""

from __future__ import annotations

import pytest
import torch
from algorithm_cases import ALL, PULLED, RULES, blocks, exchange, graphs, matrix
from hypothesis import given
from hypothesis import strategies as st
from test_contract import EXACT, LAWS, OPT, close
from torch import Tensor

from p2pfl.learning.tree import take
from p2pfl.topology import complete_graph

CARRYING = [name for name in ALL if ALL[name](OPT).carry]


MEANS = {"fedavg", "fedavg uniform", "dpsgd", "push_sum", "push_sum examples"}  # keep the mean


def test_what_can_train_while_it_exchanges():
    robust = {"balance", "rpel", "ubar", *(f"dpsgd {rule}" for rule in RULES)}
    each = {*MEANS, "gosgd", "local", *robust}
    attacked = {name for name in ALL if name.startswith("hostile") and ALL[name](OPT).carry}
    pulled = {f"{how} {name}" for how in ("proximal", "weighed") for name in each & {*PULLED}}
    assert set(CARRYING) == each | pulled | attacked
    assert {name.split()[1] for name in attacked} == {"dpsgd", "fedavg", "push_sum"}


@pytest.mark.parametrize("name", CARRYING)
@LAWS
@given(data=st.data())
def test_what_is_carried_is_the_exchange_and_the_local_steps(name, data):
    a, graph = ALL[name](OPT), data.draw(graphs())
    x, rows, grads = data.draw(blocks(len(graph)))
    if "fedavg" in name:
        graph = complete_graph(len(graph))
    w = matrix(graph, a.needs.weights)
    state = a.init(x, rows)
    for g, more in zip(grads[:3], grads[3:], strict=True):
        sent = a.step(state, g)
        trained = a.step(sent, more)
        mixed, _ = exchange(a, sent, None, w, 4)
        state = a.carry(sent, trained, mixed)
        close(a.carry(sent, sent, mixed), mixed)  # no steps: what came of the exchange
        alone, _ = exchange(a, sent, None, torch.eye(len(x), dtype=w.dtype), 4)
        close(a.model(a.carry(sent, trained, alone)), a.model(trained))
        # What is sent of attackers is not what there is, and steps on quotients move no sums.
        if name.startswith(("hostile", "gosgd")):
            continue
        # Not one step is lost: in all, the network has moved as far as they went.
        for parts in zip(*(totals(a, s) for s in (state, sent, trained, mixed)), strict=True):
            after, *others = parts
            torch.testing.assert_close(after, others[1] + others[2] - others[0], **EXACT)
            if name.removeprefix("proximal ").removeprefix("weighed ") in MEANS:
                torch.testing.assert_close(others[2], others[0], **EXACT)  # mixing keeps it
        for i in range(len(x)):
            one = torch.tensor([i])
            close(a.carry(*(take(s, one) for s in (sent, trained, mixed))), take(state, one))


def totals(a, state) -> tuple[Tensor, ...]:
    """Return what mixing keeps: the sum of all that is sent, by examples where they count."""
    message = a.send(state)
    if hasattr(message, "examples"):
        return ((message.x * message.examples).sum(0), message.examples.sum(0))
    return tuple(field.sum(0) for field in message)


@LAWS
@given(data=st.data())
def test_steps_on_a_quotient_move_it_as_far_whatever_its_weight_is_by_now(data):
    a, graph = ALL["gosgd"](OPT), data.draw(graphs())
    x, rows, grads = data.draw(blocks(len(graph)))
    w = matrix(graph, "mass")
    sent, _ = exchange(a, a.step(a.init(x, rows), grads[0]), None, w, 4)
    trained = a.step(sent, grads[1])
    mixed, _ = exchange(a, sent, None, w, 4)
    carried = a.carry(sent, trained, mixed)
    close(a.model(carried) - a.model(mixed), a.model(trained) - a.model(sent))
    assert carried.w.equal(mixed.w)
