from __future__ import annotations

import math

import networkx as nx
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from p2pfl.peer.stopping import Agreement, Progress, plateau, target
from p2pfl.topology import random_matching, static


@st.composite
def graphs(draw):
    n = draw(st.integers(1, 12))
    directed = draw(st.booleans())
    graph = nx.DiGraph() if directed else nx.Graph()
    graph.add_nodes_from(range(n))
    if directed:
        graph.add_edges_from((i, (i + 1) % n) for i in range(n if n > 1 else 0))
    else:
        graph.add_edges_from((i, draw(st.integers(0, i - 1))) for i in range(1, n))
    ends = st.integers(0, n - 1)
    more = draw(st.lists(st.tuples(ends, ends), max_size=n))
    graph.add_edges_from((a, b) for a, b in more if a != b)
    return graph


def rounds_of(peers, topology, losses, count):
    """Let all say in so many rounds what they have heard of; yield each with all verdicts."""
    for round in range(count):
        for peer, loss in zip(peers, losses, strict=True):
            peer.measured("train_loss", loss)
        said = [peer.begin(round) for peer in peers]
        for node, peer in enumerate(peers):
            for sender in topology.view(node, round)[1]:
                peer.heard(said[sender])
        yield round, {peer.reached(round) for peer in peers}


@settings(max_examples=80, deadline=None)
@given(graphs(), st.data())
def test_after_as_many_rounds_as_the_network_is_wide_all_hold_the_lowest(graph, data):
    topology = static(graph)
    width = max(topology.reach(), 1)
    goal = data.draw(st.floats(-5, 5))
    losses = data.draw(st.lists(st.floats(-6, 6), min_size=topology.n, max_size=topology.n))
    windows = data.draw(st.integers(1, 2))
    peers = [Agreement(target(goal, "train_loss"), width) for _ in losses]
    for round, verdicts in rounds_of(peers, topology, losses, windows * width):
        at_the_end = round % width == width - 1
        assert verdicts == {at_the_end and max(losses) <= goal}
        if at_the_end:
            assert {peer.lowest for peer in peers} == {-max(losses)}


@settings(max_examples=60, deadline=None)
@given(st.integers(2, 12), st.integers(0, 999), st.integers(1, 8), st.data())
def test_where_links_are_drawn_all_conclude_the_same_or_nothing(n, seed, width, data):
    """However short the windows are: of most nothing follows then."""
    topology = random_matching(n, seed)
    losses = data.draw(st.lists(st.sampled_from([0.0, 9.0]), min_size=n, max_size=n))
    rule = target(1.0, "train_loss")
    peers = [
        Agreement(rule, width, floods=lambda round: topology.floods(round, width)) for _ in losses
    ]
    for round, verdicts in rounds_of(peers, topology, losses, 6 * width):
        (verdict,) = verdicts
        last = round % width == width - 1
        floods = last and topology.floods(round + 1 - width, width)
        assert verdict == (floods and max(losses) <= 1.0)


def test_without_a_rule_nothing_is_agreed_on():
    agreement = Agreement(None, 1)
    agreement.measured("train_loss", 0.0)
    assert agreement.begin(0) == -math.inf
    agreement.heard(9.0)
    assert not agreement.reached(0)


def test_what_was_never_measured_has_not_been_reached():
    agreement = Agreement(target(0.0, "eval_acc"), 1)
    agreement.measured("train_loss", 1.0)  # another metric
    agreement.measured("eval_acc", math.nan)
    assert agreement.begin(0) == -math.inf
    assert not agreement.reached(0)
    agreement.measured("eval_acc", 0.0)
    assert agreement.begin(1) == 0.0
    assert agreement.reached(1)


def test_a_new_window_forgets_what_was_heard():
    agreement = Agreement(target(1.0, "eval_acc"), 2)
    agreement.measured("eval_acc", 1.0)
    agreement.begin(0)
    agreement.heard(-7.0)
    assert agreement.begin(1) == -7.0
    assert not agreement.reached(1)
    assert agreement.begin(2) == 1.0
    assert not agreement.reached(2)
    agreement.begin(3)
    assert agreement.reached(3)


@pytest.mark.parametrize(("metric", "sign"), [("eval_acc", 1.0), ("eval_loss", -1.0)])
def test_plateau_by_hand(metric, sign):
    rule = plateau(metric, patience=2, min_delta=0.5, smoothing=0.5)
    values = [0.0, 2.0, 2.0, math.nan, 2.0, 2.0, 9.0]
    smooth = [0.0, 1.0, 1.5, 1.5, 1.75, 1.875, 5.4375]
    since = [0, 0, 1, 1, 0, 1, 0]  # 1.75 is more than 0.5 above 1.0
    p = rule.start(1)
    for value, mean, count in zip(values, smooth, since, strict=True):
        p = rule.update(p, torch.tensor([sign * value], dtype=torch.float64))
        assert p.smooth.item() == sign * mean
        assert p.since.item() == p.score.item() == count
    assert rule.threshold == 2.0


@given(st.lists(st.lists(st.floats(-3, 3) | st.just(math.nan), min_size=3, max_size=3), max_size=9))
def test_rules_know_no_rows(table):
    for rule in (plateau(patience=2, smoothing=0.3), target(1.0), target(1.0, "train_loss")):
        together, alone = rule.start(3), [rule.start(1) for _ in range(3)]
        for line in table:
            values = torch.tensor(line, dtype=torch.float64)
            together = rule.update(together, values)
            alone = [rule.update(p, values[[i]]) for i, p in enumerate(alone)]
        for i, p in enumerate(alone):
            row = Progress(*(field[[i]] for field in together))
            for one, other in zip(p, row, strict=True):
                torch.testing.assert_close(one, other, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize(
    "wrong",
    [
        {"patience": 0},
        {"smoothing": 1.0},
        {"smoothing": -0.1},
        {"min_delta": math.nan},
        {"min_delta": math.inf},
    ],
)
def test_impossible_rules_are_refused(wrong):
    with pytest.raises(ValueError, match=next(iter(wrong))):
        plateau(**wrong)


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_a_target_that_is_reached_never_or_always_is_refused(value):
    with pytest.raises(ValueError, match="value must be a finite number"):
        target(value)
