"""What a run comes to: nothing afterwards may undo it, and like is compared with like."""

from __future__ import annotations

import pytest
import torch

import p2pfl
from p2pfl.errors import RunError
from p2pfl.experiment.experiment import Experiment
from p2pfl.launch import session
from p2pfl.launch.books import Where
from p2pfl.launch.local import _jobs
from p2pfl.launch.outcome import _steps_together, pooled_task

QUICK = {"nodes": 3, "model": "logistic", "pace": {"rounds": 3, "local_steps": 2}}


@pytest.mark.parametrize("trouble", [RunError("node 1 diverged"), KeyboardInterrupt()])
def test_trouble_with_the_baselines_does_not_undo_the_run(trouble, tmp_path, monkeypatch):
    def baselines(outcome, steps):
        raise trouble

    monkeypatch.setattr(session, "baselines", baselines)
    tables = QUICK | {"evaluation": {"baselines": True}}
    result = p2pfl.run(tables, out=tmp_path / "run")
    assert result.summary["status"] == "finished"
    assert result.summary["baselines_error"]
    assert p2pfl.load(tmp_path / "run", node=2)


def test_baselines_train_for_as_long_as_the_run_did(monkeypatch):
    seen = {}
    monkeypatch.setattr(session, "baselines", lambda outcome, steps: seen.update(steps=steps) or {})
    stop = {"name": "target", "metric": "eval_acc", "value": 0.2}
    tables = QUICK | {
        "pace": {"rounds": 200, "local_steps": 2, "stop": stop},
        "evaluation": {"baselines": True},
    }
    result = p2pfl.run(tables)
    assert result.summary["reason"] == "converged"
    assert result.summary["rounds"] < 50
    assert torch.equal(seen["steps"], torch.full((3,), 2 * result.summary["rounds"]))


def test_baselines_are_what_training_alone_and_pooled_gives():
    tables = QUICK | {"pace": {"rounds": 40, "local_steps": 2}}
    found = p2pfl.run(tables | {"evaluation": {"baselines": True}}).summary
    alone = p2pfl.run(tables | {"algorithm": "local"}).metrics["eval_acc"][-3:]
    assert found["alone"] == pytest.approx(alone.tolist())
    single = QUICK | {"nodes": 1, "algorithm": "local", "pace": {"rounds": 1, "local_steps": 240}}
    assert found["pooled"] == pytest.approx(p2pfl.run(single).summary["eval_acc_mean"], abs=0.05)


def test_pooled_training_on_everything_at_once_is_that_of_the_run():
    # The mean of the nodes' steps on all they have is a step on all there is.
    tables = QUICK | {"pace": {"rounds": 20, "local_steps": 1}, "training": {"batch_size": "full"}}
    found = p2pfl.run(tables | {"evaluation": {"baselines": True}}).summary
    assert found["pooled"] == pytest.approx(found["eval_acc_mean_model"], abs=0.003)


@pytest.mark.parametrize("batch_size", [4, 20, 50, "full"])
def test_pooled_training_goes_through_as_many_examples_as_the_run(batch_size):
    tables = {"data": {"name": "synthetic", "examples": 100}, "nodes": 3, "partition": "linear"}
    experiment = Experiment.from_dict(tables | {"training": {"batch_size": batch_size}})
    federation = experiment.federation()
    task = experiment.task(federation, None)
    pooled = pooled_task(experiment, federation, None, "cpu")
    held, steps = federation.train.count.tolist(), torch.tensor([70, 20, 40])
    most = sum(held) if batch_size == "full" else batch_size
    run = sum(s * min(most, h) for s, h in zip(steps.tolist(), held, strict=True))
    took = int(_steps_together(task, pooled, torch.arange(3), steps))
    assert took == round(run / min(most, sum(held)))
    assert int(_steps_together(task, pooled, torch.arange(3), torch.zeros_like(steps))) == 1


def test_local_peers_listen_on_loopback_whatever_a_network_file_says(tmp_path):
    (tmp_path / "far.toml").write_text(
        "".join(f'[[nodes]]\nid = {i}\naddress = "tcp://192.0.2.{i + 1}:7000"\n' for i in range(3))
        + "".join(f"[[edges]]\nbetween = [{i}, {(i + 1) % 3}]\n" for i in range(3))
    )
    experiment = Experiment.from_dict({"algorithm": "dpsgd", "topology": "far.toml"}, tmp_path)
    for job in _jobs(experiment, tmp_path, Where(), resume=False):
        job["socket"].close()
        assert all(where.startswith("tcp://127.0.0.1:") for where in job["addresses"].values())


@pytest.mark.processes
def test_peers_with_files_of_their_own_are_evaluated_at_the_end(tmp_path):
    for site in range(3):
        rows = "\n".join(f"{i + site},{int(i % 5 > 2)},{'yn'[i % 5 > 2]}" for i in range(40))
        (tmp_path / f"{site}.csv").write_text(f"a,b,y\n{rows}\n")
    data = {"name": "csv", "path": [f"{k}.csv" for k in range(3)], "target": "y"}
    tables = {
        "data": data | {"classes": ["n", "y"]},
        "holdout": "per_node",
        "partition": "natural_id",
        "preprocess": {"standardise": "pooled"},
        "model": "logistic",
        "pace": {"rounds": 4},
        "training": {"dtype": "float64"},
    }
    experiment = Experiment.from_dict(tables, tmp_path)
    simulated = p2pfl.run(experiment).summary
    local = p2pfl.run(experiment, on="local", out=tmp_path / "run").summary
    assert local["eval_acc_mean"] == simulated["eval_acc_mean"]
    assert local["eval_loss_mean"] == pytest.approx(simulated["eval_loss_mean"], rel=1e-10)
