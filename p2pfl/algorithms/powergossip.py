"""PowerGossip: two neighbours find out where their matrices differ most, and close that gap."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from p2pfl import rng
from p2pfl.algorithm import Algorithm, Inbox, Needs, Rows
from p2pfl.algorithms.edges import by_neighbour, neighbours_of
from p2pfl.algorithms.lowrank import Layout, orthonormal
from p2pfl.algorithms.steps import plain_factor, plain_step
from p2pfl.learning.checks import require
from p2pfl.learning.optim import Optimiser
from p2pfl.learning.spec import Spec
from p2pfl.learning.tree import wide


class PowerState(NamedTuple):
    """A model, its optimiser, who and whose neighbour it is, and the bases of every edge."""

    x: Tensor
    opt: Any
    node: Tensor  # [rows, 1]
    neighbours: Tensor  # [rows, k]
    keys: Tensor  # [rows, k]: the same at both ends of an edge
    bases: Tensor  # [rows, k, w]
    turn: Tensor  # [rows, 1], int64: how many exchanges there were, the same for all rows


class Projected(NamedTuple):
    """Matrices times the bases of an edge, and the parameters that travel whole."""

    sender: Tensor  # [rows, k, 1], int64
    values: Tensor  # [rows, k, w + v]


def powergossip(
    opt: Optimiser, spec: Spec, rank: int = 1, seed: int = 0
) -> Algorithm[PowerState, Projected, Projected]:
    """PowerGossip: send matrices times a few vectors (Vogels, Karimireddy and Jaggi 2020).

    The ends of an edge share an orthonormal basis P for each matrix parameter M. Each sends
    ``M^T P`` and makes ``M_i <- M_i + W_ij P Q^T``, where Q is the other's less its own. That keeps
    the mean of all models. Q, made orthonormal, is the next basis, on the other side of M: a power
    iteration, which finds the directions in which the two differ most. Directions in which they do
    not differ are drawn anew. There is nothing to tune. Convolution kernels are matrices
    ``[out, in h w]``. Vectors travel whole, and so do matrices with no more than `rank` rows or
    columns.

    A matrix of m x n makes ``4 rank n`` bytes (float32) in one round and ``4 rank m`` in the next.
    Messages have one size, that of the longer turn; which side of a matrix begins is chosen so that
    the two turns are near each other. Besides there are 4 bytes for every other parameter, and 8.
    Asks for a fixed undirected graph and for every message.

    Args:
        spec: the parameters of the model; an experiment tells them.
        rank: how many directions of a matrix are sent.
        seed: of the first bases; by default that of the experiment.
    """
    require(rank >= 1, "rank", rank, "at least 1")
    layout = Layout.of(spec, rank)

    def init(x: Tensor, rows: Rows) -> PowerState:
        require(x.shape[1] == spec.size, "spec", spec.size, f"of {x.shape[1]} parameters")
        node, neighbours = rows.nodes.unsqueeze(1), neighbours_of(rows)
        low, high = torch.minimum(node, neighbours), torch.maximum(node, neighbours)
        keys = rng.fold(rng.keys(seed, low), high)
        nothing = torch.zeros(*keys.shape, layout.width, dtype=wide(x), device=x.device)
        bases = _next(layout, nothing, keys, 0)
        turn = torch.zeros_like(node)
        return PowerState(x, opt.init(x), node, neighbours, keys, bases, turn)

    def said(s: PowerState) -> Tensor:
        x, turn = s.x.to(s.bases.dtype), _turn(s)
        bases = layout.bases(s.bases, turn)
        parts = [
            torch.einsum("iab,ikar->ikbr", matrix.of(x, turn), basis)
            for matrix, basis in zip(layout.matrices, bases, strict=True)
        ]
        whole = x[:, layout.whole.to(x.device)].unsqueeze(1).expand(-1, s.keys.shape[1], -1)
        return torch.cat([layout.joined(parts, whole), whole], 2).to(s.x.dtype)

    def send(s: PowerState) -> Projected:
        sender = s.node.unsqueeze(1).expand(-1, s.keys.shape[1], -1)
        return Projected(sender, said(s))

    def receive(s: PowerState, inbox: Inbox[Projected]) -> PowerState:
        edges, turn = by_neighbour(inbox, inbox.heard.sender, s.neighbours), _turn(s)
        theirs = edges.of(inbox.gather(inbox.heard.values)[0]).to(s.bases.dtype)
        gap = (theirs - said(s).to(theirs.dtype)) * edges.there.unsqueeze(2)
        pull = gap * edges.of(inbox.shares().to(gap.dtype).unsqueeze(2))
        x = s.x.to(gap.dtype, copy=True)
        each = zip(layout.bases(s.bases, turn), layout.bases(pull, turn + 1), strict=True)
        for matrix, (basis, part) in zip(layout.matrices, each, strict=True):
            matrix.of(x, turn).add_(torch.einsum("ikar,ikbr->iab", basis, part))
        x[:, layout.whole.to(x.device)] += pull[:, :, layout.width :].sum(1)
        # Both ends go on from the same difference, that of the lower id less the higher.
        sign = (s.node > s.neighbours).to(gap.dtype).unsqueeze(2) * 2 - 1
        bases = _next(layout, sign * gap[:, :, : layout.width], s.keys, turn + 1)
        return s._replace(x=x.to(s.x.dtype), bases=bases, turn=s.turn + 1)

    return Algorithm(
        init,
        lambda s: s.x,
        plain_step(opt),
        send,
        receive,
        needs=Needs(
            graph="symmetric", static=True, every_message=True, rounds=True, addressed=True
        ),
        factor=plain_factor(opt),
        keeps_mean=True,
    )


def _turn(s: PowerState) -> int:
    # Where there are no values, on the meta device, all turns are alike.
    return 0 if s.turn.is_meta else int(s.turn[0])


def _next(layout: Layout, flat: Tensor, keys: Tensor, turn: int) -> Tensor:
    """Return the bases of a turn, made of what the ends of each edge differ by."""
    drawn = rng.normal(rng.fold(keys, turn), layout.width).to(flat.dtype)
    pairs = zip(layout.bases(flat, turn), layout.bases(drawn, turn), strict=True)
    return layout.joined([orthonormal(block, other) for block, other in pairs], flat)
