from __future__ import annotations

import json
import math
import sys

import numpy as np
import pytest
from rich.console import Console

from p2pfl.cli.report import Format, report
from p2pfl.errors import UserError
from p2pfl.results.plots import curve
from p2pfl.results.record import Recorder
from p2pfl.results.report import compare, graph_of, labels, node_table, nodes, size
from p2pfl.results.runs import Facts, columns, read_run, summarise
from p2pfl.runtime.setup import Row

PNG = b"\x89PNG\r\n\x1a\n"


def made(folder, topology="ring", rounds=4, n=4, status="finished", **changes):
    """Record a made-up run of n nodes whose rows are changed as given."""
    toml = f'nodes = {n}\ntopology = "{topology}"\n[algorithm]\nname = "dpsgd"\n'
    recorder = Recorder(folder, toml, on="simulate", base=folder.parent)
    rows = [
        Row(k, i, 1 / (k + 1), 2 / (k + 1), 0.5 + k / 10 + i / 100, 10 + i, 0.1**k, 1000, 900, k, k)
        for k in range(rounds)
        for i in range(n)
    ]
    rows = [row._replace(**changes) for row in rows]
    recorder.rows(rows)
    facts = Facts("made", "simulate", "dpsgd", topology, 0, n, node_updates=80, wall_s=2.0)
    if status != "running":
        recorder.finish(status, summarise(columns(rows), facts), "peer 2" * (status == "failed"))
    return folder


def shown(table, width=300):
    console = Console(width=width, record=True, file=open("/dev/null", "w"))  # noqa: PTH123, SIM115
    console.print(table)
    return console.export_text()


def test_one_line_a_run(tmp_path):
    a, b = made(tmp_path / "a"), made(tmp_path / "b", "complete", eval_acc=math.nan)
    text = shown(compare([read_run(a), read_run(b)])).splitlines()
    assert len(text) == 3
    assert text[1].split()[:4] == ["a", "simulate", "finished", "4"]
    assert "81.50 %" in text[1]  # the mean of the last round
    assert "80.00 %" in text[1]  # its worst node
    assert "16 kB" in text[1]
    assert "–" in text[2]
    upright = shown(compare([read_run(a), read_run(b)], upright=True), width=60)
    assert "consensus distance" in upright
    assert "virtual" in upright


def test_a_run_that_was_broken_off_is_told_from_its_metrics(tmp_path):
    run = read_run(made(tmp_path / "a", status="running"))
    line = shown(compare([run])).splitlines()[1]
    assert "running" in line
    assert "81.50 %" in line
    assert "ring" in line


def test_nodes_stand_as_they_were_last_measured(tmp_path):
    folder = made(tmp_path / "a")
    run = read_run(folder)
    run.metrics["eval_acc"][-4:-2] = math.nan  # nodes 0 and 1 in the last round
    run.summary.update(alone=[0.0, 0.1, 0.2, 0.3], alone_mean=0.15, pooled=0.9)
    assert "15.00 %  90.00 %" in shown(compare([run]))
    found = nodes(run)
    assert [row["eval_acc"] for row in found] == pytest.approx([0.7, 0.71, 0.82, 0.83])
    counts = {"node": 3, "rounds": 4, "num_examples": 13, "bytes_sent": 4000}
    due = counts | {"eval_acc": 0.83, "eval_loss": 0.5, "train_loss": 0.25, "alone": 0.3}
    assert found[3] == pytest.approx(due)
    assert len(shown(node_table(run)).splitlines()) == 5


def test_labels_are_as_long_as_they_must_be(tmp_path):
    folders = [tmp_path / "x" / "run", tmp_path / "y" / "run", tmp_path / "x" / "other"]
    runs = [read_run(made(folder)) for folder in folders]
    assert labels(runs[:1]) == ["run"]
    assert labels(runs[::2]) == ["run", "other"]
    assert labels(runs) == ["x/run", "y/run", "x/other"]
    assert labels([runs[0], runs[0]]) == ["run", "run (2)"]


@pytest.mark.parametrize(("count", "text"), [(0, "0 B"), (999, "999 B"), (999_999, "1 MB")])
def test_sizes_are_short(count, text):
    assert size(count) == text


def test_a_curve_is_over_the_nodes_that_were_measured():
    nan = math.nan
    usual = Row(0, 0, 1.0, 1.0, 1.0, 1, nan, 1, 1, 1.0, nan)
    rows = [
        usual._replace(round=k, node=i, eval_acc=a)
        for k, i, a in [(2, 0, 0.5), (0, 0, 0.1), (0, 1, 0.3), (1, 0, nan), (2, 1, nan)]
    ]
    found = curve(columns(rows), "eval_acc")
    np.testing.assert_allclose(found, [[1, 3], [0.2, 0.5], [0.1, 0.5], [0.3, 0.5]])
    assert all(len(part) == 0 for part in curve(columns(rows), "virtual_s"))


def test_everything_is_drawn_that_was_measured(tmp_path, capsys):
    a = made(tmp_path / "a")
    b = made(tmp_path / "b", "star", consensus_distance=0.0, virtual_s=math.nan)
    report([a, b], out=tmp_path / "new" / "plots")
    files = sorted((tmp_path / "new" / "plots").iterdir())
    assert [file.stem for file in files] == [
        *("accuracy", "bytes", "consensus", "loss", "time", "topology-a", "topology-b")
    ]
    assert all(file.read_bytes().startswith(PNG) for file in files)
    printed = capsys.readouterr().out
    assert all(f"drawn: {file}" in printed for file in files)


def test_nothing_empty_is_drawn(tmp_path, capsys):
    unknown = dict.fromkeys(("eval_acc", "eval_loss", "consensus_distance", "virtual_s"), math.nan)
    a = made(tmp_path / "a", "one_peer", bytes_sent=0, **unknown)
    report([a])
    assert sorted(file.stem for file in (a / "plots").iterdir()) == ["loss", "time"]
    said = capsys.readouterr().out
    assert "not measured: accuracy, loss on test examples, consensus distance" in said


def test_runs_of_equal_models_and_of_no_round_at_all_are_drawn(tmp_path):
    a = made(tmp_path / "a", consensus_distance=0.0, n=1, topology="complete", rounds=1)
    b = made(tmp_path / "b", rounds=0, status="failed")
    report([a, b])
    assert (a / "plots" / "consensus.png").stat().st_size > 5000
    report([b], plots=True)
    assert [file.stem for file in (b / "plots").iterdir()] == ["topology"]


def test_the_graph_is_that_of_the_experiment(tmp_path):
    assert graph_of(read_run(made(tmp_path / "a", "torus:rows=3,cols=3", n=9))).size() == 18
    (tmp_path / "net.edges").write_text("0 1\n1 2\n")
    assert graph_of(read_run(made(tmp_path / "b", "net.edges", n=3))).size() == 2
    assert graph_of(read_run(made(tmp_path / "c", "gone.edges", n=3))) is None


def test_json_is_strict_and_whole(tmp_path, capsys):
    a = made(tmp_path / "a", virtual_s=math.nan, consensus_distance=math.inf, status="failed")
    report([a, made(tmp_path / "b")], format=Format.json, plots=False)
    said = json.loads(capsys.readouterr().out, parse_constant=lambda name: pytest.fail(name))
    assert [run["run"] for run in said["runs"]] == ["a", "b"]
    assert said["runs"][0]["error"] == "peer 2"
    assert said["runs"][0]["virtual_s"] is None
    assert len(said["runs"][1]["per_node"]) == 4
    assert said["plots"] == []


def test_the_error_of_a_failed_run_is_told(tmp_path, capsys):
    report([made(tmp_path / "a", status="failed")], plots=False)
    assert "peer 2" in capsys.readouterr().out


def test_without_matplotlib_it_says_what_to_install(tmp_path, monkeypatch):
    a = made(tmp_path / "a")
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(UserError, match=r"pip install 'p2pfl-gossip\[plots\]'"):
        report([a])
    report([a], plots=False)


def test_what_is_no_run_is_refused(tmp_path):
    with pytest.raises(UserError, match="is not a run folder"):
        report([tmp_path])
    a = made(tmp_path / "a")
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="cannot be made"):
        report([a], out=tmp_path / "file")
