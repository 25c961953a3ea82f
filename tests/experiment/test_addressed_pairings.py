"""What an experiment tells relay and powergossip, and which of their pairings it refuses."""

from __future__ import annotations

import pytest

from p2pfl.errors import UserError
from p2pfl.experiment.experiment import Experiment


def test_more_fragments_than_parameters_are_refused_once_the_model_is_known():
    tables = {"data": "synthetic:examples=40,shape=[3],classes=3", "model": "linear", "nodes": 2}
    most = Experiment.from_dict({**tables, "algorithm": "divshare:fragments=12"})
    more = Experiment.from_dict({**tables, "algorithm": "divshare:fragments=13"})
    task = most.task(most.federation(), None)
    assert most.setup(task)
    with pytest.raises(UserError, match="fragments must be at most the model's 12 parameters"):
        more.setup(task)


@pytest.mark.parametrize("topology", ["chain", "star", "binary_tree", "grid:rows=1,cols=7"])
def test_trees_are_taken(topology):
    assert Experiment.from_dict({"nodes": 7, "algorithm": "relay", "topology": topology})


@pytest.mark.parametrize(
    ("tables", "message"),
    [
        ({"algorithm": "relay", "topology": "ring"}, "has cycles"),
        ({"algorithm": "relay", "topology": "el_local"}, "chain, star, binary_tree"),
        ({"algorithm": {"name": "relay", "n": 8}, "topology": "chain"}, "algorithm.n is unknown"),
        ({"algorithm": "relay", "topology": "chain", "pace": "timer"}, "works in rounds"),
        ({"algorithm": "powergossip", "topology": "exponential"}, "links that go both ways"),
        ({"algorithm": "powergossip", "topology": "random_matching"}, "neighbours that stay"),
        ({"algorithm": "powergossip:rank=0", "topology": "ring"}, "rank must be at least 1"),
        ({"algorithm": "divshare:fragments=0"}, "fragments must be at least 1"),
        ({"algorithm": "divshare", "pace": "timer"}, "works in rounds"),
        ({"algorithm": "divshare", "training": {"share": ["1.*"]}}, "needs whole models"),
    ],
)
def test_what_cannot_work_is_refused(tables, message):
    with pytest.raises(UserError, match=message):
        Experiment.from_dict({"nodes": 8, **tables})
