"""UBAR: models are chosen by how near they are, and then by how good they are."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor

from p2pfl.algorithm import Algorithm, Inbox, Needs, Rows
from p2pfl.algorithms.averaging import Params
from p2pfl.algorithms.steps import carry_model, plain_factor, plain_step
from p2pfl.learning.checks import require
from p2pfl.learning.judging import Judge
from p2pfl.learning.optim import Optimiser
from p2pfl.learning.tree import wide

EXACT = 1e-9  # a share of a number of neighbours may be rounded down by so little


class UbarState(NamedTuple):
    """A model, its optimiser, whose it is, and its local steps."""

    x: Tensor
    opt: Any
    nodes: Tensor  # [rows]
    steps: Tensor  # [rows]


def ubar(
    opt: Optimiser, judge: Judge, rho: float = 0.4, alpha: float = 0.5
) -> Algorithm[UbarState, Params, Params]:
    """UBAR: of the nearest models, those that are no worse than one's own (Guo et al. 2020).

    Of the models of its k neighbours a node keeps the ``rho k`` nearest to its own, rounded down,
    and of those the ones whose loss, on the batch it trains on next, is not above that of its own;
    if there is none, the nearest. Then ``x <- alpha x + (1 - alpha) mean of those``. The paper
    takes the gradient before and adds its step after that; here the local steps come first, as with
    `dpsgd`. The mixing weights only say who was heard. Messages are ``4 d`` bytes (float32); takes
    the memory of all models heard, and the time of ``rho k + 1`` local steps more in every round.
    Trusts one's own model and data: where data are very unlike, honest models are worse, too.

    Args:
        judge: what tells losses, see `p2pfl.learning.judging`; in an experiment, the task does.
        rho: the share of the neighbours that is kept, in (0, 1]: at most the share that is honest.
        alpha: what the own model counts, in [0, 1].
    """
    require(0 < rho <= 1, "rho", rho, "in (0, 1]")
    require(0 <= alpha <= 1, "alpha", alpha, "in [0, 1]")

    def init(x: Tensor, rows: Rows) -> UbarState:
        return UbarState(x, opt.init(x), rows.nodes, torch.zeros_like(rows.nodes))

    def counted(s: UbarState) -> UbarState:
        return s._replace(steps=s.steps + 1)

    def receive(s: UbarState, inbox: Inbox[Params]) -> UbarState:
        models, others = inbox.gather(inbox.heard.x)[0], inbox.others()
        count = (others.sum(1) * rho + EXACT).long()
        most = int(count.max())
        if not most:
            return s
        mine = inbox.mine(inbox.heard.x)
        own = mine.to(wide(mine)).unsqueeze(1)
        far = (models.to(own.dtype) - own).norm(dim=2).masked_fill(~others, torch.inf)
        order = far.sort(dim=1, stable=True).indices[:, :most]
        near = models[torch.arange(len(models), device=order.device).unsqueeze(1), order]
        kept = torch.arange(most, device=order.device) < count.unsqueeze(1)
        losses = judge(torch.cat([mine.unsqueeze(1), near], 1), s.nodes, s.steps)
        good = kept & (losses[:, 1:] <= losses[:, :1])
        good[:, 0] |= ~good.any(1)
        pull = torch.where(good.unsqueeze(2), near.to(own.dtype) - own, 0.0).sum(1)
        pull = pull / good.sum(1, keepdim=True)
        x = torch.where(kept[:, :1], own[:, 0] + (1 - alpha) * pull, own[:, 0])
        return s._replace(x=x.to(mine.dtype))

    return Algorithm(
        init,
        lambda s: s.x,
        plain_step(opt, counted),
        lambda s: Params(s.x),
        receive,
        needs=Needs(models=math.ceil(1 / rho - EXACT) + 1, rule=f"ubar with rho = {rho}"),
        factor=plain_factor(opt, counted),
        carry=carry_model,
    )
