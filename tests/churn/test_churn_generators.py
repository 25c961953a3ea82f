"""Generators and traces: the laws they follow, and that whatever they draw can happen."""

import itertools
import math
import statistics

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from p2pfl.churn import load, parse
from p2pfl.errors import UserError

BEFORE = {
    "kill": ("up", "frozen"),
    "leave": ("up",),
    "stop": ("up",),
    "cont": ("frozen",),
    "restart": ("killed",),
    "join": ("left", "absent"),
}
AFTER = {"kill": "killed", "leave": "left", "stop": "frozen"}


def replay(script):
    """Go through what happens by time, check that each can, and return who is there when.

    Returns a list of (time, number of those that are there).
    """
    states = ["up" if node in script.founders else "absent" for node in range(script.nodes)]
    there, now = [(0.0, len(script.founders))], 0.0
    assert script.founders
    for one in script.timed:
        assert one.seconds >= now
        now = one.seconds
        count = there[-1][1]
        for node in one.nodes if one.kind in BEFORE else ():
            assert states[node] in BEFORE[one.kind], (one, states[node])
            states[node] = AFTER.get(one.kind, "up")
            count += {"kill": -1, "leave": -1, "restart": 1, "join": 1}.get(one.kind, 0)
        there.append((now, count))
        assert there[-1][1] >= 1
    return there


def mean_there(script, start, end):
    """Return how many are there on average between two times."""
    there = [*replay(script), (math.inf, 0)]
    return sum(
        count * max(0.0, min(end, later) - max(start, since))
        for (since, count), (later, _) in itertools.pairwise(there)
    ) / (end - start)


def stays(script):
    """Return how long those stayed that were killed after they had been restarted."""
    since, found = {}, []
    for one in script.timed:
        for node in one.nodes:
            if one.kind == "restart":
                since[node] = one.seconds
            elif node in since:
                found.append(one.seconds - since.pop(node))
    return found


GENERATORS = st.sampled_from(
    [
        "sessions = 'exponential'\nmean_up = 8\nmean_down = 4",
        "sessions = 'weibull'\nshape = 0.5\nmean_up = 5\nmean_down = 20",
        "sessions = 'pareto'\nshape = 1.5\nmean_up = 2\nmean_down = 20",
        "churn = '50% a second'\nmean_down = 5",
        "diurnal = '20s'\nlow = 0.0\nhigh = 0.5\nspread = 1",
        "diurnal = '7s'\nlow = 0.2\nhigh = 1.0",
        "failures = '3s'\nsize = '50%'\nmean_down = '10s'",
    ]
)
EVENTS = (
    "[[event]]\nat = 5\nstop = 'random 1'\nfor = 10\n"
    "[[event]]\nat = 20\nslow = { nodes = 0, factor = 3 }\n"
)


@given(
    st.lists(st.tuples(GENERATORS, st.sampled_from(["kill", "leave"])), min_size=1, max_size=3),
    st.integers(1, 12),
    st.integers(0, 2**63 - 1),
    st.sampled_from(["", EVENTS]),
)
@settings(max_examples=80)
def test_whatever_is_drawn_can_happen(generators, nodes, seed, events):
    tables = [f"[[generate]]\n{text}\nhow = '{how}'\nuntil = '60s'" for text, how in generators]
    script = parse("\n".join([*tables, events]), nodes, seed)
    replay(script)
    assert script == parse("\n".join([*tables, events]), nodes, seed)


def generated(text, nodes=200, seed=3):
    return parse(f"[[generate]]\n{text}\n", nodes, seed)


@pytest.mark.parametrize(
    ("law", "deviation"),  # of a law with mean 1
    [
        ("sessions = 'exponential'", 1.0),
        ("sessions = 'weibull'\nshape = 0.6", 1.76),
        ("sessions = 'pareto'\nshape = 3", 0.58),
    ],
)
def test_sessions_follow_their_law(law, deviation):
    script = generated(f"{law}\nmean_up = 60\nmean_down = 20\nuntil = '2h'")
    assert mean_there(script, 1800, 7200) == pytest.approx(200 * 0.75, rel=0.05)
    found = stays(script)
    assert statistics.mean(found) == pytest.approx(60, rel=0.05)
    assert statistics.stdev(found) == pytest.approx(60 * deviation, rel=0.25)


def test_twenty_per_cent_a_minute():
    script = generated("churn = '20% a minute'\nmean_down = '30s'\nuntil = '1h'")
    killed = sum(len(one.nodes) for one in script.timed if one.kind == "kill")
    assert killed / 60 / mean_there(script, 0, 3600) == pytest.approx(0.2, rel=0.05)


def test_days_and_nights():
    script = generated("diurnal = '24h'\nhigh = 0.9\nlow = 0.3\nuntil = '240h'", nodes=300)
    hour = 3600
    for day in (1, 5, 9):
        noon, midnight = 24 * hour * day, 24 * hour * (day + 0.5)
        assert mean_there(script, noon - 60, noon + 60) == pytest.approx(270, abs=20)
        if day < 9:
            assert mean_there(script, midnight - 60, midnight + 60) == pytest.approx(90, abs=25)
    assert len(script.founders) == pytest.approx(270, abs=20)


def test_nights_spread_around_the_clock_leave_the_number_as_it_is():
    script = generated("diurnal = '24h'\nspread = 1\nuntil = '72h'", nodes=400)
    for hour in range(2, 70, 7):
        assert mean_there(script, 3600 * hour, 3600 * hour + 60) == pytest.approx(240, abs=40)


def test_failures_take_many_at_once_and_bring_them_back_together():
    script = generated("failures = '10m'\nsize = '10%'\nmean_down = 5\nuntil = '100h'")
    kills = [one for one in script.timed if one.kind == "kill"]
    assert len(kills) == pytest.approx(600, rel=0.1)
    assert statistics.mode(len(one.nodes) for one in kills) == 20
    assert len({one.nodes for one in kills}) > 500
    went = {one.nodes: one.seconds for one in kills}
    backs = [one for one in script.timed if one.kind == "restart" and one.nodes in went]
    assert len(backs) > 500  # one failure seldom falls into another
    away = [one.seconds - went[one.nodes] for one in backs]
    assert statistics.mean(away) == pytest.approx(5, rel=0.25)


def test_only_those_named_go_and_how_it_is_said():
    text = "churn = '90% a minute'\nuntil = '10m'\nnodes = [1, 3]\nhow = 'leave'"
    script = generated(text, nodes=5)
    assert {node for one in script.timed for node in one.nodes} == {1, 3}
    assert {one.kind for one in script.timed} == {"leave", "join"}
    half = generated("churn = '90% a minute'\nuntil = '20m'\nnodes = '50%'", nodes=40)
    assert len({node for one in half.timed for node in one.nodes}) == 20


def test_a_node_has_the_same_sessions_among_few_and_many_and_whatever_else_is_drawn():
    text = "churn = '20% a minute'\nuntil = '30m'\nnodes = 4"
    alone = generated(text, nodes=5).timed
    more = parse(f"[[generate]]\n{text}\n[[generate]]\n{text[:-1]}2\n", 50, 3).timed
    assert alone == tuple(one for one in more if one.nodes == (4,))
    assert alone != generated(text, nodes=5, seed=4).timed


def test_the_same_generator_twice_draws_twice():
    text = "[[generate]]\nchurn = '20% a minute'\n"
    once, twice = (parse(text * times, 20, 0) for times in (1, 2))
    assert mean_there(twice, 600, 3600) < mean_there(once, 600, 3600) - 0.5


def test_nobody_goes_after_the_end_and_all_come_back():
    script = generated("churn = '80% a minute'\nuntil = '5m'")
    assert max(one.seconds for one in script.timed if one.kind == "kill") < 300
    assert replay(script)[-1][1] == 200


def test_a_trace_says_who_is_there(tmp_path):
    stored = "node,start,end\n0,0,10\n0,10,25.5\n\n2,5,20\n0,40,\n2,30,50\n"
    (tmp_path / "machines.csv").write_text(stored)
    (tmp_path / "x.toml").write_text('[[trace]]\npath = "machines.csv"\n')
    script = load(tmp_path / "x.toml", 4, 0)
    assert script.founders == (0, 1, 3)
    assert [(one.kind, one.seconds, one.nodes) for one in script.timed] == [
        ("join", 5.0, (2,)),
        ("kill", 20.0, (2,)),
        ("kill", 25.5, (0,)),
        ("restart", 30.0, (2,)),
        ("restart", 40.0, (0,)),
    ]
    replay(script)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "the header is ''; expected 'node,start,end'"),
        ("0,1,2\n", "the header is '0,1,2'"),
        ("node,start,end\n", "holds no line of a node"),
        ("node,start,end\n0,1\n", "line 2: 2 cells; expected 3"),
        ("node,start,end\n0,1,x\n", "line 2: '0,1,x' are no node and seconds"),
        ("node,start,end\n0,1,2\n9,1,2\n", "line 3: node 9 is unknown; there are 4: 0 to 3"),
        ("node,start,end\n0,2,1\n", "line 2: from 2 to 1 s is no time"),
        ("node,start,end\n0,nan,1\n", "line 2: from nan to 1 s is no time"),
        ("node,start,end\n0,5,9\n0,1,6\n", "line 2: node 0 is there already at 5 s"),
    ],
)
def test_traces_that_cannot_be_are_refused(tmp_path, text, message):
    (tmp_path / "t.csv").write_text(text)
    with pytest.raises(UserError) as caught:
        parse(f"[[trace]]\npath = '{tmp_path}/t.csv'\n", 4, 0)
    assert message in str(caught.value)
    assert str(caught.value).startswith(str(tmp_path / "t.csv"))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("until = 1", "expected one generator; choices: sessions, churn, diurnal, failures"),
        ("churn = '1% a day'\ndiurnal = 1", "there are churn, diurnal"),
        ("churn = 0.2", "0.2 is no rate; expected one as '20% a minute'"),
        ("churn = '0% a minute'", "'0% a minute' is no rate"),
        ("churn = '20% a fortnight'", "is no rate"),
        ("churn = '20% a minute'\nmean_dwon = 1", "mean_dwon is unknown; did you mean"),
        ("churn = '20% a minute'\nhow = 'die'", "how = 'die': expected 'kill' or 'leave'"),
        ("churn = '20% a minute'\nnodes = 8", "node 8 is unknown"),
        ("churn = '99% a second'\nuntil = '300d'\nmean_down = 1", "more than 1,000,000 outages"),
        ("sessions = 'exponential'", "mean_up is missing beside sessions"),
        ("sessions = 'normal'\nmean_up = 1", "expected exponential, weibull or pareto"),
        ("sessions = 'exponential'\nmean_up = 0", "0 is not above 0"),
        ("sessions = 'exponential'\nmean_up = 1\nshape = 1", "shape is for weibull and pareto"),
        ("sessions = 'weibull'\nmean_up = 1", "weibull needs a number above 0.1"),
        ("sessions = 'pareto'\nmean_up = 1\nshape = 1", "pareto needs a number above 1"),
        ("diurnal = '1d'\nlow = 0.9", "low = 0.9 is not below high = 0.9"),
        ("diurnal = '1d'\nspread = 2", "2 is not between 0 and 1"),
        ("diurnal = '1ms'", "more than 1,000,000 outages"),
        ("failures = '1m'", "size is missing beside failures"),
        ("failures = '1m'\nsize = 5", "5 of 4 peers cannot be"),
        ("failures = '1ms'\nsize = 1", "more than 1,000,000 outages until 3600 s"),
    ],
)
def test_generators_that_cannot_be_are_refused(text, message):
    with pytest.raises(UserError) as caught:
        parse(f"# first\n[[generate]]\n{text}\n", 4, 0, "g.toml")
    assert message in str(caught.value)
    assert str(caught.value).startswith("g.toml, line 2: ")


def test_a_trace_without_a_path():
    with pytest.raises(UserError, match="line 1: path is missing"):
        parse("[[trace]]\nhow = 'kill'\n", 4, 0)
    with pytest.raises(UserError, match="expected 'kill' or 'leave'"):
        parse("[[trace]]\npath = 'x'\nhow = 'go'\n", 4, 0)


def test_the_last_peer_stays_whatever_is_drawn():
    script = generated("sessions = 'exponential'\nmean_up = 1\nmean_down = 99\nuntil = 500", 2)
    counts = np.array([count for _, count in replay(script)])
    assert counts.min() == 1
    assert len(counts) > 4
