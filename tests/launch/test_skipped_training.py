"""`pace.train_every`: rounds in which models are exchanged and nobody trains."""

from __future__ import annotations

import numpy as np
import pytest

import p2pfl
from p2pfl.errors import UserError

TABLES = {
    "nodes": 4,
    "data": {"name": "synthetic", "examples": 80, "shape": [6], "classes": 3},
    "partition": {"name": "dirichlet", "alpha": 0.5, "min_partition_size": 5},
    "model": {"name": "mlp", "hidden": [5]},
    "training": {"dtype": "float64", "batch_size": 8},
    "optimiser": {"name": "sgd", "lr": 0.2, "momentum": 0.5},
    "algorithm": "dpsgd",
    "topology": "ring",
    "pace": {"rounds": 8, "local_epochs": 1, "train_every": 3},
    "evaluation": {"nodes": "all"},
}


def run(on="simulate", **pace):
    return p2pfl.run(TABLES | {"pace": TABLES["pace"] | pace}, on=on)


@pytest.mark.parametrize("overlap", [False, True])
def test_all_runtimes_come_to_the_same(overlap):
    runs = [run(on, overlap=overlap) for on in ("simulate", "emulate", "local")]
    for other in runs[1:]:
        assert other.summary["node_updates"] == runs[0].summary["node_updates"]
        for column in ("train_loss", "eval_loss"):
            np.testing.assert_allclose(other.metrics[column], runs[0].metrics[column], rtol=1e-9)


def test_nobody_trains_in_between_and_models_come_closer():
    result = run()
    trained = ~np.isnan(result.metrics["train_loss"])
    assert sorted({*result.metrics["round"][trained]}) == [0, 3, 6]
    apart = [
        result.metrics["consensus_distance"][result.metrics["round"] == k].mean() for k in range(8)
    ]
    assert apart[1] < 0.8 * apart[0]
    assert apart[2] < 0.8 * apart[1]


def test_it_is_the_same_training_with_more_mixing():
    """All hear all: further exchanges change nothing, so that every third round is all there is."""
    complete = {"algorithm": "dpsgd", "topology": "complete"}
    skipping = p2pfl.run(TABLES | complete, on="simulate")
    plain = TABLES["pace"] | {"rounds": 3, "train_every": 1}
    usual = p2pfl.run(TABLES | complete | {"pace": plain}, on="simulate")
    assert skipping.summary["node_updates"] == usual.summary["node_updates"]
    ours, theirs = (one.metrics["eval_loss"][-4:] for one in (skipping, usual))
    np.testing.assert_allclose(ours, theirs, rtol=1e-9)


def test_a_rule_on_the_training_loss_goes_by_the_rounds_with_training():
    stop = {"name": "plateau", "metric": "train_loss", "patience": 2, "min_delta": 10.0}
    often, seldom = (run(rounds=60, train_every=n, stop=stop).summary for n in (1, 4))
    assert often["reason"] == seldom["reason"] == "converged"
    assert seldom["rounds"] > often["rounds"] + 4


@pytest.mark.parametrize(
    ("pace", "algorithm", "words"),
    [
        ({"train_every": 0}, "dpsgd", "train_every = 0 is below 1"),
        (
            {"train_every": 2, "local_epochs": None, "local_steps": 1},
            "d2",
            "train_every = 1, not 2",
        ),
        ({"train_every": 2}, "diloco", "train_every = 1, not 2"),
    ],
)
def test_what_makes_no_sense_is_refused(pace, algorithm, words):
    tables = TABLES | {"algorithm": algorithm, "pace": TABLES["pace"] | pace}
    tables["pace"] = {key: value for key, value in tables["pace"].items() if value is not None}
    with pytest.raises(UserError, match=words):
        p2pfl.run(tables)
