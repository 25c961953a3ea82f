"""Rules which compare whole models by their distances."""

from __future__ import annotations

import torch
from torch import Tensor

from p2pfl.aggregation.columns import middle
from p2pfl.aggregation.rule import Aggregation, Heard
from p2pfl.learning.checks import above_zero, at_least


def krum(f: int) -> Aggregation:
    """Take the one model whose neighbours are nearest (Blanchard et al. 2017, Krum).

    The score of a model is the sum of its squared distances to the ``n - f - 2`` models nearest
    to it. Withstands f attackers among at least ``2 f + 3`` models.
    """
    at_least("f", f, 0)
    return Aggregation(lambda heard: _best(heard, f, 1), 2 * f + 3, f"krum with f = {f}")


def multi_krum(f: int, m: int | None = None) -> Aggregation:
    """Average the m models of the best scores, as of `krum` (Blanchard et al. 2017, Multi-Krum).

    Args:
        f: how many attackers it withstands, among at least ``2 f + 3`` models.
        m: how many models are kept; by default, and at most, all but f.
    """
    at_least("f", f, 0)
    at_least("m", 1 if m is None else m, 1)
    return Aggregation(lambda heard: _best(heard, f, m), 2 * f + 3, f"multi_krum with f = {f}")


def nna(f: int) -> Aggregation:
    """Average the ``n - f`` models nearest to one's own (Farhadkhani et al. 2023, MoNNA).

    Withstands f attackers among more than 2 f models; trusts one's own model.
    """
    at_least("f", f, 0)

    def combine(heard: Heard) -> Tensor:
        far = (heard.models - heard.own.unsqueeze(1)).norm(dim=2)
        return mean_of(heard.models, lowest(far, heard.mask, heard.senders - f))

    return Aggregation(combine, 2 * f + 1, f"nna with f = {f}")


def geometric_median(
    tolerance: float = 1e-6, smoothing: float = 1e-6, iterations: int = 100
) -> Aggregation:
    """Take the point whose distances from all models have the least sum.

    By the steps of Weiszfeld (1937), as Vardi and Zhang (2000) mend them where a step comes upon
    a model: there the others pull against it, and the point stays if they are no stronger.

    Withstands fewer attackers than half of the models, with
    ``kappa = 4 (1 + f / (n - 2 f))^2`` (Pillutla et al. 2022; Allouah et al. 2023).

    Args:
        tolerance: stop when a step is shorter than this share of the models' usual distance, the
            median of those from the median of each parameter, where it begins.
        smoothing: a model nearer than this share of it counts as being where the point is.
        iterations: steps at most.
    """
    for name, value in (("tolerance", tolerance), ("smoothing", smoothing)):
        above_zero(name, value)
    at_least("iterations", iterations, 1)

    def combine(heard: Heard) -> Tensor:
        point = middle(heard)
        scale = middle(heard._replace(models=_from(heard, point).unsqueeze(2)))
        short = smoothing * scale
        going = scale[:, 0] > 0  # else more than half of the models are the same
        tiny = torch.finfo(point.dtype).tiny
        for _ in range(iterations):
            far = _from(heard, point)
            here = far <= short
            pull = torch.where(heard.mask & ~here, short / far, 0.0)
            total = pull.sum(1, keepdim=True).clamp(min=tiny)
            way = mean_of(heard.models, pull / total) - point
            # As strong as the unit vectors towards the others add up to; who is here holds back.
            strength = (way.norm(dim=1, keepdim=True) * total / short).clamp(min=tiny)
            held = (heard.mask & here).sum(1, keepdim=True) / strength
            # A row stops by itself: it must not depend on who else is in the block.
            step = torch.where(going.unsqueeze(1), (1 - held).clamp(min=0) * way, 0.0)
            point = point + step
            going = going & (step.norm(dim=1) > tolerance * scale[:, 0])
            if not bool(going.any()):
                break
        return point

    return Aggregation(combine, 3, "geometric_median")


def between(heard: Heard) -> Tensor:
    """Return the distances of each two models, ``[rows, k, k]``, infinite in the padding."""
    # Without products, whose rounding would depend on how many rows there are.
    how = "donot_use_mm_for_euclid_dist"
    far: Tensor = torch.cdist(heard.models, heard.models, compute_mode=how)
    both = heard.mask.unsqueeze(1) & heard.mask.unsqueeze(2)
    return far.masked_fill(~both, torch.inf)


def lowest(scores: Tensor, mask: Tensor, count: Tensor) -> Tensor:
    """Return equal shares for so many of the lowest scores in each row; ties go by the order.

    Args:
        scores: ``[..., k]``.
        mask: what of it counts, ``[..., k]``.
        count: how many, at least 1, ``[...]``.
    """
    # Padding last, also behind scores that are infinite.
    order = scores.masked_fill(~mask, torch.inf).sort(dim=-1, stable=True).indices
    order = order.gather(-1, (~mask.gather(-1, order)).int().sort(dim=-1, stable=True).indices)
    slots = torch.arange(scores.shape[-1], device=scores.device)
    count = count.clamp(min=1).unsqueeze(-1)
    shares = (slots < count).to(scores.dtype) / count
    return torch.zeros_like(scores).scatter(-1, order, shares)


def mean_of(models: Tensor, shares: Tensor) -> Tensor:
    """Return weighted sums of models, ``[rows, k, d], [rows, k] -> [rows, d]``.

    A model without a share takes no part, whatever it holds.
    """
    used = models.masked_fill((shares == 0).unsqueeze(2), 0.0)
    return (shares.unsqueeze(2) * used).sum(1)


def _best(heard: Heard, f: int, m: int | None) -> Tensor:
    slots = torch.arange(heard.mask.shape[1], device=heard.mask.device)
    others = (heard.senders - f - 2).clamp(min=0)[:, None, None]
    far = between(heard).square()
    far = far.diagonal_scatter(torch.full_like(heard.weights, torch.inf), dim1=1, dim2=2)
    near = far.sort(dim=2).values
    scores = torch.where(slots < others, near, 0.0).sum(2)
    kept = heard.senders - f
    kept = kept if m is None else kept.clamp(max=m)
    return mean_of(heard.models, lowest(scores, heard.mask, kept))


def _from(heard: Heard, point: Tensor) -> Tensor:
    """Return how far the models of each row are from a point, ``[rows, k]``."""
    far: Tensor = (heard.models - point.unsqueeze(1)).norm(dim=2)
    return far
