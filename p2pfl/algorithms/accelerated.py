"""Several exchanges after each round of local steps, which agree faster than plain ones."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from p2pfl.algorithm import Algorithm, Inbox, Needs, Rows
from p2pfl.algorithms.averaging import Params
from p2pfl.algorithms.steps import plain_factor, plain_step
from p2pfl.learning.checks import require
from p2pfl.learning.optim import Optimiser
from p2pfl.learning.tree import wide


class ChebyshevState(NamedTuple):
    """A model, that of an exchange ago, a ratio of polynomials, and the optimiser."""

    x: Tensor
    before: Tensor
    ratio: Tensor  # [rows, 1]: of the last two polynomials at 1 / rho; 0: no exchange since a step
    opt: Any


def chebyshev(opt: Optimiser, rho: float) -> Algorithm[ChebyshevState, Params, Params]:
    """Average k times between two rounds of local steps, accelerated (Arioli and Scott 2014).

    As `dpsgd` with ``pace.train_every = k``, whose k exchanges make ``W^k x`` of what the local
    steps have left. Here they make the polynomial of degree k in W that is smallest between -rho
    and rho, ``T_k(W / rho) / T_k(1 / rho)``: ``x_1 = W x_0``, then ``a W x_t - (a - 1) x_(t-1)``
    with a as in `p2pfl.topology.chebyshev` (Scaman et al. 2017 average gradients like that). Keeps
    the mean. Asks for a fixed undirected graph, symmetric weights and every message. Messages are
    ``4 d`` bytes (float32), k of them to each neighbour for the local steps of one round.

    Args:
        rho: bounds the moduli of all eigenvalues of W but the one of 1; ``p2pfl topology show``
            tells it. Too high is slower.
    """
    require(0 < rho < 1, "rho", rho, "above 0 and below 1")

    def none(x: Tensor) -> Tensor:
        return torch.zeros_like(x[:, :1], dtype=wide(x))

    def init(x: Tensor, rows: Rows) -> ChebyshevState:
        return ChebyshevState(x, x, none(x), opt.init(x))

    def begun(s: ChebyshevState) -> ChebyshevState:
        return s._replace(ratio=none(s.x))

    def receive(s: ChebyshevState, inbox: Inbox[Params]) -> ChebyshevState:
        first = s.ratio == 0
        ratio = torch.where(first, rho, 1 / (2 / rho - s.ratio))
        ahead = torch.where(first, 1.0, 2 / rho * ratio)
        x = ahead * inbox.mix(inbox.heard.x) - (ahead - 1) * s.before
        return s._replace(x=x.to(s.x.dtype), before=s.x, ratio=ratio)

    return Algorithm(
        init,
        lambda s: s.x,
        plain_step(opt, begun),
        lambda s: Params(s.x),
        receive,
        needs=Needs(graph="symmetric", static=True, every_message=True),
        factor=plain_factor(opt, begun),
        columnwise=True,
        keeps_mean=True,
    )
