"""Runs in real processes give the numbers of the simulator."""

from __future__ import annotations

import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from launch_cases import command, free_address, metrics, p2pfl, small, summary

import p2pfl as package
from p2pfl.errors import UserError
from p2pfl.results.runs import Result

pytestmark = pytest.mark.processes

ALGORITHMS: dict[str, dict[str, Any]] = {
    "fedavg": {"algorithm": {"name": "fedavg"}, "topology": {"name": "complete"}},
    "dpsgd": {},
    "combine first": {"algorithm": {"name": "dpsgd", "order": "combine_then_adapt"}},
    "push_sum": {"algorithm": {"name": "push_sum"}, "topology": {"name": "exponential"}},
    "gradient_tracking": {
        "algorithm": {"name": "gradient_tracking"},
        "pace": {"rounds": 4, "local_steps": 1},
    },
    "d2": {"algorithm": {"name": "d2"}, "pace": {"rounds": 4, "local_steps": 1}},
    "choco top_k": {"algorithm": {"name": "choco", "codec": {"name": "top_k", "share": 0.1}}},
    "choco random_k": {"algorithm": {"name": "choco", "codec": {"name": "random_k", "k": 40}}},
    "gossip": {"algorithm": {"name": "gossip"}},
    "overlap": {"pace": {"rounds": 4, "local_steps": 2, "overlap": True}},
    "overlap of masses": {
        "algorithm": {"name": "push_sum"},
        "topology": {"name": "exponential"},
        "pace": {"rounds": 4, "local_steps": 2, "overlap": True},
    },
    "relay": {"algorithm": "relay", "topology": {"name": "binary_tree"}},
    "powergossip": {"algorithm": "powergossip:rank=2"},
    "divshare": {
        "algorithm": "divshare:fragments=2",
        "topology": {"name": "el_local", "s": 3},
    },
    "local": {"algorithm": {"name": "local"}},
}


def assert_same(ours: Result, theirs: Result, nodes: int) -> None:
    for column in ("round", "node", "num_examples", "bytes_sent", "bytes_received"):
        assert ours.metrics[column].tolist() == theirs.metrics[column].tolist(), column
    for column in ("train_loss", "eval_loss", "eval_acc"):
        np.testing.assert_allclose(
            ours.metrics[column], theirs.metrics[column], rtol=1e-10, err_msg=column
        )
    for node in range(nodes):
        mine, yours = (dict(run.model(node).named_parameters()) for run in (ours, theirs))
        assert mine.keys() == yours.keys()
        for name, values in mine.items():
            torch.testing.assert_close(values, yours[name], rtol=1e-10, atol=1e-14)


@pytest.mark.parametrize("changes", ALGORITHMS.values(), ids=ALGORITHMS.keys())
def test_processes_give_the_numbers_of_the_simulator(changes: dict[str, Any], tmp_path: Path):
    experiment = small(**changes)
    processes = package.run(experiment, on="local", out=tmp_path / "run")
    assert processes.summary["status"] == "finished"
    assert processes.summary["rejected"] == processes.summary["missed"] == 0
    simulated = package.run(experiment, on="simulate")
    assert len(processes.metrics["round"]) == 6 * experiment["pace"]["rounds"]
    assert_same(processes, simulated, 6)
    saved = package.load(tmp_path / "run", node=2)
    for ours, theirs in zip(saved.parameters(), simulated.model(2).parameters(), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=1e-14)


def test_statistics_are_pooled_over_the_network(tmp_path: Path):
    experiment = small(
        nodes=5,
        data={"name": "breast_cancer"},
        preprocess={"standardise": "pooled"},
        model={"name": "logistic"},
    )
    processes = package.run(experiment, on="local", out=tmp_path / "run")
    simulated = package.run(experiment, on="simulate")
    assert_same(processes, simulated, 5)
    for node in range(5):
        mine, yours = (dict(run.model(node).named_buffers()) for run in (processes, simulated))
        assert {"shift", "scale"} <= mine.keys()
        for name in ("shift", "scale"):
            torch.testing.assert_close(mine[name], yours[name], rtol=1e-10, atol=1e-10)


def test_the_same_seed_gives_the_same_metrics(tmp_path: Path):
    experiment = small(training={"batch_size": 16, "dtype": "float32"})
    lines = []
    for name in ("one", "two"):
        package.run(experiment, on="local", out=tmp_path / name)
        rows = metrics(tmp_path / name)
        assert all(float(row.pop("wall_s")) > 0 for row in rows)
        lines.append(rows)
    assert lines[0] == lines[1]
    assert len(lines[0]) == 18


@pytest.mark.parametrize("overlap", [False, True])
def test_peers_that_agree_stop_together(overlap: bool, tmp_path: Path):
    stop = {"name": "target", "value": 2.0, "metric": "train_loss"}
    pace = {"rounds": 50, "local_steps": 1, "stop": stop, "overlap": overlap}
    experiment = small(pace=pace)
    result = package.run(experiment, on="local", out=tmp_path / "run")
    simulated = package.run(experiment, on="simulate")
    assert result.summary["reason"] == simulated.summary["reason"] == "converged"
    for key in ("rounds", "node_updates"):
        assert result.summary[key] == simulated.summary[key]
    assert result.summary["rounds"] < 50


def test_a_program_needs_no_guard_around_a_run(tmp_path: Path):
    script = tmp_path / "script.py"
    script.write_text(
        "import p2pfl\n"
        "print('imported', __name__)\n"
        f"result = p2pfl.run({small(nodes=2)!r}, on='local', out='run')\n"
        "print(result.summary['status'], result.summary['rounds'], __file__)\n"
    )
    done = subprocess.run(
        [sys.executable, str(script)], cwd=tmp_path, capture_output=True, text=True, timeout=60
    )
    assert done.stderr == ""
    assert done.stdout == f"imported __main__\nfinished 3 {script}\n"


# Runs that cannot begin


def csv_files(folder: Path, count: int) -> list[str]:
    names = [f"{k}.csv" for k in range(count)]
    for k, name in enumerate(names):
        rows = [f"{i + k},{(i * 7 + k) % 5},{'yes' if i % 3 else 'no'}" for i in range(40)]
        (folder / name).write_text("\n".join(["a,b,label", *rows]) + "\n")
    return names


def test_one_peer_without_its_data_ends_all_at_once(tmp_path: Path):
    """In a ring of eight, most peers are in training before they could miss the one."""
    names = csv_files(tmp_path, 8)
    (tmp_path / "5.csv").unlink()
    experiment = small(
        nodes=8,
        data={"name": "csv", "path": names, "target": "label", "positive": "yes"},
        holdout={"name": "none"},
        partition={"name": "natural_id"},
        model={"name": "logistic"},
    )
    with pytest.raises(UserError, match=r"5\.csv"):
        package.run(experiment, on="local", out=tmp_path / "run", data=tmp_path)
    assert summary(tmp_path / "run")["status"] == "failed"
    assert "5.csv" in summary(tmp_path / "run")["error"]


def test_data_that_are_not_there_are_one_readable_error(tmp_path: Path):
    (tmp_path / "e.toml").write_text('nodes = 4\n[data]\nname = "idx"\npath = "nowhere"\n')
    with command(*p2pfl("run", "e.toml", "--on", "local", "--out", "run"), cwd=tmp_path) as run:
        out, err = run.communicate(timeout=60)
    assert run.returncode == 2
    assert out == ""
    assert [line for line in err.splitlines() if "nowhere" in line] == err.splitlines()[-1:]
    assert err.splitlines()[-1].startswith("p2pfl: ")
    assert "Traceback" not in err
    assert summary(tmp_path / "run")["status"] == "failed"


def test_the_addresses_of_a_network_file_are_for_peers_on_their_own_machines(tmp_path: Path):
    with socket.create_server(("127.0.0.1", 0)) as held:
        taken = f"tcp://127.0.0.1:{held.getsockname()[1]}"
        (tmp_path / "net.toml").write_text(
            f'[[nodes]]\nid = 0\naddress = "{taken}"\n'
            f'[[nodes]]\nid = 1\naddress = "{free_address()}"\n'
            "[[edges]]\nbetween = [0, 1]\n"
        )
        experiment = small(nodes=2, topology={"name": "file", "path": str(tmp_path / "net.toml")})
        result = package.run(experiment, on="local", out=tmp_path / "run")
    assert result.summary["status"] == "finished"
