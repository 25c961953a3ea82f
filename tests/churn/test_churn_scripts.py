"""Churn scripts: what they say is what happens, and what cannot be is refused in one line."""

import re
from pathlib import Path

import pytest

from p2pfl.churn import Happening, load, parse
from p2pfl.errors import UserError

EXAMPLES = sorted((Path(__file__).parents[2] / "scripts" / "churn").glob("*.toml"))


def event(at, action, more=""):
    return f'[[event]]\nat = "{at}"\n{action}\n{more}\n'


def told(script):
    """Return what happens in short: kind, when, to whom."""
    return [(one.kind, one.seconds, one.nodes) for one in script.timed]


def test_a_script_is_spelled_out_with_its_lines():
    script = parse(
        event("10s", "kill = [3, 1]")
        + event("20s", "stop = 0", 'for = "500ms"')
        + event("21s", "partition = [[0], [2, 4]]")
        + event("30s", "restart = 1")
        + event("2m", "heal = true"),
        6,
        0,
    )
    assert script.timed == (
        Happening("kill", 10.0, nodes=(1, 3), line=1),
        Happening("stop", 20.0, nodes=(0,), line=5),
        Happening("cont", 20.5, nodes=(0,), line=5),
        Happening("partition", 21.0, groups=((0,), (2, 4), (1, 3, 5)), line=9),
        Happening("restart", 30.0, nodes=(1,), line=13),
        Happening("heal", 120.0, line=17),
    )
    assert script.founders == tuple(range(6))
    assert script.remarks == ()


def test_rounds_have_a_clock_of_their_own():
    script = parse(
        event("round 12", "stop = 1", 'for = "3 rounds"') + event("round 13", "kill = 0"), 3, 0
    )
    assert script.timed == ()
    assert [(one.kind, one.seconds, one.round) for one in script.by_round] == [
        ("stop", None, 12),
        ("kill", None, 13),
        ("cont", None, 15),
    ]


def test_faults_of_links_in_their_forms():
    script = parse(
        event("1s", "drop = 0.1")
        + event("2s", 'delay = { links = [[0, 1], [2, 0]], by = "50ms" }', 'for = "1s"')
        + event("4s", "corrupt = { nodes = 1, probability = 0.5 }")
        + event("5s", 'drop = { links = "all", probability = 0 }'),
        3,
        0,
    )
    assert [(one.kind, one.links, one.value) for one in script.timed] == [
        ("drop", None, 0.1),
        ("delay", ((0, 1), (2, 0)), 0.05),
        ("delay", ((0, 1), (2, 0)), 0.0),
        ("corrupt", ((0, 1), (1, 0), (1, 2), (2, 1)), 0.5),
        ("drop", None, 0.0),
    ]


@pytest.mark.parametrize(
    ("action", "count"),
    [("kill = 'random 2'", 2), ("kill = '25%'", 4), ("kill = '0-4'", 5), ("stop = 'all'", 16)],
)
def test_who_is_meant(action, count):
    (one,) = parse(event("1s", action), 16, 7).timed
    assert len(set(one.nodes)) == count
    assert one.nodes == tuple(sorted(one.nodes))


def test_lots_fall_by_the_seed_and_on_those_that_can():
    text = "".join(event(f"{i}s", "kill = 'random 1'") for i in range(1, 8))
    one, other = parse(text, 8, 1), parse(text, 8, 2)
    assert one == parse(text, 8, 1)
    assert len({node for happening in one.timed for node in happening.nodes}) == 7
    assert told(one) != told(other)


@pytest.mark.parametrize("seed", range(5))
def test_those_are_drawn_to_whom_it_can_happen(seed, tmp_path):
    (tmp_path / "x.csv").write_text("node,start,end\n0,0,10\n1,0,10\n2,0,99\n")
    trace = f"[[trace]]\npath = '{tmp_path}/x.csv'\n"  # 0 and 1 go at 10 s
    busy = event("11s", "stop = 2", 'for = "9s"')
    script = parse(trace + busy + event("12s", "kill = 'random 1'"), 4, seed)
    assert ("kill", 12.0, (3,)) in told(script)
    with pytest.raises(UserError, match="only 1 to whom"):
        parse(trace + busy + event("12s", "kill = 'random 2'"), 4, seed)


def test_every_event_has_lots_of_its_own():
    text = "".join(event(f"{i}s", "slow = {nodes = 'random 9', factor = 2}") for i in range(1, 9))
    assert len({one.nodes for one in parse(text, 30, 0).timed}) == 8


def test_who_was_slow_is_then_as_fast_as_before():
    script = parse(event("1s", "slow = {nodes = 1, factor = 4}", "for = 2"), 2, 0)
    assert [(one.seconds, one.value) for one in script.timed] == [(1.0, 4.0), (3.0, 1.0)]


def test_comments_change_no_lots():
    text = event("1s", "kill = 'random 3'")
    assert told(parse(text, 9, 5)) == told(parse("# why\n\n" + text, 9, 5))


def test_who_joins_first_is_no_founder():
    script = parse(event("5s", "join = '2-3'") + event("9s", "leave = 2"), 4, 0)
    assert script.founders == (0, 1)
    assert told(script) == [("join", 5.0, (2, 3)), ("leave", 9.0, (2,))]


def test_a_peer_is_there_when_the_events_and_the_generators_say_so(tmp_path):
    (tmp_path / "x.csv").write_text("node,start,end\n0,0,20\n0,50,100\n1,30,100\n")
    (tmp_path / "x.toml").write_text(
        event("10s", "kill = 0")  # before the trace takes it away
        + event("40s", "restart = 0")  # it stays away, by the trace
        + event("60s", "stop = 0")
        + event("70s", "kill = 0")
        + '[[trace]]\npath = "x.csv"\nhow = "leave"\n'
    )
    script = load(tmp_path / "x.toml", 3, 0)
    assert script.founders == (0, 2)
    assert told(script) == [
        ("kill", 10.0, (0,)),
        ("join", 30.0, (1,)),
        ("restart", 50.0, (0,)),
        ("stop", 60.0, (0,)),
        ("kill", 70.0, (0,)),
    ]
    assert [one.line for one in script.timed] == [1, 0, 0, 9, 13]


def test_both_clocks_are_checked_in_the_order_of_the_file_and_it_is_said():
    script = parse(event("round 3", "kill = 1") + event("9s", "restart = 1"), 2, 0)
    assert len(script.remarks) == 1
    assert "not known before the run" in script.remarks[0]


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.stem)
def test_the_examples_do_something_for_few_and_for_many(path):
    for nodes in (8, 50):
        assert load(path, nodes, 1).happenings


def test_there_are_examples():
    assert len(EXAMPLES) >= 4


KILL = event("10s", "kill = 1")
REFUSED = {
    "unknown node": (event("1s", "kill = 4"), "line 1: node 4 is unknown; there are 4: 0 to 3"),
    "unknown in a list": (event("1s", "kill = [0, -1]"), "node -1 is unknown"),
    "unknown link": (event("1s", "drop = {links = [[0, 9]], probability = 1}"), "node 9"),
    "no link": (event("1s", "drop = {links = [[1, 1]], probability = 1}"), "[1, 1] is none"),
    "no pair": (event("1s", "drop = {links = [[1]], probability = 1}"), "expected a pair"),
    "links twice": (event("1s", "drop = {links=[[0,1],[0,1]], probability=1}"), "listed twice"),
    "named twice": (event("1s", "kill = [1, 1]"), "node 1 is named twice"),
    "nobody": (event("1s", "kill = []"), "[] names nobody"),
    "a text": (event("1s", "kill = 'node 3'"), "'node 3' names nobody; expected an id, a list"),
    "true is no node": (event("1s", "kill = true"), "True is no node"),
    "too many": (event("1s", "kill = 'random 5'"), "5 of 4 peers cannot be"),
    "backwards range": (event("1s", "kill = '3-1'"), "'3-1' goes backwards"),
    "0 %": (event("1s", "kill = '0%'"), "'0%' of 4 peers cannot be"),
    "unknown key": (event("1s", "kil = 3"), "kil is unknown; did you mean 'kill'? an event takes"),
    "unknown table": ("[[events]]\nat = 1", "events is unknown; did you mean 'event'?"),
    "unknown inner key": (event("1s", "slow = {node = 1, factor = 2}"), "did you mean 'nodes'?"),
    "missing inner key": (event("1s", "slow = {nodes = 1}"), "slow.factor is missing"),
    "no table": (event("1s", "slow = 1"), "expected a table as { nodes = [5], factor = 10 }"),
    "no action": ("[[event]]\nat = 1\n", "expected one action in an event; choices: kill"),
    "two actions": (event("1s", "kill = 1", "stop = 2"), "there are kill, stop"),
    "no time": ("[[event]]\nkill = 1\n", "at is missing"),
    "one bracket": ("[event]\nat = 1\nkill = 1\n", "expected [[event]], with two brackets"),
    "no TOML": ("[[event]\n", "is not valid TOML"),
    "nonsense time": (event("30 parsecs", "kill = 1"), "'30 parsecs' is no time"),
    "negative time": ("[[event]]\nat = -1\nkill = 1\n", "-1 is no time"),
    "infinite time": ("[[event]]\nat = inf\nkill = 1\n", "inf is no time"),
    "no such time": (event("9" * 400 + "s", "kill = 1"), "is no time"),
    "endless round": (event("round " + "9" * 400, "kill = 1"), "is no time"),
    "negative round": (event("round -1", "kill = 1"), "'round -1' is no time"),
    "zero for": (event("1s", "stop = 1", "for = 0"), "0 is not above 0"),
    "zero rounds": (event("round 1", "stop = 1", "for = '0 rounds'"), "'0 rounds' is not above 0"),
    "nothing to end": (event("1s", "cont = 1", "for = '1s'"), "for: cont is over at once"),
    "rounds for seconds": (
        event("round 5", "stop = 1", "for = '5s'"),
        "line 1: for = '5s': an event by round lasts as in for = '3 rounds'",
    ),
    "seconds for rounds": (event("5s", "stop = 1", "for = '2 rounds'"), "lasts as in for = '30s'"),
    "probability": (event("1s", "drop = 1.5"), "1.5 is not between 0 and 1"),
    "not a number": (event("1s", "drop = nan"), "nan is not between 0 and 1"),
    "no probability": (event("1s", "drop = {links = 'all'}"), "expected probability, and either"),
    "links and nodes": (
        event("1s", "drop = {links = 'all', nodes = 1, probability = 1}"),
        "either links or nodes",
    ),
    "factor": (event("1s", "slow = {nodes = 1, factor = 0}"), "factor = 0: expected a number"),
    "overlapping groups": (event("1s", "partition = [[0, 1], [1, 2]]"), "node 1 is in two groups"),
    "no cut": (event("1s", "partition = [[0, 1, 2, 3]]"), "cuts nobody off"),
    "heal": (event("1s", "heal = true"), "line 1: heal: there is no partition"),
    "heal false": (event("1s", "heal = false"), "expected true"),
    "two partitions": (
        event("1s", "partition = [0]") + event("2s", "partition = [1]"),
        "line 5: partition: that of line 1 has not healed",
    ),
    "heal too soon": (
        event("1s", "partition = [0]", 'for = "9s"') + event("2s", "heal = true"),
        "line 5: heal = True: the partition of line 1 lasts until 10 s",
    ),
    "back in time": (
        KILL + event("9s", "kill = 2"),
        "line 5: at = 9 s is before the event above it, at 10; expected",
    ),
    "back in rounds": (event("round 3", "kill = 1") + event("round 2", "kill = 2"), "2 rounds is"),
    "kill of the dead": (KILL + event("11s", "kill = 1"), "kill = 1: node 1 has been killed"),
    "stop of the dead": (KILL + event("11s", "stop = 1"), "stop = 1: node 1 has been killed"),
    "join of the killed": (KILL + event("11s", "join = 1"), "been killed; let it restart"),
    "restart of who left": (
        event("1s", "leave = 1") + event("2s", "restart = 1"),
        "node 1 has left; let it join",
    ),
    "restart of the living": (event("1s", "restart = 1"), "restart = 1: node 1 is there"),
    "join of the living": (KILL + event("12s", "restart = 1") + event("13s", "join = 1"), "there"),
    "cont without stop": (event("1s", "cont = 1"), "cont = 1: node 1 is there"),
    "before it joins": (
        event("1s", "join = 1") + event("2s", "kill = 1") + event("3s", "leave = 1"),
        "node 1 has been killed",
    ),
    "everybody joins": (event("1s", "join = '0-3'"), "nobody is there to begin with"),
    "stop twice": (event("1s", "stop = 1") + event("2s", "stop = 1"), "node 1 is stopped"),
    "frozen for a while": (
        event("1s", "stop = 1", 'for = "9s"') + event("2s", "kill = 1"),
        "line 5: kill = 1: the stop of line 1 lasts until 10 s",
    ),
    "slow for a while": (
        event("1s", "slow = {nodes = 1, factor = 2}", 'for = "9s"')
        + event("2s", "slow = {nodes = [0, 1], factor = 3}"),
        "the slow of line 1 lasts until 10 s",
    ),
    "dropped for a while": (
        event("1s", "drop = {links = [[0, 1]], probability = 1}", 'for = "9s"')
        + event("2s", "drop = 0.1"),
        "line 5: drop = 0.1: the drop of line 1 lasts until 10 s",
    ),
    "the last peer": (
        event("1s", "kill = '0-2'") + event("2s", "leave = 3"),
        "line 5: leave = 3 would leave nobody",
    ),
    "all at once": (event("1s", "kill = 'all'"), "line 1: kill = 'all' would leave nobody"),
    "all stopped by round": (
        event("round 5", "stop = '0-2'") + event("round 6", "stop = 3", 'for = "3 rounds"'),
        "line 5: stop = 3 would stop the last one: no further round comes",
    ),
    "nobody to draw": (
        event("1s", "kill = '0-2'") + event("2s", "kill = 'random 2'"),
        "there are only 1 to whom that can happen",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_cannot_be_is_refused_with_its_line(case):
    text, message = REFUSED[case]
    with pytest.raises(UserError) as caught:
        parse(text, 4, 0, "my.toml")
    assert message in str(caught.value)
    assert str(caught.value).startswith("my.toml")
    assert "\n" not in str(caught.value)


def test_all_may_be_stopped_by_round_where_time_lets_them_go_on():
    script = parse(event("round 5", "stop = 'all'") + event("9s", "cont = 'all'"), 4, 0)
    assert [one.kind for one in script.happenings] == ["cont", "stop"]


def test_where_tables_are_written_in_line_they_are_counted():
    with pytest.raises(UserError, match=r"^x, event 2: heal: there is no partition"):
        parse("event = [{at = 1, kill = 1}, {at = 2, heal = true}]", 4, 0, "x")


def test_as_many_links_as_nobody_can_list_are_refused():
    with pytest.raises(UserError, match=r"about 20,000,000 links; expected links = 'all'"):
        parse(event("1s", "drop = {nodes = '10%', probability = 1}"), 10_000, 0)


def test_files_that_are_none(tmp_path):
    with pytest.raises(UserError, match=r"none.toml cannot be read"):
        load(tmp_path / "none.toml", 4, 0)
    (tmp_path / "large.toml").write_bytes(b"#" * ((1 << 22) + 1))
    with pytest.raises(UserError, match=r"large.toml has more than 4 MiB"):
        load(tmp_path / "large.toml", 4, 0)
    (tmp_path / "bytes.toml").write_bytes(b"\xff\xfe")
    with pytest.raises(UserError, match=r"bytes.toml is no text"):
        load(tmp_path / "bytes.toml", 4, 0)


def test_the_scripts_of_the_page_on_churn(tmp_path):
    page = (Path(__file__).parents[2] / "docs" / "churn.md").read_text(encoding="utf-8")
    scripts = [text for text in re.findall(r"```toml\n(.*?)```", page, flags=re.S) if "[[" in text]
    (tmp_path / "machines.csv").write_text("node,start,end\n0,0,1\n1,0,2\n")
    assert len(scripts) == 3
    for text in scripts:
        (tmp_path / "x.toml").write_text(text)
        assert load(tmp_path / "x.toml", 8, 1).timed
