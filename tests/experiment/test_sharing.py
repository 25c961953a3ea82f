"""`training.share`: patterns over parameter names, in the experiment file and in a run of it."""

from __future__ import annotations

import pytest
import torch

import p2pfl
from p2pfl.errors import UserError
from p2pfl.experiment.experiment import Experiment

TABLES = {
    "nodes": 4,
    "data": {"name": "synthetic", "examples": 80, "shape": [6], "classes": 3},
    "partition": "iid",
    "model": {"name": "mlp", "hidden": [5]},
    "algorithm": "dpsgd",
    "topology": "ring",
    "pace": {"rounds": 3, "local_steps": 2},
}
BODY = ["1.*"]  # the first linear layer; before it stands a Flatten


def tables(**more):
    return {**TABLES, **more}


@pytest.mark.parametrize("on", ["simulate", "emulate"])
def test_bytes_fall_bodies_agree_and_heads_differ(on, tmp_path):
    whole = p2pfl.run(tables(), on=on)
    part = p2pfl.run(tables(training={"share": BODY}), on=on, out=tmp_path / "part")
    size = 6 * 5 + 5, 5 * 3 + 3
    saved = 4 * size[1] * 4 * 2 * 3  # float32, nodes, neighbours, rounds
    sent = [run.summary["bytes_sent"] for run in (whole, part)]
    assert sent[0] - sent[1] == pytest.approx(saved, abs=24 * 4)  # the length of a length
    models = [p2pfl.load(part.folder, node=k).state_dict() for k in range(4)]
    spread = {
        name: float(torch.stack([m[name] for m in models]).std(0).mean())
        for name in models[0]
        if models[0][name].is_floating_point() and models[0][name].ndim == 2
    }
    body, head = spread
    assert spread[body] < 0.6 * spread[head]


@pytest.mark.parametrize(
    ("changed", "words"),
    [
        ({"training": {"share": []}}, ["share = []", "shares nothing"]),
        ({"training": {"share": "1.*"}}, ["training.share = '1.*'"]),
        (
            {"training": {"share": BODY}, "algorithm": "push_sum"},
            ["training.share", "a mass is shared out in whole"],
        ),
        ({"training": {"share": BODY}, "algorithm": "local"}, ["training.share", "hears nobody"]),
    ],
)
def test_what_cannot_be_shared_is_refused_before_anything_starts(changed, words):
    with pytest.raises(UserError) as caught:
        Experiment.from_dict(tables(**changed))
    for word in words:
        assert word in str(caught.value)


def test_a_pattern_that_matches_nothing_names_the_parameters():
    with pytest.raises(UserError, match=r"training\.share.*'body\.\*'; there are .*1\.weight"):
        p2pfl.run(tables(training={"share": ["body.*"]}))


def test_what_is_resolved_reads_as_itself():
    experiment = Experiment.from_dict(tables(training={"share": BODY}))
    again = Experiment.from_dict(experiment.to_dict())
    assert again.to_toml() == experiment.to_toml()
    assert again.training.share == BODY
