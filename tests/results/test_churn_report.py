"""Runs with churn: when they recovered, what the report says, and what is marked in pictures."""

from __future__ import annotations

import json
import math

import pytest
from rich.console import Console

from p2pfl.cli.report import Format, report
from p2pfl.errors import UserError
from p2pfl.results.churned import Mark, churn_table, draw_marks, legend_of, marks, recovery
from p2pfl.results.plots import Drawn, Panel, picture, style
from p2pfl.results.record import Recorder
from p2pfl.results.runs import Facts, columns, read_run, summarise
from p2pfl.runtime.chronicle import Chronicle
from p2pfl.runtime.setup import Row

NAN = math.nan
INF = math.inf


def rows(accuracies, nodes=2, clock="virtual_s"):
    """Rows of rounds that take a second each, node 1 half a second longer than node 0."""
    return [
        Row(k, i, 1.0, 1.0, a, 9, 0.1, 100, 100, NAN, NAN)._replace(**{clock: k + 1 + i / 2})
        for k, a in enumerate(accuracies)
        for i in range(nodes)
    ]


@pytest.mark.parametrize(
    ("accuracies", "took", "least"),
    [
        ([0.5, 0.6, 0.7, 0.8], 0, 0.7),
        ([0.5, 0.6, 0.595, 0.8], 0, 0.595),
        ([0.5, 0.6, 0.4, 0.8], 2, 0.4),
        ([0.5, 0.6, 0.6, 0.4, 0.5, 0.5, 0.595, 0.3], 5, 0.3),
        ([0.5, 0.6, 0.4, 0.5], None, 0.4),
        ([NAN, 0.6, NAN, 0.4, NAN, 0.8], 4, 0.4),
        ([0.6, NAN, NAN, 0.4, NAN, 0.8], 4, 0.4),
    ],
)
@pytest.mark.parametrize("clock", ["virtual_s", "wall_s"])
def test_recovery_is_counted_in_rounds_since_the_last_unharmed_one(accuracies, took, least, clock):
    found = recovery(columns(rows(accuracies, clock=clock)), first_s=2.7)
    before = accuracies[1] if math.isfinite(accuracies[1]) else accuracies[0]
    due = {"accuracy_before": before, "accuracy_least": least, "recovery_rounds": took}
    assert found == pytest.approx(due)


def test_a_round_is_harmed_that_anybody_ended_too_late():
    metrics = columns(rows([0.9, 0.4, 0.9]))
    assert recovery(metrics, first_s=2.2)["recovery_rounds"] == 2  # node 1 ends round 1 at 2.5
    assert recovery(metrics, first_s=2.6) == {
        "accuracy_before": 0.4,
        "accuracy_least": 0.9,
        "recovery_rounds": 0,
    }


def test_it_is_the_mean_over_those_who_are_there():
    there = [row for row in rows([0.6, 0.6, 0.5, 0.5]) if (row.round, row.node) != (3, 1)]
    there[-1] = there[-1]._replace(eval_acc=0.6)
    assert recovery(columns(there), first_s=2.7)["recovery_rounds"] == 2


@pytest.mark.parametrize("first", [None, 0.0, 99.0])
def test_what_has_no_before_or_no_after_is_not_known(first):
    found = recovery(columns(rows([0.5, 0.6])), first)
    assert set(found.values()) == {None}
    assert set(recovery(columns([]), 1.0).values()) == {None}
    assert set(recovery(columns(rows([NAN, NAN])), 1.6).values()) == {None}


EVENTS = [
    {"kind": "kill", "virtual_s": 2.0, "nodes": [1]},
    {"kind": "partition", "virtual_s": 3.5, "round": 3, "groups": [[0], [1]]},
    {"kind": "stop", "virtual_s": 4.0, "nodes": [0]},
    {"kind": "partition", "virtual_s": 5.0, "groups": [[0, 1], []]},
    {"kind": "heal", "virtual_s": 6.5},
    {"kind": "restart", "virtual_s": 7.0, "nodes": [1]},
    {"kind": "slow", "virtual_s": 7.5, "nodes": [1], "value": 3.0},
    {"kind": "leave", "virtual_s": 8.0, "nodes": [1]},
    {"kind": "partition", "virtual_s": 9.0, "groups": [[0], [1]]},
]


def churned(folder, events=EVENTS, status="finished", clock="virtual_s", more=None, churn=True):
    """Record a made-up run of two nodes and ten rounds."""
    section = '[churn]\nname = "script"\npath = "x.toml"\n' if churn else ""
    recorder = Recorder(folder, f'nodes = 2\ntopology = "ring"\n{section}', on="emulate")
    made = rows([0.5 + k / 20 for k in range(10)], clock=clock)
    recorder.rows(made)
    for event in events:
        recorder.event("churn", **event)
    if status != "running":
        facts = Facts("made", "emulate", "dpsgd", "ring", 0, 2, wall_s=2.0)
        told = Chronicle().summary(10.0) | {"happenings": {"kill": 2}} | (more or {})
        summary = summarise(columns(made), facts) | ({"churn": told} if churn else {})
        recorder.finish(status, summary)
    return folder


def test_marks_stand_where_things_happened(tmp_path):
    assert marks(read_run(churned(tmp_path / "a"))) == [
        Mark("killed", 2.0, 2.0),
        Mark("parted", 3.5, 3, 5.0, 5.0),
        Mark("frozen", 4.0, 4.0),
        Mark("parted", 5.0, 5.0, 6.5, 6.5),
        Mark("back", 7.0, 7.0),
        Mark("left", 8.0, 8.0),
        Mark("parted", 9.0, 9.0),
    ]


def test_a_round_is_done_when_the_first_peer_has_done_it_or_a_later_one(tmp_path):
    run = read_run(churned(tmp_path / "a", EVENTS[:1]))
    run.metrics["virtual_s"][run.metrics["round"] == 1] = 5.0  # the others have left it out
    assert marks(run) == [Mark("killed", 2.0, 1.5)]


def test_marks_of_processes_count_from_when_all_founders_trained(tmp_path):
    events = [
        {"event": "peer", "phase": "training", "node": 0, "wall_s": 3.0},
        {"event": "peer", "phase": "training", "node": 1, "wall_s": 4.0},
        {"wall_s": 6.0, "kind": "kill", "nodes": [1]},
        {"wall_s": 8.5, "kind": "restart", "nodes": [1]},
        {"event": "peer", "phase": "training", "node": 1, "wall_s": 9.0},
        {"wall_s": 9.5, "kind": "kill", "nodes": [0]},
    ]
    folder = churned(tmp_path / "a", [], clock="wall_s")
    lines = [json.dumps({"event": "churn", **event}) for event in events]
    (folder / "events.jsonl").write_text("\n".join(lines) + "\n" + lines[-1][:9])
    found = marks(read_run(folder))
    assert found == [Mark("killed", 2, 2), Mark("back", 4.5, 4.5), Mark("killed", 5.5, 5.5)]


def test_no_marks_without_churn_and_a_word_if_events_are_damaged(tmp_path):
    quiet = read_run(churned(tmp_path / "a", churn=False))
    assert marks(quiet) == []
    assert marks(read_run(churned(tmp_path / "c", []))) == []
    broken = churned(tmp_path / "b")
    (broken / "events.jsonl").write_text("{\n")
    with pytest.raises(UserError, match=r"events\.jsonl cannot be read"):
        marks(read_run(broken))


def drawn_lines(monkeypatch, runs, panel, path):
    """Draw runs; return the marks as ``(x, glyph)``, the spans, and the names in the legend."""
    from matplotlib.figure import Figure

    figures = []
    monkeypatch.setattr(Figure, "savefig", lambda self, *args, **more: figures.append(self))
    drawn = [Drawn(run, run.folder.name, style(i), marks(run)) for i, run in enumerate(runs)]
    picture(drawn, [panel], path)
    (axes,) = figures[0].axes
    glyphs = [(*line.get_xdata(), line.get_marker()) for line in axes.lines]
    glyphs = [found for found in glyphs if len(found) == 2 and found[1] not in ("None", "o")]
    spans = [patch.get_extents().transformed(axes.transData.inverted()) for patch in axes.patches]
    names = [text.get_text() for legend in figures[0].legends for text in legend.get_texts()]
    return glyphs, [(span.x0, span.x1) for span in spans], names


@pytest.mark.parametrize("x", ["round", "virtual_s"])
def test_pictures_are_marked_on_the_clock_of_the_run(tmp_path, monkeypatch, x):
    run = read_run(churned(tmp_path / "a"))
    found, spans, names = drawn_lines(monkeypatch, [run], Panel("eval_acc", "", x), tmp_path / "p")
    assert found == [(2.0, "x"), (4.0, "s"), (7.0, "^"), (8.0, "v")]
    began = 3 if x == "round" else 3.5
    assert spans[:2] == [pytest.approx((began, 5.0)), pytest.approx((5.0, 6.5))]
    assert spans[2][0] == pytest.approx(9)
    assert 10 < spans[2][1] < 12
    assert names == ["killed", "left", "frozen", "back", "parted"]


def test_no_marks_where_the_axis_is_another_clock(tmp_path, monkeypatch):
    run = read_run(churned(tmp_path / "a"))
    run.metrics["wall_s"][:] = range(len(run.metrics["wall_s"]))
    panel = Panel("eval_acc", "", "wall_s")
    assert drawn_lines(monkeypatch, [run], panel, tmp_path / "p") == ([], [], [])


def test_several_runs_have_their_own_marks_and_one_legend(tmp_path, monkeypatch):
    runs = [read_run(churned(tmp_path / "a")), read_run(churned(tmp_path / "b", EVENTS[:1]))]
    runs.append(read_run(churned(tmp_path / "c", churn=False)))
    found, _, names = drawn_lines(monkeypatch, runs, Panel("eval_acc", ""), tmp_path / "p")
    assert found.count((2.0, "x")) == 2
    assert names == ["a", "b", "c", "killed", "left", "frozen", "back", "parted"]


def test_marks_do_not_make_the_axis_longer():
    from matplotlib.figure import Figure

    axes = Figure().subplots()
    axes.plot([0, 10], [1, 2])
    found = [Mark("killed", 0, 10.4), Mark("killed", 0, 50), Mark("parted", 0, 9)]
    draw_marks(axes, found, "round", "#000000", lane=0)
    assert axes.get_xlim() == (-0.5, 10.5)
    assert [line.get_xdata()[0] for line in axes.lines] == [0, 10.4, 10.4]


def test_a_legend_names_what_there_is():
    assert legend_of([]) == ([], [])
    assert legend_of([Mark("back", 1, 1), Mark("back", 2, 2)])[1] == ["back"]


def shown(runs):
    console = Console(width=300, record=True, file=open("/dev/null", "w"))  # noqa: PTH123, SIM115
    console.print(churn_table(runs))
    return [" ".join(line.split()) for line in console.export_text().splitlines()]


def test_the_table_says_what_happened_and_what_it_cost(tmp_path):
    more = {
        "known_dead_to_all_s": {"median": 3.5, "max": 4.25},
        "stall_s": {"median": 0.5, "max": 1.5},
        "survivors": 1,
        "false_suspicions": 7,
        "membership_bytes_per_s": 1234.5,
        "mean_drift": 0.01234,
        "mass_kept": 0.98765,
        "accuracy_before": 0.9,
        "accuracy_least": 0.8,
        "recovery_rounds": 3,
    }
    lines = shown([read_run(churned(tmp_path / "a", more=more))])
    assert lines[0] == "churn: median (and longest) times a"
    assert lines[1:] == [
        "happened 2× kill",
        "dead to all 3.5 s (4.2 s)",
        "kills not noticed 0",
        "false suspicions 7",
        "false deaths 0",
        "stall 0.500 s (1.5 s), survivors: 1",
        "mixed one-sidedly 0",
        "mean moved by exchanges 1.23 %",
        "mass kept 98.8 %",
        "accuracy back after 3 rounds: 90.00 % before, then 80.00 %",
        "membership, per peer 1.23 kB a second",
    ]


@pytest.mark.parametrize(
    ("took", "words"),
    [
        (0, "never fell below 90.00 % by more than 1 point"),
        (None, "not by the end: 90.00 % before, then 80.00 %"),
    ],
)
def test_runs_are_told_side_by_side(tmp_path, took, words):
    more = {"accuracy_before": 0.9, "accuracy_least": 0.8, "recovery_rounds": took}
    runs = [read_run(churned(tmp_path / "a")), read_run(churned(tmp_path / "b", more=more))]
    quiet = read_run(churned(tmp_path / "c", churn=False))
    lines = shown([runs[0], quiet, runs[1]])
    assert lines[0].endswith("a b")
    assert any(line.startswith(f"accuracy back after – {words}") for line in lines)
    assert churn_table([quiet]) is None


def test_a_report_shows_it_all(tmp_path, capsys):
    a, b = churned(tmp_path / "a"), churned(tmp_path / "b", churn=False)
    report([a, b])
    said = capsys.readouterr().out
    assert "happened" in said
    assert (a / "plots" / "accuracy.png").stat().st_size > 5000
    report([a, b], format=Format.json, plots=False)
    runs = json.loads(capsys.readouterr().out)["runs"]
    assert runs[0]["churn"]["happenings"] == {"kill": 2}
    assert "churn" not in runs[1]
    report([churned(tmp_path / "c", status="running")])  # it goes on, or was broken off
