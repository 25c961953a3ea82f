"""Robust methods which are more than a rule that takes the place of the mean."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor

from p2pfl.aggregation import b_hat, nnm
from p2pfl.algorithm import Algorithm, Inbox, Needs, Rows
from p2pfl.algorithms.averaging import LocalState, Params, dpsgd
from p2pfl.algorithms.steps import carry_model, plain_factor, plain_step
from p2pfl.learning.optim import Optimiser
from p2pfl.learning.tree import wide


class BalanceState(NamedTuple):
    """A model, its optimiser and how many exchanges it has been through."""

    x: Tensor
    opt: Any
    exchanges: Tensor


def balance(
    opt: Optimiser,
    rounds: int,
    gamma: float = 0.3,
    kappa: float = 1.0,
    alpha: float = 0.5,
) -> Algorithm[BalanceState, Params, Params]:
    """BALANCE: count who is as near as the own model is large, less and less (Fang et al. 2024).

    In exchange t it takes model j for good if
    ``|x_i - x_j| <= gamma exp(-kappa t / rounds) |x_i|``, and
    ``x_i <- alpha x_i + (1 - alpha) mean of those``; if there are none it stays. The mixing weights
    only say who was heard. Messages are ``4 d`` bytes (float32); takes the memory of all models
    heard. Trusts one's own model: without others like it a node learns alone.

    Args:
        rounds: how many exchanges there will be; in an experiment `pace.rounds` by default.
        gamma: how far apart models may be at first, as a share of the own one's norm.
        kappa: how much that shrinks: to ``exp(-kappa)`` of it.
        alpha: what the own model counts.
    """
    if rounds < 1:
        raise ValueError(f"rounds = {rounds} is below 1")
    if not 0 < gamma < math.inf or not 0 <= kappa < math.inf:
        raise ValueError(f"gamma = {gamma} must be above 0, and kappa = {kappa} at least 0")
    if not 0 <= alpha <= 1:
        raise ValueError(f"alpha = {alpha} is not in [0, 1]")

    def init(x: Tensor, rows: Rows) -> BalanceState:
        return BalanceState(x, opt.init(x), torch.zeros_like(x[:, :1], dtype=wide(x)))

    def receive(s: BalanceState, inbox: Inbox[Params]) -> BalanceState:
        models, mask = inbox.gather(inbox.heard.x)
        mine = inbox.mine(inbox.heard.x)
        own = mine.to(wide(mine))
        apart = models.to(own.dtype) - own.unsqueeze(1)
        near = gamma * torch.exp(-kappa * s.exchanges / rounds) * own.norm(dim=1, keepdim=True)
        far = apart.norm(dim=2)
        good = (mask & (far <= near)).unsqueeze(2)
        # The own model is among the good ones, at no distance.
        pull = torch.where(good, apart, 0.0).sum(1) / (good.sum(1) - 1).clamp(min=1)
        x = (own + (1 - alpha) * pull).to(mine.dtype)
        return s._replace(x=x, exchanges=s.exchanges + 1)

    def carry(before: BalanceState, trained: BalanceState, mixed: BalanceState) -> BalanceState:
        carried: BalanceState = carry_model(before, trained, mixed)
        return carried._replace(exchanges=mixed.exchanges)

    return Algorithm(
        init,
        lambda s: s.x,
        plain_step(opt),
        lambda s: Params(s.x),
        receive,
        needs=Needs(rule="balance"),
        factor=plain_factor(opt),
        carry=carry,
    )


def rpel(  # noqa: PLR0913 - a section: every parameter is a key of the file
    opt: Optimiser,
    nodes: int,
    attackers: int,
    s: int,
    rounds: int,
    failure: float = 0.01,
    seed: int = 0,
) -> Algorithm[LocalState, Params, Params]:
    """Robust pull-based epidemic learning (El Mrini, Farhadkhani and Guerraoui 2025, RPEL).

    `dpsgd` whose rows hear s others, drawn anew in every round
    (``topology = {name = "el_local", s = ..., pull = true}``), and take ``nnm`` and a trimmed mean
    with ``f = b_hat`` of the s + 1 models: how many attackers no honest node meets more of in any
    round, see `p2pfl.aggregation.b_hat`. Messages are ``4 d`` bytes (float32).

    Args:
        nodes: how many peers there are; in an experiment `nodes` by default.
        attackers: how many of them may attack.
        s: how many others each hears in a round.
        rounds: how many rounds that is to hold for; in an experiment `pace.rounds` by default.
        failure: the probability that it does not.
        seed: as of `dpsgd`.
    """
    f = b_hat(nodes, attackers, s, rounds, failure)
    if 2 * f >= s + 1:
        raise ValueError(
            f"a node that hears s = {s} of {nodes} nodes may meet {f} of the {attackers} attackers"
            f" in some round, which is not below half of s + 1 = {s + 1}: raise s, or reckon with"
            " fewer attackers"
        )
    needs = Needs(models=2 * f + 1, rule=f"rpel with b_hat = {f}")
    return dpsgd(opt, aggregate=nnm(f), seed=seed)._replace(needs=needs)
