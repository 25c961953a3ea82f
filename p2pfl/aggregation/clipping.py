"""Rules which let every model pull only so far."""

from __future__ import annotations

import torch
from torch import Tensor

from p2pfl.aggregation.rule import Aggregation, Heard
from p2pfl.learning.checks import above_zero, at_least


def centred_clipping(tau: float, iterations: int = 1) -> Aggregation:
    """Move by the mean of all differences, each clipped to tau (Karimireddy et al. 2021).

    ``v <- v + mean(clip(x_j - v, tau))``, so often, from one's own model. Each attacker moves it by
    `tau` divided by the number of models at most, in every iteration.

    Args:
        tau: the longest difference that counts in full.
        iterations: how often.
    """
    above_zero("tau", tau)
    at_least("iterations", iterations, 1)

    def combine(heard: Heard) -> Tensor:
        shares = heard.mask.to(heard.weights.dtype) / heard.senders.unsqueeze(1)
        longest = torch.full_like(heard.own[:, :1], tau)
        point = heard.own
        for _ in range(iterations):
            point = point + _pull(heard, point, longest, shares)
        return point

    return Aggregation(combine, 1, f"centred_clipping with tau = {tau}")


def clipped_gossip(tau: float | None = None, f: int | None = None) -> Aggregation:
    """Mix differences from one's own model, each clipped to tau (He et al. 2022, ClippedGossip).

    ``x_i <- x_i + sum_j W_ij clip(x_j - x_i, tau_i)``. Attackers move it by tau times their mixing
    weights at most.

    Args:
        tau: the longest difference that counts in full; or
        f: clip at the distance of the neighbour that is (f + 1)-th furthest, which an attacker
            among f can only make shorter. Asks for more than f neighbours.
    """
    if (tau is None) == (f is None):
        raise ValueError("give either tau (a length) or f (a number of attackers)")
    if f is None:
        assert tau is not None
        above_zero("tau", tau)
    else:
        at_least("f", f, 0)
    fixed = tau or 0.0

    def combine(heard: Heard) -> Tensor:
        if f is None:
            longest = torch.full_like(heard.own[:, :1], fixed)
        else:
            far = (heard.models - heard.own.unsqueeze(1)).norm(dim=2)
            far = far.masked_fill(~heard.mask, -torch.inf)
            at = min(f, far.shape[1] - 1)
            longest = far.sort(dim=1, descending=True).values[:, at : at + 1].clamp(min=0)
        return heard.own + _pull(heard, heard.own, longest, heard.weights)

    if f is None:
        return Aggregation(combine, 1, f"clipped_gossip with tau = {tau}")
    return Aggregation(combine, f + 2, f"clipped_gossip with f = {f}")


def _pull(heard: Heard, point: Tensor, longest: Tensor, shares: Tensor) -> Tensor:
    """Return the sum of clipped differences from a point, ``[rows, d]``.

    Args:
        heard: the models.
        point: ``[rows, d]``.
        longest: what differences are clipped to, ``[rows, 1]``.
        shares: what each of them counts, ``[rows, k]``, 0 in the padding.
    """
    apart = (heard.models - point.unsqueeze(1)).masked_fill(~heard.mask.unsqueeze(2), 0.0)
    far = apart.norm(dim=2)
    scale = torch.where(far > longest, longest / far, 1.0)
    return ((shares * scale).unsqueeze(2) * apart).sum(1)
