"""Many seeds, each a cluster and faults of its own."""

from __future__ import annotations

import os
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest
from swim_swarm import Run, draw, report

RARE = (
    *("refuted", "refutations", "rescued", "stalls"),
    *("partition", "rejoin", "back from the dead"),
)


def swarm(seeds):
    reached = Counter()
    for seed in seeds:
        plan = draw(seed)
        run = Run(plan)
        try:
            run.perform()
        except Exception as error:
            pytest.fail(report(plan, f"{type(error).__name__}: {error}"), pytrace=False)
        reached.update(run.watch.reached)
    return reached


def test_swarm(request):
    given = request.config.getoption("--swarm-seed", default=None)
    if given is not None:
        swarm([given])
        return
    reached = swarm(range(50))
    assert all(reached[what] >= 5 for what in RARE), reached


@pytest.mark.slow
def test_large_swarm():
    reached = swarm(range(1000, 2000))
    assert all(reached[what] >= 100 for what in RARE), reached


def test_the_same_seed_is_the_same_run_whatever_the_hashes():
    code = "from swim_swarm import *; run = Run(draw(7)); run.perform(); print(run.trace())"
    traces = []
    for hashes in ("1", "2"):
        done = subprocess.run(
            [sys.executable, "-c", code],
            cwd=Path(__file__).parent,
            env={**os.environ, "PYTHONHASHSEED": hashes},
            capture_output=True,
            text=True,
            check=True,
        )
        traces.append(done.stdout)
    run = Run(draw(7))
    run.perform()
    assert traces == [run.trace() + "\n"] * 2
    assert len(run.cluster.log) > 20
