"""Folders that peers leave when they are killed, or lose their power, at any moment."""

from __future__ import annotations

import math
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any

import pytest
import torch
from launch_cases import small

from p2pfl.errors import UserError
from p2pfl.experiment.experiment import Experiment
from p2pfl.launch.comeback import LIFE, next_life
from p2pfl.launch.leavings import bury, check_home, home, so_far
from p2pfl.results import record
from p2pfl.results.record import EXPERIMENT, HEADER, METRICS, SKETCHED, SKETCHES, SUMMARY, Recorder
from p2pfl.results.runs import read_run
from p2pfl.results.sketches import models_of
from p2pfl.runtime.setup import Row
from p2pfl.runtime.sketch import WIDTH

TRACED = (record.__file__, record.files.__file__)
TEXT = Experiment.from_dict(small(), ".").to_toml()
ABOUT: dict[str, Any] = {"on": "peer", "node": 2}


class Killed(BaseException):
    pass


@contextmanager
def killed_at(line: int) -> Iterator[None]:
    """Break off what is done within, before so many lines of `record` and `files` have run."""
    left = line

    def trace(frame: FrameType, what: str, about: object) -> Callable[..., Any] | None:
        nonlocal left
        if frame.f_code.co_filename not in TRACED:
            return None
        left -= what == "line"
        if left < 0:
            raise Killed
        return trace

    before = sys.gettrace()
    sys.settrace(trace)
    try:
        yield
    finally:
        sys.settrace(before)


def come_back(folder: Path, experiment: Experiment) -> Recorder:
    check_home(folder, experiment, 2)
    return Recorder(folder, TEXT, so_far(folder).mark, **ABOUT)


def line(round: int) -> Row:
    return Row(round, 2, 0.5, math.nan, math.nan, 10, math.nan, 100, 90, round + 1.5, math.nan)


def test_a_peer_killed_while_its_folder_is_made_can_be_started_again(tmp_path: Path):
    experiment = Experiment.from_dict(small(), ".")
    moments = 0
    while True:
        folder = home(tmp_path / str(moments), 2)
        try:
            with killed_at(moments):
                Recorder(folder, TEXT, **ABOUT)
        except Killed:
            moments += 1
        else:
            break
        bury(tmp_path / str(moments - 1), [2])
        try:  # once more, while it comes back
            with killed_at(moments // 2):
                come_back(folder, experiment)
        except Killed:
            pass
        come_back(folder, experiment).row(line(0), None)
        run = read_run(folder)
        assert run.summary["status"] == "running"
        assert run.metrics["round"].tolist() == [0]
    assert moments > 50


@pytest.mark.parametrize("there", [EXPERIMENT, SUMMARY, "thesis.tex"])
def test_what_is_not_of_a_run_is_left_alone_by_who_comes_back(tmp_path: Path, there: str):
    (tmp_path / there).write_text("precious")
    with pytest.raises(UserError):
        come_back(tmp_path, Experiment.from_dict(small(), "."))
    assert [path.read_text() for path in tmp_path.iterdir()] == ["precious"]


def trained(folder: Path) -> Path:
    """Leave the folder of a peer that has trained for three rounds."""
    recorder = Recorder(folder, TEXT, **ABOUT)
    for round in range(3):
        recorder.row(line(round), torch.full((2, WIDTH), float(round)))
    return folder


@pytest.mark.parametrize(
    ("lost", "zeros", "left"),
    [
        (0, b"", 3),
        (0, b"\0\0\0\0\n", 3),
        (0, b"\0" * 9, 3),
        (0, b"\xff\n", 3),
        (1, b"", 2),
        (5, b"\0\0\0\0\0", 2),
        (5, b"\0\0\0\0\n", 2),
        (30, b"", 1),
    ],
)
def test_metrics_go_on_after_the_last_line_that_can_be_read(
    tmp_path: Path, lost: int, zeros: bytes, left: int
):
    path = trained(tmp_path / "out") / METRICS
    path.write_bytes(path.read_bytes()[: -lost or None] + zeros)
    before = so_far(path.parent)
    assert (before.rounds, before.wall_s) == (left, left + 0.5)
    come_back(path.parent, Experiment.from_dict(small(), ".")).row(line(7), None)
    assert read_run(path.parent).metrics["round"].tolist() == [*range(left), 7]
    assert (path.parent / SKETCHES).stat().st_size == (left + 1) * SKETCHED


@pytest.mark.parametrize("lost", [1, SKETCHED, SKETCHED + 1, 3 * SKETCHED])
def test_sketches_that_are_lost_count_as_unknown(tmp_path: Path, lost: int):
    folder = trained(tmp_path / "out")
    os.truncate(folder / SKETCHES, 3 * SKETCHED - lost)
    recorder = come_back(folder, Experiment.from_dict(small(), "."))
    recorder.row(line(3), torch.full((2, WIDTH), 3.0))
    found = models_of(folder, 4)[:, 0].tolist()
    known = 3 - math.ceil(lost / SKETCHED)
    assert found[:known] + found[3:] == [*range(known), 3]
    assert all(math.isnan(value) for value in found[known:3])


def test_metrics_that_are_lost_whole_begin_anew(tmp_path: Path):
    path = trained(tmp_path / "out") / METRICS
    for data in (b"", HEADER[:9].encode(), bytes(200), HEADER.encode()):
        path.write_bytes(data)
        come_back(path.parent, Experiment.from_dict(small(), ".")).row(line(4), None)
        assert read_run(path.parent).metrics["round"].tolist() == [4]


def test_metrics_of_another_version_are_not_cut(tmp_path: Path):
    path = trained(tmp_path / "out") / METRICS
    path.write_text("round,node\n0,0\n")
    with pytest.raises(UserError, match="not those of a run of this version"):
        come_back(path.parent, Experiment.from_dict(small(), "."))
    assert path.read_text() == "round,node\n0,0\n"


def test_a_folder_that_cannot_be_looked_into_is_named(tmp_path: Path):
    folder = tmp_path / ("x" * 300)  # as one that belongs to somebody else, but for root as well
    with pytest.raises(UserError, match=r"x/experiment\.toml cannot be read: File name too long"):
        check_home(folder, Experiment.from_dict(small(), "."), 2)


@pytest.mark.parametrize("damage", [b"", b"\0\0\0", b"\xff", b"soon\n"])
def test_a_life_that_cannot_be_read_is_told_and_followed_by_the_time(tmp_path: Path, damage: bytes):
    told: list[str] = []

    def tell(kind: str, **about: Any) -> None:
        told.append(f"{kind}: {about['error']}")

    first = next_life(tmp_path, tell)
    assert next_life(tmp_path, tell) > first
    (tmp_path / LIFE).write_bytes(damage)
    assert told == []
    assert next_life(tmp_path, tell) >= first
    assert len(told) == 1
    assert told[0].startswith(f"life_unreadable: {tmp_path / LIFE}: ")
    assert int((tmp_path / LIFE).read_text()) >= first
