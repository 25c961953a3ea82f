"""Attackers in whole experiments: who they are, what they do, and who is reported on."""

from __future__ import annotations

import json
from typing import Any

import pytest
import torch

import p2pfl
from p2pfl.errors import UserError
from p2pfl.experiment.experiment import Experiment
from p2pfl.results.report import compare
from p2pfl.results.runs import read_run

BASE: dict[str, Any] = {
    "nodes": 8,
    "seed": 1,
    "data": "digits",
    "model": {"name": "mlp", "hidden": [16]},
    "training": {"dtype": "float64"},
    "algorithm": {"name": "dpsgd", "aggregate": "trimmed_mean:f=2"},
    "pace": {"rounds": 4, "local_steps": 2},
    "evaluation": {"every": 4, "nodes": "all"},
}


def experiment(**changes: Any) -> dict[str, Any]:
    return BASE | changes


def attacked(attack: str, **changes: Any) -> dict[str, Any]:
    return experiment(attackers={"nodes": [1, 6], "attack": attack}, **changes)


def test_who_attacks_is_drawn_by_the_seed():
    drawn = [
        Experiment.from_dict(
            experiment(nodes=50, seed=s, attackers={"fraction": 0.2, "attack": "alie"})
        ).attackers.who
        for s in (1, 1, 2)
    ]
    assert drawn[0] == drawn[1] != drawn[2]
    assert all(len(set(who)) == 10 for who in drawn)
    assert Experiment.from_dict(experiment()).attackers.who == ()


@pytest.mark.parametrize("attack", ["alie", "gaussian", "non_finite", "label_flip"])
def test_the_runtimes_agree(attack):
    results = [p2pfl.run(attacked(attack), on=on) for on in ("simulate", "emulate")]
    one, other = (result.metrics for result in results)
    for column in ("train_loss", "eval_acc", "consensus_distance"):
        last = one["round"] == 3
        torch.testing.assert_close(
            torch.from_numpy(one[column][last]),
            torch.from_numpy(other[column][last]),
            rtol=1e-8,
            atol=1e-12,
            equal_nan=True,
        )
    for key in ("eval_loss_mean_model", "consensus_distance"):
        assert results[0].summary[key] == pytest.approx(results[1].summary[key], rel=1e-8)


@pytest.mark.parametrize("hidden", [5, 2000])  # less and more than the model that is judged by
def test_attackers_lie_about_the_part_that_is_shared(hidden):
    tables = attacked("sign_flip", model={"name": "mlp", "hidden": [hidden]}, algorithm="dpsgd")
    tables["pace"] = {"rounds": 1, "local_steps": 1}
    runs = [
        p2pfl.run(tables | {"training": {"share": ["1.*"]}, "attackers": attackers}, on=on)
        for attackers in ({}, tables["attackers"])
        for on in ("simulate", "emulate")
    ]
    honest, _, lied, emulated = (run.summary["eval_loss_mean"] for run in runs)
    assert abs(lied - honest) > 1e-4
    assert lied == pytest.approx(emulated, rel=1e-8)


@pytest.mark.processes
def test_real_peers_agree(tmp_path):
    tables = attacked("alie", nodes=7, pace={"rounds": 2, "local_steps": 1})
    far = p2pfl.run(tables, on="local", out=tmp_path / "run")
    near = p2pfl.run(tables)
    assert far.summary["attackers"] == [1, 6]
    for key in ("eval_acc_mean", "eval_loss_mean_model", "consensus_distance"):
        assert far.summary[key] == pytest.approx(near.summary[key], rel=1e-6, abs=1e-20), key
    assert not (far.metrics["eval_acc"][far.metrics["node"] == 1] >= 0).any()


def test_what_is_reported_is_about_the_honest(tmp_path):
    tables = attacked("gaussian:sigma=5.0", topology="ring")
    tables["algorithm"] = "dpsgd"
    result = p2pfl.run(tables, out=tmp_path / "run")
    metrics, summary = result.metrics, result.summary
    last = metrics["round"] == 3
    unknown = set(metrics["node"][last & (metrics["eval_acc"] != metrics["eval_acc"])].tolist())
    assert unknown == {1, 6}
    models = torch.stack(
        [torch.cat([p.flatten() for p in result.model(k).model.parameters()]) for k in range(8)]
    ).detach()
    honest = models[[0, 2, 3, 4, 5, 7]].double()
    mean = torch.cat([p.flatten() for p in result.model().model.parameters()])
    torch.testing.assert_close(mean.double(), honest.mean(0), rtol=1e-5, atol=1e-7)
    far = (honest - honest.mean(0)).square().sum(1).mean()
    assert summary["consensus_distance"] == pytest.approx(float(far), rel=1e-5)
    written = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert (written["attackers"], written["attack"]) == ([1, 6], "gaussian")
    table = compare([read_run(tmp_path / "run")], upright=True)
    assert "1, 6 (gaussian)" in [str(cell) for cell in table.columns[1].cells]


def test_labels_are_flipped_for_attackers_alone():
    plain = Experiment.from_dict(experiment()).federation()
    flipped = Experiment.from_dict(attacked("label_flip")).federation()
    alone = Experiment.from_dict(attacked("label_flip")).federation(only=6)
    for node in range(8):
        y, now = plain.train.rows_of(node).y, flipped.train.rows_of(node).y
        assert torch.equal(now, 9 - y if node in (1, 6) else y)
    assert torch.equal(alone.train.y, 9 - plain.train.rows_of(6).y)
    assert torch.equal(flipped.test.y, plain.test.y)


def test_baselines_are_of_the_honest():
    tables = attacked("label_flip")
    tables["evaluation"] = {"every": 4, "baselines": True}
    summary = p2pfl.run(tables).summary
    honest = [summary["alone"][k] for k in (0, 2, 3, 4, 5, 7)]
    assert summary["alone_mean"] == pytest.approx(sum(honest) / 6)


def test_plain_averaging_breaks_and_a_robust_rule_does_not():
    tables = attacked("sign_flip:scale=4.0", pace={"rounds": 30, "local_steps": 2})
    tables["optimiser"] = {"name": "sgd", "lr": 0.1, "momentum": 0.9}
    robust = p2pfl.run(tables).summary["eval_acc_mean"]
    plain = p2pfl.run({**tables, "algorithm": "dpsgd"}).summary["eval_acc_mean"]
    free = p2pfl.run({k: v for k, v in tables.items() if k != "attackers"})
    assert free.summary["eval_acc_mean"] - robust < 0.05
    assert plain < 0.5


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"attackers": {"fraction": 0.2}}, "attackers: attack is missing"),
        ({"attackers": {"attack": "alie"}}, "attackers: give either fraction"),
        ({"attackers": {"attack": "alie", "fraction": 0.01}}, "fraction = 0.01 of 8 nodes"),
        ({"attackers": {"attack": "alie", "nodes": [8]}}, "not among the nodes 0 to 7"),
        ({"attackers": {"attack": "alie", "nodes": list(range(8))}}, "nobody left"),
        ({"attackers": {"attack": "alei", "nodes": [1]}}, "attackers.attack.name = 'alei'"),
        ({"attackers": {"attack": "ipm:epsilon=0", "nodes": [1]}}, "epsilon = 0"),
        (
            {"algorithm": {"name": "dpsgd", "aggregate": "trimmed_mean:f=4"}},
            "needs 9 models.*node 0",
        ),
        ({"algorithm": {"name": "dpsgd", "aggregate": "krum:f=3"}}, "krum with f = 3 needs 9"),
        ({"topology": "ring"}, "trimmed_mean with f = 2 needs 5 models.*node 0.*2 neighbours"),
        ({"algorithm": {"name": "dpsgd", "aggregate": "trimmed_maen:f=1"}}, "aggregate.name"),
        ({"algorithm": "local", "attackers": {"attack": "alie", "nodes": [1]}}, "nobody hears"),
        (
            {
                "attackers": {"attack": "non_finite", "nodes": [1]},
                "pace": {"patience": float("inf")},
            },
            "waits for it for ever",
        ),
        ({"pace": {"name": "timer"}}, "merges two"),
        (
            {"algorithm": {"name": "rpel", "nodes": 100, "attackers": 10, "s": 15, "rounds": 200}},
            "may meet 8 of the 10",
        ),
        (
            {
                "algorithm": {"name": "rpel", "nodes": 8, "attackers": 1, "s": 5, "rounds": 9},
                "topology": "el_local:s=3,pull=true",
            },
            "reckons with nodes that hear s = 5",
        ),
    ],
)
def test_mistakes_are_told(changes, told):
    with pytest.raises(UserError, match=told):
        Experiment.from_dict(experiment(**changes))


def test_a_node_that_hears_too_few_now_and_then_is_worth_a_note():
    made = Experiment.from_dict(experiment(topology="el_local:s=5"))
    assert "they then keep their own" in made.notes[0]
    pulled = Experiment.from_dict(experiment(topology="el_local:s=5,pull=true"))
    assert not any("keep their own" in note for note in pulled.notes)
    heard = {len(pulled.topology.view(k, r)[1]) for k in range(8) for r in range(5)}
    assert heard == {5}


@pytest.mark.parametrize("on", ["simulate", "emulate"])
def test_methods_with_a_state_of_their_own(on):
    for algorithm, topology in (
        ({"name": "balance", "rounds": 4, "gamma": 1.0}, "complete"),
        (
            {"name": "rpel", "nodes": 8, "attackers": 2, "s": 5, "rounds": 4},
            "el_local:s=5,pull=true",
        ),
    ):
        result = p2pfl.run(attacked("sign_flip", algorithm=algorithm, topology=topology), on=on)
        assert result.summary["status"] == "finished"
        assert result.summary["eval_loss_mean"] < 2.3
