"""What several tests of schedules look at."""

from __future__ import annotations

import math

import torch

from p2pfl.topology import metropolis, weights


def matrix(topology, round, rule=None):
    return weights(topology.links(round), rule or metropolis()).to_dense()


def is_doubly_stochastic(w):
    ones = torch.ones(len(w), dtype=w.dtype)
    sums = torch.cat([w.sum(0), w.sum(1)])
    return bool(w.min() >= 0) and torch.allclose(sums, torch.cat([ones, ones]), rtol=0, atol=1e-12)


def curve(topology, rounds):
    """What is left of x_i = i after every round, as a share of what there was."""
    x = torch.arange(topology.n, dtype=torch.float64)
    left = [(x - x.mean()).norm()]
    for round in range(rounds):
        x = matrix(topology, round) @ x
        left.append((x - x.mean()).norm())
    return [float(each / left[0]) for each in left]


def z_score(values, expected):
    """How many standard errors the mean of draws is from what it should be."""
    values = torch.tensor(values, dtype=torch.float64)
    return abs(float(values.mean()) - expected) / (float(values.std()) / math.sqrt(len(values)))
