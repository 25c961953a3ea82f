"""Runs to which everything happens: a minute of faults, then none, then all must get on."""

from __future__ import annotations

import traceback

from fault_watch import Watched


def perform(plan):
    return Watched(plan).perform()


def fails(plan):
    """Return what is broken under a plan, or nothing. An error of any kind counts."""
    try:
        perform(plan)
    except Exception as error:
        where = traceback.extract_tb(error.__traceback__)[-1]
        return f"{type(error).__name__} in {where.name}: {error}"
    return ""


def shrink(plan, most=40):
    """Return a plan with as few of the faults as it takes to fail, within so many trials."""
    step = max(1, len(plan.faults) // 2)
    while most > 0:
        for start in range(0, len(plan.faults), step):
            less = plan._replace(faults=plan.faults[:start] + plan.faults[start + step :])
            most -= 1
            if fails(less):
                plan = less
                break
            if most <= 0:
                break
        else:
            if step == 1:
                break
            step = max(1, step // 2)
    return plan


def report(plan, trouble):
    """Return how to see a failure again, and the least that leads to it."""
    small = shrink(plan)
    lines = [
        f"seed {plan.seed}: {trouble}",
        f"again: python -m pytest tests/faults/test_fault_swarm.py --fault-seed {plan.seed}",
        str(plan),
        f"{len(small.faults)} of {len(plan.faults)} faults suffice: {fails(small)}",
        *(f"  {one}" for one in small.script.timed),
    ]
    return "\n".join(lines)
