"""Rules which treat every parameter by itself."""

from __future__ import annotations

import torch
from torch import Tensor

from p2pfl.aggregation.rule import Aggregation, Heard
from p2pfl.learning.checks import at_least


def mean() -> Aggregation:
    """Take the mean in proportion to the mixing weights; a single attacker moves it anywhere."""
    return Aggregation(_weighted, 1, "mean", columnwise=True, linear=True)


def median() -> Aggregation:
    """Take the median of each parameter (Yin et al. 2018, *Byzantine-robust distributed learning*).

    Of an even number the mean of the two in the middle. Withstands fewer attackers than half of
    the models, with ``kappa = 4 (1 + f / (n - 2 f))^2`` (Allouah et al. 2023). Ignores the mixing
    weights.
    """
    return Aggregation(middle, 3, "median", columnwise=True)


def trimmed_mean(f: int) -> Aggregation:
    """Leave out the f largest and f smallest of each parameter, and average (Yin et al. 2018).

    Withstands f attackers among more than 2 f models, with
    ``kappa = 6 f / (n - 2 f) (1 + f / (n - 2 f))`` (Allouah et al. 2023). Ignores the mixing
    weights.
    """
    at_least("f", f, 0)

    def combine(heard: Heard) -> Tensor:
        count = heard.senders[:, None, None]
        slots = torch.arange(heard.mask.shape[1], device=count.device)[None, :, None]
        kept = (slots >= f) & (slots < count - f)
        total = torch.where(kept, _ordered(heard), 0.0).sum(1)
        return total / (count[:, 0] - 2 * f).clamp(min=1)

    return Aggregation(combine, 2 * f + 1, f"trimmed_mean with f = {f}", columnwise=True)


def middle(heard: Heard) -> Tensor:
    """Return the median of each parameter, ``[rows, d]``."""
    ordered, count = _ordered(heard), heard.senders
    below, above = (_slot(ordered, at) for at in ((count - 1).clamp(min=0) // 2, count // 2))
    return (below + above) / 2


def _weighted(heard: Heard) -> Tensor:
    weights = heard.weights / heard.weights.sum(1, keepdim=True)
    return (weights.unsqueeze(1) @ without_padding(heard)).squeeze(1)


def _ordered(heard: Heard) -> Tensor:
    """Return each parameter in ascending order, the padding last."""
    return heard.models.masked_fill(~heard.mask.unsqueeze(2), torch.inf).sort(dim=1).values


def _slot(models: Tensor, at: Tensor) -> Tensor:
    """Return one model of every row, ``[rows, k, d], [rows] -> [rows, d]``."""
    return models[torch.arange(len(models), device=at.device), at.clamp(max=models.shape[1] - 1)]


def without_padding(heard: Heard) -> Tensor:
    """Return the models with zeros for padding."""
    return heard.models.masked_fill(~heard.mask.unsqueeze(2), 0.0)
