"""What is sent to hosts, and what is made of what they leave."""

import asyncio

import pytest
import torch
import zmq
from fleet_cases import experiment, small, summary

import p2pfl
from p2pfl.errors import RunError, UserError
from p2pfl.experiment.experiment import Experiment
from p2pfl.fleet import control, launch
from p2pfl.fleet.collect import gather, mean_model, open_folder, set_aside
from p2pfl.fleet.hosts import read_hosts
from p2pfl.fleet.parcel import data_files, parcel
from p2pfl.fleet.record import Place, Record, read_record
from p2pfl.results.runs import read_run
from p2pfl.security.roster import read_roster

HOSTS = """
[[hosts]]
name = "a"
address = "127.0.0.1"
ports = [7000, 7001, 7002]
data = "~/data"
"""
NORM = """
from torch import nn

def make(shape, outputs):
    return nn.Sequential(nn.BatchNorm1d(shape[0]), nn.Linear(shape[0], outputs))
"""


@pytest.fixture
def fleet(tmp_path):
    (tmp_path / "hosts.toml").write_text(HOSTS)
    return read_hosts(tmp_path / "hosts.toml")


def test_the_experiment_means_the_same_where_it_is_sent(tmp_path, fleet):
    (tmp_path / "experiment.toml").write_text("[[links]]\nbetween = [0, 1]\n")
    (tmp_path / "mine.py").write_text(NORM)
    (tmp_path / "ring.edges").write_text("0 1\n1 2\n2 0\n")
    tables = small(model={"name": "custom", "factory": "mine.py:make"}, topology="ring.edges")
    here = Experiment.from_dict(tables, tmp_path)
    files = parcel(here, fleet, {})
    assert set(files) == {"experiment.toml", "peers.toml", "files/mine.py", "files/ring.edges"}
    there = tmp_path / "there"
    for name, content in files.items():
        (there / name).parent.mkdir(parents=True, exist_ok=True)
        (there / name).write_bytes(content)
    (tmp_path / "ring.edges").unlink()
    found = Experiment.load(there / "experiment.toml")
    assert found.sections["model"].values["factory"] == f"{there}/files/mine.py:make"
    task = here.task(here.federation(only=0), None)
    assert found.terms(task) == here.terms(task)


def test_addresses_and_keys_are_sent(tmp_path, fleet):
    addresses = {node: f"tcp://127.0.0.1:{7000 + node}" for node in range(3)}
    keys = {node: zmq.curve_keypair()[0].decode() for node in range(3)}
    for known in ({}, keys):
        (tmp_path / "peers.toml").write_bytes(parcel(experiment(), fleet, known)["peers.toml"])
        roster = read_roster(tmp_path / "peers.toml")
        assert (roster.addresses, roster.keys) == (addresses, known)


def test_a_peer_needs_no_data_of_others(fleet):
    def needed(node, **more):
        data = {"name": "csv", "target": "y", **more}
        return data_files(experiment(data=data), fleet.seats[node])

    assert needed(1, path="x.csv") == ["~/data/x.csv"]
    assert needed(1, path="/x.csv") == ["/x.csv"]
    each = {"path": ["0.csv", "1.csv", "2.csv"], "classes": [0, 1]}
    files = {"partition": {"name": "natural_id"}, "holdout": {"name": "per_node"}}
    data = {"name": "csv", "target": "y", **each}
    own = experiment(data=data, **files, evaluation={"on": "own"})
    assert data_files(own, fleet.seats[1]) == ["~/data/1.csv"]
    assert data_files(experiment(), fleet.seats[0]) == []


def test_the_mean_model_is_that_of_a_run_in_one_place(tmp_path):
    data = {"data": {"name": "wine"}, "preprocess": {"standardise": "pooled"}}
    p2pfl.run(experiment(**data), out=tmp_path / "run")
    assert p2pfl.load(tmp_path / "run").standardises
    together = mean_model(tmp_path / "run", [0, 1, 2]).state_dict()
    for name, place in p2pfl.load(tmp_path / "run").state_dict().items():
        assert torch.allclose(together[name], place, atol=1e-6), name


def test_no_mean_model_where_layers_hold_statistics(tmp_path):
    (tmp_path / "norm.py").write_text(NORM)
    tables = small(model={"name": "custom", "factory": "norm.py:make"})
    p2pfl.run(Experiment.from_dict(tables, tmp_path), out=tmp_path / "run")
    with pytest.raises(UserError, match="buffers are estimated from data"):
        mean_model(tmp_path / "run", [0, 1, 2])


def test_a_run_without_any_model_is_a_valid_folder(tmp_path):
    folder = tmp_path / "run"
    open_folder(folder, experiment())
    assert summary(folder)["status"] == "running"
    endings = {node: {"status": "failed", "why": "no power"} for node in range(3)}
    gather(folder, endings, "failed", "no power anywhere")
    assert read_run(folder).summary["error"] == "no power anywhere"
    assert summary(folder)["mean_model_missing"] == "no peer has got through"


class Ended:
    """A connection to a host on which some peers are still at work."""

    def __init__(self, *going):
        self.going = going

    async def ask(self, verb, folder, nodes):
        assert verb == "status"
        return {"peers": [{"node": n} | ({} if n in self.going else {"ended": {}}) for n in nodes]}


def test_nothing_is_taken_for_collected_while_a_peer_is_at_work(tmp_path, fleet, monkeypatch):
    folder, places = tmp_path / "run", [Place(fleet.hosts[0], "/there", [0, 1, 2])]
    open_folder(folder, experiment())
    Record("now", 3, places).save(folder)
    endings = {node: {"status": "failed", "why": "it is out of reach"} for node in range(3)}
    going = launch.conclude(folder, read_record(folder), {"a": Ended(1, 2)}, endings, False)
    ended = asyncio.run(going)
    assert ended.away == "1 of 1 hosts have not given all they have: a: peers still at work: 1, 2"
    assert ended.away in ended.error
    assert not read_record(folder).collected

    async def fetch(folder, place, shell):
        pass

    monkeypatch.setattr(launch, "fetch", fetch)
    done = launch.conclude(folder, read_record(folder), {"a": Ended()}, endings, True)
    assert asyncio.run(done).away is None
    assert read_record(folder).endings == endings
    told = asyncio.run(control.status(folder))  # without asking hosts where nothing may be left
    assert [(peer.node, peer.phase, peer.why) for peer in told] == [
        (node, "failed", "it is out of reach") for node in range(3)
    ]


def test_a_run_is_collected_whatever_has_become_of_the_files_it_was_made_of(tmp_path):
    (tmp_path / "mine.py").write_text("raise KeyError(1)")
    (tmp_path / "line.edges").write_text("0 1\n1 2\n")
    folder, begun = (
        tmp_path / "run",
        Experiment.from_dict(small(topology={"name": "file", "path": "line.edges"}), tmp_path),
    )
    open_folder(folder, begun)
    text = (folder / "experiment.toml").read_text()
    (folder / "experiment.toml").write_text(
        text.replace("[model]", "[model]\nfactory = 'mine.py:make'")
    )
    (tmp_path / "line.edges").unlink()
    for _ in range(2):  # `up` and then `down`
        gather(folder, {0: {"status": "finished", "why": ""}}, "finished", None)
        told = summary(folder)
        assert (told["status"], told["topology"], told["nodes"]) == ("finished", "file", 3)


def test_a_run_folder_that_was_moved_is_one_line(tmp_path, fleet):
    record = Record("now", 3, [Place(fleet.hosts[0], "/there", [0, 1, 2])])
    with pytest.raises(RunError, match=r"moved is there no more .*`p2pfl down` collects"):
        asyncio.run(launch.conclude(tmp_path / "moved", record, {}, {}, False))


@pytest.mark.parametrize("text", ["", "round,no", "round,node\n"])
def test_a_host_with_a_full_disk_keeps_no_other_from_being_collected(
    tmp_path, fleet, text, monkeypatch
):
    folder, places = tmp_path / "run", [Place(fleet.hosts[0], "/there", [0, 1, 2])]
    open_folder(folder, experiment())
    Record("now", 3, places).save(folder)
    p2pfl.run(experiment(), out=tmp_path / "done")
    lines = (tmp_path / "done" / "metrics.csv").read_text().splitlines(keepends=True)

    async def fetch(folder, place, shell):
        for node in place.nodes:
            home = folder / "peers" / f"{node:03d}"
            home.mkdir(parents=True)
            own = [line for line in lines[1:] if line.split(",")[1] == str(node)]
            (home / "metrics.csv").write_text(text if node == 1 else "".join(lines[:1] + own))
        (home / "summary.json").write_text("[1")

    monkeypatch.setattr(launch, "fetch", fetch)
    endings = {node: {"status": "finished", "why": "all rounds"} for node in (0, 2)}
    endings[1] = {"status": "failed", "why": "no space"}
    ended = asyncio.run(
        launch.conclude(folder, read_record(folder), {"a": Ended()}, endings, interrupted=False)
    )
    assert ended.error.startswith("peer 1 on a failed: no space")
    assert ("damaged" in ended.error) == text.endswith("\n")
    assert read_record(folder).collected
    assert set(read_run(folder).metrics["node"]) == {0, 2}


def test_a_peer_with_damaged_metrics_has_failed(tmp_path):
    home = tmp_path / "peers" / "002"
    home.mkdir(parents=True)
    (home / "metrics.csv").write_text("round,node\n")
    faults = set_aside(tmp_path)
    assert list(faults) == [2]
    assert faults[2].endswith(f"of this version; kept as {home}/metrics.csv.damaged")
    assert not (home / "metrics.csv").exists()
    assert set_aside(tmp_path) == {}


def test_the_record_survives(tmp_path, fleet):
    record = Record("now", 3, [Place(fleet.hosts[0], "/there", [0, 1, 2])])
    record.save(tmp_path)
    assert read_record(tmp_path) == record
    (tmp_path / "fleet.json").write_text('{"started": 1}')
    with pytest.raises(UserError, match="is damaged"):
        read_record(tmp_path)
    with pytest.raises(UserError, match="is no run of `p2pfl up`: it is not there"):
        read_record(tmp_path / "none")
