"""Power cuts at any moment: what was acknowledged is there, or a careless writer is found out."""

from __future__ import annotations

import random

import pytest
from checkpoint_cases import InPlace, SimFS, Unflushed, UnflushedFolder, checkpoints, right, save

from p2pfl.results.checkpoint import CheckpointError
from p2pfl.results.durable import DRAFT

LIVES = 2  # the second goes on in what the first has left


def newest(files):
    """Return the number of the newest valid checkpoint, 0 if there is none."""
    try:
        found = checkpoints(files).newest()
    except CheckpointError:
        return 0
    if found is None:
        return 0
    assert right(found)
    return found.number


def lost(kind, seed):
    """Cut the power at a random moment of each life; return how many saved steps are lost."""
    chance, worst = random.Random(seed), 0
    disk, number = {}, 0
    for _ in range(LIVES):
        files = kind(disk, left=chance.randrange(1, 60))
        kept, saved = checkpoints(files), number
        try:
            while True:
                save(kept, saved + 1)
                saved += 1
                assert not any(name.endswith(DRAFT) for name in files.names_now)
        except BaseException as error:
            if type(error).__name__ != "Cut":
                raise
        disk = files.after_the_cut(chance)
        number = newest(SimFS(disk))
        worst = max(worst, saved - number)
        assert number <= saved + 1
    return worst


def losses(kind, cuts):
    return sum(lost(kind, seed) > 0 for seed in range(cuts // LIVES))


def test_no_saved_step_is_lost():
    assert losses(SimFS, 3000) == 0


@pytest.mark.slow
def test_no_saved_step_is_lost_in_many_more():
    assert losses(SimFS, 20_000) == 0


@pytest.mark.parametrize("kind", [Unflushed, UnflushedFolder, InPlace])
def test_careless_writers_are_found_out(kind):
    assert losses(kind, 200) > 5
