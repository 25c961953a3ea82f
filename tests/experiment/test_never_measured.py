"""Runs that would never stop, because what they stop by is not measured of every node."""

from __future__ import annotations

import pytest

import p2pfl
from p2pfl.errors import UserError
from p2pfl.experiment.experiment import Experiment

OWN = {"holdout": {"name": "per_node", "fraction": 0.1}, "evaluation": {"on": "own"}}
SMALL = {"nodes": 4, "model": "logistic", "partition": "linear"}
SMALL |= {"data": {"name": "synthetic", "examples": 40}}


def stopping(metric: str, value: float = 0.0) -> dict:
    stop = {"name": "target", "metric": metric, "value": value}
    return {"pace": {"rounds": 9, "local_steps": 1, "stop": stop}}


def test_a_node_without_a_row_held_out_is_named_once_the_data_are_there():
    tables = {**SMALL, **OWN}
    federation = Experiment.from_dict(tables).federation()
    assert federation.own_test is not None
    held_out = federation.own_test.count
    assert 0 < int((held_out == 0).sum()) < 4
    node = int((held_out == 0).nonzero()[0])
    experiment = Experiment.from_dict(tables | stopping("eval_loss"))
    for only in (None, node):
        with pytest.raises(UserError, match=f"'eval_loss' is never measured of node {node}"):
            experiment.federation(only=only)
    experiment.federation(only=int(held_out.argmax()))
    assert Experiment.from_dict(tables | stopping("train_loss")).federation().n == 4
    enough = tables | stopping("eval_acc") | {"partition": "iid"}
    assert p2pfl.run(enough).summary["reason"] == "converged"


def test_test_rows_that_are_none_are_refused():
    tables = {**SMALL, "holdout": {"name": "random", "fraction": 0.01}}
    with pytest.raises(UserError, match="'eval_acc' is never measured, as there are no test rows"):
        Experiment.from_dict(tables | stopping("eval_acc")).federation()
    assert p2pfl.run(tables).summary["reason"] == "all rounds done"


def test_the_accuracy_of_a_regression_is_refused():
    tables = {"nodes": 2, "model": "logistic", "data": {"name": "synthetic", "classes": 0}}
    with pytest.raises(UserError, match="'eval_acc' is never measured of a regression"):
        Experiment.from_dict(tables | stopping("eval_acc")).federation()
