"""What people see of churn: the section of an experiment, the verb, the pictures."""

import json
import sys

import pytest
from typer.testing import CliRunner

from p2pfl.churn import parse
from p2pfl.churn.draw import draw
from p2pfl.churn.text import as_text
from p2pfl.churn.tracks import tracks
from p2pfl.cli import app
from p2pfl.errors import UserError
from p2pfl.experiment.config import read
from p2pfl.experiment.sections import SECTIONS

TEXT = """
[[event]]
at = "10s"
kill = 1
for = "20s"

[[event]]
at = "40s"
stop = 2
for = "10s"

[[event]]
at = "50s"
slow = { nodes = 0, factor = 4 }
for = "10s"

[[event]]
at = "60s"
partition = [0]
for = "20s"

[[event]]
at = "70s"
drop = 0.25
for = "10s"
"""


def build(value, nodes=8, seed=1):
    return read("churn", value, SECTIONS["churn"]).build("churn", nodes, seed)


def p2pfl(*words):
    return CliRunner().invoke(app, list(map(str, words)))


@pytest.fixture
def path(tmp_path):
    path = tmp_path / "x.toml"
    path.write_text(TEXT)
    return path


def test_by_default_nothing_happens():
    script = build({})
    assert (script.founders, script.happenings) == (tuple(range(8)), ())


def test_a_script_in_an_experiment(path):
    script = build({"name": "script", "path": str(path)})
    assert script == build(f"script:path={path}")
    assert [one.kind for one in script.timed][:2] == ["kill", "restart"]


@pytest.mark.parametrize(
    ("section", "table"),
    [
        (
            {"name": "sessions", "up": "weibull", "shape": 0.5, "mean_up": 60, "mean_down": 10},
            "sessions = 'weibull'\nshape = 0.5\nmean_up = 60\nmean_down = 10",
        ),
        ("rate:share=20% a minute,mean_down=10s", "churn = '20% a minute'\nmean_down = 10"),
        ("diurnal:period=10m,low=0.1", "diurnal = '10m'\nlow = 0.1"),
        (
            {"name": "failures", "mean_between": "5m", "size": "25%", "until": "1h"},
            "failures = 300\nsize = '25%'",
        ),
    ],
)
def test_a_section_is_a_generator_without_a_file(section, table):
    script = build(section)
    assert script.timed
    assert script == parse(f"[[generate]]\n{table}\n", 8, 1)


def test_a_trace_in_an_experiment(tmp_path):
    (tmp_path / "t.csv").write_text("node,start,end\n0,0,10\n1,0,20\n")
    (one,) = build({"name": "trace", "path": str(tmp_path / "t.csv"), "how": "leave"}).timed
    assert (one.kind, one.seconds, one.nodes) == ("leave", 10.0, (0,))


@pytest.mark.parametrize(
    ("section", "message"),
    [
        ({"name": "scirpt"}, "churn.name = 'scirpt' is unknown; did you mean 'script'?"),
        ({"name": "script"}, "churn.path is missing"),
        ("script:path=none.toml", "none.toml cannot be read"),
        ("rate:share=2", "churn.share = 2: expected str, got int"),
        ("rate:share=x", "churn: 'x' is no rate"),
        ({"name": "sessions", "mean_up": -1}, "churn: -1.0 is no time"),
    ],
)
def test_sections_that_cannot_be(section, message):
    with pytest.raises(UserError) as caught:
        build(section)
    assert str(caught.value).startswith(message)


def test_tracks_tell_how_peers_and_links_are():
    (track,) = tracks(parse(TEXT, 3, 0), until=100)
    assert [tuple(span) for span in track.peers[1]] == [
        (0, 10, "up"),
        (10, 30, "away"),
        (30, 100, "up"),
    ]
    assert [tuple(span) for span in track.peers[2]][1] == (40, 50, "stopped")
    assert [tuple(span) for span in track.peers[0]][1] == (50, 60, "slow")
    assert track.faults == {"partition": ((60, 80, "1|2"),), "drop": ((70, 80, "0.25"),)}
    assert track.there == ((0, 3), (10, 2), (30, 3), (40, 3), (50, 3))


def test_a_track_ends_where_it_is_cut():
    (track,) = tracks(parse(TEXT, 3, 0), until=20)
    assert track.there == ((0, 3), (10, 2))
    assert track.peers[1] == ((0, 10, "up"), (10, 20, "away"))
    assert track.faults == {}


def test_a_picture_in_characters():
    lines = as_text(parse(TEXT, 3, 0), until=100, width=20).splitlines()
    assert lines[:7] == [
        "        0  ██████████▓▓████████",
        "        1  ██····██████████████",
        "        2  ████████░░██████████",
        "partition              ####      1|2",
        "     drop                ##      0.25",
        "    there  ██▅▅▅▅██████████████  2 to 3 of 3",
        "     time  0     50s      1.67m",
    ]
    assert lines[-1].startswith(
        "1 kill, 1 restart, 1 stop, 1 cont, 2 slow, 1 partition, 2 drop, 1 heal"
    )


def test_what_is_short_is_seen_and_of_many_peers_some_are_shown():
    text = "[[event]]\nat = '1h'\nkill = 77\nfor = 1\n[[event]]\nat = '2h'\nstop = 5\nfor = 1\n"
    shown = as_text(parse(text, 99, 0))
    assert sum("·" in line for line in shown.splitlines()[:-1]) == 1
    assert "and 59 more" in shown


def test_time_and_rounds_have_a_picture_each():
    text = "[[event]]\nat = 'round 4'\nkill = 1\n[[event]]\nat = '5s'\nkill = 0\n"
    shown = as_text(parse(text, 3, 0))
    assert shown.count("there") == 2
    assert "which comes first is not known before the run" in shown


def test_the_verb_shows_prints_and_draws(path, tmp_path):
    pytest.importorskip("matplotlib")
    done = p2pfl("churn", "show", path, "--nodes", 4, "--draw", tmp_path / "a.png", "--until", "2m")
    assert done.exit_code == 0, done.output
    assert "partition" in done.output
    assert (tmp_path / "a.png").read_bytes().startswith(b"\x89PNG")
    told = json.loads(p2pfl("churn", "show", path, "--nodes", 4, "--format", "json").stdout)
    assert told["founders"] == [0, 1, 2, 3]
    assert told["happenings"][0]["kind"] == "kill"
    assert told["happenings"][0]["seconds"] == 10.0


def test_the_verb_refuses_in_one_line(path):
    for words, message in (
        ((path, "--nodes", 2), "x.toml, line 7: stop = 2: node 2 is unknown"),
        ((path, "--nodes", 4, "--until", "never"), "--until: 'never' is no time"),
        (("none.toml", "--nodes", 4), "none.toml cannot be read"),
    ):
        error = p2pfl("churn", "show", *words).exception
        assert isinstance(error, UserError)
        assert message.replace("stop = 2: ", "") in str(error)


def test_drawing_both_clocks_and_without_matplotlib(tmp_path, monkeypatch):
    pytest.importorskip("matplotlib")
    script = parse(TEXT + "[[event]]\nat = 'round 4'\nkill = 3\n", 60, 0)
    draw(script, tmp_path / "a.png")
    draw(script, tmp_path / "b.png")
    assert (tmp_path / "a.png").read_bytes() == (tmp_path / "b.png").read_bytes()
    with pytest.raises(UserError, match="cannot be written"):
        draw(script, tmp_path / "no" / "a.png")
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(UserError, match=r"pip install 'p2pfl-gossip\[plots\]'"):
        draw(script, tmp_path / "a.png")
