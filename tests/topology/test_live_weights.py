"""Links with weights of their own, among fewer nodes."""

from __future__ import annotations

import random

import pytest
import torch

from p2pfl.topology import base, hyper_hypercube, od_equi_dyn, ou_equi_dyn, u_equi_static
from p2pfl.topology.live import Overlay

from .schedule_checks import is_doubly_stochastic, matrix

BUILT = {
    "base": base,
    "base k=2": lambda n: base(n, 2),
    "u_equi_static": u_equi_static,
    "od_equi_dyn": od_equi_dyn,
    "ou_equi_dyn": ou_equi_dyn,
}


def some(k):
    return tuple(sorted(random.Random(k).sample(range(16), k)))


@pytest.mark.parametrize("name", BUILT)
@pytest.mark.parametrize("k", [2, 5, 11, 15])
def test_the_live_have_the_weights_of_so_many(name, k):
    build, live = BUILT[name], some(k)
    topology, small = Overlay(build(16), build).among(live), build(k)
    for round in range(6):
        expected = torch.eye(16, dtype=torch.float64)
        expected[torch.tensor(live)[:, None], torch.tensor(live)] = matrix(small, round)
        assert torch.equal(matrix(topology, round), expected)


def test_the_live_average_exactly_among_themselves():
    live = some(11)
    topology = Overlay(base(16, 2), lambda k: base(k, 2)).among(live)
    x = torch.arange(16, dtype=torch.float64) ** 2
    for round in range(topology.period):
        x = matrix(topology, round) @ x
    mean = sum(node**2 for node in live) / 11
    assert x[list(live)].tolist() == pytest.approx([mean] * 11, rel=1e-12)
    dead = [node for node in range(16) if node not in live]
    assert x[dead].tolist() == [node**2 for node in dead]


@pytest.mark.parametrize("name", BUILT)
def test_what_is_mended_goes_by_degrees(name):
    topology = Overlay(BUILT[name](16), None).among(some(11))
    for round in range(5):
        assert topology.links(round).weights is None
        assert topology.view_weights(0, round) is None


def test_a_number_that_cannot_be_is_mended():
    topology = Overlay(hyper_hypercube(16), hyper_hypercube).among(some(11))
    assert topology.period == 4
    x = torch.arange(16, dtype=torch.float64)
    for round in range(400):
        w = matrix(topology, round)
        assert is_doubly_stochastic(w)
        x = w @ x
    mean = sum(some(11)) / 11
    assert x[list(some(11))].tolist() == pytest.approx([mean] * 11, rel=1e-9)
