"""Sweeps that run: the folder, the numbers, what is done again, and what goes wrong."""

import csv
import fcntl
import json
import math
import statistics
import subprocess
import sys
import time

import numpy as np
import psutil
import pytest
from typer.testing import CliRunner

from p2pfl.cli import app
from p2pfl.errors import RunError, UserError
from p2pfl.results.runs import read_run
from p2pfl.sweep import SweepWatch, run_sweep

EXPERIMENT = {
    "name": "tiny",
    "nodes": 3,
    "data": "breast_cancer",
    "model": "logistic",
    "preprocess": {"standardise": "pooled"},
    "pace": {"rounds": 2, "local_steps": 1},
}
SWEEP = {
    "experiment": EXPERIMENT,
    "seeds": [1, 2],
    "grid": {"optimiser.lr": [0.1, 0.01], "topology": ["complete", "ring"]},
    "set": {"algorithm": "dpsgd"},
}
ONE = {"experiment": EXPERIMENT, "seeds": 1}


def lines(path):
    with path.open(encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


def untimed(table):
    return [{key: value for key, value in row.items() if key != "wall_s"} for row in table]


def soon(what, seconds):
    until = time.monotonic() + seconds
    while not (done := what()) and time.monotonic() < until:
        time.sleep(0.05)
    return done


def lives(mark):
    try:
        return psutil.Process(int(mark.stem)).status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


@pytest.fixture(scope="module")
def parallel(tmp_path_factory):
    return run_sweep(SWEEP, tmp_path_factory.mktemp("two") / "out", jobs=2)


def test_the_number_of_jobs_changes_no_number(parallel, tmp_path):
    single = run_sweep(SWEEP, tmp_path / "one", jobs=1)
    assert untimed(single.table) == untimed(parallel.table)
    for row in single.table:
        one, two = (read_run(s.folder / "runs" / row["run"]).metrics for s in (single, parallel))
        assert np.array_equal(one["eval_loss"], two["eval_loss"])


def test_the_folder_and_the_table(parallel):
    assert len(parallel.table) == 2 * 2 * 2
    assert not parallel.failed
    assert {row["status"] for row in parallel.table} == {"finished"}
    assert [row["seed"] for row in parallel.table] == [1, 2] * 4
    written = lines(parallel.folder / "results.csv")
    assert [row["optimiser.lr"] for row in written] == ["0.1"] * 4 + ["0.01"] * 4
    assert [float(row["eval_acc_mean"]) for row in written] == [
        row["eval_acc_mean"] for row in parallel.table
    ]
    for row in parallel.table:
        run = read_run(parallel.folder / "runs" / row["run"])
        assert run.summary["eval_loss_mean"] == row["eval_loss_mean"]
        assert run.experiment["seed"] == row["seed"]
    assert (parallel.folder / "plots" / "compare.png").stat().st_size > 1000


def test_means_and_deviations_are_those_over_the_seeds(parallel):
    assert len(parallel.summary) == len(lines(parallel.folder / "summary.csv")) == 4
    for i, told in enumerate(parallel.summary):
        values = [row["eval_loss_mean"] for row in parallel.table[2 * i : 2 * i + 2]]
        assert told["n"] == 2
        assert told["eval_loss_mean_mean"] == pytest.approx(statistics.mean(values))
        assert told["eval_loss_mean_sd"] == pytest.approx(math.dist(values, values[::-1]) / 2)
        assert told["eval_loss_mean_sd"] > 0


def test_resuming_skips_what_finished_and_redoes_what_did_not(tmp_path):
    whole = run_sweep(ONE | {"seeds": [1, 2]}, tmp_path, jobs=1)
    first, second = (tmp_path / "runs" / row["run"] for row in whole.table)
    summary = json.loads((second / "summary.json").read_text())
    (second / "summary.json").write_text(json.dumps(summary | {"status": "running"}))
    (second / "metrics.csv").write_text("half a li")
    (first / "mark").touch()
    ended = []
    watch = SweepWatch(ended=lambda row: ended.append(row["seed"]))
    extended = ONE | {"seeds": [1, 2, 3]}
    again = run_sweep(extended, tmp_path, jobs=1, watch=watch)
    assert (ended, again.skipped) == ([2, 3], 1)
    assert (first / "mark").exists()
    assert untimed(again.table[:2]) == untimed(whole.table)
    assert run_sweep(extended, tmp_path, jobs=1).skipped == 3


def test_a_sweep_that_was_interrupted_goes_on(tmp_path):
    def interrupt(row):
        raise KeyboardInterrupt

    sweep = ONE | {"seeds": [1, 2]}
    with pytest.raises(KeyboardInterrupt):
        run_sweep(sweep, tmp_path, jobs=1, watch=SweepWatch(ended=interrupt))
    assert [row["status"] for row in lines(tmp_path / "results.csv")] == ["finished", "not run"]
    again = run_sweep(sweep, tmp_path, jobs=1)
    assert again.skipped == 1
    assert not again.failed


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"seeds": [2]}, "seeds differs"),
        ({"on": "emulate"}, "on differs"),
        ({"set": {"pace.rounds": 3}}, "set differs"),
        ({"grid": SWEEP["grid"] | {"optimiser.lr": [0.1, 0.2]}}, r"grid\.optimiser\.lr differs"),
        ({"grid": {"nodes": [3]}}, "grid differs"),
        ({"cases": [{"label": "a", "set": {}}]}, "cases differs"),
    ],
)
def test_another_plan_does_not_fit_the_folder(change, told, parallel):
    before = (parallel.folder / "sweep.toml").read_text()
    with pytest.raises(UserError, match=told):
        run_sweep(SWEEP | change, parallel.folder)
    assert (parallel.folder / "sweep.toml").read_text() == before


def test_an_experiment_that_was_changed_meanwhile_does_not_fit(tmp_path):
    file, out = tmp_path / "mine.toml", tmp_path / "out"
    file.write_text('model = "logistic"\nnodes = 3\npace = { rounds = 2 }\n')
    run_sweep({"experiment": str(file)}, out, jobs=1)
    file.write_text('model = "logistic"\nnodes = 3\npace = { rounds = 3 }\n')
    with pytest.raises(UserError, match="pace of the experiment was changed since"):
        run_sweep({"experiment": str(file)}, out, jobs=1)


def test_folders_of_others_are_left_alone(tmp_path, parallel):
    (tmp_path / "thesis.txt").touch()
    with pytest.raises(UserError, match="holds files already"):
        run_sweep(ONE, tmp_path, jobs=1)
    with (parallel.folder / ".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        with pytest.raises(UserError, match="another sweep is at work"):
            run_sweep(SWEEP, parallel.folder)


def test_a_run_that_fails_is_noted_and_the_others_go_on(tmp_path):
    (tmp_path / "s.toml").write_text(
        'experiment = "digits"\n[set]\nnodes = 3\npace.rounds = 2\nevaluation.baselines = false\n'
        "[grid]\noptimiser.lr = [0.1, 1e30]\n"
    )
    words = ["sweep", str(tmp_path / "s.toml"), "--out", str(tmp_path / "out"), "--jobs", "1"]
    done = CliRunner().invoke(app, [*words, "--format", "json"])
    assert isinstance(done.exception, RunError)
    assert "1 of 2 runs failed: lr=1e+30-seed" in str(done.exception)
    good, bad = json.loads(done.stdout)["runs"]
    assert (good["status"], bad["status"]) == ("finished", "failed")
    assert "diverged" in bad["error"]
    assert "[1/2] lr=0.1-seed" in done.stderr
    assert f"{bad['run']}: failed: node" in done.stderr
    assert [row["n"] for row in json.loads(done.stdout)["summary"]] == [1, 0]


def test_a_run_that_cannot_even_begin_is_noted(tmp_path):
    data = {"name": "csv", "path": "missing.csv", "target": "y"}
    found = run_sweep({"experiment": EXPERIMENT, "set": {"data": data}}, tmp_path, jobs=1)
    assert "missing.csv" in found.failed[0]["error"]


def test_a_worker_that_is_killed_ends_the_sweep_in_one_line(tmp_path):
    (tmp_path / "deadly.py").write_text("import os\ndef make(shape, outputs):\n    os._exit(9)\n")
    deadly = {"name": "custom", "factory": f"{tmp_path}/deadly.py:make"}
    sweep = {"experiment": EXPERIMENT, "seeds": 2, "set": {"model": deadly}}
    with pytest.raises(RunError, match="a worker process was killed"):
        run_sweep(sweep, tmp_path / "out", jobs=2)
    assert (tmp_path / "out" / "results.csv").exists()


@pytest.mark.processes
@pytest.mark.slow
def test_workers_may_have_a_process_for_each_peer(tmp_path):
    found = run_sweep(ONE | {"on": "local", "seeds": 2}, tmp_path, jobs=2)
    assert [row["error"] for row in found.table] == ["", ""]


@pytest.mark.processes
def test_workers_end_with_a_sweep_that_is_killed(tmp_path):
    (tmp_path / "slow.py").write_text(
        "import os, pathlib, time\n"
        "def make(shape, outputs):\n"
        f"    pathlib.Path({str(tmp_path)!r}, f'{{os.getpid()}}.pid').touch()\n"
        "    time.sleep(60)\n"
    )
    slow = {"name": "custom", "factory": f"{tmp_path}/slow.py:make"}
    sweep = {"experiment": EXPERIMENT, "seeds": 2, "set": {"model": slow}}
    code = f"from p2pfl.sweep import run_sweep; run_sweep({sweep!r}, {str(tmp_path / 'out')!r}, 2)"
    parent = subprocess.Popen([sys.executable, "-c", code])
    try:
        assert soon(lambda: len(list(tmp_path.glob("*.pid"))) == 2, 60)
    finally:
        parent.kill()
        parent.wait()
    assert soon(lambda: not any(map(lives, tmp_path.glob("*.pid"))), 10)


@pytest.mark.parametrize("where", [".", "peers/001"])
def test_a_run_that_is_still_written_is_not_cleared_away(where, tmp_path):
    (first,) = run_sweep(ONE, tmp_path, jobs=1).table
    run = tmp_path / "runs" / first["run"]
    summary = json.loads((run / "summary.json").read_text())
    (run / "summary.json").write_text(json.dumps(summary | {"status": "running"}))
    (run / where).mkdir(parents=True, exist_ok=True)
    with (run / where / "metrics.csv").open("a") as orphan:
        fcntl.flock(orphan, fcntl.LOCK_EX)
        with pytest.raises(UserError, match="is being written by another process"):
            run_sweep(ONE, tmp_path, jobs=1)
    assert run_sweep(ONE, tmp_path, jobs=1).skipped == 0


def test_a_plan_in_the_folder_that_is_damaged_is_told_by_its_own_name(tmp_path):
    (tmp_path / "sweep.toml").write_text("seeds = [1]")
    with pytest.raises(UserError, match=f"{tmp_path}/sweep.toml: sweep.experiment is missing"):
        run_sweep(ONE, tmp_path, jobs=1)


def test_help_has_an_example():
    done = CliRunner().invoke(app, ["sweep", "--help"])
    assert "p2pfl sweep" in done.stdout.split("Example:", 1)[1]


def test_the_command_prints_a_table_and_says_what_it_skips(parallel):
    words = ["sweep", str(parallel.folder / "sweep.toml"), "--out", str(parallel.folder)]
    done = CliRunner().invoke(app, words)
    assert done.exit_code == 0, done.output
    assert "8 finished before and are skipped" in done.stderr
    assert "lr=0.01,topology=ring" in done.stdout
    assert "±" in done.stdout
    assert not CliRunner().invoke(app, [*words, "-q"]).stderr
