"""Checkpoints in a whole run: what cannot go on, full disks, and the command line."""

from __future__ import annotations

import contextlib
import csv
import json
import os
import resource
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from resume_cases import KILLED, run_and_copy, same, tables
from safetensors.torch import load_file
from typer.testing import CliRunner

import p2pfl
from p2pfl.cli import app
from p2pfl.errors import UserError
from p2pfl.launch.books import Watch
from p2pfl.results.runs import read_summary


@pytest.mark.parametrize(
    ("change", "key"),
    [
        ("seed=3", "seed"),
        ("optimiser.lr=0.2", "optimiser.lr"),
        ("evaluation.every=2", "evaluation.every"),
        ("pace.local_steps=3", "pace.local_steps"),
        ("pace.stop=target:value=0.5", "pace.stop"),
        ("algorithm=dpsgd", "algorithm"),
        ("nodes=3", "nodes"),
    ],
)
def test_what_would_be_another_run_is_refused_by_name(change, key, tmp_path):
    _, killed = run_and_copy(tables({}), tmp_path, KILLED)
    with pytest.raises(
        UserError, match=rf"^{key}.* = .* may be changed: pace.rounds, pace.seconds"
    ):
        p2pfl.run(resume=killed, changes=[change])
    assert read_summary(killed)["status"] == "running"


def test_what_cannot_go_on_says_what_to_do(tmp_path):
    whole, killed = run_and_copy(tables({}), tmp_path, KILLED)
    with pytest.raises(UserError, match=r"has finished. For more rounds: p2pfl run .*toml"):
        p2pfl.run(resume=whole.folder)
    with pytest.raises(UserError, match="give no others"):
        p2pfl.run(tables({}), resume=killed)
    with pytest.raises(UserError, match="began with --on simulate"):
        p2pfl.run(resume=killed, on="local")
    with pytest.raises(UserError, match="nothing to run"):
        p2pfl.run()
    with pytest.raises(UserError, match="no run folder"):
        p2pfl.run(resume=tmp_path / "nowhere")
    emulated = tmp_path / "emulated"
    with contextlib.suppress(Killed):
        p2pfl.run(tables({}), "emulate", out=emulated, watch=Watch(rows=killed_at_once))
    with pytest.raises(UserError, match=r"the emulator cannot be resumed: .* --on emulate"):
        p2pfl.run(resume=emulated)
    for path in (killed / "checkpoints").iterdir():
        path.write_bytes(b"")
    with pytest.raises(UserError, match=r"0 bytes.*Start again: p2pfl run"):
        p2pfl.run(resume=killed)
    shutil.rmtree(killed / "checkpoints")
    with pytest.raises(UserError, match=r"holds no checkpoints to go on from. Start again: p2pfl"):
        p2pfl.run(resume=killed)
    (killed / "metrics.csv").write_text("")
    assert read_summary(killed)["status"] == "running"  # nothing was touched


class Killed(BaseException):
    pass


def killed_at_once(rows):
    raise Killed


def test_metrics_that_were_shortened_are_not_made_up(tmp_path):
    _, killed = run_and_copy(tables({}), tmp_path, KILLED)
    (killed / "metrics.csv").write_text("")
    with pytest.raises(UserError, match=r"metrics.csv has 0 bytes, but had \d+ at the last"):
        p2pfl.run(resume=killed)


def test_a_run_that_is_still_going_on_is_left_alone(tmp_path):
    refused = []

    def rows(rows):
        if rows[0].round == KILLED:
            with pytest.raises(UserError, match="is being written by another process"):
                p2pfl.run(resume=tmp_path / "run")
            refused.append(True)

    whole = p2pfl.run(tables({}), out=tmp_path / "run", watch=Watch(rows=rows))
    assert refused
    same(whole, p2pfl.run(tables({}), out=tmp_path / "again"))


def test_no_checkpoints_where_none_are_wanted(tmp_path):
    for name, section in (("off", {"every": 0, "seconds": 0.0}), ("not yet", {"seconds": 1000.0})):
        _, copy = run_and_copy(tables({}) | {"checkpoint": section}, tmp_path / name, 4)
        assert not (copy / "checkpoints").exists()
    _, copy = run_and_copy(
        tables({"checkpoint": {"seconds": 0.0, "keep": 1, "every": 2}}), tmp_path, 4
    )
    assert [path.name for path in (copy / "checkpoints").iterdir()] == ["00000004.safetensors"]


@pytest.mark.parametrize(
    ("key", "value"), [("every", -1), ("keep", 0), ("seconds", -1.0), ("seconds", float("inf"))]
)
def test_nonsense_is_refused_before_anything_is_written(key, value, tmp_path):
    with pytest.raises(UserError, match=f"checkpoint: {key} = "):
        p2pfl.run(tables({"checkpoint": {key: value}}), out=tmp_path / "run")
    assert not (tmp_path / "run").exists()


def failures(folder):
    events = [json.loads(line) for line in (folder / "events.jsonl").read_text().splitlines()]
    return [event for event in events if event["event"] == "checkpoint_failed"]


def test_a_run_whose_checkpoints_cannot_be_written_goes_on(tmp_path):
    tall = tables({"model": {"name": "mlp", "hidden": [200]}})
    whole = p2pfl.run(tall, out=tmp_path / "whole")
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    size = 32 << 10  # bytes: enough for all but checkpoints
    told = []
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
        cramped = p2pfl.run(tall, out=tmp_path / "run", watch=Watch(warn=told.append))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    same(whole, cramped)
    (failure,) = failures(tmp_path / "run")  # and not one for every round
    assert "no checkpoint can be written" in failure["error"]
    assert len(told) == 1
    assert "the run goes on" in told[0]


INSIDE = """
import json, sys, p2pfl
from pathlib import Path
run = Path(sys.argv[1]) / "run"
def watch(rows):
    left = sorted(path.name for path in (run / "checkpoints").glob("*"))
    seen.append(left)
seen = []
from p2pfl.launch.books import Watch
result = p2pfl.run({
    "nodes": 64, "data": "wine", "model": {"name": "mlp", "hidden": [7000]},
    "pace": {"rounds": 6, "local_steps": 1}, "checkpoint": {"seconds": 0.0},
    "output": {"models": "none"}, "evaluation": {"nodes": 1},
}, out=run, watch=Watch(rows=watch))
events = [json.loads(line) for line in (run / "events.jsonl").read_text().splitlines()]
print(json.dumps([result.summary["status"], result.summary["rounds"], seen, events]))
"""


@pytest.mark.skipif(os.geteuid() != 0, reason="only root may mount a small disk")
def test_a_full_disk_does_not_stop_a_run(tmp_path):
    """64 MiB hold one checkpoint of 30 MiB, and a draft of the next, but no third."""
    mount = 'mount -t tmpfs -o size=64m tmpfs "$1" && exec "$2" -c "$3" "$1"'
    command = ["unshare", "--mount", "sh", "-c", mount, "sh", str(tmp_path), sys.executable, INSIDE]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    if "unshare" in done.stderr or "mount:" in done.stderr:
        pytest.skip(f"no mount namespaces here: {done.stderr}")
    assert done.returncode == 0, done.stderr
    status, rounds, seen, events = json.loads(done.stdout)
    assert (status, rounds) == ("finished", 6)
    written = [event["rounds"] for event in events if event["event"] == "checkpoint"]
    (failure,) = (event for event in events if event["event"] == "checkpoint_failed")
    assert "No space left on device" in failure["error"]
    assert written == [1, 2]
    kept = ["00000001.safetensors", "00000002.safetensors"]
    assert seen[-1] == kept  # no litter, and those that were there are there still


@pytest.mark.processes
def test_the_command_line_after_a_sigkill(tmp_path):
    run = [sys.executable, "-m", "p2pfl", "run", "--quiet", "--format", "json"]
    shape = [f"--set={text}" for text in ("nodes=3", "pace.rounds=200", "checkpoint.seconds=0")]
    shape += ["--set=evaluation.baselines=false", "--set=evaluation.every=50"]
    shape += ["--set=checkpoint.every=20"]
    folder = tmp_path / "killed"
    process = subprocess.Popen([*run, "digits", "--out", str(folder), *shape])
    until = time.monotonic() + 60
    while not list((folder / "checkpoints").glob("[0-9]*")):
        assert time.monotonic() < until
        assert process.poll() is None, "it ended before it was killed"
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert read_summary(folder)["status"] == "running"
    again = subprocess.run([*run, "--resume", str(folder)], capture_output=True, text=True)
    assert again.returncode == 0, again.stderr
    assert json.loads(again.stdout)["status"] == "finished"
    # In a process of its own, too: on another number of threads sums come out otherwise.
    whole = tmp_path / "whole"
    subprocess.run([*run, "digits", "--out", str(whole), *shape], check=True, capture_output=True)
    assert without_times(folder) == without_times(whole)
    for path in (whole / "models").iterdir():
        ours, theirs = load_file(path), load_file(folder / "models" / path.name)
        assert all(ours[name].equal(theirs[name]) for name in ours)


@pytest.mark.parametrize(
    ("words", "why"),
    [
        (["--resume", "DIR", "digits"], "leave out digits"),
        (["--resume", "DIR", "--out", "elsewhere"], "leave out --out"),
        (["--resume", "DIR", "--on", "emulate"], "began with --on simulate"),
        (["--resume", "DIR", "--seed", "5"], "seed = 5: it was 0"),
        (["--resume", "nowhere"], "no run folder"),
        ([], "give an EXPERIMENT, as in p2pfl run digits, or --resume DIR"),
    ],
)
def test_the_command_line_says_what_cannot_be(words, why, tmp_path):
    _, killed = run_and_copy(tables({}), tmp_path, KILLED)
    words = [str(killed) if word == "DIR" else word for word in words]
    done = CliRunner().invoke(app, ["run", *words])
    assert isinstance(done.exception, UserError)
    assert why in str(done.exception)


def without_times(folder: Path):
    with (folder / "metrics.csv").open() as file:
        return [{k: v for k, v in row.items() if k != "wall_s"} for row in csv.DictReader(file)]
