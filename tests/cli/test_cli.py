"""The command line as a user meets it: verbs, output, mistakes and exit codes."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from typer.testing import CliRunner

from p2pfl.cli import app
from p2pfl.errors import UserError

QUICK = ["--set", "pace.rounds=2", "--set", "nodes=3", "--set", "evaluation.baselines=false"]


def p2pfl(*words):
    return CliRunner().invoke(app, list(map(str, words)))


def shell(*words, **kwargs):
    command = [sys.executable, "-m", "p2pfl", *map(str, words)]
    return subprocess.run(command, capture_output=True, text=True, timeout=120, **kwargs)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs") / "digits"
    done = p2pfl("run", "digits", "--quiet", "--out", folder, *QUICK)
    assert done.exit_code == 0, done.output
    return folder


@pytest.mark.parametrize(
    "verb",
    [
        *(
            "run",
            "peer",
            "report",
            "predict",
            "experiments",
            "topology show",
            "topology compare",
            "topologies",
            "algorithms",
            "partition show",
            "churn show",
        ),
        *("up", "status", "logs", "down", "sweep"),
        *("keys new", "keys show", "keys allow", "keys revoke"),
    ],
)
def test_every_verb_has_help_with_an_example(verb):
    done = p2pfl(*verb.split(), "--help")
    assert done.exit_code == 0
    assert f"p2pfl {verb}" in done.stdout.split("Example:", 1)[1]


def test_version():
    assert p2pfl("--version").stdout.startswith("p2pfl ")


def test_run_leaves_a_folder_and_prints_a_table(folder):
    names = {path.name for path in folder.iterdir()}
    assert names >= {"experiment.toml", "metrics.csv", "events.jsonl", "summary.json", "models"}
    summary = json.loads((folder / "summary.json").read_text())
    asked = "nodes rounds eval_acc_mean eval_acc_worst eval_acc_mean_model consensus_distance"
    asked += " bytes_sent node_updates node_updates_per_s wall_s virtual_s seed version"
    assert set(asked.split()) <= summary.keys()
    assert (summary["status"], summary["nodes"], summary["rounds"]) == ("finished", 3, 2)
    header = "round,node,train_loss,eval_loss,eval_acc,num_examples,consensus_distance,"
    header += "bytes_sent,bytes_received,wall_s,virtual_s"
    assert (folder / "metrics.csv").read_text().splitlines()[0] == header


def test_json_is_the_summary(tmp_path):
    done = p2pfl("run", "digits", "-q", "--out", tmp_path / "r", "--format", "json", *QUICK)
    assert json.loads(done.stdout) == json.loads((tmp_path / "r" / "summary.json").read_text())


def test_the_same_seed_twice_gives_the_same_metrics(folder, tmp_path):
    p2pfl("run", "digits", "-q", "--out", tmp_path / "again", *QUICK)
    p2pfl("run", "digits", "-q", "--out", tmp_path / "other", "--seed", 5, *QUICK)

    def lines(run):
        rows = (run / "metrics.csv").read_text().splitlines()[1:]
        return [row.split(",")[:9] for row in rows]  # all but the times

    assert lines(folder) == lines(tmp_path / "again")
    assert lines(folder) != lines(tmp_path / "other")


def test_report_and_predict(folder, tmp_path):
    done = p2pfl("report", folder, folder, "--out", tmp_path)
    assert done.exit_code == 0, done.output
    assert list(tmp_path.glob("*.png"))
    pixels = tmp_path / "pixels.csv"
    pixels.write_text(",".join(f"p{i}" for i in range(64)) + "\n" + ",".join(["0.5"] * 64) + "\n")
    done = p2pfl("predict", folder, pixels, "--format", "json")
    assert json.loads(done.stdout)[0]["prediction"] in map(str, range(10))


def test_topology_show():
    done = p2pfl("topology", "show", "torus:rows=4,cols=6", "--format", "json")
    told = json.loads(done.stdout)
    asked = "nodes edges directed period degree_max doubly_stochastic rho slem gap exact_after"
    assert set(asked.split()) | {"rounds_to_1e-6"} <= told.keys()
    assert (told["nodes"], told["edges"], told["degree_max"]) == (24, 48, 4)
    lazy = p2pfl("topology", "show", "ring", "--nodes", 16, "--mixing", "metropolis:lazy=true")
    assert "0.974627" in lazy.stdout


def test_topology_show_draws(tmp_path):
    p2pfl("topology", "show", "ring", "--nodes", 5, "--draw", tmp_path / "ring.png")
    assert (tmp_path / "ring.png").read_bytes().startswith(b"\x89PNG")


def test_partition_show():
    done = p2pfl("partition", "show", "digits", "--format", "json")
    told = json.loads(done.stdout)
    assert len(told["nodes"]) == 8
    assert sum(row["examples"] for row in told["nodes"]) + told["test_examples"] == 1797


def test_experiments_lists_what_ships():
    assert "digits-ring" in p2pfl("experiments").stdout


@pytest.mark.parametrize(
    ("words", "part"),
    [
        (["run", "nosuch"], "digits"),
        (["run", "nosuch.toml"], "nosuch.toml"),
        (["run", "digits", "--set", "pace.rounds=many"], "pace.rounds"),
        (["run", "digits", "--set", "pace.rounds"], "key=value"),
        (["run", "digits", "--device", "abacus"], "--device abacus"),
        (["run", "digits", "--device", "meta"], "--device meta"),
        (["run", "digits-gossip"], "--on emulate"),
        (["run", "heart"], "heart"),
        (["run", "x" * 300], "cannot be read: File name too long"),
        (["topology", "show", "torus"], "--nodes"),
        (["topology", "show", "rign", "--nodes", "4"], "did you mean 'ring'"),
        (["topology", "show", "ring:rows=2", "--nodes", "4"], "ring takes no keys"),
        (["partition", "show", "digits", "--set", "nodes=2000"], "1438"),
        (["report", "nowhere"], "nowhere"),
        (["predict", "nowhere", "x.csv"], "nowhere"),
        (["peer", "digits", "--id", "0", "--peers", "nowhere.toml"], "nowhere.toml"),
    ],
)
def test_mistakes_are_user_errors(words, part, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    done = p2pfl(*words)
    assert isinstance(done.exception, UserError)
    assert part in str(done.exception)
    assert "\n" not in str(done.exception)
    assert not list(tmp_path.iterdir())


def test_a_mistake_is_one_line_and_exit_code_2(tmp_path):
    (tmp_path / "bad.toml").write_text("nodes = [")
    done = shell("run", tmp_path / "bad.toml")
    assert done.returncode == 2
    assert done.stderr.startswith("p2pfl: ")
    assert "not valid TOML" in done.stderr
    assert len(done.stderr.splitlines()) == 1


@pytest.mark.parametrize("words", [["experiments"], ["topologies"], ["run", "--help"]])
@pytest.mark.parametrize("unbuffered", ["", "1"])
def test_an_output_that_cannot_be_written_is_told_in_one_line(words, unbuffered):
    command = [sys.executable, "-m", "p2pfl", *words]
    environment = {**os.environ, "PYTHONUNBUFFERED": unbuffered}
    with Path("/dev/full").open("w") as full:
        done = subprocess.run(
            command, stdout=full, stderr=subprocess.PIPE, text=True, timeout=120, env=environment
        )
    assert done.returncode == 1
    assert done.stderr == "p2pfl: standard output cannot be written: No space left on device\n"


@pytest.mark.parametrize("words", [["experiments"], ["topologies"]])
def test_a_pipe_that_was_closed_is_no_matter(words):
    reading, writing = os.pipe()
    os.close(reading)
    command = [sys.executable, "-m", "p2pfl", *words]
    try:
        done = subprocess.run(command, stdout=writing, stderr=subprocess.PIPE, timeout=120)
    finally:
        os.close(writing)
    assert done.stderr == b""


def test_a_folder_that_is_taken_is_left_alone(tmp_path):
    (tmp_path / "mine.txt").write_text("precious")
    done = shell("run", "digits", "--out", tmp_path, *QUICK)
    assert done.returncode == 2
    assert [path.name for path in tmp_path.iterdir()] == ["mine.txt"]


def test_a_run_that_diverges_fails_with_exit_code_1_and_keeps_its_rows(tmp_path):
    data = ["--set", "model=linear", "--set", "data=diabetes", "--set", "algorithm=dpsgd"]
    rest = ["--set", "optimiser.lr=5e-5", "--set", "nodes=3", "--set", "evaluation.baselines=false"]
    done = shell("run", "digits", "--out", tmp_path / "r", "--set", "partition=iid", *data, *rest)
    assert done.returncode == 1
    assert "diverged" in done.stderr
    assert "Traceback" not in done.stderr
    assert json.loads((tmp_path / "r" / "summary.json").read_text())["status"] == "failed"
    assert len((tmp_path / "r" / "metrics.csv").read_text().splitlines()) > 1
