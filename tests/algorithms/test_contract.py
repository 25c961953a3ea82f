"""What every algorithm must obey, whoever wrote it."""

from __future__ import annotations

from unittest import mock

import networkx as nx
import pytest
import torch
from algorithm_cases import (
    ALL,
    PLAIN,
    WHOLE,
    blocks,
    exchange,
    graphs,
    inbox,
    matrix,
    play,
    some,
    told,
)
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from p2pfl.algorithm import ByColumn, Inbox, Rows
from p2pfl.algorithms import ALGORITHMS, choco, dpsgd, proximal, weighed
from p2pfl.algorithms.averaging import Params
from p2pfl.attacks import ATTACKS, hostile
from p2pfl.codec import CODECS, random_k
from p2pfl.learning import training
from p2pfl.learning.optim import adam, chain, clip_norm, sgd
from p2pfl.learning.schedules import exponential
from p2pfl.learning.tree import leaves, take, tree_map, unshared
from p2pfl.runtime import exchange as in_place
from p2pfl.runtime.ranks import Ranks
from p2pfl.topology import ring_graph

OPT = sgd(0.1, momentum=0.9, nesterov=True, weight_decay=0.05)
EXACT = {"rtol": 1e-11, "atol": 1e-12}
LAWS = settings(max_examples=12, deadline=None)

# Those whose steps are no multiple of the gradient at their model.
NO_FACTOR = {"push_sum", "gradient_tracking", "d2", "proximal", "average", "exact_diffusion"}
NO_FACTOR |= {"beer", "hostile", "extra", "kgt", "push_diging", "push_pull", "qg"}
NO_FACTOR |= {"gosgd", "weighed"}
# Those which make more of their own steps even when they hear nobody.
OF_THEIR_OWN = {"qg", "diloco", "fedavgm", "fedadagrad", "fedadam", "fedyogi"}
OF_THEIR_OWN |= {"gossip update_then_merge", "noloco"}
# Those whose exchange leaves the mean of all models as it is.
KEEPING = {"fedavg", "dpsgd", "local", "qg", "gradient_tracking", "kgt", "chebyshev", "beer"}
KEEPING |= {"choco", "quantised", "deepsqueeze", "moniqua", "powergossip"}


def close(actual, expected, **tolerance):
    pairs = zip(leaves(actual), leaves(expected), strict=True)
    for one, other in pairs:
        torch.testing.assert_close(one, other, **(tolerance or EXACT))


def test_the_table_is_complete():
    assert {name.split()[0] for name in PLAIN} == ALGORITHMS.keys()
    assert {name.split()[1] for name in PLAIN if name.startswith("choco")} == CODECS.keys()


@pytest.mark.parametrize("name", ALL)
@LAWS
@given(data=st.data())
def test_renaming_the_nodes_changes_nothing(name, data):
    if "bucketing" in name:  # who shares a bucket is drawn by the order of the ids
        return
    a, graph = ALL[name](OPT), data.draw(graphs())
    n = len(graph)
    x, rows, grads = data.draw(blocks(n))
    order = torch.tensor(data.draw(st.permutations(range(n))))
    w = matrix(graph, a.needs.weights)
    after = play(a, x, rows, grads, w)
    renamed = some(rows, order)
    again = play(a, x[order], renamed, grads[:, order], w[order][:, order])
    close(take(after, order), again)


@pytest.mark.parametrize("name", ALL)
@LAWS
@given(data=st.data())
def test_rows_meet_only_in_the_inbox(name, data):
    a, graph = ALL[name](OPT), data.draw(graphs())
    x, rows, grads = data.draw(blocks(len(graph)))
    w = matrix(graph, a.needs.weights)
    rows = told(rows, w)
    together, heard = a.init(x, rows), None
    alone = [a.init(x[[i]], some(rows, [i])) for i in range(len(x))]
    settle = a.settle or (lambda state: state)
    for g in grads[:3]:
        together = settle(a.step(together, g))
        message, model = a.send(together), a.model(together)
        for i in range(len(x)):
            state, row = settle(a.step(alone[i], g[[i]])), torch.tensor([i])
            close(state, take(together, row))
            close(a.send(state), take(message, row))
            close(a.model(state), model[row])
        together, heard = exchange(a, together, heard, w, x.shape[1])
        alone = [take(together, torch.tensor([i])) for i in range(len(x))]


@pytest.mark.parametrize("name", ALL)
@LAWS
@given(data=st.data())
def test_a_line_of_the_inbox_is_a_peer(name, data):
    """What a row makes of its inbox depends on its own line of weights alone."""
    a, graph = ALL[name](OPT), data.draw(graphs())
    x, rows, grads = data.draw(blocks(len(graph)))
    w = matrix(graph, a.needs.weights)
    state = a.step(a.init(x, told(rows, w)), grads[0])
    known = inbox(a, state, None, w, x.shape[1])
    together = a.receive(state, known)
    for i in range(len(x)):
        senders = known.weights[i].nonzero()[:, 0]
        own = (senders == known.own[i]).nonzero()[0]
        line = Inbox(known.weights[[i]][:, senders], take(known.heard, senders), own)
        row = torch.tensor([i])
        close(a.receive(take(state, row), line), take(together, row))


@pytest.mark.parametrize("name", ALL)
@LAWS
@given(data=st.data())
def test_columns_may_be_received_one_after_the_other(name, data):
    """What says so of itself may be given a few columns at a time, over the old ones."""
    a, graph = ALL[name](OPT), data.draw(graphs())
    x, rows, grads = data.draw(blocks(len(graph)))
    w, columns = matrix(graph, a.needs.weights), data.draw(st.integers(1, 4))
    state, heard = unshared(a.init(x, told(rows, w))), None
    for g in grads[:3]:
        state = unshared(a.step(state, g))
        known = inbox(a, state, heard, w, 4)
        heard, around = known.heard, Ranks().neighbourhood(known.weights)._replace(own=known.own)
        expected = tree_map(torch.clone, a.receive(state, known))
        with mock.patch.object(in_place, "block_width", return_value=columns):
            state = in_place.receive_(a, state, heard, around, 4)
        close(state, expected)
    assert a.columnwise != any(word in name for word in WHOLE)


def begun(a, data):
    """Return the state of three rows that all hear each other, and gradients for them."""
    x, rows, grads = data.draw(blocks(3))
    return unshared(a.init(x, told(rows, torch.ones(3, 3)))), grads


@pytest.mark.parametrize("name", ALL)
@pytest.mark.parametrize(
    "opt", [sgd(exponential(0.1, 0.9), 0.9), adam(0.1, weight_decay=0.01)], ids=["trace", "adam"]
)
@LAWS
@given(data=st.data())
def test_columns_may_make_a_step_one_after_the_other(name, opt, data):
    """Local steps overwrite a state a few columns at a time, and come to the same."""
    a = ALL[name](opt)
    state, grads = begun(a, data)
    assert isinstance(a.step, ByColumn) != (name == "average")  # which makes none
    for g in grads:
        expected = tree_map(torch.clone, a.step(state, g))
        own = [leaf.data_ptr() for leaf in leaves(state)]
        with mock.patch.object(training, "BLOCK", data.draw(st.integers(1, 3))):
            state = training._stepped(a.step, state, g)
        assert [leaf.data_ptr() for leaf in leaves(state)] == own
        assert all(torch.equal(*pair) for pair in zip(leaves(state), leaves(expected), strict=True))


@pytest.mark.parametrize("name", ALL)
def test_a_step_that_looks_at_whole_rows_says_so(name):
    assert not isinstance(ALL[name](chain([clip_norm(1.0), OPT])).step, ByColumn)


@pytest.mark.parametrize("name", ALL)
@pytest.mark.parametrize("opt", [sgd(0.1), sgd(exponential(0.1, 0.9))], ids=["constant", "falling"])
@LAWS
@given(data=st.data())
def test_a_step_is_its_factor_times_the_gradient(name, opt, data):
    a = ALL[name](opt)
    state, grads = begun(a, data)
    if a.factor is None:
        assert name.split()[0] in NO_FACTOR
        return
    for g in grads:
        factor, after = a.factor(state)
        assert factor.shape == (3, 1)
        model = a.model(state)
        assert any(leaf is model for leaf in leaves(state))
        assert a.model(after) is model
        expected = a.step(state, g)
        close(model + factor * g, a.model(expected))
        rest = [leaf for leaf in leaves(after) if leaf is not model]
        close(tuple(rest), tuple(e for e in leaves(expected) if e is not a.model(expected)))
        state = expected


@pytest.mark.parametrize("name", ALL)
@LAWS
@given(data=st.data())
def test_agreed_nodes_without_gradients_stay(name, data):
    if name.startswith("hostile"):  # attackers do not agree
        return
    a, graph = ALL[name](sgd(0.1, momentum=0.9)), data.draw(graphs())
    x, rows, _ = data.draw(blocks(len(graph)))
    x = x[:1].expand_as(x).contiguous()
    w = matrix(graph, a.needs.weights)
    state, heard = a.init(x, told(rows, w)), None
    if name.endswith(("random_k", "int8", "qsgd")):  # to be agreed is to know it of each other
        state, heard = known(state, x), Params(x)
    for _ in range(4):
        state = a.step(state, torch.zeros_like(x))
        state = a.settle(state) if a.settle else state
        state, heard = exchange(a, state, heard, w, x.shape[1])
    close(a.model(state), x)


def known(state, x: Tensor):
    inner = getattr(state, "inner", state)._replace(public=x)
    return state._replace(inner=inner) if hasattr(state, "inner") else inner


@pytest.mark.parametrize("name", ALL)
def test_nothing_that_was_given_is_written_into(name):
    a = ALL[name](chain([clip_norm(1.0), OPT]))
    draw = torch.Generator().manual_seed(3)
    x, g = torch.randn(2, 5, 4, generator=draw, dtype=torch.float64)
    given, heard, w = [], None, torch.full((5, 5), 0.2, dtype=torch.float64)
    rows = told(Rows(torch.arange(5), torch.tensor([3, 1, 4, 1, 5])), w)

    def lend(tree):
        given.append((tree, tree_map(torch.clone, tree)))
        return tree

    state = a.init(lend(x), lend(rows))
    for _ in range(3):
        state = a.step(lend(state), lend(g))
        a.model(lend(state))
        known = inbox(a, lend(state), heard, lend(w), 4)
        heard = lend(known.heard)
        mixed = a.receive(lend(state), known)
        trained = a.step(lend(state), lend(g))
        if a.settle:
            trained = a.settle(lend(trained))
        if a.carry:
            a.carry(state, lend(trained), lend(mixed))
        state = mixed
    for tree, before in given:
        close(tree, before, rtol=0, atol=0)


@pytest.mark.parametrize("name", ALL)
@LAWS
@given(data=st.data())
def test_an_exchange_keeps_the_mean_where_it_says_so(name, data):
    a, graph = ALL[name](OPT), data.draw(graphs())
    if not a.keeps_mean:
        return
    x, rows, grads = data.draw(blocks(len(graph)))
    w = matrix(nx.complete_graph(len(graph)) if a.needs.graph == "complete" else graph)
    state, heard = a.init(x, told(rows, w)), None
    for g in grads:
        state = a.step(state, g)
        state = a.settle(state) if a.settle else state
        before = a.model(state).mean(0)
        state, heard = exchange(a, state, heard, w, x.shape[1])
        close(a.model(state).mean(0), before, rtol=0, atol=1e-10)


@pytest.mark.parametrize("name", ALL)
@LAWS
@given(data=st.data())
def test_who_begins_anew_is_understood_by_those_who_never_heard_it(name, data):
    a, graph = ALL[name](OPT), data.draw(graphs())
    if a.restart is None or not a.keeps_mean:  # it would show by the mean
        return
    x, rows, grads = data.draw(blocks(len(graph)))
    w = matrix(graph)
    state = play(a, x, rows, grads[:3], w)
    before, heard = a.model(state), None
    state = a.restart(state)
    close(a.model(state), before)
    for g in grads[3:]:
        state, heard = exchange(a, state, heard, w, x.shape[1])
        close(a.model(state).mean(0), before.mean(0), rtol=0, atol=1e-10)
        state = a.step(state, g)
        before = a.model(state)


@pytest.mark.parametrize("wrap", ["", "proximal", "weighed"])
def test_choco_that_begins_anew_says_all_of_its_model(wrap):
    whole = PLAIN["choco identity"](OPT)
    a = {"": whole, "proximal": proximal(whole, 0.3), "weighed": weighed(whole, 20.0)}[wrap]
    x = torch.tensor([[1.0, 2.0], [3.0, 4.0]], dtype=torch.float64)
    rows = Rows(torch.arange(2), torch.tensor([20, 20]))
    state = play(a, x, rows, torch.ones(3, 2, 2).double(), matrix(ring_graph(2)))
    first = a.absorb(None, a.send(a.restart(state)), 2)
    close(first.x, a.model(state))
    assert not torch.allclose(a.absorb(None, a.send(state), 2).x, a.model(state))


def test_which_methods_can_begin_anew():
    able = {name for name, build in ALL.items() if build(OPT).restart}
    assert {name.split()[0] for name in able & PLAIN.keys()} == {
        *("choco", "quantised", "deepsqueeze", "moniqua", "jwins")
    }
    assert {"proximal choco top_k", "weighed choco top_k"} <= able


def test_which_methods_keep_the_mean():
    """Others do not, or only as long as nobody is older than the others."""
    kept = {name for name, build in PLAIN.items() if build(OPT).keeps_mean}
    assert {name.split()[0] for name in kept} == KEEPING
    assert "fedavg" not in kept
    assert ALL["proximal dpsgd"](OPT).keeps_mean
    assert not ALL["dpsgd median"](OPT).keeps_mean


@pytest.mark.parametrize("name", PLAIN)
@pytest.mark.parametrize("steps", [1, 3])
@LAWS
@given(data=st.data())
def test_hearing_nobody_is_the_local_optimiser(name, steps, data):
    a = PLAIN[name](OPT)
    if (a.needs.one_step and steps > 1) or {name, name.split()[0]} & OF_THEIR_OWN:
        return
    x, rows, grads = data.draw(blocks(data.draw(st.integers(1, 4))))
    expected, state = x, OPT.init(x)
    for g in grads:
        update, state = OPT.update(g, state, expected)
        expected = expected + update
    after = play(a, x, rows, grads, torch.eye(len(x), dtype=torch.float64), steps)
    close(a.model(after), expected, rtol=1e-10, atol=1e-11)


@given(seed=st.integers(0, 99))
@LAWS
def test_random_k_draws_other_columns_in_every_round(seed):
    a, x = choco(sgd(0.1), random_k(1), seed=seed), torch.ones(1, 40, dtype=torch.float64)
    state, heard, seen = a.init(x, Rows(torch.tensor([seed]), torch.tensor([1]))), None, set()
    for _ in range(8):  # and without a single local step
        seen.add(int(a.send(state).columns))
        state, heard = exchange(a, state, heard, torch.ones(1, 1, dtype=torch.float64), 40)
    assert len(seen) > 3


# The inbox itself.


@st.composite
def inboxes(draw):
    rows, senders = draw(st.integers(1, 5)), draw(st.integers(1, 6))
    made = torch.Generator().manual_seed(draw(st.integers(0, 2**32)))
    w = torch.rand(rows, senders, generator=made, dtype=torch.float64)
    w = w * (torch.rand(rows, senders, generator=made) < draw(st.sampled_from([0.3, 0.7, 1.0])))
    w[torch.arange(rows), torch.randint(senders, (rows,), generator=made)] = 0.25
    own = torch.randint(senders, (rows,), generator=made)  # which may have no weight
    field = torch.randn(senders, 3, generator=made, dtype=torch.float64)
    by = torch.rand(senders, 1, generator=made, dtype=torch.float64) + 0.1
    return w, field, by, own


def sparse(w: Tensor, own: Tensor, explicit_zeros: bool) -> Tensor:
    """Return the same matrix, in which one's own entries stand in any case."""
    stored = (w != 0) | explicit_zeros
    stored[torch.arange(len(w)), own] = True
    start = torch.cat([torch.zeros(1, dtype=torch.int64), stored.sum(1).cumsum(0)])
    columns = stored.nonzero()[:, 1]
    return torch.sparse_csr_tensor(start, columns, w[stored], w.shape, check_invariants=True)


@pytest.mark.filterwarnings("ignore:.*[Ss]parse CSR")
@given(inboxes(), st.booleans())
@settings(max_examples=60, deadline=None)
def test_dense_and_sparse_weights_are_the_same(case, explicit_zeros):
    w, field, by, own = case
    dense, csr = Inbox(w, (field,), own), Inbox(sparse(w, own, explicit_zeros), (field,), own)
    close(csr.mix(field), dense.mix(field))
    close(csr.mix(field, by), dense.mix(field, by))
    close(csr.mean(field, by), dense.mean(field, by))
    close(csr.largest(by), dense.largest(by))
    close(csr.mine(field), dense.mine(field))
    assert torch.equal(csr.others().sum(1), dense.others().sum(1))
    for i in range(len(w)):
        (a, masked), (b, mask) = csr.gather(field), dense.gather(field)
        close(a[i][masked[i]], b[i][mask[i]])


@given(inboxes())
@settings(max_examples=60, deadline=None)
def test_the_inbox_by_hand(case):
    w, field, by, own = case
    inbox = Inbox(w, (field,), own)
    block, mask = inbox.gather(field)
    for i, line in enumerate(w):
        who = [j for j in range(w.shape[1]) if line[j] or j == own[i]]
        scaled = [float(line[j] * by[j]) for j in who]
        mixed = sum(s * field[j] for s, j in zip(scaled, who, strict=True)) / sum(scaled)
        close(inbox.mix(field, by)[i], mixed)
        mean = sum(by[j] * field[j] for j in who) / sum(by[j] for j in who)
        close(inbox.mean(field, by)[i], mean)
        assert inbox.largest(by)[i] == max(by[j] for j in who)
        close(block[i][mask[i]], field[who])


def test_equal_lines_are_one_line():
    row = torch.tensor([[0.5, 0.25, 0.25]], dtype=torch.float64)
    field, by = torch.randn(2, 3, 4, dtype=torch.float64)
    by, own = by[:, :1].abs() + 0.1, torch.arange(3)
    short = Inbox(row.expand(3, 3), (field,), own)
    full = Inbox(row.repeat(3, 1), (field,), own)
    close(short.mix(field), full.mix(field))
    close(short.mix(field, by), full.mix(field, by))
    close(short.mean(field, by), full.mean(field, by))
    assert short.mix(field).stride(0) == 0


@pytest.mark.parametrize("name", ALL)
def test_what_others_divide_by_is_declared_as_counts(name):
    """All numbers beside a model, but for units: those are looked at when they are decoded."""
    a, w = ALL[name](OPT), matrix(ring_graph(3))
    rows = told(Rows(torch.arange(3), torch.ones(3, dtype=torch.int64)), w)
    message = a.send(a.init(torch.ones(3, 4), rows))
    each = zip(message._fields, message, strict=True)
    beside = {k for k, field in each if field.is_floating_point() and field.shape[-1] == 1}
    assert beside - {"unit", "values"} == set(a.needs.counts)


@pytest.mark.parametrize("name", ["gossip", "push_sum", "push_sum examples", "fedavg"])
def test_counts_and_masses_are_not_kept_in_half_precision(name):
    a, x = ALL[name](sgd(0.1)), torch.ones(5, 3, dtype=torch.bfloat16)
    w = matrix(ring_graph(5), a.needs.weights)
    state, heard = (
        a.init(x, Rows(torch.arange(5), torch.tensor([1001, 1002, 1003, 1004, 1005]))),
        None,
    )
    for _ in range(300):
        state = a.step(state, torch.zeros_like(x))
        state, heard = exchange(a, state, heard, w, 3)
    assert a.model(state).dtype == torch.bfloat16
    torch.testing.assert_close(a.model(state), x, rtol=0.01, atol=0)
    narrow = next(leaf for leaf in leaves(state) if leaf.shape == (5, 1))
    if name == "gossip":
        assert narrow.flatten().tolist() == [300.0] * 5
    elif name == "fedavg":
        assert narrow.flatten().tolist() == [1001, 1002, 1003, 1004, 1005]
    else:
        assert narrow.sum().item() == pytest.approx(5015 if "examples" in name else 5, rel=1e-4)


# On a chain, the weights that agree fastest leave nothing of one's own model.
ALONE = torch.tensor([[0.5, 0.5, 0.0], [0.5, 0.0, 0.5], [0.0, 0.5, 0.5]], dtype=torch.float64)


@pytest.mark.parametrize("name", ["dpsgd median", "fedasync", "balance", "gossip limited"])
def test_who_takes_nothing_of_its_own_has_heard_itself(name):
    """These go by who was heard, and not by the weights."""
    a, x = ALL[name](sgd(0.1)), torch.tensor([[1.0, 1.1], [1.0, 0.9], [1.1, 1.0]]).double()
    rows = Rows(torch.arange(3), torch.ones(3, dtype=torch.int64))
    state = a.init(x, rows)
    after = [a.model(exchange(a, state, None, w, 2)[0]) for w in (ALONE, ALONE + torch.eye(3) / 9)]
    close(after[0][1], after[1][1])


def test_an_attacker_may_take_nothing_of_its_own():
    honest = dpsgd(sgd(0.1))
    a = hostile(honest, ATTACKS["ipm"](), [1])
    x = torch.arange(6.0, dtype=torch.float64).view(3, 2)
    rows = Rows(torch.arange(3), torch.ones(3, dtype=torch.int64))
    state, _ = exchange(a, a.init(x, rows), None, ALONE, 2)
    close(a.model(state), ALONE @ x)
