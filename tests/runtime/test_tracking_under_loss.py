"""Trackers that share out masses reach the optimum although messages are lost; others do not."""

from __future__ import annotations

import pytest
from runtime_cases import CASES, N, emulated, make

from p2pfl.learning import Quadratics
from p2pfl.learning.optim import sgd
from p2pfl.peer.plan import Pace
from p2pfl.runtime.network import NetworkModel

TASK = Quadratics(N, 5, seed=3)


def off(name: str) -> float:
    setup = make(
        CASES[name]._replace(opt=sgd(0.05)), Pace(400, patience=3.0, evaluate_every=0), task=TASK
    )
    network = NetworkModel(
        latency=0.1, jitter=3.0, compute=1.0, compute_jitter=1.0, loss=0.1, seed=1
    )
    emulator, _ = emulated(setup, network)
    assert emulator.missed > 200
    return float((emulator.ending.params - TASK.optimum()).abs().max())


@pytest.mark.parametrize("name", ["push_diging", "push_pull"])
def test_running_sums_make_up_for_what_was_lost(name):
    assert off(name) < 1e-6


def test_means_do_not():
    assert off("gradient_tracking") > 1e-2
