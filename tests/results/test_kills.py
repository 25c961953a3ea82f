"""SIGKILL at any moment of a writer: there is always a checkpoint that can be read."""

from __future__ import annotations

import multiprocessing
import os
import random
import signal
import time

import pytest
from checkpoint_cases import InPlaceDisk, checkpoints, right, save

from p2pfl.results.checkpoint import CheckpointError
from p2pfl.results.durable import DRAFT, Disk

WIDTH = 100_000  # of the tensor, so that writing takes a while
FORK = multiprocessing.get_context("fork")  # importing torch each time would take seconds


def write_until_killed(files, folder, number, end):
    kept = checkpoints(files, folder)
    while True:
        number += 1
        save(kept, number, WIDTH)
        os.write(end, b".")


def kills(files, folder, count):
    """Kill a writer so many times; return how often nothing could be read, and steps lost."""
    chance, unreadable, lost, number, drafts = random.Random(count), 0, 0, 0, 0
    for _ in range(count):
        ours, theirs = os.pipe()
        writer = FORK.Process(target=write_until_killed, args=(files, folder, number, theirs))
        writer.start()
        os.close(theirs)
        time.sleep(chance.uniform(0, 0.06))  # any moment will do
        os.kill(writer.pid, signal.SIGKILL)
        writer.join()
        saved = number
        while more := os.read(ours, 4096):
            saved += len(more)
        os.close(ours)
        drafts += sum(path.name.endswith(DRAFT) for path in folder.glob("*"))
        try:
            found = checkpoints(files, folder).newest()
        except CheckpointError:
            unreadable, number = unreadable + 1, saved
            continue
        assert found is None or right(found, WIDTH)
        number = found.number if found else 0
        lost += number < saved
    return unreadable, lost, drafts, number


def test_fifty_kills(tmp_path):
    unreadable, lost, drafts, number = kills(Disk(), tmp_path / "checkpoints", 50)
    assert (unreadable, lost) == (0, 0)
    assert number > 5  # they wrote
    assert drafts > 0  # and some were killed while they did


@pytest.mark.slow
def test_a_thousand_kills(tmp_path):
    assert kills(Disk(), tmp_path / "checkpoints", 1000)[:2] == (0, 0)


def test_a_careless_writer_is_found_out(tmp_path):
    (tmp_path / "checkpoints").mkdir()
    assert kills(InPlaceDisk(), tmp_path / "checkpoints", 50)[0] > 0
