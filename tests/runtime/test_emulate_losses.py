"""Where messages are lost, peers that wait for each other stay together."""

from __future__ import annotations

import pytest
from runtime_cases import Case, emulated, flat, make

from p2pfl.algorithms import dpsgd, push_sum
from p2pfl.learning.optim import sgd
from p2pfl.peer.plan import Pace
from p2pfl.runtime.network import NetworkModel
from p2pfl.topology import metropolis, push, ring_graph, torus_graph

N, ROUNDS, APART = 16, 150, 10


@pytest.mark.parametrize("build", [dpsgd, push_sum])
@pytest.mark.parametrize("graph", [ring_graph, torus_graph])
def test_nobody_runs_away_from_neighbours_that_only_wait(build, graph):
    """Of every ten messages three are lost, so that most rounds of a peer end with a deadline."""
    case = Case(build, graph, push() if build is push_sum else metropolis(), sgd(0.02))
    network = NetworkModel(latency=0.1, compute=1.0, loss=0.3)
    _, rounds = emulated(make(case, Pace(ROUNDS, patience=10.0), n=N), network)
    ended = {(row.node, row.round): row.virtual_s for row in flat(rounds)}
    for a, b in graph(N).to_directed().edges:
        for round in range(ROUNDS - APART):
            assert ended[a, round] < ended[b, round + APART]
