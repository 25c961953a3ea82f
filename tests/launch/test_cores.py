"""Which cores the peers of one machine are kept on."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import tomli_w
from launch_cases import LONG, command, p2pfl, small

from p2pfl.experiment.experiment import Experiment
from p2pfl.launch import cores, local
from p2pfl.launch.books import Where

TELLS = """\
import json, math, os
from pathlib import Path
from torch import nn

def make(shape, outputs):
    with Path(__file__).with_name("cores").open("a") as file:
        print(json.dumps([*os.sched_getaffinity(0)]), file=file)
    return nn.Sequential(nn.Flatten(), nn.Linear(math.prod(shape), outputs))
"""


def told(nodes: int, bind: bool) -> list[list[int]]:
    """Return the cores that peers of a local run are told to stay on."""
    experiment = Experiment.from_dict(small(nodes=nodes, topology="complete"))
    jobs = local._jobs(experiment, Path("run"), Where(bind=bind), resume=False)
    for job in jobs:
        job["socket"].close()
    return [job["cores"] for job in jobs]


@pytest.mark.parametrize(
    ("peers", "each", "threads"),
    [
        (1, [[2, 3, 5, 7, 11]], 5),
        (2, [[2, 3], [5, 7, 11]], 2),
        (4, [[2], [3], [5], [7, 11]], 1),
        (5, [[2], [3], [5], [7], [11]], 1),
        (6, [[2, 3, 5, 7, 11]] * 6, 1),
    ],
)
def test_all_are_dealt_out_if_there_are_enough(monkeypatch, tmp_path, peers, each, threads):
    monkeypatch.setattr(cores, "TOLD", tmp_path)  # the system does not tell what is one core
    monkeypatch.setattr(cores, "usable", lambda: [2, 3, 5, 7, 11])
    assert cores.deal(peers) == each
    assert cores.threads_each(peers) == threads


@pytest.mark.parametrize("listed", ["{0},{1}", "{0}-{1}"])
def test_a_core_is_not_divided(monkeypatch, tmp_path: Path, listed):
    monkeypatch.setattr(cores, "TOLD", tmp_path)
    monkeypatch.setattr(cores, "usable", lambda: list(range(8)))
    for processor in range(8):
        folder = tmp_path / f"cpu{processor}" / "topology"
        folder.mkdir(parents=True)
        (folder / "physical_package_id").write_text(f"{processor % 2}\n")
        first = processor % 4
        (folder / "thread_siblings_list").write_text(listed.format(first, first + 4) + "\n")
    assert cores.deal(2) == [[0, 2, 4, 6], [1, 3, 5, 7]]
    assert cores.deal(3) == [[0, 4], [2, 6], [1, 3, 5, 7]]
    assert cores.deal(4) == [[0, 4], [2, 6], [1, 5], [3, 7]]
    assert cores.deal(5) == [list(range(8))] * 5


def test_what_is_bound_is_let_go_again():
    before = cores.usable()
    with cores.bound(before[:1]):
        assert cores.usable() == before[:1]
    assert cores.usable() == before


def test_cores_that_are_not_there_any_more_change_nothing():
    before = cores.usable()
    cores.bind([10**4])
    assert cores.usable() == before


@pytest.mark.parametrize(("nodes", "bind"), [(1, True), (2, True), (2, False), (10**2, True)])
def test_what_peers_are_told(nodes: int, bind: bool):
    dealt = told(nodes, bind)
    assert len(dealt) == nodes
    assert dealt == (cores.deal(nodes) if bind else [cores.usable()] * nodes)


@pytest.mark.skipif(len(cores.usable()) < 2, reason="needs a core for each of two peers")
@pytest.mark.processes
def test_peers_stay_on_cores_of_their_own(tmp_path: Path):
    (tmp_path / "tells.py").write_text(TELLS)
    model = {"name": "custom", "factory": "tells.py:make"}
    (tmp_path / "e.toml").write_text(
        tomli_w.dumps(small(nodes=2, topology="complete", model=model))
    )
    with command(*p2pfl("run", "e.toml", "--on", "local", "-q"), cwd=tmp_path) as process:
        assert process.wait(LONG) == 0
    found = [set(json.loads(line)) for line in (tmp_path / "cores").read_text().splitlines()]
    assert all(set(own) in found for own in cores.deal(2))
