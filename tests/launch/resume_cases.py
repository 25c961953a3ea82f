"""Runs that are killed, and how they are compared with others that were not."""

from __future__ import annotations

import shutil

import numpy as np
from safetensors.torch import load_file

import p2pfl
from p2pfl.launch.books import Watch

ROUNDS, KILLED = 6, 3
BASE = {
    "nodes": 4,
    "data": "wine",
    "model": "logistic",
    "preprocess": {"standardise": "pooled"},
    "pace": {"rounds": ROUNDS, "local_steps": 2},
    "checkpoint": {"seconds": 0.0},
}


def tables(case, **pace):
    changed = {key: value for key, value in case.items() if key != "pace"}
    given = {**BASE["pace"], **case.get("pace", {}), **pace}
    return BASE | changed | {"pace": {k: v for k, v in given.items() if v is not None}}


def run_and_copy(experiment, folder, after, **options):
    """Run to the end; also return what a kill after so many rounds would have left."""
    copy = folder / "killed"

    def rows(rows):
        if rows[0].round == after:
            shutil.copytree(folder / "whole", copy)

    watch = Watch(rows=rows)
    return p2pfl.run(experiment, out=folder / "whole", watch=watch, **options), copy


def models(folder):
    return {path.name: load_file(path) for path in sorted(folder.glob("models/*"))}


def same(one, other):
    """Compare all that two runs have left, but for the time they took."""
    for name, column in one.metrics.items():
        if name != "wall_s":
            np.testing.assert_array_equal(column, other.metrics[name], err_msg=name)
    assert np.all(np.diff(other.metrics["wall_s"]) >= 0)
    ours, theirs = models(one.folder), models(other.folder)
    assert len(ours) > 1
    assert ours.keys() == theirs.keys()
    for name, tensors in ours.items():
        for key, tensor in tensors.items():
            assert tensor.equal(theirs[name][key]), (name, key)
    told = ("eval_loss_mean_model", "consensus_distance", "reason", "node_updates", "rounds")
    for key in (*told, "bytes_sent", "status"):
        assert one.summary[key] == other.summary[key]
    lines = [(r.folder / "metrics.csv").read_text().count("\n") for r in (one, other)]
    assert lines[0] == lines[1]
