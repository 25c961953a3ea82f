from __future__ import annotations

import errno
import json
import math
import os
import subprocess
import sys
import threading
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from p2pfl.errors import RunError, UserError
from p2pfl.results.record import Recorder, new_folder
from p2pfl.results.runs import (
    Facts,
    Result,
    columns,
    last_measured,
    merge_peers,
    read_run,
    summarise,
)
from p2pfl.results.sketches import moved
from p2pfl.runtime.setup import Row
from p2pfl.runtime.sketch import distances, sketch

TOML = 'name = "tiny"\nnodes = 2\n'
FACTS = Facts("tiny", "simulate", "dpsgd", "ring", seed=7, nodes=2)


def row(round=0, node=0, **changes):
    usual = Row(round, node, 0.5, 0.25, 0.75, 10, 0.125, 100, 90, 1.5, math.nan)
    return usual._replace(**changes)


def strictly(text):
    def refuse(name):
        raise AssertionError(f"{name} is no JSON")

    return json.loads(text, parse_constant=refuse)


def test_a_finished_run_reads_back_as_it_was(tmp_path):
    recorder = Recorder(tmp_path / "a" / "run", TOML, on="simulate", base=tmp_path)
    rows = [row(k, i, eval_acc=math.nan if k == 0 else 0.5 + i / 4) for k in (0, 1) for i in (0, 1)]
    recorder.rows(rows[:2])
    recorder.rows(rows[2:])
    recorder.event("stopped", node=1, gap=math.inf)
    recorder.finish("finished", summarise(columns(rows), FACTS))
    run = read_run(tmp_path / "a" / "run")
    assert run.experiment == {"name": "tiny", "nodes": 2}
    assert (run.summary["status"], run.summary["on"]) == ("finished", "simulate")
    assert run.summary["base"] == str(tmp_path)
    for name, values in columns(rows).items():
        np.testing.assert_array_equal(run.metrics[name], values)
        assert run.metrics[name].dtype == values.dtype
    events = [strictly(line) for line in (run.folder / "events.jsonl").read_text().splitlines()]
    assert [event["event"] for event in events] == ["started", "stopped", "finished"]
    assert events[1]["gap"] is None
    assert all(event["wall_s"] >= 0 for event in events)


@given(
    st.lists(st.floats(allow_subnormal=True), min_size=6, max_size=6),
    st.lists(st.integers(0, 2**62), min_size=5, max_size=5),
)
def test_a_line_of_metrics_keeps_every_bit(floats, wholes):
    from p2pfl.results.record import _line
    from p2pfl.results.runs import _row

    a, b, c, d, e, f = floats
    before = Row(wholes[0], wholes[1], a, b, c, wholes[2], d, wholes[3], wholes[4], e, f)
    line = _line(before)
    assert "nan" not in line
    after = _row(Path("metrics.csv"), 2, line.removesuffix("\n"))
    assert repr(after) == repr(before)
    assert _line(after) == line


def test_equal_runs_give_equal_bytes(tmp_path):
    for name in "ab":
        recorder = Recorder(tmp_path / name, TOML)
        recorder.rows([row(train_loss=0.1 + 0.2), row(node=1, eval_acc=math.nan)])
        recorder.finish("finished", {})
    a, b = ((tmp_path / name / "metrics.csv").read_bytes() for name in "ab")
    assert a == b
    assert a.split(b"\n")[1].startswith(b"0,0,0.30000000000000004,")
    assert b",," in a.split(b"\n")[2]


def test_the_summary_says_running_until_the_end(tmp_path):
    recorder = Recorder(tmp_path / "run", TOML, **FACTS._replace(wall_s=0.0)._asdict())
    recorder.rows([row()])
    run = read_run(tmp_path / "run")  # as after kill -9
    assert run.summary["status"] == "running"
    assert (run.summary["eval_acc_mean"], run.summary["wall_s"]) == (0.75, 1.5)
    assert run.summary["virtual_s"] is None
    recorder.finish("failed", {}, error="node 3 died")
    summary = strictly((tmp_path / "run" / "summary.json").read_text())
    assert (summary["status"], summary["error"]) == ("failed", "node 3 died")
    assert not list((tmp_path / "run").glob(".*"))


def test_what_cannot_be_written_leaves_no_draft(tmp_path, monkeypatch):
    recorder = Recorder(tmp_path / "run", TOML, **FACTS._asdict())

    def full(descriptor):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(RunError, match="safetensors cannot be written: No space left"):
        recorder.model("mean", {"weight": torch.ones(2)}, {})
    assert not list((tmp_path / "run").rglob(".*"))


@pytest.mark.parametrize("there", ["experiment.toml", "thesis.tex"])
def test_a_folder_in_use_is_refused_and_left_alone(tmp_path, there):
    (tmp_path / there).write_text("precious")
    with pytest.raises(UserError, match="holds files already; choose another --out"):
        Recorder(tmp_path, TOML)
    assert [path.read_text() for path in tmp_path.iterdir()] == ["precious"]


def test_a_file_in_the_way_is_refused(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="file"):
        Recorder(tmp_path / "file", TOML)
    with pytest.raises(UserError, match="file"):
        Recorder(tmp_path / "file" / "run", TOML)
    with pytest.raises(UserError, match="file"):
        new_folder(tmp_path / "file", "run")


def test_new_folders_are_new_also_when_made_at_once(tmp_path):
    found: list[Path] = []
    threads = [
        threading.Thread(target=lambda: found.append(new_folder(tmp_path / "runs", "tiny")))
        for _ in range(8)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    names = ["tiny", *(f"tiny-{k}" for k in range(2, 9))]
    assert sorted(path.name for path in found) == names
    Recorder(found[0], TOML).finish("finished", {})  # an empty folder will do


def test_each_node_counts_as_it_was_last_evaluated():
    nan = math.nan
    rows = [
        row(0, 0, eval_acc=0.1, eval_loss=4.0, consensus_distance=8.0),
        row(0, 1, eval_acc=0.2, eval_loss=2.0, consensus_distance=6.0),
        row(1, 0, eval_acc=0.6, eval_loss=1.0, consensus_distance=2.0),
        row(1, 1, eval_acc=nan, eval_loss=nan, consensus_distance=4.0, virtual_s=3.5),
        row(2, 0, eval_acc=nan, eval_loss=nan, consensus_distance=nan, bytes_sent=11),
    ]
    metrics = columns(rows)
    nodes, acc = last_measured(metrics, "eval_acc")
    assert (nodes.tolist(), acc.tolist()) == ([0, 1], [0.6, 0.2])
    facts = FACTS._replace(node_updates=80, wall_s=4.0, reason="all rounds done")
    summary = summarise(metrics, facts)
    assert summary["eval_acc_mean"] == pytest.approx(0.4, abs=1e-15)
    assert (summary["eval_acc_worst"], summary["eval_loss_mean"]) == (0.2, 1.5)
    assert (summary["consensus_distance"], summary["rounds"]) == (3.0, 3)
    assert (summary["bytes_sent"], summary["bytes_received"]) == (411, 450)
    assert (summary["node_updates_per_s"], summary["wall_s"]) == (20.0, 4.0)
    assert (summary["virtual_s"], summary["eval_acc_mean_model"]) == (3.5, None)


def test_a_summary_has_every_key_even_of_nothing():
    keys = """
        nodes rounds eval_acc_mean eval_acc_worst eval_acc_mean_model consensus_distance
        bytes_sent node_updates node_updates_per_s wall_s virtual_s seed version on experiment
        algorithm topology reason eval_loss_mean bytes_received missed rejected
    """
    summary = summarise(columns([]), FACTS)
    assert set(keys.split()) <= summary.keys()
    assert strictly(json.dumps(summary))["eval_acc_mean"] is None


def test_a_line_that_was_cut_off_is_left_out(tmp_path):
    recorder = Recorder(tmp_path / "run", TOML)
    recorder.rows([row(), row(node=1)])
    path = tmp_path / "run" / "metrics.csv"
    whole = path.read_text()
    for cut in range(1, len(whole.splitlines()[-1]) + 1):
        path.write_text(whole[:-cut])
        assert len(read_run(tmp_path / "run").metrics["node"]) == 1


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("summary.json", None, "is not a run folder: it has no summary.json"),
        ("summary.json", "{", "not valid JSON"),
        ("summary.json", "[]", "not the summary of a run"),
        ("experiment.toml", None, "it has no experiment.toml"),
        ("experiment.toml", "= 3", "not valid TOML"),
        ("metrics.csv", None, "it has no metrics.csv"),
        ("metrics.csv", "a,b\n", "its columns"),
        ("metrics.csv", ",".join(Row._fields) + "\n1,2\n", "metrics.csv, line 2: '1,2'"),
        ("metrics.csv", ",".join(Row._fields) + "\n0,0,x,,,1,,1,1,,\n", "line 2"),
    ],
)
def test_damage_is_named(tmp_path, name, text, message):
    Recorder(tmp_path / "run", TOML).finish("finished", {})
    (tmp_path / "run" / name).unlink()
    if text is not None:
        (tmp_path / "run" / name).write_text(text)
    with pytest.raises(UserError, match=message):
        read_run(tmp_path / "run")


def test_no_folder_is_no_run(tmp_path):
    with pytest.raises(UserError, match="there is no run folder"):
        read_run(tmp_path / "nothing")


def peers_of(folder, models, steps=None):
    """Record peers, each with its models, ``[rounds, d]``, and how exchanges have moved them.

    A model of NaN was not sketched.
    """
    steps = torch.full_like(models, math.nan) if steps is None else steps
    Recorder(folder, TOML, on="local")
    for node, params in enumerate(models):
        recorder = Recorder(folder / "peers" / f"{node:03d}", TOML)
        for k, vector in enumerate(params):
            mine = row(k, node, consensus_distance=math.nan)
            both = sketch(torch.stack([vector, steps[node, k]]))
            recorder.row(mine, None if vector.isnan().any() else both)
    return folder


def test_peers_merge_with_the_distances_of_their_models(tmp_path):
    generator = torch.Generator().manual_seed(0)
    models = torch.randn(3, 2, 5, generator=generator)  # kept whole by the sketch
    rows = merge_peers(peers_of(tmp_path / "run", models))
    assert [(r.round, r.node) for r in rows] == [(k, i) for k in range(2) for i in range(3)]
    for k in range(2):
        due = distances(models[:, k].double())
        found = [r.consensus_distance for r in rows if r.round == k]
        np.testing.assert_allclose(found, due, rtol=1e-6)
    assert len(read_run(tmp_path / "run").metrics["node"]) == 6  # nobody has merged them yet


def test_peers_that_were_broken_off_merge_as_far_as_they_came(tmp_path):
    models = torch.arange(12.0).reshape(3, 2, 2)
    models[1, 0] = math.nan  # peer 1 had no sketch in round 0
    folder = peers_of(tmp_path / "run", models)
    for peer, name, cut in (("001", "metrics.csv", 4), ("002", "sketch_pairs.f32", 9)):
        path = folder / "peers" / peer / name
        path.write_bytes(path.read_bytes()[:-cut])
    (folder / "peers" / "003").mkdir()  # never got to write anything
    found = {(r.round, r.node): r.consensus_distance for r in merge_peers(folder)}
    assert set(found) == {(0, 0), (0, 1), (0, 2), (1, 0), (1, 2)}
    assert found[0, 0] == found[0, 2] == 32.0  # of (0, 1) and (8, 9)
    assert all(math.isnan(found[key]) for key in ((0, 1), (1, 0), (1, 2)))


def test_a_peer_alone_is_its_own_mean(tmp_path):
    (only,) = merge_peers(peers_of(tmp_path / "run", torch.ones(1, 1, 3)))
    assert only.consensus_distance == 0.0
    assert merge_peers(tmp_path) == []


def test_what_exchanges_have_moved_is_added_up(tmp_path):
    models, steps = torch.ones(3, 2, 2), torch.arange(12.0).reshape(3, 2, 2)
    steps[2, 1] = math.nan  # unknown
    folder = peers_of(tmp_path / "run", models, steps)
    path = folder / "peers" / "001" / "sketch_pairs.f32"
    path.write_bytes(path.read_bytes()[:-9])  # it was killed while it wrote the last one
    total = moved(folder)
    assert total[:2].tolist() == [0 + 2 + 4 + 8, 1 + 3 + 5 + 9]
    assert not total[2:].any()
    assert moved(peers_of(tmp_path / "other", models)) is None
    assert moved(tmp_path) is None


def test_a_result_shows_itself_and_its_rounds(monkeypatch):
    rows = [row(), row(node=1)]
    asked: list[int | None] = []
    summary = summarise(columns(rows), FACTS)
    result = Result(None, summary, columns(rows), asked.append)
    assert "accuracy 0.7500" in repr(result)
    assert "in memory" in repr(result)
    assert result.rounds["node"].tolist() == [0, 1]
    monkeypatch.setitem(sys.modules, "pandas", None)
    assert result.rounds[1]["node"] == 1
    assert list(result.rounds[0]) == list(Row._fields)
    result.model()
    result.model(3)
    assert asked == [None, 3]
    assert "run on" in repr(Result(Path("x"), {}, columns([]), partial(asked.append)))


def test_importing_is_cheap():
    heavy = "{'pandas', 'matplotlib', 'rich', 'typer', 'sklearn'}"
    ours = "p2pfl.results.record, p2pfl.results.predictor"
    code = f"import sys, {ours}; print({heavy} & sys.modules.keys())"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "set()"
