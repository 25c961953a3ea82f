"""A peer that is stopped, or left alone, before training has begun."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace

import pytest
from launch_cases import free_address, small, summary

from p2pfl.errors import RunError
from p2pfl.experiment.experiment import Experiment
from p2pfl.launch import local
from p2pfl.launch.local import peer_run
from p2pfl.launch.serving import Post
from p2pfl.results.record import Recorder
from p2pfl.runtime.endpoint import Endpoint
from p2pfl.runtime.finding import Book
from p2pfl.runtime.handshake import NeighbourGone, Terms
from p2pfl.runtime.links import Links
from p2pfl.runtime.setup import Row
from p2pfl.runtime.wire import Kind

EXPERIMENT = Experiment.from_dict(
    small(
        nodes=2,
        data={"name": "breast_cancer"},
        preprocess={"standardise": "pooled"},
        model={"name": "logistic"},
    ),
    ".",
)
SOON = 20.0


class Stage:
    """Peer 0, and how far it has come."""

    def __init__(self, folder: Path) -> None:
        self.addresses = {node: free_address() for node in range(2)}
        self.folder, self.phases, self.asked = folder, list[str](), threading.Event()

    def run(self, join_timeout: float, resume: bool = False) -> str:
        where = (0, self.addresses[0], self.addresses)
        post = Post(*where, join_timeout=join_timeout, resume=resume)
        told = peer_run(EXPERIMENT, post, self.folder, self._say, lambda: not self.asked.is_set())
        return str(told["status"])

    def stop_in(self, phase: str) -> None:
        """Ask the peer to end a little after it has come to a phase."""

        def watch() -> None:
            while phase not in self.phases:
                time.sleep(0.01)
            time.sleep(0.2)
            self.asked.set()

        threading.Thread(target=watch, daemon=True).start()

    def _say(self, news: dict[str, object]) -> None:
        self.phases.append(str(news.get("phase")))


@contextmanager
def silent(stage: Stage, then: Callable[[Links], None] = lambda links: None) -> Iterator[None]:
    """A peer 1 that meets peer 0, does something, and then says nothing but goodbye."""
    task = EXPERIMENT.task(EXPERIMENT.federation(None, only=1), None)
    terms, done = Terms(EXPERIMENT.terms(task)), threading.Event()

    def live() -> None:
        book = Book(2, {0: stage.addresses[0]})
        links = Links(1, Endpoint(stage.addresses[1], 1), [0], terms, book)
        links.meet(SOON)
        then(links)
        while not done.is_set():
            links.events()
            links.poller.poll(20)
        links.close("done", 1.0)

    thread = threading.Thread(target=live)
    thread.start()
    yield
    done.set()
    thread.join()


def test_a_peer_can_be_stopped_while_it_waits_for_the_others(tmp_path: Path):
    stage = Stage(tmp_path / "out")
    stage.stop_in("meeting")
    assert stage.run(SOON) == "interrupted"
    assert summary(stage.folder)["status"] == summary(stage.folder)["reason"] == "interrupted"
    assert summary(stage.folder)["rounds"] == 0
    assert not list(stage.folder.glob("models/*"))


def test_a_peer_can_be_stopped_while_statistics_are_averaged(tmp_path: Path):
    stage = Stage(tmp_path / "out")
    stage.stop_in("averaging statistics")
    with silent(stage):
        assert stage.run(SOON) == "interrupted"
    assert summary(stage.folder)["status"] == "interrupted"
    assert "training" not in stage.phases


def test_a_neighbour_that_says_nothing_about_its_statistics_is_named(tmp_path: Path):
    stage = Stage(tmp_path / "out")
    with silent(stage), pytest.raises(RunError, match="nothing heard in time of peer 1 while stat"):
        stage.run(2.0)
    assert summary(stage.folder)["status"] == "failed"


def test_a_neighbour_lost_while_statistics_are_averaged_is_named(tmp_path: Path):
    stage = Stage(tmp_path / "out")

    def leave(links: Links) -> None:
        for one in links._neighbours.values():
            one.say_goodbye(links._about(Kind.BYE), b"enough")

    with silent(stage, leave), pytest.raises(NeighbourGone, match="lost peer 1 while statistics"):
        stage.run(SOON)
    assert summary(stage.folder)["status"] == "failed"


def test_who_comes_back_to_nobody_says_that_the_others_may_have_ended(tmp_path: Path):
    stage = Stage(tmp_path / "out")
    with pytest.raises(RunError, match=r"nothing heard within 0.1 s of peer 1 at [^;]*$"):
        stage.run(0.1)
    about = {"on": "peer", "node": 0}
    row = Row(*(0,) * len(Row._fields))._replace(wall_s=1.5)
    Recorder(tmp_path / "before", EXPERIMENT.to_toml(), **about).row(row, None)
    stage.folder = tmp_path / "before"
    with pytest.raises(RunError, match="they have ended since peer 0 was here, or are out of rea"):
        stage.run(0.1, resume=True)
    assert summary(stage.folder)["status"] == "failed"


@pytest.mark.parametrize("part", ["serve", "_summary"])
def test_a_mistake_of_ours_is_a_failure_too(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, part: str
):
    def broken(*given: object) -> None:
        raise ZeroDivisionError

    monkeypatch.setattr(local, "serve", lambda *given: SimpleNamespace(ending=None))
    monkeypatch.setattr(local, part, broken)
    stage = Stage(tmp_path / "out")
    with pytest.raises(ZeroDivisionError):
        stage.run(SOON)
    found = summary(stage.folder)
    assert (found["status"], found["error"]) == ("failed", "ZeroDivisionError")
