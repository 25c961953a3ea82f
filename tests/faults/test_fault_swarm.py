"""Many seeds, each a run and faults of its own."""

from __future__ import annotations

import dataclasses
import math
import os
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest
from fault_plan import LOSSY, draw
from fault_swarm import perform, report
from fault_watch import Watched

RARE = (
    *("refute", "rejoin", "heal", "skip", "jump", "one-sided", "late"),
    *("turned away", "corrupt"),
)


def swarm(seeds):
    reached = Counter()
    for seed in seeds:
        plan = draw(seed)
        run = Watched(plan)
        try:
            run.perform()
        except Exception as error:
            pytest.fail(report(plan, f"{type(error).__name__}: {error}"), pytrace=False)
        reached.update(what for what, times in run.reached.items() if times)
    return reached


def test_faults(request):
    given = request.config.getoption("--fault-seed", default=None)
    if given is not None:
        swarm([given])
        return
    reached = swarm(range(30))
    assert all(reached[what] >= 1 for what in RARE), reached


@pytest.mark.slow
def test_a_thousand_seeds():
    reached = swarm(range(1000, 2000))
    assert all(reached[what] >= 10 for what in RARE), reached


@pytest.mark.parametrize(
    ("seed", "algorithm", "topology"),
    [(136, "dpsgd", "one_peer"), (126, "push_sum", "exponential"), (1182, "dpsgd", "one_peer")],
)
def test_in_step_on_one_way_links_all_come_to_the_end(seed, algorithm, topology):
    """Nobody waits for ever, whoever comes and goes meanwhile, or is done a little sooner."""
    plan = draw(seed)
    plan = plan._replace(
        algorithm=algorithm,
        topology=topology,
        rate=0.0,
        pace=plan.pace._replace(patience=math.inf, rounds=60),
        network=dataclasses.replace(plan.network, loss=0.0),
        faults=tuple(one for one in plan.faults if one.kind not in LOSSY),
    )
    perform(plan)


def test_the_same_seed_is_the_same_run_whatever_the_hashes():
    code = (
        "from fault_plan import draw; from fault_swarm import perform\n"
        "print(*(perform(draw(seed)).hash.hexdigest() for seed in (1, 3)))"
    )
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
        traces.append(done.stdout.split())
    assert traces == [[perform(draw(seed)).hash.hexdigest() for seed in (1, 3)]] * 2
