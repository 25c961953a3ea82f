"""Algorithms on networks and paces that they cannot work on."""

from __future__ import annotations

import pytest

from p2pfl.errors import UserError
from p2pfl.experiment.experiment import Experiment
from p2pfl.experiment.pairing import check_pairing
from p2pfl.topology.schedule import nobody

ONE = {"local_steps": 1}
STOP = {"name": "target", "metric": "train_loss", "value": 0.5}


@pytest.mark.parametrize(
    ("tables", "words"),
    [
        ({"algorithm": "extra", "topology": "ring"}, ["'extra'", "pace.local_steps = 1"]),
        ({"algorithm": "exact_diffusion", "topology": "exponential"}, ["both ways"]),
        ({"algorithm": "extra", "topology": "random_matching", "pace": ONE}, ["neighbours that"]),
        ({"algorithm": "kgt", "pace": {"patience": 0.0}}, ["'kgt'", "patience = 0"]),
        ({"algorithm": "push_pull", "pace": {"patience": 0.0}}, ["'push_pull'", "patience = 0"]),
        (
            {"algorithm": "push_diging", "topology": "star", "mixing": "uniform"},
            ["'push_diging'", "use push"],
        ),
        ({"algorithm": "qg", "mixing": "push"}, ["'qg'", "metropolis"]),
        ({"algorithm": "qg", "pace": "timer"}, ["'qg'", "works in rounds"]),
        ({"algorithm": "diloco", "pace": "timer"}, ["'diloco'", "works in rounds"]),
        ({"algorithm": "kgt", "pace": "timer"}, ["'kgt'", "works in rounds"]),
        ({"algorithm": "push_pull", "pace": "timer"}, ["'push_pull'", "works in rounds"]),
        ({"algorithm": "kgt", "pace": {"overlap": True}}, ["'kgt'", "pace.overlap"]),
        ({"algorithm": "kgt:outer_lr=2.0"}, ["algorithm", "outer_lr must be in (0, 1]", "2.0"]),
        ({"algorithm": "gossip:merge=best"}, ["algorithm.merge", "'best'", "'limited'"]),
        ({"algorithm": "fedasync:staleness=none"}, ["algorithm.staleness", "'hinge'"]),
        ({"algorithm": "fedasync:b=2"}, ["algorithm: b = 2", "'hinge'"]),
        ({"algorithm": "gossip:limit=5"}, ["algorithm: limit = 5", "merge = 'limited'"]),
        ({"algorithm": "gossip:order=random_walk"}, ["one model at a time", "hears 2"]),
        ({"algorithm": "gossip:order=random_walk,merge=age", "pace": "timer"}, ["merges nothing"]),
        (
            {"algorithm": "gossip:order=update_then_merge", "training": {"share": ["1.*"]}},
            ["training.share", "in whole"],
        ),
        ({"algorithm": "local", "pace": {"stop": STOP}}, ["pace.stop", "algorithm.name = 'local'"]),
    ],
)
def test_wrong_pairings_are_refused(tables, words):
    with pytest.raises(UserError) as caught:
        Experiment.from_dict({"nodes": 8, "topology": "ring", **tables})
    for word in words:
        assert word in str(caught.value)


def test_nodes_agree_when_to_stop_only_where_all_hear_of_all():
    tables = {"nodes": 4, "topology": "ring", "algorithm": "dpsgd", "pace": {"stop": STOP}}
    pair = Experiment.from_dict(tables)._pairing
    check_pairing(pair)
    with pytest.raises(UserError, match=r"pace\.stop .* topology\.name = 'ring' some never hear"):
        check_pairing(pair._replace(topology=nobody(4)))
    Experiment.from_dict({"nodes": 1, "algorithm": "local", "pace": {"stop": STOP}})


@pytest.mark.parametrize(
    ("tables", "mixing"),
    [
        ({"algorithm": "exact_diffusion", "topology": "ring", "pace": ONE}, "metropolis"),
        ({"algorithm": "push_pull", "topology": "exponential"}, "push"),
        ({"algorithm": "push_diging", "topology": "one_peer_exponential"}, "push"),
        ({"algorithm": "kgt", "topology": "random_matching"}, "metropolis"),
        ({"algorithm": "gossip:merge=limited,limit=3", "topology": "ring", "pace": "timer"}, None),
        ({"algorithm": "fedasync", "topology": "ring", "pace": "timer"}, None),
        ({"algorithm": "gosgd", "topology": "exponential", "pace": "timer"}, "push"),
        ({"algorithm": "push_sum", "topology": "star", "pace": "timer"}, "push"),
        ({"algorithm": "gossip:order=random_walk", "topology": "ring", "pace": "timer"}, None),
        ({"algorithm": "gossip:order=update_then_merge", "topology": "random_matching"}, None),
        ({"algorithm": "fedasync", "topology": "ring", "pace": {"patience": 0.0}}, None),
    ],
)
def test_right_ones_are_not(tables, mixing):
    experiment = Experiment.from_dict({"nodes": 8, **tables})
    assert mixing is None or experiment.sections["mixing"].name == mixing


def test_who_reckons_with_fewer_attackers_than_there_are_is_refused():
    tables = {
        "nodes": 8,
        "algorithm": "rpel:nodes=8,attackers=1,s=5,rounds=4",
        "topology": "el_local:s=5,pull=true",
        "attackers": {"nodes": [1, 2], "attack": "sign_flip"},
    }
    with pytest.raises(UserError, match=r"algorithm\.attackers = 1, but .* has 2"):
        Experiment.from_dict(tables)


@pytest.mark.parametrize(("algorithm", "said"), [("kgt", True), ("dpsgd", False)])
def test_what_needs_every_message_is_warned_of_a_network_that_loses_some(algorithm, said):
    tables = {"algorithm": algorithm, "topology": "ring", "network": {"loss": 0.1}}
    notes = Experiment.from_dict(tables).notes
    assert any("needs every message" in note for note in notes) is said


def heard_of(**more):
    pulled = {"nodes": 8, "topology": "el_local:s=5,pull=true", "pace": {"rounds": 7}}
    return Experiment.from_dict(pulled | more)


def test_what_an_algorithm_reckons_with_follows_the_experiment():
    rpel = heard_of(algorithm="rpel:attackers=1,s=5")
    assert rpel.sections["algorithm"].values["rounds"] == 7
    assert rpel.sections["algorithm"].values["nodes"] == 8
    assert not any("reckons" in note for note in rpel.notes)
    told = Experiment.from_dict(rpel.to_dict())
    assert told.to_dict() == rpel.to_dict()
    assert heard_of(algorithm="balance").sections["algorithm"].values["rounds"] == 7
    ticking = heard_of(algorithm="balance", topology="ring", pace="timer:ticks=33")
    assert ticking.sections["algorithm"].values["rounds"] == 33


def test_who_reckons_with_other_rounds_than_there_are_is_told():
    for given in ("balance:rounds=3", {"name": "balance", "rounds": 3}):
        (note,) = [one for one in heard_of(algorithm=given).notes if "reckons" in one]
        assert "algorithm.rounds = 3, and pace.rounds = 7" in note
    with pytest.raises(UserError, match=r"algorithm\.nodes = 9, but nodes = 8"):
        heard_of(algorithm="rpel:nodes=9,attackers=1,s=5")
    with pytest.raises(UserError, match=r"algorithm\.attackers is missing"):
        heard_of(algorithm="rpel:s=5")


def test_a_seed_of_its_own_goes_before_that_of_the_experiment():
    for topology, seed in (("random_matching", 4), ("random_matching:seed=9", 9)):
        experiment = Experiment.from_dict({"seed": 4, "algorithm": "qg", "topology": topology})
        assert experiment.sections["topology"].values["seed"] == seed
