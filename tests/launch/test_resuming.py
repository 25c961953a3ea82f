"""A run that was killed goes on to the numbers of one that was not."""

from __future__ import annotations

import contextlib
import json
import shutil

import pytest
from resume_cases import KILLED, run_and_copy, same, tables

import p2pfl
from p2pfl.errors import UserError
from p2pfl.experiment.experiment import Experiment
from p2pfl.launch.books import Watch
from p2pfl.results.runs import read_summary

MOMENTUM = {"name": "sgd", "lr": 0.1, "momentum": 0.9}
FADING = {"name": "sgd", "lr": {"name": "exponential", "start": 0.1, "rate": 0.9}}
CHAIN = {"name": "chain", "parts": [{"name": "clip_norm", "norm": 0.5}, {"name": "adam"}]}
CHOCO = {"name": "choco", "gamma": 0.3}

CASES = {
    "fedavg": {},
    "fedavg momentum": {"optimiser": MOMENTUM},
    "fedavg adam": {"optimiser": {"name": "adam", "lr": 0.01}},
    "fedavg overlap": {"pace": {"overlap": True}, "optimiser": MOMENTUM},
    "dpsgd adamw": {"algorithm": "dpsgd", "topology": "ring", "optimiser": {"name": "adamw"}},
    "dpsgd combine": {"algorithm": "dpsgd:order=combine_then_adapt", "topology": "ring"},
    "dpsgd chain": {"algorithm": "dpsgd", "topology": "ring", "optimiser": CHAIN},
    "dpsgd schedule": {"algorithm": "dpsgd", "topology": "ring", "optimiser": FADING},
    "dpsgd overlap": {"algorithm": "dpsgd", "topology": "ring", "pace": {"overlap": True}},
    "dpsgd changing": {"algorithm": "dpsgd", "topology": "random_matching"},
    "dpsgd bfloat16": {"algorithm": "dpsgd", "training": {"dtype": "bfloat16"}},
    "proximal": {"algorithm": "dpsgd", "training": {"proximal": 0.1}, "topology": "ring"},
    "local": {"algorithm": "local", "optimiser": MOMENTUM, "preprocess": {"standardise": "own"}},
    "push_sum": {"algorithm": "push_sum:weight=examples", "topology": "exponential"},
    "push_sum overlap": {"algorithm": "push_sum", "pace": {"overlap": True}},
    "gradient_tracking": {"algorithm": "gradient_tracking", "topology": "ring"},
    "d2": {"algorithm": "d2", "topology": "ring", "pace": {"local_steps": 1}},
    "choco top_k": {"algorithm": CHOCO | {"codec": "top_k:share=0.2"}, "topology": "ring"},
    "choco random_k": {"algorithm": CHOCO | {"codec": "random_k:share=0.2"}, "topology": "ring"},
    "beer": {"algorithm": {"name": "beer", "codec": "half"}, "topology": "ring"},
    "deepsqueeze": {"algorithm": {"name": "deepsqueeze", "codec": "sign"}, "topology": "ring"},
    "jwins bfloat16": {"algorithm": "jwins:share=0.1", "training": {"dtype": "bfloat16"}},
    "gossip": {"algorithm": "gossip", "topology": "ring"},
    "uneven": {"partition": "dirichlet:alpha=0.5", "pace": {"local_steps": None}},
    "evaluated now and then": {"evaluation": {"every": 4, "nodes": 2}},
    "dropout": {"model": "mlp:hidden=[8],dropout=0.2", "training": {"dtype": "float64"}},
}
RULES = {
    "plateau": {"name": "plateau", "patience": 2, "min_delta": 0.05, "smoothing": 0.5},
    "target": {"name": "target", "metric": "eval_acc", "value": 0.9},
}


@pytest.mark.parametrize("name", CASES)
def test_a_killed_run_goes_on_to_the_same_numbers(name, tmp_path):
    whole, killed = run_and_copy(tables(CASES[name]), tmp_path, KILLED)
    assert read_summary(killed)["status"] == "running"
    again = p2pfl.run(resume=killed)
    assert again.folder == killed
    same(whole, again)
    events = [json.loads(line) for line in (killed / "events.jsonl").read_text().splitlines()]
    assert [e["rounds"] for e in events if e["event"] == "resumed"] == [KILLED]
    assert not (killed / "checkpoints").exists()  # there is nothing to go on with any more


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("left", [1, 2, 3])
def test_a_stopping_rule_stops_where_it_would_have(rule, left, tmp_path):
    ring = {"algorithm": "dpsgd", "topology": "ring", "nodes": 5}
    asked = tables(ring, rounds=60, stop=RULES[rule])
    after = p2pfl.run(asked).summary["rounds"] - left
    whole, killed = run_and_copy(asked, tmp_path, after)
    assert whole.summary["reason"] == "converged"
    same(whole, p2pfl.run(resume=killed))


def test_killed_again_and_again(tmp_path):
    whole, killed = run_and_copy(tables(CASES["choco top_k"]), tmp_path, 1)
    for after in (2, 4):
        next_one = tmp_path / f"killed at {after}"

        def rows(rows, after=after, was=killed, to=next_one):
            if rows[0].round == after:
                shutil.copytree(was, to)

        p2pfl.run(resume=killed, watch=Watch(rows=rows))
        killed = next_one
    same(whole, p2pfl.run(resume=killed))


@pytest.mark.parametrize("error", [KeyboardInterrupt, OSError])
def test_a_run_that_was_interrupted_or_failed_goes_on_too(error, tmp_path):
    def rows(rows):
        if rows[0].round == KILLED:
            raise error

    with contextlib.suppress(OSError):
        p2pfl.run(tables({}), out=tmp_path / "run", watch=Watch(rows=rows))
    assert read_summary(tmp_path / "run")["status"] in ("interrupted", "failed")
    whole = p2pfl.run(tables({}), out=tmp_path / "whole")
    same(whole, p2pfl.run(resume=tmp_path / "run"))


def test_more_rounds_may_be_asked_for(tmp_path):
    _, killed = run_and_copy(tables({}), tmp_path, KILLED)
    changes = ["pace.rounds=9", "output.models=all", "checkpoint.every=2"]
    again = p2pfl.run(resume=killed, changes=changes)
    same(p2pfl.run(tables({}, rounds=9), out=tmp_path / "nine"), again)
    assert Experiment.load(killed / "experiment.toml").rounds == 9


@pytest.mark.parametrize("rounds", [2, 3])
def test_as_many_rounds_as_were_done_are_too_few(rounds, tmp_path):
    _, killed = run_and_copy(tables({}), tmp_path, KILLED)
    with pytest.raises(UserError, match=f"pace.rounds = {rounds}, but 3 rounds have been done"):
        p2pfl.run(resume=killed, changes=[f"pace.rounds={rounds}"])


def test_a_damaged_checkpoint_is_passed_over_and_said_so(tmp_path):
    whole, killed = run_and_copy(tables({}), tmp_path, KILLED)
    newest = killed / "checkpoints" / "00000003.safetensors"
    newest.write_bytes(newest.read_bytes()[:-1] + b"?")
    told = []
    again = p2pfl.run(resume=killed, watch=Watch(warn=told.append))
    same(whole, again)
    assert "SHA-256" in told[0]
    assert told[1] == "going on after 2 rounds"
    events = (killed / "events.jsonl").read_text()
    assert "checkpoint_skipped" in events


def test_what_was_torn_off_is_cut_off(tmp_path):
    whole, killed = run_and_copy(tables({}), tmp_path, KILLED)
    for name in ("metrics.csv", "events.jsonl"):
        with (killed / name).open("ab") as file:
            file.write(b"12,0,\0\0\0")
    same(whole, p2pfl.run(resume=killed))
    for line in (killed / "events.jsonl").read_text().splitlines():
        json.loads(line)
