"""RelaySGD: models are passed on along a tree, and every node's counts once."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from p2pfl.algorithm import Algorithm, Inbox, Needs, Rows
from p2pfl.algorithms.edges import by_neighbour, neighbours_of
from p2pfl.algorithms.steps import plain_factor, plain_step
from p2pfl.learning.checks import require
from p2pfl.learning.optim import Optimiser
from p2pfl.learning.tree import wide


class RelayState(NamedTuple):
    """A model, its optimiser, who and whose neighbour it is, and what each of them said last."""

    x: Tensor
    opt: Any
    node: Tensor  # [rows, 1]
    neighbours: Tensor  # [rows, k]
    sums: Tensor  # [rows, k, d]
    counts: Tensor  # [rows, k, 1]


class Relayed(NamedTuple):
    """The sum of the models on the sender's side of an edge, and of how many it is."""

    sender: Tensor  # [rows, k, 1], int64
    counts: Tensor  # [rows, k, 1]
    sums: Tensor  # [rows, k, d]


def relay(opt: Optimiser, n: int) -> Algorithm[RelayState, Relayed, Relayed]:
    """RelaySGD: relay sums of models along a tree (Vogels et al. 2021).

    To neighbour j goes ``m_ij = x_i + sum over k != j of m_ki``, as they were heard a round before,
    with a count made likewise, and ``x_i <- ((n - sum c_ki) x_i + sum m_ki) / n``. So every model
    counts once, as old as it is far away, and with a constant rate and full gradients all reach the
    optimum of the mean loss, whatever the data. Asks for links that form a tree and stay.
    What is not heard in a round counts as nothing in it, counts included: one's own model takes its
    place. Messages are ``4 d + 12`` bytes (float32), different ones to each neighbour; the memory
    is that of so many models as the graph's largest degree.

    Args:
        n: how many nodes there are.
    """
    require(n >= 1, "n", n, "at least 1")

    def init(x: Tensor, rows: Rows) -> RelayState:
        neighbours, exact = neighbours_of(rows), wide(x)
        k = neighbours.shape[1]
        sums = torch.zeros(len(x), k, x.shape[1], dtype=exact, device=x.device)
        counts = torch.zeros(len(x), k, 1, dtype=exact, device=x.device)
        return RelayState(x, opt.init(x), rows.nodes.unsqueeze(1), neighbours, sums, counts)

    def send(s: RelayState) -> Relayed:
        total = s.x.unsqueeze(1) + s.sums.sum(1, keepdim=True)
        count = 1 + s.counts.sum(1, keepdim=True)
        sender = s.node.unsqueeze(1).expand_as(s.counts)
        return Relayed(sender, count - s.counts, total - s.sums)

    def receive(s: RelayState, inbox: Inbox[Relayed]) -> RelayState:
        edges = by_neighbour(inbox, inbox.heard.sender, s.neighbours)
        counts, sums = (edges.of(inbox.gather(field)[0]) for field in inbox.heard[1:])
        x = s.x + (sums.sum(1) - counts.sum(1) * s.x) / n
        return s._replace(x=x.to(s.x.dtype), sums=sums, counts=counts)

    return Algorithm(
        init,
        lambda s: s.x,
        plain_step(opt),
        send,
        receive,
        needs=Needs(
            graph="tree",
            static=True,
            rounds=True,
            rule="relay",
            addressed=True,
            counts=("counts",),
        ),
        factor=plain_factor(opt),
    )
